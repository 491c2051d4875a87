"""VBench's subject and background consistency, from features of a video's frames, and its motion smoothness. Source: Huang et al., arXiv
2311.17982, and the code of Vchitect/VBench (vbench/subject_consistency.py, background_consistency.py, motion_smoothness.py). Temporal flickering
is `quality.temporal_flickering`.
"""

from collections.abc import Callable

import numpy as np


def consistency(features) -> float:
    """features [t, d], t >= 2, of the frames of one video, in order → mean over the frames from the second on of half the cosine to the frame before
    and half that to the first frame, negative ones taken as 0. A still video has 1."""
    x = np.asarray(features, np.float64)
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"expected features [t, d] of two frames at least, got {x.shape}")
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    before, first = (x[1:] * x[:-1]).sum(1), x[1:] @ x[0]
    return float((np.maximum(before, 0) + np.maximum(first, 0)).mean() / 2)


def motion_smoothness(frames, interpolate: Callable) -> float:
    """(255 − mean |real − interpolated|) / 255 over frames 1, 3, 5 … of uint8 [t, H, W, 3], t >= 3; 1 is best. A last frame without a follower is
    left out, as there.

    interpolate: (first, second), uint8 [n, H, W, 3] each → the frames halfway between, uint8 (`amt.Interpolator`). VBench scales pictures down
    where a GPU's memory asks for it (two million pixels on 24 GB, four on 80 GB); this does not.
    """
    x = np.asarray(frames)
    if x.ndim != 4 or x.dtype != np.uint8 or len(x) < 3:
        raise ValueError(f"expected uint8 frames [t, H, W, 3] of three frames at least, got {x.dtype} {x.shape}")
    known = x[::2]
    between = np.asarray(interpolate(known[:-1], known[1:]))
    return float((255 - np.abs(x[1::2][: len(between)].astype(np.int16) - between).mean()) / 255)
