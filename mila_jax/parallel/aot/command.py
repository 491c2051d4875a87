"""The command `mila plan`."""

import json
import os
import pathlib
import sys

import jax

from mila_jax.errors import UserError
from mila_jax.parallel.aot.chips import parse_topology
from mila_jax.parallel.aot.compiler import require_compiler
from mila_jax.parallel.aot.layout import to_json
from mila_jax.parallel.aot.sizes import plan_sizes, with_guide_sizes
from mila_jax.parallel.aot.sweep import changed, parse_sweep, plan_all, recommend
from mila_jax.parallel.aot.terminal import assumptions, details, label, overview
from mila_jax.parallel.mesh import axis_sizes
from mila_jax.parallel.table import format_table, sharding_table


def _write(path: str, text: str) -> None:
    partial = pathlib.Path(f"{path}.partial")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); choose another file") from None


def plan_command(options, overrides: list[str]) -> int:
    """Runs `mila plan`; returns 0 if a layout fits, 1 if none does. Raises `UserError` for mistakes and a missing compiler."""
    # Only shapes are computed here: an accelerator of this machine, which another job may hold, is left alone.
    jax.config.update("jax_platforms", "cpu")
    topologies = [parse_topology(name) for name in options.topology]
    layouts = parse_sweep(options.sweep)
    if options.table:
        for topology in topologies:
            for changes in layouts:
                config = changed(options.config, overrides, changes)
                sizes = axis_sizes(config.mesh, topology.devices)
                print(format_table(sharding_table(config, sizes), sizes))
        return 0
    if len(topologies) * len(layouts) == 1:  # a mistake in the sizes is said even where nothing can be compiled
        plan_sizes(with_guide_sizes(changed(options.config, overrides, layouts[0]), options.step), topologies[0].devices, options.step)
    require_compiler()

    def report(result):
        if not options.quiet:
            print(f"{result['topology']} {label(result)}: {result['status']} ({result.get('compile', {}).get('seconds', 0):.0f} s)", file=sys.stderr)

    results = plan_all(
        options.config, overrides, topologies, options.step, layouts, report=report, full=options.full, use_cache=not options.no_cache,
        limit=60 * options.minutes,
    )  # fmt: skip
    best = recommend(results)
    for result in results if len(results) == 1 else [best] if best else []:
        print(details(result) + "\n")
    if len(results) > 1:
        print(overview(results))
        print(f"recommended: {best['topology']} {label(best)}" if best else "no layout fits in 90 % of HBM")
    if any("assumptions" in r for r in results):
        print(assumptions(results))
    if options.json:
        _write(options.json, to_json(results))
    if options.html:
        from mila_jax.parallel.aot.page import write_page

        print(write_page(options.html, results, best))
    return 0 if any(r["status"] == "planned" and r["hbm"].get("fits", True) for r in results) else 1


def load_results(path) -> list[dict]:
    """The results of a JSON file of `mila plan`, always as a list. Raises `UserError` if it is none."""
    try:
        value = json.loads(pathlib.Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a JSON file of mila plan ({error}); write one with mila plan --json={path}") from None
    results = value if isinstance(value, list) else [value]
    if not all(isinstance(r, dict) and "topology" in r for r in results):
        raise UserError(f"{path} is not a JSON file of mila plan; write one with mila plan --json={path}")
    return results
