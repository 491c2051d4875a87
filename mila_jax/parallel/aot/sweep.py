"""Many layouts: the cross product of a few settings, ranked, with one recommendation."""

import itertools

from mila_jax.config import load_config, plain
from mila_jax.errors import UserError
from mila_jax.parallel.aot.chips import Topology
from mila_jax.parallel.aot.layout import comfortable, plan_layout, skipped


def _split(text: str, separator: str) -> list[str]:
    """Parts at `separator` outside brackets."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "([") - (c in ")]")
        if c == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [p.strip() for p in parts if p.strip()]


def parse_sweep(text: str | None) -> list[dict[str, str]]:
    """`"mesh.context=1,4;model.remat=none,block"` → one dict of changes for each of the four layouts; nothing → one without changes.

    Raises `UserError` for a part that is not KEY=VALUE,VALUE.
    """
    axes = []
    for part in _split(text or "", ";"):
        key, sign, values = part.partition("=")
        listed = _split(values, ",")
        if not sign or not key.strip() or not listed:
            raise UserError(f"--sweep: {part!r} is not KEY=VALUE,VALUE; example: --sweep 'mesh.context=1,4;model.remat=none,block'")
        axes.append([(key.strip().removeprefix("config."), value) for value in listed])
    return [dict(choice) for choice in itertools.product(*axes)]


def changed(file: str, overrides: list[str], changes: dict[str, str]):
    """The config of `file` with the command line's overrides and a layout's changes on top; `UserError` for unknown keys and wrong types."""
    # A tuple given twice would be appended to itself, so what a layout changes replaces what the command line says.
    kept = [o for o in overrides if o.partition("=")[0].removeprefix("--config.") not in changes]
    return load_config(file, [*kept, *(f"--config.{key}={value}" for key, value in changes.items())])


def plan_all(file: str, overrides: list[str], topologies: list[Topology], step: str, layouts: list[dict], *, report=None, **options) -> list[dict]:
    """Results of every layout on every topology, in order. report: called with each result as it comes.

    A layout of a sweep that cannot work is "skipped" with its reason; the only one raises its `UserError`.
    """
    several = len(topologies) * len(layouts) > 1
    results = []
    for topology, changes in itertools.product(topologies, layouts):
        config = changed(file, overrides, changes)  # a wrong key is a mistake in the command, not in the layout
        written = {key: plain(value) for key, value in changes.items()}
        try:
            result = plan_layout(config, topology, step, name=file, changes=written, **options)
        except UserError as error:
            if not several:
                raise
            result = skipped(topology, step, written, error)
        results.append(result)
        if report is not None:
            report(result)
    return results


def order(result: dict) -> tuple:
    """Sorting key, best first: fits with room, then the better pessimistic, then the better roofline utilisation."""
    mfu = result.get("mfu", {})
    return not comfortable(result), -mfu.get("pessimistic", 0.0), -mfu.get("roofline", 0.0)


def recommend(results: list[dict]) -> dict | None:
    """The best layout that fits in 90 % of HBM, None if none does."""
    fitting = sorted((r for r in results if comfortable(r)), key=order)
    return fitting[0] if fitting else None
