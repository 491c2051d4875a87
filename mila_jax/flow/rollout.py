"""Long videos: windows after windows in `lax.scan`, following a `RolloutPlan` (paper 3.2-3.4).

A step of the scan carries the last N frames of each view and gives the next T − N, so time and memory of the compiled program
do not depend on the number of windows. Noise of a window derives from (key, stage, window number, sample), nothing else:
`continue_video` called window by window from the host gives the same frames as the scan.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mila_jax.errors import UserError
from mila_jax.flow.anchors import renoise
from mila_jax.flow.plan import RolloutPlan, Windows
from mila_jax.flow.sampler import noise_like, sample_keys, sample_window
from mila_jax.flow.schedules import check_anchor, window_schedule

STAGES = {"bootstrap": 0, "coarse": 1, "refine": 2}


@dataclasses.dataclass(frozen=True)
class SamplerOptions:
    """How windows are denoised; hashable, so it can be a static argument.

    `steps` K; TPD `family` and strength `alpha` (0: all frames together); JDC `a` (how wrong anchors are taken to be) and
    `sigma_a` (level they start at; both only matter for coarse_to_refine; a = 0 re-noises as if anchors were right);
    `shift`: strength R of the timestep transform (`timeshift.shift_ratio`), 1 for none; `temperature`: scale of the noise that frames
    start from (1: the model's law; below 1 gives up variety for calm pictures, as with any small generator; anchors are
    re-noised at full strength, since their level says how much noise they hold). Raises UserError if σ_a < a.
    """

    steps: int = 50
    family: str = "exponential"
    alpha: float = 0.5
    a: float = 0.15
    sigma_a: float = 0.4
    shift: float = 1.0
    temperature: float = 1.0

    def __post_init__(self):
        check_anchor(self.a, self.sigma_a)
        if not 0 <= self.temperature <= 1:
            raise UserError(f"generate.temperature={self.temperature} must lie between 0 and 1")

    def schedule(self, windows: Windows):
        """Levels `[K+1, T]` of every window of a stage."""
        return window_schedule(
            self.steps, windows.clean, anchor=windows.anchor, family=self.family, alpha=self.alpha,
            sigma_a=self.sigma_a, a=self.a, shift=self.shift,
        )  # fmt: skip


class Rollout(NamedTuple):
    """A long video in latents.

    `latents [B, V, F, h, w, c]`: frames 1 … F; `anchors [B, V, A, h, w, c]`: as the coarse stage gave them, `corrected`: as they
    are in the video (frame numbers `plan.refine.indices[:, -1]`; the last may lie beyond F). Both None without anchors.
    """

    latents: jax.Array
    anchors: jax.Array | None
    corrected: jax.Array | None


def window_keys(key, batch: int, stage: str, number):
    """Keys `[B]` of window `number` (int or traced, below 2^24) of `stage`. `key`: one key, or one per sample `[B]`."""
    # one fold for both: each costs a hash in the compiled window
    part = jnp.uint32(STAGES[stage] << 24) + jnp.asarray(number, jnp.uint32)
    return jax.vmap(jax.random.fold_in, (0, None))(sample_keys(key, batch), part)


def start_window(context, anchor, windows: Windows, options: SamplerOptions, keys):
    """The window before its first step, `[B, V, T, h, w, c]`: clean frames, noise, and the anchor (kept or re-noised) at the end.

    `context [B, V, N, h, w, c]`; `anchor [B, V, h, w, c]` or None.
    """
    frames = len(windows.clean)
    shape = context.shape[:2] + (frames - windows.conditioning,) + context.shape[3:]
    noise = noise_like(keys, shape, context.dtype)
    fresh = options.temperature * noise
    if windows.kept_anchor is not None:
        fresh = fresh.at[:, :, -1].set(anchor.astype(noise.dtype))
    elif windows.anchor is not None:
        renoised, _ = renoise(anchor.astype(noise.dtype), options.sigma_a, options.a, noise[:, :, -1])
        fresh = fresh.at[:, :, -1].set(renoised)
    return jnp.concatenate([context, fresh], axis=2)


def continue_video(velocity: Callable, context, anchor, conditions, keys, *, windows: Windows, options: SamplerOptions):
    """One window: (context of the next, new frames `[B, V, T−N, h, w, c]`).

    `context [B, V, N, h, w, c]`: the last frames of the video so far; `anchor [B, V, h, w, c]` or None; `conditions`: leaves lead
    with the batch; `keys [B]` from `window_keys`.
    """
    x = start_window(context, anchor, windows, options, keys)
    x = sample_window(velocity, x, options.schedule(windows), conditions)
    new = x[:, :, windows.conditioning:]
    return jnp.concatenate([context, new], axis=2)[:, :, -context.shape[2]:], new


def scan_stage(velocity: Callable, context, anchors, conditions, key, *, stage: str, windows: Windows, options: SamplerOptions):
    """All windows of a stage in one scan: (last context, new frames `[B, V, W·(T−N), h, w, c]`).

    `anchors [W, B, V, h, w, c]` or None; leaves of `conditions` lead with [W, B].
    """

    batch = context.shape[0]
    key = sample_keys(key, batch)

    def body(carry, window):
        number, anchor, here = window
        keys = window_keys(key, batch, stage, number)
        return continue_video(velocity, carry, anchor, here, keys, windows=windows, options=options)

    context, new = jax.lax.scan(body, context, (jnp.arange(windows.count), anchors, conditions))
    new = jnp.moveaxis(new, 0, 2)  # [B, V, W, T−N, ...]
    return context, new.reshape(new.shape[:2] + (-1,) + new.shape[4:])


def rollout(velocity: Callable, first_frames, plan: RolloutPlan, coarse_conditions, refine_conditions, key,
            options: SamplerOptions = SamplerOptions(), *, bootstrap_conditions=None) -> Rollout:
    """Generates a long video along `plan`; jit-able with `plan`, `options` and `velocity` closed over.

    `first_frames [B, V, G, h, w, c]` clean latents, the last is frame 0, G = plan.given; conditions of each stage (None if the plan
    has no such stage): pytrees whose leaves lead with [W, B], window by window as in `plan.coarse`, `plan.refine`,
    `plan.bootstrap` (W = 1). `key`: one key, or one per sample `[B]`. Raises UserError if frames or conditions do not fit the plan.
    """
    _check(first_frames, plan, {"bootstrap": bootstrap_conditions, "coarse": coarse_conditions, "refine": refine_conditions})
    context, parts, key = first_frames[:, :, -plan.conditioning:], [], sample_keys(key, first_frames.shape[0])

    if plan.bootstrap is not None:
        _, new = scan_stage(velocity, context, None, bootstrap_conditions, key, stage="bootstrap", windows=plan.bootstrap, options=options)
        parts.append(new)
        context = jnp.concatenate([context, new], axis=2)[:, :, -plan.conditioning:]

    anchors = corrected = per_window = None
    if plan.coarse is not None:
        _, anchors = scan_stage(velocity, context, None, coarse_conditions, key, stage="coarse", windows=plan.coarse, options=options)
        anchors = anchors[:, :, :plan.anchors]
        per_window = jnp.moveaxis(anchors, 2, 0)

    if plan.refine is not None:
        _, new = scan_stage(velocity, context, per_window, refine_conditions, key, stage="refine", windows=plan.refine, options=options)
        parts.append(new)
        if anchors is not None:
            corrected = new[:, :, plan.anchor_stride - 1::plan.anchor_stride]

    latents = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=2)
    return Rollout(latents[:, :, :plan.frames], anchors, corrected)


def _check(first_frames, plan: RolloutPlan, conditions: dict) -> None:
    """Raises UserError when the number of first frames or of windows in the conditions is not the plan's."""
    if first_frames.shape[2] != plan.given:
        raise UserError(f"the plan is for {plan.given} first frames per view, got {first_frames.shape[2]}")
    for stage, windows in plan.stages.items():
        for leaf in jax.tree.leaves(conditions[stage]):
            if leaf.shape[:2] != (windows.count, first_frames.shape[0]):
                raise UserError(
                    f"{stage} conditions must lead with (windows, batch) = ({windows.count}, {first_frames.shape[0]}), got {leaf.shape[:2]}"
                )
