"""Long videos: windows after windows, following a `RolloutPlan` (paper 3.2-3.4).

All windows of a video, of whatever stage, run one loop body: what tells a coarse window from a refining one (levels of its frames,
what they start from, which anchor it ends in) is data, a row of `Tables`. So the network is compiled once, settings of the noise
(TPD, JDC, shift, temperature, strategy) and the number of windows are run-time values, and memory of the program does not
depend on the length. `advance` runs any number of windows: all of them in one call, or a few at a time from the host with the
carried state donated (streaming; the only host traffic is latents, so it works on many processes). Both give the same bits.

Noise of a window derives from (key, stage, window number, sample), nothing else.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mila_jax.errors import UserError
from mila_jax.flow.anchors import coefficients
from mila_jax.flow.plan import RolloutPlan, Windows
from mila_jax.flow.rectified_flow import align
from mila_jax.flow.sampler import noise_like, sample_keys, sample_window
from mila_jax.flow.schedules import check_anchor, check_strength, window_schedule

STAGES = {"bootstrap": 0, "coarse": 1, "refine": 2}
KINDS = ("bootstrap", "coarse", "refine", "anchored")  # rows of `Tables`; anchored: a refining window that ends in an anchor
ANCHOR_SLOTS = 128  # fewest coarse frames that the state has room for, so that videos of most lengths share a program


@dataclasses.dataclass(frozen=True)
class SamplerOptions:
    """How windows are denoised; hashable, so it can be a static argument.

    `steps` K; TPD `family` and strength `alpha` (0: all frames together); JDC `a` (how wrong anchors are taken to be) and
    `sigma_a` (level they start at; both only matter for coarse_to_refine; a = 0 re-noises as if anchors were right);
    `shift`: strength R of the timestep transform (`timeshift.shift_ratio`), 1 for none; `temperature`: scale of the noise that frames
    start from (1: the model's law; below 1 gives up variety for calm pictures, as with any small generator; anchors are
    re-noised at full strength, since their level says how much noise they hold); `context_level`: level to which the frames that a window
    starts from are noised and at which they stay, so that the network mends them instead of copying their errors. Raises UserError naming the setting
    that is out of its range.
    """

    steps: int = 50
    family: str = "exponential"
    alpha: float = 0.5
    a: float = 0.15
    sigma_a: float = 0.4
    shift: float = 1.0
    temperature: float = 1.0
    context_level: float = 0.0

    def __post_init__(self):
        check_anchor(self.a, self.sigma_a)
        if self.steps < 1:
            raise UserError(f"generate.steps={self.steps} must be at least 1")
        check_strength(self.alpha)
        if not 0 < self.shift < math.inf:
            raise UserError(f"generate.shift={self.shift:g} must be a positive number; 0 is Open-Sora's rule, 1 none")
        if not 0 <= self.temperature <= 1:
            raise UserError(f"generate.temperature={self.temperature:g} must lie between 0 and 1")
        if not 0 <= self.context_level < 1:
            raise UserError(f"generate.context_level={self.context_level:g} must lie between 0 and 1")

    def schedule(self, windows: Windows):
        """Levels `[K+1, T]` of a stage's windows (those with an anchor, if there are any)."""
        return window_schedule(
            self.steps, windows.clean, anchor=windows.noisy_places, family=self.family, alpha=self.alpha,
            sigma_a=self.sigma_a, a=self.a, shift=self.shift,
        )  # fmt: skip


class Tables(NamedTuple):
    """What kinds of windows do, in the order of `KINDS`; float32 but for `back`.

    `levels [4, K+1, T]`: schedules. A window starts as keep · source + spread · ε, with `keep`, `spread` `[4, T]` and as source the
    context, then coarse frames: (1, 0) on clean frames, (0, temperature) on new ones, eq. (9)'s on anchors to correct. `back [4, T]` int32: how
    many coarse frames before the one that the window ends in each of them is (of consequence for anchors only).
    """

    levels: jax.Array
    keep: jax.Array
    spread: jax.Array
    back: jax.Array


class State(NamedTuple):
    """What goes from window to window; of one shape for all lengths up to `ANCHOR_SLOTS` anchors.

    `context [B, V, N, h, w, c]`: the last frames so far; `first`: those at which coarse and refining stages start; `anchors
    [A, B, V, h, w, c]`.
    """

    context: jax.Array
    first: jax.Array
    anchors: jax.Array


class Rows(NamedTuple):
    """The windows of a video in order; all leaves lead with [W].

    `kind`: row of the tables; `part`: what is folded into the key (stage and number); `rewind`: starts from `first`, not from the
    context; `mark`: its last frames become `first`; `anchor`: slot that it ends in; `store`: slot for its new frames, -1 for none;
    `conditions`: pytree whose leaves lead with [W, B].
    """

    kind: Any
    part: Any
    rewind: Any
    mark: Any
    anchor: Any
    store: Any
    conditions: Any


class Rollout(NamedTuple):
    """A long video in latents.

    `latents [B, V, F, h, w, c]`: frames 1 … F; `anchors [B, V, A, h, w, c]`: as the coarse stage gave them, `corrected`: as they
    are in the video (frame numbers `plan.anchor_frames`; those of the last window may lie beyond F). Both None without anchors.
    """

    latents: jax.Array
    anchors: jax.Array | None
    corrected: jax.Array | None


def window_part(stage: str, number):
    """What is folded into a sample's key for window `number` (int or array, below 2^24) of a stage: uint32."""
    return (np.uint32(STAGES[stage] << 24) + np.asarray(number, np.uint32)).astype(np.uint32)


def window_keys(key, batch: int, stage: str, number):
    """Keys `[B]` of window `number` of `stage`. `key`: one key, or one per sample `[B]`."""
    return jax.vmap(jax.random.fold_in, (0, None))(sample_keys(key, batch), window_part(stage, number))


def make_tables(plan: RolloutPlan, options: SamplerOptions) -> Tables:
    """Tables of the kinds of windows that the plan has; kinds that it has not are all clean."""
    refine = plan.refine
    kinds = {"bootstrap": plan.bootstrap, "coarse": plan.coarse, "refine": refine and refine.plain, "anchored": refine if plan.anchors else None}
    frames = plan.window
    levels, keep, spread = (np.zeros((len(KINDS), *shape), np.float32) for shape in ((options.steps + 1, frames), (frames,), (frames,)))
    keep[:] = 1
    back = np.zeros((len(KINDS), frames), np.int32)
    for row, name in enumerate(KINDS):
        windows = kinds[name]
        if windows is None:
            continue
        with jax.ensure_compile_time_eval():  # numbers even where a rollout is traced
            levels[row] = options.schedule(windows)
            anchor = [float(part) for part in coefficients(options.sigma_a, options.a)[:2]]
        if options.context_level and frames < 2 * plan.conditioning:  # noised frames would stay on as the next window's context
            raise UserError(
                f"generate.context_level needs windows with at least as many new frames as conditioning ({plan.conditioning} of {frames})"
            )
        context = windows.clean & (np.arange(frames) < plan.conditioning)
        levels[row] = np.where(context, options.context_level, levels[row])
        keep[row] = np.where(context, 1 - options.context_level, windows.clean)
        spread[row] = np.where(context, options.context_level, np.where(windows.clean, 0.0, options.temperature))
        back[row, windows.places] = windows.steps_back
        if windows.anchor is not None:
            keep[row, windows.places], spread[row, windows.places] = anchor
    return Tables(levels, keep, spread, back)


def make_rows(plan: RolloutPlan, conditions: dict, *, skip_coarse: bool = False) -> Rows:
    """Rows of the windows of a plan. `conditions`: pytree for each stage of `plan.stages`, leaves leading with [W, B].

    skip_coarse: without the coarse windows (anchors are given).
    """
    rows = []
    for stage, windows in plan.stages.items():
        if stage == "coarse" and skip_coarse:
            continue
        number, new = np.arange(windows.count), plan.window - plan.conditioning
        # Of given anchors, none lies between those that windows have.
        slot = (dataclasses.replace(windows, stride=len(windows.places)) if skip_coarse else windows).slots
        kind = {"bootstrap": np.full(windows.count, 0), "coarse": np.full(windows.count, 1), "refine": 2 + windows.anchored}[stage]
        rows.append(Rows(
            kind=kind.astype(np.int32), part=window_part(stage, number), rewind=(number == 0) & (stage != "bootstrap"),
            mark=np.full(windows.count, stage == "bootstrap"), anchor=slot.astype(np.int32),
            store=(number * new if stage == "coarse" else np.full(windows.count, -1)).astype(np.int32), conditions=conditions[stage],
        ))  # fmt: skip
    return jax.tree.map(lambda *parts: (jnp if any(isinstance(part, jax.Array) for part in parts) else np).concatenate(parts), *rows)


def pad_rows(rows: Rows, capacity: int) -> Rows:
    """`rows` with leaves of `capacity` windows; those that are added never run."""
    return jax.tree.map(lambda leaf: np.concatenate([leaf, np.zeros((capacity - len(leaf), *leaf.shape[1:]), leaf.dtype)]), rows)


def start_state(first_frames, plan: RolloutPlan, anchors=None) -> State:
    """The state before the first window. `first_frames [B, V, G, h, w, c]`; `anchors [B, V, A, h, w, c]` if they are given.

    Raises UserError if the number of first frames or of anchors is not the plan's.
    """
    if first_frames.shape[2] != plan.given:
        raise UserError(f"the plan is for {plan.given} first frames per view, got {first_frames.shape[2]}")
    xp = jnp if isinstance(first_frames, jax.Array) else np
    context = first_frames[:, :, -plan.conditioning :]
    short = plan.conditioning - context.shape[2]  # the bootstrap window takes its few frames from the front
    context = xp.pad(context, [(0, 0), (0, 0), (0, short)] + [(0, 0)] * 3)
    new = plan.window - plan.conditioning
    needed = 0 if plan.coarse is None else plan.coarse.count * new
    slots = max(ANCHOR_SLOTS, 1 << (max(needed, new) - 1).bit_length())  # every window's new frames are read there, stored or not
    room = np.zeros((slots,) + context.shape[:2] + context.shape[3:], context.dtype)
    if anchors is not None:
        if anchors.shape[2] != plan.anchors:
            raise UserError(f"the plan has {plan.anchors} anchors, got {anchors.shape[2]}")
        room = xp.concatenate([xp.moveaxis(xp.asarray(anchors, context.dtype), 2, 0), room[plan.anchors :]])
    return State(context, xp.array(context), xp.asarray(room))  # two arrays: a donated one may not be passed twice


def start_window(state: State, row: Rows, tables: Tables, keys):
    """A window before its first step, `[B, V, T, h, w, c]`; `row`: one window of `Rows`, `keys [B]` its keys."""
    keep, spread = tables.keep[row.kind], tables.spread[row.kind]
    context = jnp.where(row.rewind, state.first, state.context)
    frames, known = keep.shape[0], context.shape[2]
    shape = context.shape[:2] + (frames,) + context.shape[3:]
    noise = noise_like(keys, shape, context.dtype)
    coarse = jnp.moveaxis(state.anchors[row.anchor - tables.back[row.kind, known:]], 0, 2)
    source = jnp.concatenate([context, coarse], axis=2)
    keep, spread = (align(jnp.broadcast_to(part, shape[:3]), source) for part in (keep, spread))
    return (keep * source + spread * noise).astype(context.dtype)


def after_window(state: State, row: Rows, window) -> State:
    """The state after a window `[B, V, T, h, w, c]` is denoised; also how a rollout is resumed from windows kept on disk."""
    known = state.context.shape[2]
    context = window[:, :, -known:]
    new = jnp.moveaxis(window[:, :, known:], 2, 0)
    slot = jnp.maximum(row.store, 0)
    old = jax.lax.dynamic_slice_in_dim(state.anchors, slot, new.shape[0])
    anchors = jax.lax.dynamic_update_slice_in_dim(state.anchors, jnp.where(row.store >= 0, new, old), slot, 0)
    return State(context, jnp.where(row.mark, context, state.first), anchors)


def advance(velocity: Callable, state: State, rows: Rows, tables: Tables, key, count):
    """The first `count` (int or traced) of `rows` windows: (state, windows `[W, B, V, T, h·w·c]`, see `unmerge`); those not run are zeros.

    A loop over windows around a scan over steps; jit-able with `velocity` closed over and `state` donated. `key`: one key, or one per
    sample `[B]`. A latent's axes are merged in what the loop fills: a last axis of a few channels would be held by a TPU as one of 128.
    """
    batch, views, _, *grid = state.context.shape
    keys = sample_keys(key, batch)
    capacity, frames = np.shape(rows.kind)[0], np.shape(tables.keep)[1]
    rows, tables = jax.tree.map(jnp.asarray, (rows, tables))
    windows = jnp.zeros((capacity, batch, views, frames, math.prod(grid)), state.context.dtype)

    def body(number, carry):
        state, windows = carry
        row = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False), rows)
        x = start_window(state, row, tables, jax.vmap(jax.random.fold_in, (0, None))(keys, row.part))
        x = sample_window(velocity, x, tables.levels[row.kind], row.conditions)
        return after_window(state, row, x), jax.lax.dynamic_update_index_in_dim(windows, x.reshape(windows.shape[1:]), number, 0)

    # With a trip count that the compiler knows, a loop of one window would be inlined, and its sums could round otherwise.
    return jax.lax.fori_loop(0, jnp.asarray(count, jnp.int32), body, (state, windows))


def unmerge(windows, grid):
    """Windows `[W, B, V, T, h·w·c]` that `advance` filled (NumPy or JAX), for grid = (h, w, c) → `[W, B, V, T, h, w, c]`."""
    return windows.reshape(*windows.shape[:4], *grid)


def new_frames(plan: RolloutPlan, kind: int, window):
    """Frames of the video `[B, V, n, h, w, c]` that a window `[B, V, T, h, w, c]` of a kind adds; coarse windows add none."""
    known = {"bootstrap": plan.given, "coarse": plan.window}.get(KINDS[kind], plan.conditioning)
    return window[:, :, known:]


def collect(plan: RolloutPlan, windows, anchors=None) -> Rollout:
    """The video made of all windows `[W, B, V, T, h, w, c]` in order, as NumPy or JAX arrays.

    `anchors [B, V, A, h, w, c]`: those that were given, if any; the coarse windows are then not among `windows`.
    """
    xp = jnp if isinstance(windows, jax.Array) else np
    parts, first = [], 0

    def flat(part):  # [W, B, V, n, …] → [B, V, W·n, …]
        part = xp.moveaxis(part, 0, 2)
        return part.reshape(part.shape[:2] + (-1,) + part.shape[4:])

    for stage, stage_windows in plan.stages.items():
        if stage == "coarse" and anchors is not None:
            continue
        here = windows[first : first + stage_windows.count]
        first += stage_windows.count
        if stage == "bootstrap":
            parts.append(flat(here[:, :, :, plan.given :]))
        elif stage == "coarse":
            anchors = flat(here[:, :, :, plan.conditioning :])[:, :, plan.anchor_slots]
        else:
            parts.append(flat(here[:, :, :, plan.conditioning :]))
    corrected = None
    if anchors is not None:  # `here` are the refining windows, the last stage
        corrected = flat(here[np.flatnonzero(plan.refine.anchored)][:, :, :, np.array(plan.refine.places, int)])
    return Rollout(xp.concatenate(parts, axis=2)[:, :, : plan.frames], anchors, corrected)


def rollout(
    velocity: Callable,
    first_frames,
    plan: RolloutPlan,
    coarse_conditions,
    refine_conditions,
    key,
    options: SamplerOptions = SamplerOptions(),
    *,
    bootstrap_conditions=None,
    anchors=None,
) -> Rollout:
    """Generates a long video along `plan`; jit-able with `plan`, `options` and `velocity` closed over.

    `first_frames [B, V, G, h, w, c]` clean latents, the last is frame 0, G = plan.given; conditions of each stage (None if the plan
    has no such stage): pytrees whose leaves lead with [W, B], window by window as in `plan.coarse`, `plan.refine`,
    `plan.bootstrap` (W = 1). `key`: one key, or one per sample `[B]`. `anchors [B, V, A, h, w, c]`: used in place of those of the coarse
    stage. Raises UserError if frames or conditions do not fit the plan.
    """
    conditions = {"bootstrap": bootstrap_conditions, "coarse": coarse_conditions, "refine": refine_conditions}
    state = start_state(first_frames, plan, anchors)
    skip = anchors is not None
    check_conditions(plan, conditions, first_frames.shape[0], skip_coarse=skip)
    rows = make_rows(plan, conditions, skip_coarse=skip)
    _, windows = advance(velocity, state, rows, make_tables(plan, options), key, len(rows.kind))
    return collect(plan, unmerge(windows, first_frames.shape[3:]), anchors)


def check_conditions(plan: RolloutPlan, conditions: dict, batch: int, *, skip_coarse: bool = False) -> None:
    """Raises UserError when the number of windows or samples in the conditions of a stage is not the plan's."""
    for stage, windows in plan.stages.items():
        for leaf in jax.tree.leaves(conditions[stage]) if not (skip_coarse and stage == "coarse") else ():
            if np.shape(leaf)[:2] != (windows.count, batch):
                raise UserError(f"{stage} conditions must lead with (windows, batch) = ({windows.count}, {batch}), got {np.shape(leaf)[:2]}")
