"""The one training step: used by the loop, the tests, the benchmarks and ahead-of-time compilation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from mila_jax.errors import UserError
from mila_jax.flow.rectified_flow import DISTRIBUTIONS, add_noise, draw_levels, masked_loss, velocity_target
from mila_jax.flow.sampler import noise_like
from mila_jax.flow.schedules import FAMILIES, check_anchor, check_strength, training_levels
from mila_jax.model.conditions import from_clip
from mila_jax.model.network import make_velocity
from mila_jax.parallel.compiler_options import options_of
from mila_jax.parallel.logical import mesh_axes, use_rules, with_rules
from mila_jax.parallel.mesh import constrain_parameters
from mila_jax.train.state import Health, TrainState

FOREGROUND_OF = ("places", "given")  # what `train.foreground_weight` looks at


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
    explode: float = 10.0
    context_rate: float = 0.0
    context_level: float = 0.0
    foreground_weight: float = 0.0
    foreground_of: str = "places"
    anchor_stride: int = 0

    @classmethod
    def from_config(cls, config) -> "Objective":
        """Raises `UserError` when the anchor's level is below its error, for names that are unknown, and for a wrong strength of TPD, weight of
        vehicles or stride of anchors."""
        check_anchor(config.window.anchor_error, config.window.anchor_level)
        check_strength(config.window.tpd_strength)
        t, w = config.train, config.window
        if t.level not in DISTRIBUTIONS:
            raise UserError(f"train.level={t.level!r} is unknown; use one of {', '.join(DISTRIBUTIONS)}")
        if w.tpd_family not in FAMILIES:
            raise UserError(f"window.tpd_family={w.tpd_family!r} is unknown; use one of {', '.join(FAMILIES)}")
        if w.get("inner_anchors", False) and w.anchor_stride < 1:
            raise UserError(f"window.anchor_stride={w.anchor_stride} must be positive")
        if t.get("foreground_weight", 0.0) < 0:
            raise UserError(f"train.foreground_weight={t.foreground_weight} must not be negative")
        if t.get("foreground_of", "places") not in FOREGROUND_OF:
            raise UserError(f"train.foreground_of={t.foreground_of!r} must be one of {', '.join(FOREGROUND_OF)}")
        if t.get("foreground_of", "places") == "given" and not t.get("foreground_weight", 0.0):
            raise UserError("train.foreground_of='given' says what train.foreground_weight looks at, which is 0; set it above 0")
        return cls(
            level=t.level, tpd_rate=t.tpd_rate, tpd_family=w.tpd_family, tpd_strength=w.tpd_strength, anchor_level=w.anchor_level,
            anchor_rate=t.anchor_rate, anchor_noisy=t.anchor_noisy, text_drop=t.text_drop, waypoint_drop=t.waypoint_drop, ema=t.ema,
            explode=t.get("explode", 10.0), context_rate=t.get("context_rate", 0.0), context_level=t.get("context_level", 0.0),
            foreground_weight=t.get("foreground_weight", 0.0), foreground_of=t.get("foreground_of", "places"),
            anchor_stride=w.anchor_stride if w.get("inner_anchors", False) else 0,
        )  # fmt: skip


DATA_RATE = 12.0  # frames per second of the (re)fine stage; only its windows end in an anchor


def frame_roles(key, clip, objective: Objective):
    """Which frames are clean and which are noisy anchors: two bool arrays [b, t] (the paper's training stages).

    The first `clip["conditioning"]` frames are clean. At 12 Hz, a share `anchor_rate` of the samples ends in an anchor, of which
    `anchor_noisy` are to be corrected (JDC) and the rest are clean (divide and conquer). With an `anchor_stride` above 0, further anchors
    (ours) lie so many frames apart before that one, in windows whose new frames are a multiple of it, as in generation.
    """
    b, _, t = clip["latents"].shape[:3]
    place = jnp.arange(t)
    has, noisy = jax.random.uniform(key, (2, b))
    where = place == t - 1
    if objective.anchor_stride:
        several = (t - clip["conditioning"]) % objective.anchor_stride == 0
        where = where | several[:, None] & ((t - 1 - place) % objective.anchor_stride == 0)
    given = place < clip["conditioning"][:, None]
    coarse = ((has < objective.anchor_rate) & (clip["fps"] > DATA_RATE - 0.5))[:, None] & where & ~given
    anchor = coarse & (noisy < objective.anchor_noisy)[:, None]
    return given | (coarse & ~anchor), anchor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draws:
    """Everything random of a batch: levels [b, t], clean bool [b, t], noise like the latents, drop_text and drop_waypoints bool [b]."""

    levels: jax.Array
    clean: jax.Array
    noise: jax.Array
    drop_text: jax.Array
    drop_waypoints: jax.Array


def draw(clip, key, objective: Objective, level=None) -> Draws:
    """The draws of a batch from its key. `level`: one fixed noise level for all samples (evaluation) instead of drawn ones."""
    b = clip["latents"].shape[0]
    k_roles, k_level, k_tpd, k_noise, k_drop = jax.random.split(key, 5)
    clean, anchor = frame_roles(k_roles, clip, objective)
    sigma = draw_levels(k_level, b, distribution=objective.level) if level is None else jnp.full((b,), level)
    alpha = jnp.where(jax.random.uniform(k_tpd, (b,)) < objective.tpd_rate, objective.tpd_strength, 0.0)
    levels = training_levels(sigma, clean, anchor, alpha=alpha, family=objective.tpd_family, sigma_a=objective.anchor_level)
    if objective.context_rate:
        noisy, depth = jax.random.uniform(jax.random.fold_in(k_level, 1), (2, b))
        context = jnp.where(noisy < objective.context_rate, objective.context_level * depth, 0.0)
        levels = jnp.where(jnp.arange(levels.shape[1]) < clip["conditioning"][:, None], context[:, None], levels)
    no_text, no_waypoints = jax.random.uniform(k_drop, (2, b))
    noise = noise_like(k_noise, clip["latents"].shape)
    return Draws(levels, clean, noise, no_text < objective.text_drop, no_waypoints < objective.waypoint_drop)


def vehicle_weights(clip, objective: Objective):
    """Weights [b, v, t, h, w] of the places of a batch in the loss, or None where all count alike; ours.

    With `foreground_weight` w > 0, for which the clips must tell where vehicles are: 1 + w · how much of a place they cover, or, with
    `foreground_of="given"`, 1 + w · how much of a view they cover at most in the frames that the window starts from. The latter
    tells hardly anything of the frames to come that the network is not told, so that it hardly changes what is learned, but where it is learned
    best. Hardly: between two annotations a box lies between both, and one that only the later knows counts already (`data_pipeline.foreground`).
    """
    if not objective.foreground_weight:
        return None
    covered = clip["foreground"].astype(jnp.float32) / 255
    if objective.foreground_of == "given":
        given = jnp.arange(covered.shape[2]) < clip["conditioning"][:, None]
        most = jnp.where(given[:, None], covered.mean((-2, -1)), 0.0).max(-1)
        covered = jnp.broadcast_to(most[..., None, None, None], covered.shape)
    return 1 + objective.foreground_weight * covered


def loss_of(params, clip, draws: Draws, *, graphdef, config, prior, objective: Objective):
    """Masked rectified-flow loss (eq. (15)) of a batch of clips with these draws → `flow.rectified_flow.MaskedLoss`."""
    latents = clip["latents"].astype(jnp.float32)
    levels = jnp.broadcast_to(draws.levels[:, None], latents.shape[:3])
    conditions = from_clip(clip).replace(drop_text=draws.drop_text, drop_waypoints=draws.drop_waypoints)
    velocity = make_velocity(graphdef, params, config, prior)
    predicted = velocity(add_noise(latents, draws.noise, levels), levels, conditions)
    return masked_loss(predicted, velocity_target(latents, draws.noise), ~draws.clean, vehicle_weights(clip, objective))


def loss(params, clip, key, *, graphdef, config, prior, objective: Objective, level=None):
    """`loss_of` with the draws of `key`; `level` as in `draw`."""
    draws = draw(clip, key, objective, level)
    return loss_of(params, clip, draws, graphdef=graphdef, config=config, prior=prior, objective=objective)


def split_batch(tree, parts: int, groups: int):
    """Arrays [b, …] → [parts, b / parts, …], or with several groups [parts, groups, b / parts / groups, …].

    A part takes every `parts`-th sample of each device's own: cut into stretches instead, most devices would have none of a part, and
    the compiler would gather the batch on all of them.
    """

    def split(x):
        x = x.reshape(groups, x.shape[0] // groups // parts, parts, *x.shape[1:])
        x = jnp.moveaxis(x, 2, 0)
        return x if groups > 1 else x[:, 0]

    return jax.tree.map(split, tree)


def gradients(selected, params, clip, key, *, graphdef, config, prior, objective: Objective, trainable=None, accumulate: int = 1, groups: int = 1):
    """(mean loss of the batch, its gradient with respect to `selected`, the trained part of `params`).

    accumulate: parts that the batch is taken in, one after the other, with one part's activations in memory at a time. Sums of squares and
    their gradients are added and divided by the number of noisy values at the end, so that the result is the large batch's to rounding.
    groups: size of the mesh axis `data`. Each group of devices adds up the gradients of its own samples; they meet once, after the last part
    (left to itself, the compiler has them meet in each part and layer).
    """
    draws = draw(clip, key, objective)

    def value(selected, clip, draws):
        whole = selected if trainable is None else trainable.merge(params, selected)
        return loss_of(whole, clip, draws, graphdef=graphdef, config=config, prior=prior, objective=objective)

    if accumulate == 1:
        return jax.value_and_grad(lambda s: value(s, clip, draws).mean)(selected)

    def part(selected, clip, draws):
        def total(s):
            out = value(s, clip, draws)
            return out.sum, out.count

        (total, count), grads = jax.value_and_grad(total, has_aux=True)(selected)
        return total, count, grads

    axes = mesh_axes("batch")
    kept = {a for name in ("layers", "embed", "mlp", "heads", "head_dim") for a in mesh_axes(name)}  # where parameters are split
    groups = groups if "data" in axes and "data" not in kept else 1
    lead = ("data",) if groups > 1 else ()

    def body(sums, both):
        if groups == 1:
            total, count, grads = part(selected, *both)
        else:
            with use_rules(batch=tuple(a for a in axes if a != "data")):
                total, count, grads = jax.vmap(part, (None, 0, 0), spmd_axis_name="data")(selected, *both)
        total, count, grads = jax.tree.map(jnp.add, sums, (total, count, grads))
        return (total, count, constrain_parameters(grads, *lead)), None

    shape = (groups,) if groups > 1 else ()
    zeros = jax.tree.map(lambda x: jnp.zeros(shape + x.shape, jnp.float32), selected)
    start = jnp.zeros(shape), jnp.zeros(shape), constrain_parameters(zeros, *lead)
    (total, count, grads), _ = jax.lax.scan(body, start, split_batch((clip, draws), accumulate, groups))
    if groups > 1:
        total, count, grads = jax.tree.map(lambda x: x.sum(0), (total, count, grads))
    count = jnp.maximum(count, 1.0)
    return total / count, jax.tree.map(lambda g: g / count, grads)


YOUNG = 20  # good steps before a loss can be called far above the average


def train_step(
    state: TrainState, clip, key, *, graphdef, config, prior, objective: Objective, tx, trainable=None, accumulate: int = 1, groups: int = 1
):
    """One update. `clip`: batch of `data_pipeline.clips`; `key`: the run's key (the step is folded in here).

    A step whose loss or gradient is no number, or whose loss is more than `objective.explode` times the running average, changes nothing
    but the counters. Returns the new state and metrics (scalars): loss, grad_norm, skipped, skipped_in_row.
    """
    selected = state.params if trainable is None else trainable.select(state.params)
    value, grads = gradients(
        selected, state.params, clip, jax.random.fold_in(key, state.step), graphdef=graphdef, config=config, prior=prior, objective=objective,
        trainable=trainable, accumulate=accumulate, groups=groups,
    )  # fmt: skip
    norm = optax.tree.norm(grads)
    health, ok = judge(state, value, norm, objective.explode)
    updates, opt_state = tx.update(grads, state.opt_state, selected)
    new = optax.apply_updates(selected, updates)
    params = new if trainable is None else trainable.merge(state.params, new)
    # A young average follows closely, so that it does not carry the random start for thousands of steps.
    decay = jnp.minimum(objective.ema, (1.0 + state.step) / (10.0 + state.step))
    ema = jax.tree.map(lambda average, new: average + (1 - decay) * (new - average), state.ema, params)
    params, ema, opt_state = jax.tree.map(
        lambda new, old: jnp.where(ok, new, old), (params, ema, opt_state), (state.params, state.ema, state.opt_state)
    )
    metrics = {"loss": value, "grad_norm": norm, "skipped": health.skipped, "skipped_in_row": health.in_row}
    return TrainState(state.step + 1, params, ema, opt_state, health), metrics


def judge(state: TrainState, value, norm, explode: float) -> tuple[Health, jax.Array]:
    """(health after a step with this loss and gradient norm, whether the step counts)."""
    before = state.health
    good = state.step - before.skipped
    ok = jnp.isfinite(value) & jnp.isfinite(norm) & ((good < YOUNG) | (value <= explode * before.average))
    weight = jnp.maximum(1.0 / (good + 1.0), 0.01)
    average = jnp.where(ok, before.average + weight * (value - before.average), before.average)
    bad = 1 - ok.astype(jnp.int32)
    return Health(average, before.skipped + bad, (before.in_row + 1) * bad), ok


def jit_train_step(shardings, batch_shardings, rules=None, **static):
    """`train_step` jitted with a donated state; `static`: its keyword arguments, `rules`: the logical rules it is traced under.

    The compiler gets the options of the devices that the shardings are for (`parallel.compiler_options`).
    """
    return jax.jit(
        with_rules(rules or {}, functools.partial(train_step, **static)), donate_argnums=0,
        in_shardings=(shardings, batch_shardings, shardings.step), out_shardings=(shardings, shardings.step), compiler_options=options_of(batch_shardings),
    )  # fmt: skip
