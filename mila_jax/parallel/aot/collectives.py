"""Collectives of a compiled program: over which mesh axis they run, how many bytes they move, and a ring model of their time.

The compiler gives no time for them. The model is a bidirectional ring, over as many torus dimensions as a group of that size
is likely to span; it knows nothing of contention, latency or the actual placement.
"""

import dataclasses
import itertools
import math
import re

import numpy as np

from mila_jax.parallel.aot.chips import Chip
from mila_jax.parallel.aot.costs import operand_arrays
from mila_jax.parallel.aot.hlo import Computation, Instruction

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute", "collective-broadcast")


@dataclasses.dataclass(frozen=True)
class Collective:
    """kind; axis: mesh axes joined by "+" ("?" if the groups are no axes of the mesh); size of a group; bytes: the larger of what
    one device puts in and takes out; seconds by the ring model; asynchronous: the schedule lets other work run meanwhile."""

    kind: str
    axis: str
    size: int
    bytes: int
    seconds: float
    asynchronous: bool


def kind_of(opcode: str) -> str | None:
    """`all-gather-start` → `all-gather`; None for what is no collective."""
    for suffix in ("-start", "-done"):
        opcode = opcode.removesuffix(suffix)
    return opcode if opcode in KINDS else None


def _reorder(shape: str, transpose: str | None, count: int | None = None):
    ids = np.arange(math.prod(int(n) for n in shape.split(","))).reshape([int(n) for n in shape.split(",")])
    return ids.transpose([int(n) for n in transpose.split(",")]) if transpose else ids


def groups(attributes: str, devices: int) -> list[list[int]]:
    """Replica groups in any of the spellings of HLO; for a permutation its (source, target) pairs; all devices if nothing is said."""
    found = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}", attributes)
    if found:
        axes = [(name, int(size)) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])]
        ids = _reorder(found[2], found[3]) if found[2] else np.arange(math.prod(size for _, size in axes))
        ids = ids.reshape([size for _, size in axes])
        chosen = [[name for name, _ in axes].index(name) for name in re.findall(r"'(\w+)'", found[4])]
        rest = [k for k in range(len(axes)) if k not in chosen]
        return ids.transpose(rest + chosen).reshape(-1, math.prod(axes[k][1] for k in chosen)).tolist()
    found = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if found:
        return _reorder(found[2], found[3]).reshape([int(n) for n in found[1].split(",")]).tolist()
    found = re.search(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}", attributes)
    listed = [[int(n) for n in g.split(",") if n] for g in re.findall(r"\{([\d,]*)\}", found[1])] if found else []
    return listed or [list(range(devices))]


def axis_of(members: list[list[int]], mesh: dict[str, int], permutation: bool = False) -> str:
    """The mesh axes that groups of device numbers run over ("data+fsdp"), "?" if they are none. A permutation: the axes it moves along."""
    names, sizes = list(mesh), list(mesh.values())
    if permutation:
        places = [np.array(np.unravel_index(pair, sizes)) for pair in members]
        moved = [n for k, n in enumerate(names) if any(p[k, 0] != p[k, 1] for p in places)]
        return "+".join(moved) or "none"
    wanted = {frozenset(g) for g in members}
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    split = [k for k in range(len(sizes)) if sizes[k] > 1]
    for count in range(1, len(split) + 1):
        for chosen in itertools.combinations(split, count):
            rest = [k for k in range(len(sizes)) if k not in chosen]
            lines = ids.transpose(rest + list(chosen)).reshape(-1, math.prod(sizes[k] for k in chosen))
            if {frozenset(line) for line in lines.tolist()} == wanted:
                return "+".join(names[k] for k in chosen)
    return "none" if all(len(g) == 1 for g in members) else "?"


def ring_seconds(kind: str, bytes_in: int, bytes_out: int, size: int, chip: Chip) -> float:
    """Bandwidth time of a collective over groups of `size` devices on bidirectional rings."""
    if size <= 1:
        return 0.0
    dims = min(chip.torus, max(1, round(math.log(size, 4)))) if size > 4 else 1
    bandwidth, share = 2 * chip.link * dims, (size - 1) / size
    if kind == "all-gather":
        return bytes_out * share / bandwidth
    if kind == "reduce-scatter":
        return bytes_in * share / bandwidth
    if kind == "all-reduce":
        return 2 * bytes_out * share / bandwidth
    if kind in ("all-to-all", "ragged-all-to-all"):
        # On a ring of n each byte travels n/4 links on average, with two directions to choose from.
        return bytes_in * size ** (1 / dims) / (8 * chip.link)
    return bytes_out / chip.link


def to_other_slices(i: Instruction, computation: Computation, chip: Chip) -> Collective:
    """`Collective` of a `send`: of collectives over several slices the compiler makes ones within a slice, and sends between slices."""
    size = sum(a.padded for a in operand_arrays(i, computation)[:1])
    return Collective("send", "slices", 2, size, size / chip.network, True)


def describe(i: Instruction, computation: Computation, mesh: dict[str, int], chip: Chip, *, asynchronous: bool, kind=None, sizes=None) -> Collective:
    """`Collective` of an instruction. sizes: (bytes in, bytes out) where its own operands do not show them."""
    kind = kind or kind_of(i.opcode)
    permutation = kind == "collective-permute"
    members = groups(i.attributes, math.prod(mesh.values()))
    size = 2 if permutation else len(members[0])
    if sizes is None:
        put_in = sum(a.padded for a in operand_arrays(i, computation))
        taken = sum(a.padded for a in i.out)
        if i.opcode.endswith("-start"):  # the result holds the operands, the results and bookkeeping
            taken = put_in if kind != "all-gather" else max(taken - put_in, put_in)
        sizes = put_in, taken
    return Collective(kind, axis_of(members, mesh, permutation), size, max(sizes), ring_seconds(kind, *sizes, size, chip), asynchronous)
