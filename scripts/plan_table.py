#!/usr/bin/env python3
"""The README's table of modelled layouts, made from the results of `mila plan`.

  .venv/bin/python scripts/plan_table.py                 print the table of docs/plan/*.json
  .venv/bin/python scripts/plan_table.py --update        put it into README.md
  .venv/bin/python scripts/plan_table.py --run [NAME …]  plan the layouts of LAYOUTS anew (all, or those whose name contains NAME)
  … --run --full                                         with whole compilations (minutes each)
"""

import argparse
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "plan"
BEGIN, END = "<!-- plan table: scripts/plan_table.py -->", "<!-- end of plan table -->"

# name → (what it is, arguments of mila plan). Windows of 4 + 24 frames of six 256×448 views: 2,688 tokens a frame.
LAYOUTS = {}


def cells(result: dict, what: str) -> tuple:
    """A row of the table."""
    hbm, mfu = result["hbm"], result.get("mfu")
    mesh = " ".join(f"{axis} {size}" for axis, size in result["mesh"].items() if size > 1)
    memory = f"{hbm['peak_gib']:.1f} of {hbm['limit_gib']}" if "peak_gib" in hbm else "-"
    if mfu is None:
        return (what, result["topology"], mesh, memory, result["reason"][:60], "-", "-", result["mode"])
    return (
        what, result["topology"], mesh, memory, f"{mfu['pessimistic']:.2f} … {mfu['roofline']:.2f}", f"{mfu['roofline_without_collectives']:.2f}",
        f"{result['flops']['hlo_over_model']:.3f}", result["mode"],
    )  # fmt: skip


HEADER = ("layout", "slice", "mesh", "HBM GiB", "MFU, modelled", "without collectives", "FLOPs / model's", "mode")


def table(results: list[tuple[str, dict]]) -> str:
    """Markdown."""
    rows = [HEADER, ("---",) * len(HEADER), *(cells(result, what) for what, result in results)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def load() -> list[tuple[str, dict]]:
    """(what, result) of every file there is, in the order of LAYOUTS, others after them by name."""
    from mila_jax.parallel.aot.command import load_results

    files = {path.stem: path for path in sorted(RESULTS.glob("*.json"))}
    names = [name for name in LAYOUTS if name in files] + [name for name in files if name not in LAYOUTS]
    return [(LAYOUTS.get(name, (name,))[0], result) for name in names for result in load_results(files[name])]


def run(names: list[str], full: bool) -> int:
    """Plans the layouts; returns the number of those that failed."""
    failed = 0
    for name, (_, arguments) in LAYOUTS.items():
        if names and not any(n in name for n in names):
            continue
        print(f"── {name}", file=sys.stderr)
        command = [sys.executable, "-m", "mila_jax", "plan", *arguments, f"--json={RESULTS / name}.json", *(["--full"] if full else [])]
        failed += subprocess.run(command, cwd=ROOT).returncode != 0
    return failed


def main(argv=None) -> int:
    """Exit code 0, or 1 if a layout could not be planned."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--update", action="store_true")
    options = parser.parse_args(argv)
    if options.run:
        return 1 if run(options.names, options.full) else 0
    made = table(load())
    if not options.update:
        print(made)
        return 0
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        print(f"error: README.md has no lines {BEGIN} and {END}", file=sys.stderr)
        return 2
    readme.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
