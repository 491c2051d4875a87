#!/usr/bin/env python3
"""Compile time and memory of generation, 10 s beside 60 s: what must not grow with the length.

    .venv/bin/python scripts/benchmark_rollout.py [--seconds 10 60] [--steps=2] [--weights=FILE] [--skip-stream]

Each figure comes from a process of its own, without the cache of compiled programs. "one call" makes the video in one call of the program, so
that its output (latents) grows with the length; "a window a call" is what `mila generate` runs. "streamed" is that command itself, from
images to mp4, with the peak of its resident memory. Ends with exit code 1 if a peak that must not grow differs by more than 2 %.
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
ALLOWED = 0.02
MIB = 2**20


def arguments():
    """The command line; `--child` is what the script calls itself with."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--seconds", type=float, nargs=2, default=(10.0, 60.0))
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--weights", default="", help="a trained model; default the shipped one")
    parser.add_argument("--skip-stream", action="store_true", help="compile only")
    parser.add_argument("--child", choices=("one call", "a window a call", "streamed"), help=argparse.SUPPRESS)
    return parser.parse_args()


def settings(options):
    """The config."""
    from mila_jax.config import load_config

    config = load_config("configs/tiny.py", [f"--config.generate.steps={options.steps}"])
    config.generate.weights = options.weights or None
    return config


def compiled(options) -> dict:
    """Seconds and MiB of the program for a video of `options.seconds[0]`, in one call or a window a call."""
    import numpy as np

    from mila_jax import runtime
    from mila_jax.choose_model import load_chosen
    from mila_jax.generate import Generator, window_settings
    from mila_jax.start import FRAME_RATE, Start
    from mila_jax.trajectory import manoeuvre

    runtime.setup()
    config = settings(options)
    model = load_chosen(config)
    config = window_settings(model, config)
    seconds = options.seconds[0]
    text = np.zeros(model.data["text_shape"], np.float32)
    start = Start(
        first_latents=np.zeros((6, config.window.conditioning, *model.data["latent_shape"]), np.float32), intrinsics=np.ones((6, 4), np.float32),
        extrinsics=np.ones((6, 7), np.float32), trajectory=manoeuvre("straight", seconds + 10), text=text, text_mask=text[:, 0] == 0, description="",
    )  # fmt: skip
    generator = Generator(model, config)
    job = generator.job([start], round(seconds * FRAME_RATE))
    lowered = generator.lower(job, windows=None if options.child == "one call" else 1)
    began = time.perf_counter()
    memory = lowered.compile().memory_analysis()
    seconds = time.perf_counter() - began
    sizes = {"temporaries": memory.temp_size_in_bytes, "arguments": memory.argument_size_in_bytes, "outputs": memory.output_size_in_bytes}
    sizes["peak"] = sum(sizes.values()) - memory.alias_size_in_bytes
    return {"windows": job.windows, "compile_s": round(seconds, 1)} | {f"{name}_mib": round(size / MIB, 2) for name, size in sizes.items()}


def streamed(options) -> dict:
    """Seconds, and the peak of resident memory in MiB, of `mila generate` from a folder of images."""
    import numpy as np
    from PIL import Image

    from mila_jax import cli
    from mila_jax.views import VIEWS

    with tempfile.TemporaryDirectory() as folder:
        noise = np.random.default_rng(0).integers(0, 255, (len(VIEWS), 64, 112, 3)).astype(np.uint8)
        for view, picture in zip(VIEWS, noise):
            Image.fromarray(picture).save(pathlib.Path(folder) / f"{view}.png")
        command = ["generate", f"--frames={folder}", "--waypoints=straight", f"--seconds={options.seconds[0]}", f"--out={folder}/out", "--quiet"]
        command += [f"--config.generate.steps={options.steps}", *([f"--config.generate.weights={options.weights}"] if options.weights else [])]
        began = time.perf_counter()
        if cli.main(command):
            sys.exit(1)
        seconds = time.perf_counter() - began
    return {"seconds": round(seconds, 1), "peak_resident_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)}


def in_child(kind: str, seconds: float, options) -> dict:
    """What a process of its own finds."""
    command = [
        sys.executable,
        __file__,
        "--child",
        kind,
        "--seconds",
        str(seconds),
        str(seconds),
        f"--steps={options.steps}",
        f"--weights={options.weights}",
    ]
    run = subprocess.run(command, capture_output=True, text=True, env={"JAX_PLATFORMS": "cpu"} | os.environ | {"MILA_CACHE": ""})
    if run.returncode:
        sys.exit(f"{kind}, {seconds:g} s: {run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def main() -> int:
    """Prints both lengths of each way, and the ratios of what must not grow."""
    options = arguments()
    if options.child:
        print(json.dumps((streamed if options.child == "streamed" else compiled)(options)))
        return 0
    constant = {"one call": "temporaries_mib", "a window a call": "peak_mib"}
    shown = {} if options.skip_stream else {"streamed": "peak_resident_mib"}
    grown = False
    for kind, key in (constant | shown).items():
        found = [in_child(kind, seconds, options) for seconds in options.seconds]
        for seconds, figures in zip(options.seconds, found):
            print(f"{kind}, {seconds:g} s: {json.dumps(figures)}", flush=True)
        ratio = found[1][key] / found[0][key]
        times = f", compile time {found[1]['compile_s'] / found[0]['compile_s']:.2f}" if "compile_s" in found[0] else ""
        print(f"{kind}, {options.seconds[1]:g} s over {options.seconds[0]:g} s: {key.removesuffix('_mib')} {ratio:.4f}{times}", flush=True)
        grown |= kind in constant and abs(ratio - 1) > ALLOWED
    return int(grown)


if __name__ == "__main__":
    sys.exit(main())
