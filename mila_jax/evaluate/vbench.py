"""VBench's subject and background consistency, from features of a video's frames. Source: Huang et al., arXiv 2311.17982, and the code of
Vchitect/VBench (vbench/subject_consistency.py, background_consistency.py). Temporal flickering is `quality.temporal_flickering`.
"""

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
