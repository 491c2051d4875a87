"""The training state and its shardings."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mila_jax.model.dit import DiT, DiTConfig
from mila_jax.model.stdit3_weights import abstract_model
from mila_jax.parallel.mesh import parameter_shardings, replicated
from mila_jax.train.optimizer import like_parameters
from mila_jax.train.stages import Trainable


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Health:
    """What `train_step` knows of the run's losses: average float32 [], over the good steps of late; skipped, in_row int32 []: steps that were
    skipped because their loss was no number or far above it, in all and without a good one between."""

    average: jax.Array
    skipped: jax.Array
    in_row: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """step int32 [], params and ema (float32), opt_state (of the trained parameters), health. All else of a run derives from seed and step."""

    step: jax.Array
    params: nnx.State
    ema: nnx.State
    opt_state: optax.OptState
    health: Health


def fresh_health() -> Health:
    """Before the first step."""
    return Health(jnp.float32(0), jnp.int32(0), jnp.int32(0))


def _build(config: DiTConfig, key):
    return nnx.split(DiT(config, rngs=nnx.Rngs(key)))


def _selected(trainable: Trainable | None, params):
    return params if trainable is None else trainable.select(params)


def abstract_state(config: DiTConfig, tx, trainable: Trainable | None = None) -> TrainState:
    """The state as shapes."""
    _, params = abstract_model(config)
    return TrainState(
        jax.ShapeDtypeStruct((), jnp.int32), params, params, jax.eval_shape(lambda p: tx.init(_selected(trainable, p)), params),
        jax.eval_shape(fresh_health),
    )  # fmt: skip


def state_shardings(mesh, config: DiTConfig, tx, trainable: Trainable | None = None):
    """Shardings of the whole state. Moments lie as their parameters do: `jit(tx.init)` alone would replicate them silently.

    trainable: the parameters that the optimizer knows; None = all.
    """
    _, params = abstract_model(config)
    shardings, whole = parameter_shardings(mesh, params), replicated(mesh)
    # Rows of a stacked array lie as the array does: the axis of the layers is never split.
    trained = jax.eval_shape(lambda p: _selected(trainable, p), params)
    moments = like_parameters(tx, jax.eval_shape(tx.init, trained), parameter_shardings(mesh, trained), whole)
    return TrainState(step=whole, params=shardings, ema=shardings, opt_state=moments, health=Health(whole, whole, whole))


def create_state(mesh, config: DiTConfig, tx, seed: int, params=None, trainable: Trainable | None = None) -> TrainState:
    """A fresh state on the mesh; the same seed gives the same values on any mesh. `params` (optional) replaces the initial ones."""
    shardings = state_shardings(mesh, config, tx, trainable)

    def init(given):
        with nnx.use_eager_sharding(False):
            drawn = _build(config, jax.random.key(seed))[1] if given is None else given
        return TrainState(jnp.int32(0), drawn, jax.tree.map(jnp.copy, drawn), tx.init(_selected(trainable, drawn)), fresh_health())

    return jax.jit(init, out_shardings=shardings)(params)
