"""Rectified flow files: trajectories, training loss, time transform and mask strategies of Open-Sora 1.2, replayed by `flow`.

`{name}/out` is what the sampler made of `in/z` with the analytic velocity v = −z + 0.1 sin(t/100) + 0.05 mean(y), t = 1000·level;
`meta_json` holds each run's settings. The training entries were made with the prediction v = x_t / 2 + t / 100000 (recovered from
the recorded losses; the file does not say). Layouts of the file: latents [b, c, t, h, w].
"""

import json

import jax
import jax.numpy as jnp
import numpy as np

from mila_jax.errors import UserError
from mila_jax.flow.guidance import guided
from mila_jax.flow.masks import apply_mask_strategy
from mila_jax.flow.rectified_flow import add_noise, align, masked_loss, velocity_target
from mila_jax.flow.sampler import edit_rows, sample_edit, sample_window
from mila_jax.flow.timeshift import published_latent_frames, sampling_times, shift, shift_ratio

TRAJECTORY_TOLERANCE = 5e-5
LOSS_TOLERANCE = 1e-5
TIME_TOLERANCE = 2e-6  # of times in [0, 1]


def matches(keys) -> bool:
    """True for files of this format."""
    return "meta_json" in keys and any(key.split("/")[0] in ("tt_grid", "train", "mask_strategy") or key == "in/z" for key in keys)


def check(npz) -> list[tuple[str, float, float]]:
    """(output, largest error, tolerance) of everything the file holds; raises UserError if entries that belong together are missing."""
    try:
        meta = json.loads(str(npz["meta_json"]))
        results = []
        for name in sorted(key.removesuffix("/out") for key in npz if key.endswith("/out") and key.removesuffix("/out") in meta):
            results += _trajectory(npz, name, meta[name])
        if "train/x0" in npz:
            results += _training(npz)
        if "tt_grid/out" in npz:
            results += _time_transform(npz)
        if "mask_strategy" in meta:
            results += _mask_strategy(npz, meta["mask_strategy"])
    except KeyError as error:
        raise UserError(f"the rectified flow file lacks {error}; get it again") from None
    if not results:
        raise UserError("the rectified flow file holds no output that this command knows; get it again")
    return results


def _ours(x):
    """[..., c, t, h, w] → [..., v=1, t, h, w, c]."""
    return jnp.asarray(np.moveaxis(x, -4, -1))[..., None, :, :, :, :]


def _error(ours, golden) -> float:
    """Largest absolute difference; NaN must stand where NaN stands, and shapes must be equal, else it is infinite."""
    ours, golden = np.asarray(ours, np.float64), np.asarray(golden, np.float64)
    if ours.shape != golden.shape or not np.array_equal(np.isnan(ours), np.isnan(golden)):
        return float("inf")
    return float(np.max(np.abs(np.where(np.isnan(golden), 0, ours - golden)), initial=0.0))


def _velocity(latents, levels, conditions):
    """The file's analytic velocity; `conditions`: mean of the text `[B]`. Frames at level 0 are not moved, whatever it says there."""
    return -latents + align(0.1 * jnp.sin(levels * 10), latents) + 0.05 * align(conditions, latents)


def _text_mean(y):
    return jnp.asarray(y).mean(axis=tuple(range(1, np.ndim(y))))


def _ratio(npz):
    frames = npz["in/num_frames"]  # the first sample's decides for all whether they are images
    latent_frames = np.ones_like(frames) if frames.flat[0] == 1 else published_latent_frames(np.maximum(frames, 2))
    return shift_ratio(npz["in/height"], npz["in/width"], latent_frames)


def _trajectory(npz, name: str, settings: dict) -> list[tuple[str, float, float]]:
    z, cond, null = _ours(npz["in/z"]), _text_mean(npz["in/y_cond"]), _text_mean(npz["in/y_null"])
    ratio = _ratio(npz) if settings["use_timestep_transform"] else np.ones(len(z))
    times = sampling_times(settings["num_sampling_steps"], ratio, discrete=settings["discrete"])
    golden_times = npz[f"{name}/timesteps"] / 1000
    results = [(f"{name}/timesteps", _error(times[:-1], golden_times), TIME_TOLERANCE)]
    velocity = guided(_velocity, [lambda _: null], [settings["cfg_scale"]])
    if f"{name}/mask" in npz:
        mask = npz[f"{name}/mask"]
        results.append((f"{name}/x_mask", _error(edit_rows(times, mask)[2], npz[f"{name}/x_mask"]), 0.0))
        out = jax.jit(lambda x, noise: sample_edit(velocity, x, times, mask, cond, noise))(z, _ours(npz[f"{name}/noise"]))
    else:
        schedule = np.broadcast_to(times[:, :, None], times.shape + z.shape[2:3])
        out = jax.jit(lambda x: sample_window(velocity, x, schedule, cond))(z)
    return [*results, (f"{name}/out", _error(out, _ours(npz[f"{name}/out"])), TRAJECTORY_TOLERANCE)]


def _training(npz) -> list[tuple[str, float, float]]:
    x, noise = _ours(npz["train/x0"]), _ours(npz["train/noise"])
    level = jnp.asarray(npz["train/t"]) / 1000
    masks = {"train_nomask": np.ones(x.shape[:1] + x.shape[2:3], bool), "train_mask": npz["train/mask"]}
    results = [("train/x_t_at_t0", _error(add_noise(x, noise, jnp.zeros(len(x))), _ours(npz["train/x_t_at_t0"])), LOSS_TOLERANCE)]
    for name, mask in masks.items():
        levels = jnp.where(mask[:, None], level[:, None, None], 0.0)
        x_t = add_noise(x, noise, levels)
        loss = masked_loss(0.5 * x_t + 0.01 * align(level, x_t), velocity_target(x, noise), mask)
        results.append((f"{name}/x_t", _error(x_t, _ours(npz[f"{name}/x_t"])), LOSS_TOLERANCE))
        results.append((f"{name}/loss", _error(loss.sample_sum / loss.sample_count, npz[f"{name}/loss"]), LOSS_TOLERANCE))
    return results


def _time_transform(npz) -> list[tuple[str, float, float]]:
    height, width = npz["tt_grid/hw"].T[:, :, None, None]
    frames = published_latent_frames(npz["tt_grid/num_frames"])[:, None]
    times = npz["tt_grid/t"] / 1000
    results = [("tt_grid/out", _error(shift(times, shift_ratio(height, width, frames)), npz["tt_grid/out"] / 1000), TIME_TOLERANCE)]
    if "tt_grid/out_scale2_480p_51" in npz:
        ratio = shift_ratio(480, 854, published_latent_frames(51), scale=2.0)
        results.append(("tt_grid/out_scale2", _error(shift(times, ratio), npz["tt_grid/out_scale2_480p_51"] / 1000), TIME_TOLERANCE))
    return results


def _mask_strategy(npz, strategies: list[str]) -> list[tuple[str, float, float]]:
    references = []
    for sample in range(len(strategies)):
        numbers = sum(key.startswith(f"mask_strategy/ref{sample}_") for key in npz)
        references.append([_ours(npz[f"mask_strategy/ref{sample}_{number}"]) for number in range(numbers)])
    results = []
    for case in sorted({key.split("/")[1] for key in npz if key.startswith("mask_strategy/align")}):
        text = case.removeprefix("align")
        align_to = None if text == "None" else int(text)
        z, mask = apply_mask_strategy(_ours(npz["mask_strategy/in_z"]), references, strategies, align=align_to)
        results.append((f"mask_strategy/{case}/z", _error(z, _ours(npz[f"mask_strategy/{case}/z"])), 0.0))
        results.append((f"mask_strategy/{case}/mask", _error(mask, npz[f"mask_strategy/{case}/mask"]), 0.0))
    return results
