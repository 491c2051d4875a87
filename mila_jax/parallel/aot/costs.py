"""What one instruction costs: floating-point operations of its matmuls, bytes that it moves through HBM, elementary operations.

Traps that this file exists for: batched matmuls appear as convolutions whose window mostly falls on padding (only positions on
real data are counted); arrays are padded to tiles in memory; a slice of a large buffer moves the slice, an update in place
moves the update.
"""

import collections
import dataclasses
import math
import re

import numpy as np

from mila_jax.parallel.aot.hlo import Computation, Instruction, Module

FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id iota add-dependency opt-barrier async-done async-update".split()
)
ELEMENTARY = frozenset(
    "add subtract multiply divide maximum minimum select compare negate abs and or xor not convert clamp power sign floor ceil".split()
    + "shift-left shift-right-logical shift-right-arithmetic".split()
)
TRANSCENDENTAL = frozenset("exponential exponential-minus-one log log-plus-one tanh rsqrt sqrt logistic sine cosine erf cbrt divide power".split())


@dataclasses.dataclass(frozen=True)
class Work:
    """flops of matmuls; padded: the same with operands filled up to the matrix unit; vector: elementary element operations."""

    flops: float = 0.0
    padded: float = 0.0
    vector: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.padded + other.padded, self.vector + other.vector)


def _fill(size: int, to: int) -> int:
    return -(-size // to) * to


def _taps(size_in, size_kernel, size_out, stride, pad, lhs_dilate, rhs_dilate) -> int:
    """How many (output position, kernel position) pairs of one window dimension meet an element that is neither padding nor hole."""
    place = np.arange(size_out)[:, None] * stride + np.arange(size_kernel)[None] * rhs_dilate - pad
    return int(((place >= 0) & (place % lhs_dilate == 0) & (place // lhs_dilate < size_in)).sum())


def _matmul(batch, rows, columns, depth, unit) -> Work:
    """[batch] × rows × depth × columns; the unit wants depth and columns in whole multiples of its side, rows in eights."""
    filled = _fill(rows, 8) * _fill(columns, unit) * _fill(depth, unit)
    return Work(2.0 * batch * rows * columns * depth, 2.0 * batch * filled)


def matmul_work(i: Instruction, computation: Computation, unit: int = 128) -> Work:
    """Work of a `dot` or `convolution`; nothing for other opcodes or unreadable shapes. unit: side of the matrix unit."""
    sides = [computation.get(o) for o in i.operands[:2]]
    if i.opcode not in ("dot", "convolution") or len(sides) < 2 or None in sides:
        return Work()
    left, right, out = sides[0].out[0].dims, sides[1].out[0].dims, i.out[0].dims
    if i.opcode == "dot":

        def listed(key):
            found = re.search(rf"{key}=\{{([\d,]*)\}}", i.attributes)
            return [int(d) for d in found[1].split(",") if d] if found else []

        batch = math.prod(left[d] for d in listed("lhs_batch_dims"))
        depth = math.prod(left[d] for d in listed("lhs_contracting_dims"))
        rows = math.prod(left) // (batch * depth)
        return _matmul(batch, rows, math.prod(out) // (batch * rows), depth, unit)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    if not labels:
        return Work()
    ll, rl, ol = labels.groups()
    window = re.search(r"window=\{([^}]*)\}", i.attributes)
    options = dict(part.split("=") for part in window[1].split()) if window else {}
    spatial = sum(c.isdigit() for c in ll)

    def option(key, d, default):
        return options[key].split("x")[d] if key in options else default

    positions = 1
    for d in map(str, range(spatial)):
        n = int(d)
        positions *= _taps(
            left[ll.index(d)], right[rl.index(d)], out[ol.index(d)], int(option("stride", n, 1)), int(option("pad", n, "0_0").split("_")[0]),
            int(option("lhs_dilate", n, 1)), int(option("rhs_dilate", n, 1)),
        )  # fmt: skip
    return _matmul(positions, out[ol.index("b")], out[ol.index("f")], right[rl.index("i")], unit)


def computation_work(module: Module, name: str | None, unit: int, memo: dict) -> Work:
    """Work of everything inside a (fused) computation. A transcendental function counts as four elementary operations."""
    if name in memo:
        return memo[name]
    total = Work()
    computation = module.computations.get(name, {})
    for i in computation.values():
        if i.opcode in ("fusion", "call"):
            total += computation_work(module, i.called, unit, memo)
        elif i.opcode in ("convolution", "dot"):
            total += matmul_work(i, computation, unit)
        else:
            total += Work(vector=vector_work(i, computation))
    memo[name] = total
    return total


def vector_work(i: Instruction, computation: Computation) -> float:
    """Elementary element operations of one instruction."""
    if i.opcode == "reduce":
        source = computation.get(i.operands[0])
        return source.out[0].elements if source is not None and source.out else 0
    if i.opcode in TRANSCENDENTAL:
        return 4 * i.out[0].elements
    return i.out[0].elements if i.opcode in ELEMENTARY else 0


def in_hbm(arrays) -> int:
    """Padded bytes of those arrays that lie in HBM."""
    return sum(a.padded for a in arrays if a.space == 0)


def operand_arrays(i: Instruction, computation: Computation):
    """Arrays of the operands that are not constants."""
    return [a for o in i.operands if o in computation and computation[o].opcode != "constant" for a in computation[o].out]


def _parameters(computation: Computation) -> dict[int, Instruction]:
    return {int(i.literal): i for i in computation.values() if i.opcode == "parameter"}


def _through_bitcasts(i: Instruction | None, computation: Computation) -> Instruction | None:
    while i is not None and i.opcode == "bitcast" and i.operands:
        i = computation.get(i.operands[0])
    return i


def _passes_on(i: Instruction | None) -> bool:
    """Bookkeeping of a collective that runs inside a fusion: its buffers pass through and are counted with the collective."""
    return i is not None and (i.opcode.startswith(("all-", "collective-", "reduce-scatter")) or 'custom_call_target="AsyncCollective' in i.attributes)


def _read_of(module: Module, computation: Computation, name: str, whole: int, users: dict, depth: int = 0) -> int:
    """Bytes of a buffer of `whole` bytes that a fused computation reads: slices count as what they take."""
    total = 0
    for user in users.get(name, ()):
        if user.opcode == "tuple" or _passes_on(user):
            continue
        if user.opcode in ("dynamic-slice", "slice"):
            total += user.out[0].padded
        elif user.opcode == "bitcast" and depth < 6:
            total += _read_of(module, computation, user.name, whole, users, depth + 1)
        elif user.opcode == "fusion" and depth < 6:
            inner = module.computations.get(user.called, {})
            parameter = _parameters(inner).get(user.operands.index(name))
            total += _read_of(module, inner, parameter.name, whole, _users(inner), depth + 1) if parameter is not None else whole
        else:
            return whole
    return min(total, whole)


def _users(computation: Computation) -> dict[str, list[Instruction]]:
    users = collections.defaultdict(list)
    for i in computation.values():
        for operand in i.operands:
            users[operand].append(i)
    return users


def fusion_traffic(module: Module, i: Instruction, computation: Computation) -> tuple[int, int]:
    """HBM bytes (read, written) of a fusion."""
    inner = module.computations.get(i.called, {})
    users = _users(inner)
    root = _through_bitcasts(next((x for x in inner.values() if x.root), None), inner)
    roots = [] if root is None else [root]
    if root is not None and root.opcode == "tuple":
        roots = [_through_bitcasts(inner.get(o), inner) for o in root.operands]
    written, updated = 0, set()
    for array, source in zip(i.out, roots):
        if source is not None and source.opcode == "dynamic-update-slice":
            update = inner.get(source.operands[1])
            written += update.out[0].padded if array.space == 0 and update is not None and update.out else 0
            target = _through_bitcasts(inner.get(source.operands[0]), inner)
            if target is not None and target.opcode == "parameter":
                updated.add(target.name)
        elif source is not None and (source.opcode in ("parameter", "get-tuple-element") or _passes_on(source)):
            pass
        elif array.space == 0:
            written += array.padded
    read = 0
    for number, parameter in _parameters(inner).items():
        source = computation.get(i.operands[number]) if number < len(i.operands) else None
        out = source.out if source is not None else parameter.out
        if not out or out[0].space != 0:
            continue
        if parameter.name in updated and all(u.opcode in ("dynamic-update-slice", "bitcast") for u in users[parameter.name]):
            continue  # updated in place: what is not replaced is not touched
        read += _read_of(module, inner, parameter.name, out[0].padded, users)
    return read, written


def traffic(module: Module, i: Instruction, computation: Computation) -> tuple[int, int]:
    """HBM bytes (read, written) of any instruction that is executed."""
    if i.opcode in FREE:
        return 0, 0
    if i.opcode == "fusion":
        return fusion_traffic(module, i, computation)
    if i.opcode in ("dynamic-slice", "slice"):
        return (i.out[0].padded, in_hbm(i.out)) if in_hbm(operand_arrays(i, computation)[:1]) else (0, in_hbm(i.out))
    if i.opcode == "dynamic-update-slice":
        update = computation.get(i.operands[1])
        size = update.out[0].padded if update is not None and update.out else 0
        return (size if in_hbm(update.out) else 0, size if in_hbm(i.out) else 0) if size else (0, 0)
    return in_hbm(operand_arrays(i, computation)), in_hbm(i.out)
