"""Goes through a compiled program as it would be executed: every instruction once, with how often its loops run it."""

import dataclasses
import re

from mila_jax.parallel.aot import collectives, kernels
from mila_jax.parallel.aot.chips import Chip
from mila_jax.parallel.aot.collectives import Collective
from mila_jax.parallel.aot.costs import FREE, Work, computation_work, matmul_work, operand_arrays, in_hbm, traffic, vector_work
from mila_jax.parallel.aot.hlo import Computation, Instruction, Module, trip_count

_NO_WORK = ("AllocateBuffer", "ConcatBitcast", "PrepareAsyncCallStart", "PrepareAsyncCallDone")
_CYCLES = re.compile(r'"window_config":\{.*?"estimated_cycles":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Row:
    """One executed instruction. times: executions a step; work, read, written (HBM bytes), cycles (the compiler's estimate, 0 if none)
    of one execution. kernel: which of our own kernels (`chips.OWN_KERNELS`), or part of another attention kernel, or "". prefetch: a copy
    between memories that runs beside other work."""

    name: str
    opcode: str
    times: int
    work: Work
    read: int
    written: int
    cycles: int
    collective: Collective | None
    kernel: str
    prefetch: bool
    copy: bool
    source: str
    op_name: str
    type: str


@dataclasses.dataclass(frozen=True)
class Walk:
    """rows, and the names of loops whose trip count is not known (counted once: any figure of such a program is too low)."""

    rows: list[Row]
    unknown_loops: list[str]


def _inner_collective(module: Module, name: str | None) -> tuple[Instruction, Computation] | None:
    for i in module.computations.get(name, {}).values():
        if collectives.kind_of(i.opcode):
            return i, module.computations[name]
        if i.opcode == "fusion":
            found = _inner_collective(module, i.called)
            if found:
                return found
    return None


class _Walker:
    def __init__(self, module: Module, chip: Chip, mesh: dict[str, int]):
        self.module, self.chip, self.mesh, self.memo = module, chip, mesh, {}
        self.rows, self.unknown = [], []

    def visit(self, name: str, times: int) -> None:
        """Adds the rows of a computation that runs `times` times."""
        computation = self.module.computations[name]
        for i in computation.values():
            if i.opcode == "while":
                count = trip_count(self.module, i)
                if count is None:
                    self.unknown.append(i.name)
                self.visit(i.attribute("body"), times * (1 if count is None else count))
            elif i.opcode == "call":
                self.visit(i.attribute("to_apply"), times)
            elif i.opcode == "conditional":  # every branch counts: which one runs is not known
                names = re.findall(r"(?:true_computation|false_computation)=%?([\w.\-<>]+)", i.attributes)
                listed = re.search(r"branch_computations=\{([^}]*)\}", i.attributes)
                for branch in names + (re.findall(r"%?([\w.\-<>]+)", listed[1]) if listed else []):
                    self.visit(branch, times)
            elif i.opcode not in FREE and not i.opcode.endswith("-done"):
                row = self.row(i, computation, times)
                if row is not None:
                    self.rows.append(row)

    def row(self, i: Instruction, computation: Computation, times: int) -> Row | None:
        module, unit = self.module, self.chip.matrix_unit
        target = kernels.custom_call_target(i)
        if target in _NO_WORK:
            return None
        work, kernel = Work(), ""
        read, written = traffic(module, i, computation)
        cycles = _CYCLES.search(i.attributes)
        prefetch = False
        copy = i.opcode in ("copy", "transpose") or (
            i.opcode == "fusion" and re.match(r"(copy|transpose|bitcast_copy|copy_bitcast)", i.name) is not None
        )
        collective = None
        if i.opcode == "recv":
            return None  # the other end of a send, at the same time
        if i.opcode == "send":
            collective = collectives.to_other_slices(i, computation, self.chip)
        elif collectives.kind_of(i.opcode):
            collective = collectives.describe(i, computation, self.mesh, self.chip, asynchronous=i.opcode.endswith("-start"))
        elif i.opcode == "fusion":
            work = computation_work(module, i.called, unit, self.memo)
            collective = self._fused(i, computation)
        elif i.opcode in ("dot", "convolution"):
            work = matmul_work(i, computation, unit)
        elif target == kernels.TARGET:
            work, kernel = kernels.kernel_work(i, computation, unit), kernels.own_kernel(i) or kernels.kernel_part(i, computation)
        elif i.opcode in ("async-start", "copy-start", "slice-start", "dynamic-slice-start"):
            inner = _inner_collective(module, i.called)
            if inner:
                collective = collectives.describe(*inner, self.mesh, self.chip, asynchronous=True)
            else:
                prefetch, (read, written) = True, self._copied(i, computation)
        else:
            work = Work(vector=vector_work(i, computation))
        if collective is not None and not work.flops:
            read = written = 0  # the network's time stands for it
            copy = False
        return Row(
            i.name, i.opcode, times, work, read, written, int(cycles[1]) if cycles else 0, collective, kernel, prefetch, copy,
            module.source(i), i.op_name, i.type[:160],
        )  # fmt: skip

    def _copied(self, i: Instruction, computation: Computation) -> tuple[int, int]:
        """Bytes (read, written) of an asynchronous copy: its result names the operand, the destination and bookkeeping."""
        sources = operand_arrays(i, computation)[:1]
        out = [a for a in i.out if a.dims]
        size = min((a.padded for a in out[:2]), default=0)
        destination = min(out[:2], key=lambda a: a.padded) if i.opcode != "copy-start" and len(out) > 1 else (out[0] if out else None)
        if i.opcode == "copy-start" and out:
            size = out[0].padded
        return (size if in_hbm(sources) else 0), (size if destination is not None and destination.space == 0 else 0)

    def _fused(self, i: Instruction, computation: Computation) -> Collective | None:
        """The collective that the compiler merged into a fusion: counted at its start, or where it is if it runs alone."""
        found = _inner_collective(self.module, i.called)
        if not found:
            return None
        inner, inside = found
        targets = {kernels.custom_call_target(x) for x in self.module.computations[i.called].values()}
        kind = collectives.kind_of(inner.opcode)
        # A collective in steps beside matmuls: fusions between its start and its end run on with it, named in one of two ways.
        steps = "async_collective_name" in inner.attributes or "async_collective_fusion_config" in inner.attributes
        if steps or any(t.startswith("AsyncCollective") for t in targets):
            if "AsyncCollectiveStart" not in targets:
                return None
            whole = max((a.padded for a in inner.out), default=0)
            size = len(collectives.groups(inner.attributes, 1)[0])
            sizes = (whole // size if kind == "all-gather" else whole, whole)
            return collectives.describe(inner, inside, self.mesh, self.chip, asynchronous=True, sizes=sizes)
        put_in, taken = sum(a.padded for a in operand_arrays(i, computation)), sum(a.padded for a in i.out)
        if kind == "all-reduce" and taken < put_in:
            kind = "reduce-scatter"
        return collectives.describe(inner, inside, self.mesh, self.chip, asynchronous=False, kind=kind, sizes=(put_in, taken))


def walk(module: Module, chip: Chip, mesh: dict[str, int]) -> Walk:
    """Rows of everything that one step executes on one device. mesh: axis → size, in the order of the device numbers."""
    walker = _Walker(module, chip, mesh)
    walker.visit(module.entry, 1)
    return Walk(walker.rows, walker.unknown)
