"""Numbers about pictures that need no network: PSNR, contrast, sharpness, flicker.

They judge nothing alone. Beside the same numbers of the real video they show the usual failures at a glance: contrast falls
when a long video washes out, sharpness rises with noise and falls with blur, flicker is near zero when the video freezes.
"""

import numpy as np

_LUMA = np.array([0.299, 0.587, 0.114])


def psnr(reference, estimate):
    """Peak signal-to-noise ratio in dB of each picture.

    reference, estimate: uint8 [..., H, W, 3]. Returns float64 [...]; identical pictures give infinity.
    """
    reference, estimate = np.asarray(reference), np.asarray(estimate)
    if reference.shape != estimate.shape or reference.dtype != np.uint8 or estimate.dtype != np.uint8:
        got = f"{reference.dtype} {reference.shape} and {estimate.dtype} {estimate.shape}"
        raise ValueError(f"expected two uint8 arrays of one shape, got {got}")
    error = np.square(reference.astype(np.float64) - estimate).mean((-3, -2, -1))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255.0**2 / error)


def grey(images):
    """uint8 [..., H, W, 3] -> luma float64 [..., H, W] in 0..255 (ITU-R BT.601 weights)."""
    return np.asarray(images) @ _LUMA


def frame_statistics(images):
    """Per picture of uint8 [..., H, W, 3], on luma in grey levels 0..255: dict of float64 [...].

    brightness: mean; contrast: standard deviation; sharpness: root mean square of the differences to the next pixel (right
    and below), the gradient energy.
    """
    luma = grey(images)
    right, below = np.diff(luma, axis=-1), np.diff(luma, axis=-2)
    energy = np.square(right).mean((-2, -1)) + np.square(below).mean((-2, -1))
    return {"brightness": luma.mean((-2, -1)), "contrast": luma.std((-2, -1)), "sharpness": np.sqrt(energy)}


def frame_change(frames):
    """Mean absolute change between following frames: uint8 [t, ..., H, W, 3], t >= 2 -> [t-1, ...] in grey levels 0..255."""
    frames = np.asarray(frames).astype(np.int16)
    return np.abs(np.diff(frames, axis=0)).mean((-3, -2, -1))


def temporal_flickering(frames):
    """(255 − mean |frame_i − frame_{i+1}|) / 255 over uint8 [t, ..., H, W, 3], t >= 2; 1 is a still picture.

    Source: the "temporal flickering" dimension of VBench, which uses no network.
    """
    return float((255 - frame_change(frames).mean()) / 255)
