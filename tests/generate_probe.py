"""Run in a child process with eight host devices: whole videos under one mesh and mode after the other.

`python -m tests.generate_probe CASES.json OUT.npz`; cases: name → {"mesh": sizes, "mode": attention.parallel, "videos": made together}. The
model is small, with the motion prior, and all its parameters are random. Saves latents, and what streaming and resuming give.
"""

import dataclasses
import json
import os
import pathlib
import sys

import jax
import ml_collections
import numpy as np

from mila_jax.config import load_config
from mila_jax.generate import Generator
from mila_jax.model.precondition import SCALES, Prior
from mila_jax.model.weights import WorldModel, model_config
from mila_jax.start import Start
from mila_jax.model.stdit3_weights import abstract_model
from mila_jax.trajectory import manoeuvre
from mila_jax.views import VIEWS

DATA = {"latent_shape": [4, 8, 2], "image_size": [32, 64], "text_shape": [3, 6]}
FRAMES = 10  # one coarse window, two refining ones


def make_config() -> ml_collections.ConfigDict:
    """configs/tiny.py with a smaller network, text guidance and few steps."""
    config = load_config("configs/tiny.py")
    config.model.update(width=32, depth=2, heads=4, fourier_bands=2, sweep=2)
    config.window.update(frames=8, conditioning=2, anchor_stride=6)
    config.generate.update(steps=2, guidance_text=2.0)
    return config


def make_model(config, seed: int = 1) -> WorldModel:
    """A model of random parameters (also those that start at zero) and a plausible prior."""
    dit = model_config(config, DATA)
    graphdef, shapes = abstract_model(dit)
    r = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: (0.1 * r.normal(size=x.shape)).astype(np.float32), shapes)
    channels = DATA["latent_shape"][-1]
    prior = Prior(np.eye(channels, dtype=np.float32), np.full((len(VIEWS), channels, len(SCALES)), 1 / len(SCALES), np.float32))
    return WorldModel(config, dit, graphdef, params, prior, DATA, {}, "")


def with_smaller_guide(model: WorldModel) -> WorldModel:
    """The model with a guide of other sizes."""
    config = make_config()
    config.model.update(width=16, depth=1, heads=2)
    return dataclasses.replace(model, guide=make_model(config, seed=5))


def make_starts(count: int) -> list[Start]:
    """Different starts of cars that turn."""
    r = np.random.default_rng(2)
    length, width = DATA["text_shape"]
    turns = r.normal(size=(6, 4))
    rig = np.concatenate([r.normal(size=(6, 3)), turns / np.linalg.norm(turns, axis=-1, keepdims=True)], -1).astype(np.float32)
    return [
        Start(
            first_latents=r.normal(size=(6, 2, *DATA["latent_shape"])).astype(np.float32), intrinsics=np.full((6, 4), 0.5, np.float32), extrinsics=rig,
            trajectory=manoeuvre(name, 10.0), text=r.normal(size=(length, width)).astype(np.float32), text_mask=np.arange(length) < 2, description=name,
        )
        for name in ("left", "straight")[:count]
    ]  # fmt: skip


def main() -> None:
    # Kept between runs of the suite; compiling is nearly all of the time this takes.
    folder = os.environ.get("MILA_TEST_CACHE", pathlib.Path.home() / ".cache" / "mila_jax_tests")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    found = {}
    for name, case in json.loads(open(sys.argv[1]).read()).items():
        config = make_config()
        config.mesh.update(case["mesh"])
        config.attention.parallel = case["mode"]
        count = abs(int(np.prod(list(case["mesh"].values()))))
        devices = jax.devices()[:count] if -1 not in case["mesh"].values() else None
        model = make_model(config)
        if case.get("guide"):
            model = with_smaller_guide(model)
        generator = Generator(model, config, videos=case["videos"], devices=devices)
        starts = make_starts(case["videos"])
        video, _ = generator(starts, FRAMES, seed=3)
        job = generator.job(starts, FRAMES, seed=3)
        windows = list(generator.stream(job))
        resumed = list(generator.stream(job, windows[:2]))
        found |= {f"{name}/latents": video.latents, f"{name}/windows": np.stack(windows), f"{name}/resumed": np.stack(resumed)}
        found[f"{name}/devices"] = generator.layout.mesh.size
        split = [len({str(shard.index) for shard in x.addressable_shards}) for x in jax.tree.leaves(generator.model.params)]
        found[f"{name}/split"] = max(split)  # parts that the parameter that is split most lies in
    np.savez(sys.argv[2], **found)


if __name__ == "__main__":
    main()
