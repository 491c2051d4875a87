"""The training state and its shardings."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mila_jax.model.dit import DiT, DiTConfig
from mila_jax.parallel.mesh import parameter_shardings, replicated


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """step int32 [], params and ema (float32), opt_state. Everything else of a run derives from the seed and the step."""

    step: jax.Array
    params: nnx.State
    ema: nnx.State
    opt_state: optax.OptState


def _build(config: DiTConfig, key):
    return nnx.split(DiT(config, rngs=nnx.Rngs(key)))


def abstract_model(config: DiTConfig):
    """(graphdef, parameter shapes) of a `DiT` without allocating anything."""
    with nnx.use_eager_sharding(False):
        return jax.eval_shape(lambda: _build(config, 0))


def state_shardings(mesh, config: DiTConfig, tx):
    """Shardings of the whole state. Moments lie as their parameters do: `jit(tx.init)` alone would replicate them silently."""
    _, params = abstract_model(config)
    shardings, whole = parameter_shardings(mesh, params), replicated(mesh)
    moments = optax.tree_utils.tree_map_params(
        tx, lambda _, s: s, jax.eval_shape(tx.init, params), shardings, transform_non_params=lambda _: whole
    )
    return TrainState(step=whole, params=shardings, ema=shardings, opt_state=moments)


def create_state(mesh, config: DiTConfig, tx, seed: int, params=None) -> TrainState:
    """A fresh state on the mesh; the same seed gives the same values on any mesh. `params` (optional) replaces the initial ones."""
    shardings = state_shardings(mesh, config, tx)

    def init(given):
        with nnx.use_eager_sharding(False):
            drawn = _build(config, jax.random.key(seed))[1] if given is None else given
        return TrainState(jnp.int32(0), drawn, jax.tree.map(jnp.copy, drawn), tx.init(drawn))

    return jax.jit(init, out_shardings=shardings)(params)
