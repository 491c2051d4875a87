"""Which frames of a window are clean: training masks, and Open-Sora's mask strategies for editing."""

from collections.abc import Sequence

import numpy as np
import jax
import jax.numpy as jnp

from mila_jax.errors import UserError


def conditioning_mask(conditioning, frames: int):
    """Clean mask `[B, T]`: the first `conditioning [B]` (int) frames are clean."""
    return jnp.arange(frames) < jnp.asarray(conditioning)[:, None]


def training_masks(key, conditioning, frames: int, *, tail_rate=0.0, noisy_rate=0.75):
    """Clean and anchor masks of training windows, both bool `[B, T]`.

    `conditioning [B]`: clean first frames. With probability `tail_rate` (scalar or `[B]`; 0 where windows have no tail anchor,
    as in coarse windows) the last frame is an anchor; of these `noisy_rate` are noisy (true in the anchor mask; 75 % in the
    paper's third stage), the others clean (divide and conquer). Loss mask and levels follow: see `schedules.training_levels`.
    """
    clean = conditioning_mask(conditioning, frames)
    has_tail, is_noisy = jax.random.uniform(key, (2, clean.shape[0]))
    has_tail, is_noisy = has_tail < jnp.asarray(tail_rate), is_noisy < jnp.asarray(noisy_rate)
    last = jnp.arange(frames) == frames - 1
    anchor = last & (has_tail & is_noisy)[:, None] & ~clean
    return clean | (last & (has_tail & ~is_noisy)[:, None]), anchor


def parse_mask_strategy(text: str) -> list[tuple[int, int, int, int, int, float]]:
    """`;`-separated groups "loop, reference, reference start, target start, length, edit ratio" (Open-Sora 1.2, inference_utils).

    Missing trailing fields are 0, 0, 0, 0, 1, 0. Empty text: no groups. Raises UserError for a malformed group.
    """
    groups = []
    for group in filter(None, (text or "").split(";")):
        fields = group.split(",")
        fields += ["0", "0", "0", "0", "1", "0"][len(fields) :]
        try:
            *integers, ratio = fields
            loop, reference, start, target, length = (int(field) for field in integers)
            groups.append((loop, reference, start, target, length, float(ratio)))
        except ValueError:
            raise UserError(f"mask strategy {group!r}: expected up to 5 integers and an edit ratio, as in '0,0,-3,0,3,0.4'") from None
    return groups


def apply_mask_strategy(z, references: Sequence[Sequence[np.ndarray]], strategies: Sequence[str], *, loop: int = 0, align: int | None = None):
    """Copies reference latents into `z` and writes their edit ratios (Open-Sora 1.2, inference_utils.apply_mask_strategy).

    `z [B, V, T, h, w, c]`; `references[b]`: list of `[V, t, h, w, c]`; `strategies[b]`: text for `parse_mask_strategy`; groups of
    other loops are skipped. Negative starts count from the end; `align` snaps starts to its multiples (5 = one chunk of Open-Sora's
    video autoencoder). Returns (new z, edit ratio `[B, T]` float32), or (z, None) when there are no strategies. Runs on the host.
    Raises UserError when a group names a reference that is not there.
    """
    z = np.array(z)
    if not strategies:
        return z, None
    frames = z.shape[2]
    ratio = np.ones((len(strategies), frames), np.float32)
    for sample, text in enumerate(strategies):
        for group_loop, number, start, target, length, edit in parse_mask_strategy(text):
            if group_loop != loop:
                continue
            if not 0 <= number < len(references[sample]):
                raise UserError(f"mask strategy {text!r} names reference {number}, but sample {sample} has {len(references[sample])}")
            reference = np.asarray(references[sample][number])
            available = reference.shape[1]
            start += available if start < 0 else 0
            target += frames if target < 0 else 0
            if align is not None:
                start, target = _snap(start, align, available), _snap(target, align, frames)
            length = min(length, frames - target, available - start)
            z[sample, :, target : target + length] = reference[:, start : start + length]
            ratio[sample, target : target + length] = edit
    return z, ratio


def _snap(value: int, step: int, limit: int) -> int:
    """Nearest multiple of `step` (ties fall), except that rounding up never leaves the last whole step below `limit`."""
    whole, rest = divmod(value, step)
    if rest > step / 2 and whole < limit // step - 1:
        whole += 1
    return whole * step
