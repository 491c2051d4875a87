"""Do neighbouring cameras agree where they see the same strip of the world?

Pixels of one camera are carried into its neighbour over a simple model of the surroundings, a bowl: the flat ground (z = 0 of
the ego frame) out to a radius, and an upright wall at that radius for everything above. What stands nearer than the wall or
beyond it lands some pixels off (at 30 m and 0.5 m between the cameras less than a degree for anything farther than 15 m), so
the numbers are read against two others: the real video's own agreement, the best that this model can show, and a wrong
pairing (the neighbour's picture exchanged for that of another camera), which any street scores because road is below and
sky above.
"""

import dataclasses

import numpy as np

from mila_jax.errors import UserError
from mila_jax.evaluate.quality import grey
from mila_jax.geometry import inverse, project, transform
from mila_jax.views import VIEWS, neighbours


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Pixels of view `first` that view `second` sees too: integer `rows`, `columns` [p] and positions `x`, `y` [p] in `second`."""

    first: int
    second: int
    rows: np.ndarray
    columns: np.ndarray
    x: np.ndarray
    y: np.ndarray


def bowl_points(origin, directions, radius):
    """Where rays meet the bowl.

    origin [3] and directions [n, 3] in the ego frame (metres), radius in metres, larger than the origin's distance from the z
    axis. Returns [n, 3].
    """
    a = np.square(directions[:, :2]).sum(-1)
    b = directions[:, :2] @ origin[:2]
    c = origin[:2] @ origin[:2] - radius**2
    wall = (-b + np.sqrt(b * b - a * c)) / np.maximum(a, 1e-12)
    down = directions[:, 2] < -1e-9
    ground = np.where(down, -origin[2] / np.where(down, directions[:, 2], -1.0), np.inf)
    return origin + np.minimum(wall, ground)[:, None] * directions


def overlaps(intrinsics, translation, quaternion, height, width, radius=30.0):
    """The shared strips of the six cameras, once round the ring.

    intrinsics [6, 4] (fx, fy, cx, cy as fractions of width and height), translation [6, 3] and quaternion [6, 4] camera→ego,
    all in the order of `VIEWS`; height, width of the pictures in pixels. Returns one `Overlap` per neighbouring pair; it has
    no pixels where two cameras share nothing.
    """
    rows, columns = (grid.ravel() for grid in np.mgrid[:height, :width])
    camera2ego = transform(translation, quaternion)
    found = []
    for first, second in neighbours():
        fx, fy, cx, cy = intrinsics[first]
        rays = np.stack([((columns + 0.5) / width - cx) / fx, ((rows + 0.5) / height - cy) / fy, np.ones(len(rows))], -1)
        points = bowl_points(camera2ego[first, :3, 3], rays @ camera2ego[first, :3, :3].T, radius)
        place, depth = project(points, inverse(camera2ego[second]), intrinsics[second])
        x, y = place[:, 0] * width - 0.5, place[:, 1] * height - 0.5
        seen = (depth > 0) & (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
        found.append(Overlap(first, second, rows[seen], columns[seen], x[seen], y[seen]))
    return found


def _bilinear(images, x, y):
    """images [t, H, W] at positions x, y [p] inside them -> [t, p]."""
    left = np.minimum(x.astype(int), images.shape[2] - 2)
    top = np.minimum(y.astype(int), images.shape[1] - 2)
    across, down = x - left, y - top
    upper = images[:, top, left] * (1 - across) + images[:, top, left + 1] * across
    lower = images[:, top + 1, left] * (1 - across) + images[:, top + 1, left + 1] * across
    return upper * (1 - down) + lower * down


def view_agreement(frames, strips, swap=0):
    """Agreement of neighbouring views in their shared strips.

    frames: uint8 [t, 6, H, W, 3]; strips: from `overlaps` for this H, W. swap: takes the neighbour's pixels from the camera
    that many places further round the ring, for the wrong pairing. Returns dict of float64 [t, pairs] (pairs in the order of
    `strips`): correlation of luma (−1..1; 0 where a strip is uniform) and difference, the mean absolute one in grey levels
    0..255. Raises `UserError` if no two cameras overlap.
    """
    frames = np.asarray(frames)
    if frames.ndim != 5 or frames.shape[1] != len(VIEWS):
        raise ValueError(f"expected frames [t, {len(VIEWS)}, H, W, 3], got {frames.shape}")
    strips = [s for s in strips if len(s.rows) > 1]
    if not strips:
        raise UserError("view agreement: no two neighbouring cameras overlap; check the rig's intrinsics and extrinsics")
    luma = grey(frames)
    correlation, difference = [], []
    for strip in strips:
        own = luma[:, strip.first, strip.rows, strip.columns]
        other = _bilinear(luma[:, (strip.second + swap) % len(VIEWS)], strip.x, strip.y)
        difference.append(np.abs(own - other).mean(-1))
        own, other = own - own.mean(-1, keepdims=True), other - other.mean(-1, keepdims=True)
        scale = np.sqrt(np.square(own).sum(-1) * np.square(other).sum(-1))
        correlation.append(np.where(scale > 1e-9, (own * other).sum(-1) / np.maximum(scale, 1e-9), 0.0))
    return {"correlation": np.stack(correlation, -1), "difference": np.stack(difference, -1)}


def agreement_table(videos, intrinsics, translation, quaternion, radius=30.0):
    """Rows for a report: how well the views of each video agree, beside the wrong pairing.

    videos: dict name -> uint8 [t, 6, H, W, 3] (for example generated and real). Rig as in `overlaps`. Returns list of dicts:
    video, correlation, wrong_pairing_correlation, difference, wrong_pairing_difference (means over frames and pairs).
    """
    table = []
    for name, frames in videos.items():
        strips = overlaps(intrinsics, translation, quaternion, *np.shape(frames)[2:4], radius)
        right = view_agreement(frames, strips)
        wrong = view_agreement(frames, strips, swap=2)
        row = {"video": name}
        for key in ("correlation", "difference"):
            row[key] = float(right[key].mean())
            row[f"wrong_pairing_{key}"] = float(wrong[key].mean())
        table.append(row)
    return table
