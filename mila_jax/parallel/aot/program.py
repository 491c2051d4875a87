"""The jitted step and its abstract arguments: shapes with shardings on a mesh of devices that need not exist.

Both steps are the ones that run: `train.step.jit_train_step` and the window sampler with the velocity of `generate`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from mila_jax.flow.sampler import sample_window
from mila_jax.model.conditions import Conditions
from mila_jax.model.dit import DiTConfig
from mila_jax.model.precondition import SCALES, Prior
from mila_jax.model.stdit3_weights import abstract_model
from mila_jax.parallel.aot.sizes import Sizes
from mila_jax.parallel.compiler_options import options_of
from mila_jax.parallel.logical import rules_from_config, spec, use_rules, with_rules
from mila_jax.parallel.mesh import batch_sharding, replicated
from mila_jax.rollout_program import Layout, Network, Parameters, evaluations, generation_rules, generation_velocity
from mila_jax.train.optimizer import make_optimizer
from mila_jax.train.stages import resolve
from mila_jax.train.state import abstract_state, state_shardings
from mila_jax.train.step import Objective, jit_train_step
from mila_jax.views import VIEWS


class Program(NamedTuple):
    """`function.lower(*arguments)` inside `jax.set_mesh(mesh)` is the step of this layout."""

    function: object
    arguments: tuple
    mesh: Mesh


def _shaped(shapes, shardings):
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings)


def _key(mesh):
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(mesh))


def _prior(dit: DiTConfig, sizes: Sizes) -> Prior | None:
    """A prior of the preconditioning, if a network of these sizes has any: its values change no shape, so any will do."""
    if dit.in_channels == dit.out_channels:
        return None
    channels = sizes.data["latent_shape"][-1]
    return Prior(np.eye(channels, dtype=np.float32), np.full((len(VIEWS), channels, len(SCALES)), 1 / len(SCALES), np.float32))


def abstract_clip(sizes: Sizes, sharding, foreground: bool = False) -> dict:
    """A batch of `data_pipeline.clips` as shapes; see `ClipSource.__getitem__`. foreground: with the places of vehicles."""
    b, v, t = sizes.batch, len(VIEWS), sizes.frames
    length, width = sizes.data["text_shape"]
    shapes = {
        "latents": (v, t, *sizes.data["latent_shape"]), "intrinsics": (v, t, 4), "extrinsics": (v, t, 7), "waypoints": (t, 3), "frame_times": (t,),
        "fps": (), "conditioning": (), "text": (length, width), "text_mask": (length,),
    }  # fmt: skip
    if foreground:
        shapes["foreground"] = (v, t, *sizes.data["latent_shape"][:2])
    types = {"latents": jnp.float16, "conditioning": jnp.int32, "text_mask": jnp.bool_, "foreground": jnp.uint8}
    return {name: jax.ShapeDtypeStruct((b, *shape), types.get(name, jnp.float32), sharding=sharding) for name, shape in shapes.items()}


def train_program(config, sizes: Sizes, mesh: Mesh) -> Program:
    """The training step with a donated abstract state."""
    tx = make_optimizer(config.train)
    graphdef, params = abstract_model(sizes.dit)
    trainable = resolve(params, config.train.get("trainable", ("*",)), sizes.dit.depth)
    shardings = state_shardings(mesh, sizes.dit, tx, trainable)
    objective = Objective.from_config(config)
    step = jit_train_step(
        shardings, batch_sharding(mesh), rules=rules_from_config(config), graphdef=graphdef, config=sizes.dit, prior=_prior(sizes.dit, sizes),
        objective=objective, tx=tx, trainable=trainable, accumulate=config.train.get("accumulate", 1), groups=mesh.shape["data"],
    )  # fmt: skip
    clip = abstract_clip(sizes, batch_sharding(mesh), objective.foreground_weight > 0)
    return Program(step, (_shaped(abstract_state(sizes.dit, tx, trainable), shardings), clip, _key(mesh)), mesh)


def _network(sizes: Sizes) -> tuple[Network, Parameters]:
    """The network of `sizes`, with its guide if there is one, and their abstract parameters."""
    graphdef, params = abstract_model(sizes.dit)
    prior = _prior(sizes.dit, sizes)
    if sizes.guide is None:
        return Network(graphdef, sizes.dit, prior), Parameters(params)
    guide, weaker = _network(sizes.of_guide)
    return Network(graphdef, sizes.dit, prior, guide), Parameters(params, weaker.model)


def sample_program(config, sizes: Sizes, mesh: Mesh, layout: Layout) -> Program:
    """One denoising step of a window, guidance included, laid out as generation does; the window is donated."""
    network, params = _network(sizes)
    b, v, t = sizes.batch, len(VIEWS), sizes.frames
    rows = layout.batch
    window = jax.ShapeDtypeStruct((b, v, t, *sizes.data["latent_shape"]), jnp.float32, sharding=NamedSharding(mesh, spec(rows, None, "frames")))
    schedule = jax.ShapeDtypeStruct((2, t), jnp.float32, sharding=replicated(mesh))
    clip = abstract_clip(sizes, NamedSharding(mesh, spec(rows)))
    names = ("text", "text_mask", "waypoints", "intrinsics", "extrinsics", "frame_times", "fps")
    drop = jax.ShapeDtypeStruct((b,), jnp.bool_, sharding=NamedSharding(mesh, spec(rows)))
    conditions = Conditions(**{name: clip[name] for name in names}, drop_text=drop, drop_waypoints=drop)

    def sample_step(params, window, schedule, conditions):
        velocity = generation_velocity(network, params, config.generate, rows is not None)
        return sample_window(velocity, window, schedule, conditions)

    step = jax.jit(
        with_rules(layout.rules, sample_step), donate_argnums=1, out_shardings=window.sharding, compiler_options=options_of(window.sharding)
    )  # fmt: skip
    return Program(step, (_shaped(params, layout.parameters(params)), window, schedule, conditions), mesh)


def make_program(config, sizes: Sizes, mesh: Mesh) -> Program:
    """The program of `sizes.step`, under the config's logical rules."""
    if sizes.step == "train":
        with use_rules(**rules_from_config(config)):
            return train_program(config, sizes, mesh)
    rules = generation_rules(config, sizes.dit, mesh, evaluations(config.generate, sizes.batch), sizes.frames, sizes.tokens)
    with use_rules(**rules):
        return sample_program(config, sizes, mesh, Layout(mesh, rules, sizes.batch))
