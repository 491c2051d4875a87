"""The program of generation on a mesh of devices: `flow.rollout.advance` with the network, under the same sharding rules as training.

Parameters lie as in training (`mesh.fsdp`, `mesh.tensor`), several videos or guidance passes are spread over `mesh.data`, and the work
within a window over `mesh.context` as `attention.parallel` says. What it makes is the same on any mesh, up to rounding.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from mila_jax.errors import UserError
from mila_jax.flow.guidance import autoguided, guidance_weights, guided
from mila_jax.flow.rollout import State, advance, after_window
from mila_jax.model import conditions as conditions_module
from mila_jax.model.dit import DiTConfig
from mila_jax.model.network import make_velocity
from mila_jax.model.precondition import Prior
from mila_jax.parallel.compiler_options import options_of
from mila_jax.parallel.logical import constrain, mesh_axes, rules_from_config, spec, use_rules, with_rules
from mila_jax.parallel.mesh import axis_sizes, check_divides, make_mesh, parameter_shardings, replicated


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """What the program knows of a model before it has its parameters. guide: a weaker one for autoguidance, or None."""

    graphdef: object
    dit: DiTConfig
    prior: Prior | None
    guide: "Network | None" = None

    def velocity(self, params):
        """The network's velocity with these parameters."""
        return make_velocity(self.graphdef, params, self.dit, self.prior)


class Parameters(NamedTuple):
    """What the program computes with; guide: the weaker model's, or None."""

    model: nnx.State
    guide: nnx.State | None = None


def generation_velocity(network: Network, params: Parameters, generate, split: bool = True):
    """The velocity that windows are denoised with: the network, guided as the config's `generate` section says.

    split: whether the axis of videos is split over the mesh. Batched guidance passes may be where videos are not; the guide sees videos only.
    """
    velocity = network.velocity(params.model)
    drops = (conditions_module.drop_text, conditions_module.drop_waypoints)
    velocity = guided(velocity, drops, (generate.guidance_text, generate.guidance_waypoints), batched=generate.guidance_batched)
    if network.guide is None:
        return velocity
    guide = network.guide.velocity(params.guide)
    return autoguided(velocity, guide if split else with_rules({"batch": None}, guide), generate.guidance_model)


def evaluations(generate, videos: int) -> int:
    """Samples that the network sees at a time: videos, times the guidance passes where those are batched."""
    passes = sum(weight != 0 for weight in guidance_weights((generate.guidance_text, generate.guidance_waypoints)))
    return videos * (passes if generate.guidance_batched else 1)


def generation_mesh(sizes, samples: int, devices=None) -> Mesh:
    """The mesh of the config's `mesh` section for `samples` samples at a time.

    mesh.data = -1 takes as many devices as the samples can be spread over evenly, and leaves the others idle; a mesh over several processes
    has to hold all of their devices. Raises `UserError` naming the key for sizes that fit neither devices nor samples.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = sizes.copy_and_resolve_references()
    if sizes.data == -1 and min(sizes.fsdp, sizes.context, sizes.tensor) > 0:
        others = sizes.fsdp * sizes.context * sizes.tensor
        most = axis_sizes(sizes, len(devices))["data"]
        sizes.data = most if jax.process_count() > 1 else max(n for n in range(1, most + 1) if samples % n == 0)
        devices = devices[: sizes.data * others]
    data = axis_sizes(sizes, len(devices))["data"]
    if samples % data:
        raise UserError(f"mesh.data={data} does not divide {samples} sample(s) (videos × guidance passes); set mesh.data=-1, or use mesh.context")
    return make_mesh(sizes, devices)


def generation_rules(config, dit: DiTConfig, mesh: Mesh, samples: int, frames: int, tokens: int, whose: str = "") -> dict:
    """Logical rules of generation: those of the config, with the batch over as many axes as the samples can be split over.

    frames: of a window; tokens: patches of a view; whose: of another model than the config's, for messages. Raises `UserError` naming the key of a
    size that a mesh axis does not divide.
    """
    config = config.copy_and_resolve_references()
    if "attention" in config:
        config.attention.temporal = dit.temporal_kernel
    rules = rules_from_config(config)
    # One video cannot be split over `fsdp`: parameters still are, each device then gathers those it needs.
    split = samples % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0
    axes = rules["batch"] if isinstance(rules["batch"], tuple) else (rules["batch"],)
    rules |= {"batch": tuple(axis for axis in axes if axis is not None and (split or axis != "fsdp"))}
    with use_rules(**rules):
        check_divides(mesh, samples, dit.heads, dit.width, frames, tokens, whose)
    return rules


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """Where everything lies while `videos` videos are made together: the mesh, the rules, and shardings of what enters and leaves the program."""

    mesh: Mesh
    rules: dict
    videos: int

    @property
    def batch(self) -> str | None:
        """Logical name of the axis of videos; None where guidance passes are split but videos are too few."""
        with use_rules(**self.rules):
            parts = math.prod(self.mesh.shape[axis] for axis in mesh_axes("batch"))
        return "batch" if self.videos % parts == 0 else None

    def check_videos(self, count: int) -> None:
        """Raises `UserError` when the mesh was laid out for another number of videos than `count`, and cannot take that many."""
        if self.mesh.size > 1 and count != self.videos:
            raise UserError(f"the mesh is laid out for {self.videos} video(s) at a time, not {count}; make as many together as it is for")

    def _named(self, *names) -> NamedSharding:
        with use_rules(**self.rules):
            return NamedSharding(self.mesh, spec(*names))

    @property
    def whole(self) -> NamedSharding:
        """The same on every device."""
        return replicated(self.mesh)

    @property
    def windows(self) -> NamedSharding:
        """Of windows `[W, b, v, t, h·w·c]`."""
        return self._named(None, self.batch, None, "frames")

    @property
    def state(self) -> State:
        """Of the state between windows, whose few frames are not split."""
        frames, anchors = self._named(self.batch), self._named(None, self.batch)
        return State(frames, frames, anchors)

    def parameters(self, params):
        """Of `Parameters`, as in training."""
        with use_rules(**self.rules):
            return Parameters(*(None if part is None else parameter_shardings(self.mesh, part) for part in params))

    def put(self, tree, shardings):
        """Host arrays (the same in every process) → arrays on the mesh. Arrays that lie right already are not copied."""
        if jax.process_count() == 1:
            return jax.device_put(tree, shardings)
        place = lambda x, s: jax.make_array_from_callback(np.shape(x), s, lambda index: np.asarray(x)[index])  # noqa: E731
        return jax.tree.map(place, tree, shardings)

    def fetch(self, x) -> np.ndarray:
        """An array on the mesh → a host array, in every process."""
        return np.asarray(x) if x.is_fully_addressable else np.asarray(multihost_utils.process_allgather(x, tiled=True))


def _advance(params, state, rows, tables, shared, key, count, *, network: Network, generate, batch: str | None):
    velocity = generation_velocity(network, params, generate, batch is not None)

    def windowed(latents, levels, window):
        # Stated here, since what a window starts from (noise, known frames) and the sum of guided velocities have no sharding of their own.
        latents = constrain(latents, batch, None, "frames", None, None, None)
        return constrain(velocity(latents, levels, shared.replace(**window._asdict())), batch, None, "frames", None, None, None)

    return advance(windowed, state, rows, tables, key, count)


class RolloutProgram:
    """`flow.rollout.advance` jitted for a layout; to be called with parameters and state that lie as the layout says.

    One program serves all lengths, strategies, schedules and anchor settings.
    """

    def __init__(self, network: Network, generate, layout: Layout, parameters):
        """generate: the config's section; parameters: their shardings."""
        whole, state = layout.whole, layout.state
        function = functools.partial(_advance, network=network, generate=generate, batch=layout.batch)
        self.layout = layout
        self.advance = jax.jit(
            with_rules(layout.rules, function), donate_argnums=1, in_shardings=(parameters, state, whole, whole, whole, whole, whole),
            out_shardings=(state, layout.windows), compiler_options=options_of(whole),
        )  # fmt: skip
        self._after = jax.jit(after_window, in_shardings=(state, whole, whole), out_shardings=state)

    def __call__(self, *arguments):
        """(state, windows `[W, b, v, t, h·w·c]`, see `flow.rollout.unmerge`) of `params, state, rows, tables, shared, key, count`; the state is taken over."""
        with jax.set_mesh(self.layout.mesh):
            return self.advance(*arguments)

    def after(self, state, row, window):
        """The state after a window that was made before."""
        with jax.set_mesh(self.layout.mesh):
            return self._after(state, row, window)

    def lower(self, *arguments):
        """The program for these arguments (arrays or shapes), lowered: for its compile time and memory."""
        with jax.set_mesh(self.layout.mesh):
            return self.advance.lower(*arguments)
