"""Which parameters a run trains (`train.trainable`), and the table of them that is printed at its start.

A pattern is a parameter's dotted name in which `*` stands for anything (`conditions.*`, `pairs.spatial.attn.*`). Blocks are stacked, so that
`pairs[-1].*` means the last pair of each stacked array, `pairs[0:2].*` the first two. What no pattern names is frozen: it gets no gradient
and no memory in the optimizer. The stages' patterns are in configs/stages.py.
"""

import dataclasses
import fnmatch
import math
import re

import jax
from flax import nnx

from mila_jax.errors import UserError

_ROWS = re.compile(r"pairs\[(-?\d*)(:?)(-?\d*)\]")


@dataclasses.dataclass(frozen=True)
class Part:
    """One trained parameter: its path; start and stop: the rows of a stacked array, None for all of it."""

    path: tuple
    start: int | None = None
    stop: int | None = None


@dataclasses.dataclass(frozen=True)
class Trainable:
    """The trained part of a parameter tree; hashable, so static under jit. `everything`: nothing is frozen."""

    parts: tuple[Part, ...]
    everything: bool

    def select(self, params: nnx.State) -> nnx.State:
        """The trained parameters alone, rows cut out of stacked arrays."""
        if self.everything:
            return params
        flat = dict(nnx.to_flat_state(params))
        return nnx.from_flat_state({p.path: flat[p.path] if p.start is None else _rows(flat[p.path], p) for p in self.parts})

    def merge(self, params: nnx.State, selected: nnx.State) -> nnx.State:
        """`params` with its trained part replaced by `selected`."""
        if self.everything:
            return selected
        flat, new = dict(nnx.to_flat_state(params)), dict(nnx.to_flat_state(selected))
        for part in self.parts:
            value = new[part.path]
            if part.start is not None:
                whole = flat[part.path]
                value = whole.replace(whole[...].at[part.start : part.stop].set(value[...]))
            flat[part.path] = value
        return nnx.from_flat_state(flat)


def _rows(variable, part: Part):
    value = variable[...]
    if isinstance(value, jax.ShapeDtypeStruct):
        return variable.replace(jax.ShapeDtypeStruct((part.stop - part.start, *value.shape[1:]), value.dtype))
    return variable.replace(value[part.start : part.stop])


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern.replace("[", "[[]"))  # brackets stand for themselves


def resolve(params: nnx.State, patterns, depth: int) -> Trainable:
    """The parameters that `patterns` name, in a tree of `depth` stacked pairs (arrays or shapes).

    Raises `UserError` for a pattern that names nothing, and for rows that the stack does not have or that do not form one run.
    """
    names = {".".join(map(str, path)): path for path, _ in nnx.to_flat_state(params)}
    chosen: dict[tuple, set[int] | None] = {}
    for pattern in patterns:
        found = _ROWS.match(pattern)
        rows, plain = None, pattern
        if found:
            rows = _row_numbers(found, depth, pattern)
            plain = "pairs" + pattern[found.end() :]
        hits = [path for name, path in names.items() if _matches(name, plain)]
        if not hits:
            raise UserError(f"train.trainable: {pattern!r} names no parameter; names are such as {', '.join(sorted(names)[::12])}")
        for path in hits:
            before = chosen.get(path, set())
            chosen[path] = None if rows is None or before is None else before | rows
    parts = []
    for path in (p for p, _ in nnx.to_flat_state(params) if p in chosen):
        rows = chosen[path]
        if rows is None or len(rows) == depth:
            parts.append(Part(path))
        elif max(rows) - min(rows) + 1 != len(rows):
            raise UserError(f"train.trainable: pairs {sorted(rows)} of {'.'.join(map(str, path))} are not one run of neighbours; name one run")
        else:
            parts.append(Part(path, min(rows), max(rows) + 1))
    return Trainable(tuple(parts), len(parts) == len(names) and all(p.start is None for p in parts))


def _row_numbers(found: re.Match, depth: int, pattern: str) -> set[int]:
    first, colon, last = found.groups()
    try:
        rows = set(range(depth)[slice(int(first) if first else None, int(last) if last else None)]) if colon else {range(depth)[int(first)]}
    except (ValueError, IndexError):
        rows = set()
    if not rows:
        raise UserError(f"train.trainable: {pattern!r} names no pair of the {depth} there are")
    return rows


def describe(params: nnx.State, trainable: Trainable) -> str:
    """The table: each group of parameters with how many of its numbers are trained, and the sums."""
    parts = {p.path: p for p in trainable.parts}
    groups: dict[str, list[int]] = {}
    for path, variable in nnx.to_flat_state(params):
        group = ".".join(map(str, path[: 3 if path[0] == "pairs" else 2 if path[0] == "conditions" else 1]))
        size, part = math.prod(variable.shape), parts.get(path)
        share = 0 if part is None else size if part.start is None else size // variable.shape[0] * (part.stop - part.start)
        trained, whole = groups.get(group, [0, 0])
        groups[group] = [trained + share, whole + size]
    rows = [("parameters", "trained", "of")]
    rows += [(name, f"{trained:,}" if trained else "frozen", f"{whole:,}") for name, (trained, whole) in groups.items()]
    rows.append(("all", f"{sum(t for t, _ in groups.values()):,}", f"{sum(w for _, w in groups.values()):,}"))
    widths = [max(len(r[i]) for r in rows) for i in range(3)]
    return "\n".join(f"{r[0]:{widths[0]}}  {r[1]:>{widths[1]}}  {r[2]:>{widths[2]}}" for r in rows)
