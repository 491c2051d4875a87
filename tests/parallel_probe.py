"""Run in a child process with eight host devices: the train step of a small model under one mesh and mode after the other.

`python -m tests.parallel_probe CASES.json OUT.npz`; cases: name → {"mesh": sizes, "mode": attention.parallel, "gather": mesh.gather (default
layer), "rules": mesh.rules (default none), "accumulate": parts of a batch (default 1), "detail": model.detail (default 0)}. The optimizer only records, so that the very step that is trained with returns every
gradient. Collectives are counted in its compiled program.
"""

import dataclasses
import json
import os
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from mila_jax.model.dit import DiTConfig
from mila_jax.model.network import make_velocity
from mila_jax.parallel.logical import rules_of, use_rules, with_rules
from mila_jax.parallel.mesh import batch_sharding, check_divides, make_mesh
from mila_jax.train.state import TrainState, abstract_model, create_state, state_shardings
from mila_jax.train.step import Objective, jit_train_step

CONFIG = DiTConfig(
    width=32, depth=2, heads=4, in_channels=2, out_channels=2, text_width=6, text_length=3, pred_sigma=False, fourier_bands=2, image_size=(32, 64),
    ray_rotary=True, unroll=1,
)  # fmt: skip
SIZES = dict(b=4, v=2, t=4, h=4, w=8)
OBJECTIVE = Objective("uniform", 0.5, "exponential", 0.5, 0.4, 0.7, 0.75, 0.3, 0.3, 0.99)
KINDS = ("all-to-all", "all-gather", "reduce-scatter", "all-reduce", "collective-permute")


def recorder() -> optax.GradientTransformation:
    """An optimizer that changes nothing and keeps the gradients as its state."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda grads, state, params=None: (jax.tree.map(jnp.zeros_like, grads), grads)
    )


def make_clip(sizes=None) -> dict:
    """Random clips, as `data_pipeline.clips` makes them."""
    r = np.random.default_rng(0)
    b, v, t, h, w = (sizes or SIZES).values()
    rotation = r.normal(size=(b, v, t, 4))
    extrinsics = np.concatenate([r.normal(size=(b, v, t, 3)), rotation / np.linalg.norm(rotation, axis=-1, keepdims=True)], -1)
    return dict(
        latents=r.normal(size=(b, v, t, h, w, 2)).astype(np.float32), text=r.normal(size=(b, 3, 6)).astype(np.float32),
        text_mask=np.arange(3) < np.array([[3], [2], [3], [1]])[:b], waypoints=r.normal(size=(b, t, 3)).astype(np.float32),
        intrinsics=np.full((b, v, t, 4), 1.5, np.float32), extrinsics=extrinsics.astype(np.float32),
        frame_times=np.tile(np.arange(t) / 12, (b, 1)).astype(np.float32), fps=np.full(b, 12.0, np.float32), conditioning=np.array([1, 2, 1, 2], np.int32)[:b],
    )  # fmt: skip


def random_parameters(config=CONFIG):
    """All parameters random (also those that start at zero, whose branches would be silent), on one device."""
    _, params = abstract_model(config)
    r = np.random.default_rng(1)
    return jax.tree.map(lambda x: (0.2 * r.normal(size=x.shape)).astype(np.float32), params)


def count_collectives(text: str) -> dict:
    """How many collectives of each kind a compiled program's text holds."""
    return {kind: len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in KINDS}


def run(case, config=CONFIG) -> dict:
    """Loss, velocity, gradients by parameter name, and collectives of one case."""
    count, config = int(np.prod(list(case["mesh"].values()))), dataclasses.replace(config, detail=case.get("detail", 0))
    mesh, rules = make_mesh(case["mesh"], jax.devices()[:count]), rules_of(case["mode"], case.get("rules", {}), case.get("gather", "layer"))
    graphdef, _ = abstract_model(config)
    with use_rules(**rules):
        check_divides(mesh, SIZES["b"], config.heads, config.width, SIZES["t"], SIZES["h"] * SIZES["w"] // 4)
        shardings, batches = state_shardings(mesh, config, recorder()), batch_sharding(mesh)
        with jax.set_mesh(mesh):
            state = create_state(mesh, config, recorder(), 0, random_parameters(config))
            clip = jax.device_put(make_clip(), batches)
    static = dict(graphdef=graphdef, config=config, prior=None)
    key = jax.random.key(3)
    with jax.set_mesh(mesh):
        step = jit_train_step(
            shardings, batches, rules=rules, objective=OBJECTIVE, tx=recorder(), accumulate=case.get("accumulate", 1), groups=mesh.shape["data"], **static
        ).lower(state, clip, key).compile()  # fmt: skip
        velocity = None
        if case.get("accumulate", 1) == 1:  # the velocity does not depend on it
            forward = jax.jit(
                with_rules(rules, lambda params, clip: _forward(graphdef, config, params, clip)), in_shardings=(shardings.params, batches)
            )
            velocity = np.asarray(forward(state.params, clip))
        state, metrics = step(state, clip, key)
    assert isinstance(state, TrainState)
    grads = {".".join(map(str, k)): np.asarray(v[...]) for k, v in nnx.to_flat_state(state.opt_state)}
    text = step.as_text()
    main = text[text.index("\nENTRY ") :]
    return dict(
        loss=float(metrics["loss"]), velocity=velocity, grads=grads, collectives=count_collectives(text), outside=count_collectives(main.split("\n}")[0]),
    )  # fmt: skip


def _forward(graphdef, config, params, clip):
    from mila_jax.model.conditions import from_clip

    levels = jnp.linspace(0.1, 0.9, SIZES["t"]) * jnp.ones((SIZES["b"], SIZES["v"], 1))
    return make_velocity(graphdef, params, config)(clip["latents"], levels, from_clip(clip))


def main() -> None:
    # Kept between runs of the suite; compiling is nearly all of the time this takes.
    folder = os.environ.get("MILA_TEST_CACHE", pathlib.Path.home() / ".cache" / "mila_jax_tests")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    cases = json.loads(open(sys.argv[1]).read())
    arrays, told = {}, {}
    for name, case in cases.items():
        result = run(case)
        told[name] = dict(loss=result["loss"], collectives=result["collectives"], outside=result["outside"])
        if result["velocity"] is not None:
            arrays[f"{name}/velocity"] = result["velocity"]
        arrays |= {f"{name}/grad/{k}": v for k, v in result["grads"].items()}
    np.savez(sys.argv[2], told=json.dumps(told), **arrays)


if __name__ == "__main__":
    main()
