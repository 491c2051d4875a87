"""The one training step: used by the loop, the tests, the benchmarks and ahead-of-time compilation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from mila_jax.flow.rectified_flow import add_noise, draw_levels, masked_loss, velocity_target
from mila_jax.flow.sampler import noise_like
from mila_jax.flow.schedules import check_anchor, training_levels
from mila_jax.model.conditions import from_clip
from mila_jax.model.network import make_velocity
from mila_jax.parallel.compiler_options import options_of
from mila_jax.parallel.logical import with_rules
from mila_jax.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a step draws at random, from the config's `train` and `window` sections (hashable: static under jit)."""

    level: str
    tpd_rate: float
    tpd_family: str
    tpd_strength: float
    anchor_level: float
    anchor_rate: float
    anchor_noisy: float
    text_drop: float
    waypoint_drop: float
    ema: float

    @classmethod
    def from_config(cls, config) -> "Objective":
        """Raises `UserError` when the anchor's level is below its error."""
        check_anchor(config.window.anchor_error, config.window.anchor_level)
        t, w = config.train, config.window
        return cls(
            level=t.level, tpd_rate=t.tpd_rate, tpd_family=w.tpd_family, tpd_strength=w.tpd_strength, anchor_level=w.anchor_level,
            anchor_rate=t.anchor_rate, anchor_noisy=t.anchor_noisy, text_drop=t.text_drop, waypoint_drop=t.waypoint_drop, ema=t.ema,
        )  # fmt: skip


DATA_RATE = 12.0  # frames per second of the (re)fine stage; only its windows end in an anchor


def frame_roles(key, clip, objective: Objective):
    """Which frames are clean and which is a noisy anchor: two bool arrays [b, t] (method.md, training stages).

    The first `clip["conditioning"]` frames are clean. At 12 Hz, a share `anchor_rate` of the samples ends in an anchor, of which
    `anchor_noisy` are to be corrected (JDC) and the rest are clean (divide and conquer).
    """
    b, _, t = clip["latents"].shape[:3]
    place = jnp.arange(t)
    has, noisy = jax.random.uniform(key, (2, b))
    tail = ((has < objective.anchor_rate) & (clip["fps"] > DATA_RATE - 0.5))[:, None] & (place == t - 1)
    anchor = tail & (noisy < objective.anchor_noisy)[:, None]
    return (place < clip["conditioning"][:, None]) | (tail & ~anchor), anchor


def loss(params, clip, key, *, graphdef, config, prior, objective: Objective, level=None):
    """Masked rectified-flow loss (eq. (15)) of a batch of clips → `flow.rectified_flow.MaskedLoss`.

    `level`: one fixed noise level for all samples (evaluation), with every other draw as in training; None draws levels.
    """
    latents = clip["latents"].astype(jnp.float32)
    b = latents.shape[0]
    k_roles, k_level, k_tpd, k_noise, k_drop = jax.random.split(key, 5)
    clean, anchor = frame_roles(k_roles, clip, objective)
    sigma = draw_levels(k_level, b, distribution=objective.level) if level is None else jnp.full((b,), level)
    alpha = jnp.where(jax.random.uniform(k_tpd, (b,)) < objective.tpd_rate, objective.tpd_strength, 0.0)
    levels = training_levels(sigma, clean, anchor, alpha=alpha, family=objective.tpd_family, sigma_a=objective.anchor_level)
    levels = jnp.broadcast_to(levels[:, None], latents.shape[:3])
    noise = noise_like(k_noise, latents.shape)
    conditions = from_clip(clip)
    no_text, no_waypoints = jax.random.uniform(k_drop, (2, b))
    conditions = conditions.replace(drop_text=no_text < objective.text_drop, drop_waypoints=no_waypoints < objective.waypoint_drop)
    velocity = make_velocity(graphdef, params, config, prior)
    predicted = velocity(add_noise(latents, noise, levels), levels, conditions)
    return masked_loss(predicted, velocity_target(latents, noise), ~clean)


def train_step(state: TrainState, clip, key, *, graphdef, config, prior, objective: Objective, tx):
    """One update. `clip`: batch of `data_pipeline.clips`; `key`: the run's key (the step is folded in here).

    Returns the new state and metrics (scalars): loss, gradient norm.
    """

    def mean_loss(params):
        value = loss(
            params, clip, jax.random.fold_in(key, state.step), graphdef=graphdef, config=config, prior=prior, objective=objective
        )
        return value.mean

    value, grads = jax.value_and_grad(mean_loss)(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    # A young average follows closely, so that it does not carry the random start for thousands of steps.
    decay = jnp.minimum(objective.ema, (1.0 + state.step) / (10.0 + state.step))
    ema = jax.tree.map(lambda average, new: average + (1 - decay) * (new - average), state.ema, params)
    metrics = {"loss": value, "grad_norm": optax.tree.norm(grads)}
    return TrainState(state.step + 1, params, ema, opt_state), metrics


def jit_train_step(shardings, batch_shardings, rules=None, **static):
    """`train_step` jitted with a donated state; `static`: its keyword arguments, `rules`: the logical rules it is traced under.

    The compiler gets the options of the devices that the shardings are for (`parallel.compiler_options`).
    """
    return jax.jit(
        with_rules(rules or {}, functools.partial(train_step, **static)), donate_argnums=0,
        in_shardings=(shardings, batch_shardings, None), out_shardings=(shardings, None), compiler_options=options_of(batch_shardings),
    )  # fmt: skip
