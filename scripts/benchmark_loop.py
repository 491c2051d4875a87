#!/usr/bin/env python3
"""What the training loop costs over the bare step: metrics, checkpoints, transfer guard, notices.

    .venv/bin/python scripts/benchmark_loop.py --data=DIR [--steps=100] [--repeats=3] [--config=configs/tiny.py]

Stretches of `steps` steps alternate: first the jitted step alone on the batches of the same loader, then `mila train` from its second step on,
which saves twice in that stretch (configs/tiny.py saves every 250 steps). Prints the medians and their ratio.
"""

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data", required=True, help="an encoded data set")
    parser.add_argument("--config", default="configs/tiny.py")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


def bare(config, steps: int) -> float:
    """Seconds a step of the jitted step and the loader alone, without the first."""
    import jax

    from mila_jax.train.trainer import Trainer

    trainer = Trainer(config)
    with jax.set_mesh(trainer.mesh):
        state, batches = trainer.initial_state(), trainer.batches(trainer.train_source, 0)
        state, _ = jax.block_until_ready(trainer.step(state, next(batches), trainer.key))
        began = time.perf_counter()
        for _ in range(steps - 1):
            state, _ = trainer.step(state, next(batches), trainer.key)
        jax.block_until_ready(state)
        return (time.perf_counter() - began) / (steps - 1)


def whole(config) -> float:
    """Seconds a step of `train`, saves included, without start-up and the first step."""
    from mila_jax.train.loop import train

    train(config, progress=False)
    start = json.loads((pathlib.Path(config.train.dir) / "goodput.jsonl").read_text().splitlines()[-1])
    return (start["wall"] - sum(start[kind] for kind in ("start", "compile", "restore"))) / (config.train.steps - 1)


def main() -> int:
    """Prints a line for each pair, then the medians."""
    options = arguments()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from mila_jax import runtime
    from mila_jax.config import load_config

    runtime.setup()
    config = load_config(options.config)
    config.data.dir, config.train.steps, config.train.eval_every = options.data, options.steps, 0
    config.train.checkpoint_every = options.steps // 2
    times = {"bare": [], "whole": []}
    for number in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            config.train.dir = folder
            times["bare"].append(bare(config, options.steps))
        with tempfile.TemporaryDirectory() as folder:
            config.train.dir = folder
            times["whole"].append(whole(config))
        print(f"{number + 1}: bare step {1e3 * times['bare'][-1]:.0f} ms, in the loop {1e3 * times['whole'][-1]:.0f} ms", flush=True)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratio = medians["whole"] / medians["bare"]
    print(json.dumps({"steps": options.steps, "repeats": options.repeats, "loop_over_bare_step": round(ratio, 4)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
