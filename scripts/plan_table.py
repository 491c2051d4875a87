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
XL = "--config=configs/xl128.py"


def _mesh(data, fsdp, context=1, gather="step"):
    return [f"--config.mesh.data={data}", f"--config.mesh.fsdp={fsdp}", f"--config.mesh.context={context}", f"--config.mesh.gather={gather}"]


def _batch(samples, remat):
    return [f"--config.train.batch={samples}", f"--config.model.remat={remat}"]


_GUIDED = ["--step=sample", "--config.generate.guidance_text=7.0", "--config.generate.guidance_waypoints=7.0"]
# What is kept for the backward pass is the most that fits in nine tenths of the memory.
_MOST, _LEAST = "dots+attention", "block"
_V5P, _V5E, _V6E = "dots+attention:14:attention+results", "attention:3:block", "dots+attention:19:attention+results"
_PUBLISHED = ["--config=configs/xl.py", "--topology=v5p:4x4x4"]
_OBVIOUS = ["--config.attention.kernel=xla", *_mesh(1, 16, 4, "layer")]
LAYOUTS = {
    "obvious_v5p_64": ("as published, attention by XLA, all recomputed, 16 samples on 64 chips", [*_PUBLISHED, *_batch(16, _LEAST), *_OBVIOUS]),
    "xl_v5p_64": ("as published, splash kernel, 16 samples on 64 chips", [*_PUBLISHED, *_mesh(1, 16, 4), *_batch(16, _MOST)]),
    "xl_own_v5p_64": ("`configs/xl.py` as it is, 32 samples on 64 chips", _PUBLISHED),
    "v5p_64_context": ("16 samples on 64 chips", [XL, "--topology=v5p:4x4x4", *_batch(16, _MOST), *_mesh(1, 16, 4)]),
    "v5p_64": ("64 samples on 64 chips", [XL, "--topology=v5p:4x4x4", *_batch(64, _V5P), *_mesh(4, 16)]),
    "v5p_64_360": (
        "360×640, 16 samples on 64 chips",
        [XL, "--topology=v5p:4x4x4", *_batch(16, _MOST), *_mesh(1, 16, 4), "--config.data.image_size=(360,640)"],
    ),
    "v5e_16": ("16 samples on 16 chips", [XL, "--topology=v5e:4x4", *_batch(16, _V5E), *_mesh(1, 16, gather="layer")]),
    "v6e_64_context": ("16 samples on 64 chips", [XL, "--topology=v6e:8x8", *_batch(16, _V6E), *_mesh(1, 16, 4)]),
    "v6e_64_wide": ("wide preset, 16 samples on 64 chips", ["--config=configs/v6e.py", "--topology=v6e:8x8", *_batch(16, _MOST), *_mesh(1, 16, 4)]),
    "sample_v5p_4": ("one guided denoising step, one video", [XL, "--topology=v5p:2x2x1", *_GUIDED, *_mesh(1, 2, 2)]),
    "sample_v5e_8": ("one guided denoising step, one video", [XL, "--topology=v5e:2x4", *_GUIDED, *_mesh(1, 2, 4)]),
    "scaling_v5p_16": ("one sample a chip", [XL, "--topology=v5p:2x2x4", *_batch(16, _V5P), *_mesh(1, 16)]),
    "scaling_v5p_256": ("one sample a chip", [XL, "--topology=v5p:4x8x8", *_batch(256, _V5P), *_mesh(16, 16)]),
    "scaling_v5p_512": ("one sample a chip", [XL, "--topology=v5p:8x8x8", *_batch(512, _V5P), *_mesh(32, 16)]),
    "scaling_v5e_64": ("one sample a chip", [XL, "--topology=v5e:8x8", *_batch(64, _V5E), *_mesh(4, 16, gather="layer")]),
    "scaling_v5e_256": ("one sample a chip", [XL, "--topology=v5e:16x16", *_batch(256, _V5E), *_mesh(16, 16, gather="layer")]),
    "scaling_v5e_512": ("one sample a chip", [XL, "--topology=2xv5e:16x16", *_batch(512, _LEAST), *_mesh(32, 16, gather="layer")]),
}


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
