"""Where vehicles are in the pictures, at the latents' resolution: from the annotated boxes, for a training loss that weighs them more.

Boxes are annotated twice a second and pictures taken twelve times, so a box is moved along the straight line between the two moments around a
picture. What covers a vehicle is not known: boxes that are mostly hidden (nuScenes' visibility level 1) are left out, the others count whole.
"""

from typing import NamedTuple

import numpy as np

from data_pipeline.nuscenes.annotations import TABLES, Instance, Named, SampleAnnotation, has_boxes
from data_pipeline.nuscenes.reader import Instant, NuScenes, version_folder
from data_pipeline.nuscenes.tables import dangling, stream
from mila_jax import geometry
from mila_jax.errors import UserError
from mila_jax.views import VIEWS

CATEGORIES = "vehicle."
HIDDEN = "1"  # less than 40 % of the box is seen
LONGEST_GAP_US = 1_200_000  # between annotated moments: two steps at 2 Hz
HOLD_US = 250_000  # how long before its first and after its last annotation a box is taken to stay where it was
NEAR = 0.3  # metres before the camera, where boxes are cut
CORNERS = np.array([[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)])
EDGES = np.array([(i, j) for i in range(8) for j in range(i) if np.abs(CORNERS[i] - CORNERS[j]).sum() == 1])


class Vehicles(NamedTuple):
    """The n boxes of one scene, by vehicle and time. instance int64 [n]; times_us int64 [n]; translation [n, 3] metres in the world; size [n, 3]
    metres (width, length, height); rotation [n, 4], w first."""

    instance: np.ndarray
    times_us: np.ndarray
    translation: np.ndarray
    size: np.ndarray
    rotation: np.ndarray


def read_vehicles(nusc: NuScenes) -> dict[str, Vehicles]:
    """The boxes of all vehicles that are not mostly hidden, by scene token; one pass over the tables.

    Raises `UserError`: a version without annotations, a missing or broken table, a token that points nowhere.
    """
    folder = version_folder(nusc.root, nusc.version, ("sample", *TABLES))
    if not has_boxes(folder):
        raise UserError(f"{folder} has no annotations, which data.foreground=True needs; set data.foreground=False, or take an annotated version")
    samples = {row.token: (row.scene_token, row.timestamp) for row in stream(folder, "sample")}
    categories = {row.token for row in stream(folder, "category", Named) if row.name.startswith(CATEGORIES)}
    instances = {row.token: i for i, row in enumerate(stream(folder, "instance", Instance)) if row.category_token in categories}
    rows: dict[str, list[tuple]] = {}
    for row in stream(folder, "sample_annotation", SampleAnnotation):
        if row.visibility_token == HIDDEN or row.instance_token not in instances:
            continue
        if row.sample_token not in samples:
            raise dangling(folder, "sample_annotation", row, "sample_token", "sample")
        scene, time_us = samples[row.sample_token]
        rows.setdefault(scene, []).append((instances[row.instance_token], time_us, *row.translation, *row.size, *row.rotation))
    return {scene: _sorted(np.array(found)) for scene, found in rows.items()}


def _sorted(rows: np.ndarray) -> Vehicles:
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]  # whole microseconds are exact in float64
    return Vehicles(rows[:, 0].astype(np.int64), rows[:, 1].astype(np.int64), rows[:, 2:5], rows[:, 5:8], rows[:, 8:])


def boxes_at(vehicles: Vehicles, time_us: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Translations [m, 3], sizes [m, 3] and rotations [m, 4] of the vehicles that are somewhere at a time."""
    times, count = vehicles.times_us, len(vehicles.times_us)
    following = np.minimum(np.arange(count) + 1, count - 1)
    gap = times[following] - times
    linked = (vehicles.instance[following] == vehicles.instance) & (gap > 0) & (gap <= LONGEST_GAP_US)
    first = ~np.concatenate([[False], linked[:-1]])
    since = time_us - times
    between = linked & (since >= 0) & (since < gap)
    held = (~linked & (since >= 0) & (since <= HOLD_US)) | (first & (since < 0) & (since >= -HOLD_US))
    chosen = np.flatnonzero(between | held)
    to = np.where(between, following, np.arange(count))[chosen]
    share = np.where(between, since / np.maximum(gap, 1), 0.0)[chosen]
    translation = vehicles.translation[chosen] + share[:, None] * (vehicles.translation[to] - vehicles.translation[chosen])
    return translation, vehicles.size[chosen], geometry.interpolate_rotation(vehicles.rotation[chosen], vehicles.rotation[to], share)


def coverage(translation, size, rotation, world2camera, intrinsics, shape) -> np.ndarray:
    """Part of each place of an image that the upright rectangles around m boxes cover, float64 [h, w] in 0 … 1 (of several, the largest).

    translation, size, rotation: as of `boxes_at`; world2camera [4, 4]; intrinsics: fx, fy, cx, cy as fractions; shape: (h, w).
    """
    height, width = shape
    corners = CORNERS * size[:, None, [1, 0, 2]]
    points = np.einsum("mij,mkj->mki", geometry.rotation_matrix(rotation), corners) + translation[:, None]
    points = points @ world2camera[:3, :3].T + world2camera[:3, 3]
    a, b = points[:, EDGES[:, 0]], points[:, EDGES[:, 1]]
    cut = (a[..., 2] < NEAR) != (b[..., 2] < NEAR)
    share = (NEAR - a[..., 2]) / np.where(cut, b[..., 2] - a[..., 2], 1.0)
    points = np.concatenate([points, a + share[..., None] * (b - a)], 1)
    seen = np.concatenate([points[:, :8, 2] >= NEAR, cut], 1)
    depth = np.where(seen, points[..., 2], 1.0)
    rows, columns = (
        _covered(focal * points[..., i] / depth + centre, seen, n)
        for i, n, focal, centre in ((1, height, intrinsics[1], intrinsics[3]), (0, width, intrinsics[0], intrinsics[2]))
    )
    return (rows[:, :, None] * columns[:, None, :]).max(0, initial=0.0)


def _covered(fractions, seen, count: int) -> np.ndarray:
    """Part [m, count] of each of `count` equal stretches of 0 … 1 between the least and the largest of `fractions` [m, k] that are seen."""
    low = np.where(seen, fractions, np.inf).min(1)[:, None] * count
    high = np.where(seen, fractions, -np.inf).max(1)[:, None] * count
    place = np.arange(count)
    return np.clip(np.minimum(high, place + 1) - np.maximum(low, place), 0.0, 1.0)


def foreground_of(vehicles: Vehicles | None, moment: Instant, shape) -> np.ndarray:
    """uint8 [6, h, w]: the part of each place of the six pictures of an instant that vehicles cover, 255 = all of it. None: no vehicle."""
    out = np.zeros((len(VIEWS), *shape), np.uint8)
    for view in range(len(VIEWS) if vehicles is not None else 0):
        ego = geometry.transform(moment.ego_translation[view], moment.ego_rotation[view])
        camera = ego @ geometry.transform(moment.cam2ego_translation[view], moment.cam2ego_rotation[view])
        boxes = boxes_at(vehicles, moment.timestamps_us[view])
        out[view] = np.rint(255 * coverage(*boxes, geometry.inverse(camera), moment.intrinsics[view], shape))
    return out
