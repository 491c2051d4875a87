"""Where vehicles are in the pictures, at the latents' resolution: from the annotated boxes, for a training loss that weighs them more.

Boxes are annotated twice a second and pictures taken twelve times, so a box is moved along the straight line between the two moments around a
picture. What covers a vehicle is not known: boxes that are mostly hidden (nuScenes' visibility level 1) are left out, the others count whole.
"""

from typing import NamedTuple

import numpy as np

from data_pipeline.nuscenes.annotations import TABLES, Instance, Named, SampleAnnotation, has_boxes
from data_pipeline.nuscenes.reader import Instant, NuScenes, version_folder
from data_pipeline.nuscenes.tables import dangling, stream, table_path
from mila_jax import geometry
from mila_jax.errors import UserError
from mila_jax.views import VIEWS

CATEGORIES = "vehicle."
HIDDEN = "1"  # less than 40 % of the box is seen
LONGEST_GAP_US = 1_200_000  # between annotated moments: two steps at 2 Hz
HOLD_US = 250_000  # how long before its first and after its last annotation a box is taken to stay where it was
NEAR = 0.3  # metres before the camera, nearer than which nothing is seen
RAYS = 4  # along each side of a place
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

    Raises `UserError`: a version without annotations or without any vehicle among its categories, a missing or broken table, a token that
    points nowhere.
    """
    folder = version_folder(nusc.root, nusc.version, ("sample", *TABLES))
    if not has_boxes(folder):
        raise UserError(f"{folder} has no annotations, which data.foreground=True needs; set data.foreground=False, or take an annotated version")
    samples = {row.token: (row.scene_token, row.timestamp) for row in stream(folder, "sample")}
    is_vehicle = {row.token: row.name.startswith(CATEGORIES) for row in stream(folder, "category", Named)}
    if not any(is_vehicle.values()):
        raise UserError(
            f"{table_path(folder, 'category')} names no {CATEGORIES}* category, which data.foreground=True needs; set data.foreground=False"
        )
    of_vehicle = {}
    for row in stream(folder, "instance", Instance):
        if row.category_token not in is_vehicle:
            raise dangling(folder, "instance", row, "category_token", "category")
        of_vehicle[row.token] = is_vehicle[row.category_token]
    rows: dict[str, list[tuple]] = {}
    numbers: dict[str, dict[str, int]] = {}  # of the vehicles of each scene
    for row in stream(folder, "sample_annotation", SampleAnnotation):
        for key, table in (("instance_token", of_vehicle), ("sample_token", samples)):
            if getattr(row, key) not in table:
                raise dangling(folder, "sample_annotation", row, key, key.removesuffix("_token"))
        if row.visibility_token == HIDDEN or not of_vehicle[row.instance_token]:
            continue
        scene, time_us = samples[row.sample_token]
        mine = numbers.setdefault(scene, {})
        number = mine.setdefault(row.instance_token, len(mine))
        rows.setdefault(scene, []).append((number, time_us, *row.translation, *row.size, *row.rotation))
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
    """Part of each place of an image that m boxes cover, float64 [h, w] in 0 … 1 (of several, the largest): rays that meet the box.

    translation, size, rotation: as of `boxes_at`; world2camera [4, 4]; intrinsics: fx, fy, cx, cy as fractions; shape: (h, w).
    """
    out = np.zeros(shape)
    if not len(translation):
        return out
    turns = world2camera[:3, :3] @ geometry.rotation_matrix(rotation)  # box to camera
    centres = translation @ world2camera[:3, :3].T + world2camera[:3, 3]
    halves = size[:, [1, 0, 2]] / 2
    columns, rows = ((np.arange(n * RAYS) + 0.5) / (n * RAYS) for n in (shape[1], shape[0]))
    directions = np.stack(np.broadcast_arrays((columns - intrinsics[2]) / intrinsics[0], ((rows - intrinsics[3]) / intrinsics[1])[:, None], 1.0), -1)
    for turn, centre, half in zip(turns, centres, halves):
        top, bottom, left, right = _reach(turn, centre, half, intrinsics, shape)
        if top >= bottom or left >= right:
            continue
        rays = directions[top * RAYS : bottom * RAYS, left * RAYS : right * RAYS]
        hit = meets(rays, turn, centre, half)
        part = hit.reshape(bottom - top, RAYS, right - left, RAYS).mean((1, 3))
        np.maximum(out[top:bottom, left:right], part, out=out[top:bottom, left:right])
    return out


def meets(rays, turn, centre, half) -> np.ndarray:
    """Which rays [..., 3] from the camera (depth 1 a unit) meet a box beyond `NEAR`: turn [3, 3] box to camera, centre [3], half sizes [3]."""
    inside, start = rays @ turn, -centre @ turn  # in the box's own axes
    with np.errstate(divide="ignore", invalid="ignore"):
        first, second = (-half - start) / inside, (half - start) / inside
    # A ray along a face meets that pair of planes nowhere, or everywhere if it runs between them (0/0 on a plane counts as within).
    enter = np.fmin(first, second).max(-1)
    leave = np.fmax(first, second).min(-1)
    return np.maximum(enter, NEAR) <= leave


def _reach(turn, centre, half, intrinsics, shape) -> tuple[int, int, int, int]:
    """Rows and columns (top, bottom, left, right) of places outside which the box is not seen; none are left where it is behind the camera."""
    corners = (CORNERS * 2 * half) @ turn.T + centre
    a, b = corners[EDGES[:, 0]], corners[EDGES[:, 1]]
    cut = (a[:, 2] < NEAR) != (b[:, 2] < NEAR)
    share = (NEAR - a[cut, 2]) / (b[cut, 2] - a[cut, 2])
    points = np.concatenate([corners[corners[:, 2] >= NEAR], a[cut] + share[:, None] * (b[cut] - a[cut])])
    if not len(points):
        return 0, 0, 0, 0
    fx, fy, cx, cy = intrinsics
    x, y = (fx * points[:, 0] / points[:, 2] + cx) * shape[1], (fy * points[:, 1] / points[:, 2] + cy) * shape[0]
    low, high = np.clip(np.floor([y.min(), x.min()]), 0, shape), np.clip(np.ceil([y.max(), x.max()]), 0, shape)
    return int(low[0]), int(high[0]), int(low[1]), int(high[1])


def foreground_of(vehicles: Vehicles | None, moment: Instant, shape) -> np.ndarray:
    """uint8 [6, h, w]: the part of each place of the six pictures of an instant that vehicles cover, 255 = all of it. None: no vehicle."""
    out = np.zeros((len(VIEWS), *shape), np.uint8)
    for view in range(len(VIEWS) if vehicles is not None else 0):
        ego = geometry.transform(moment.ego_translation[view], moment.ego_rotation[view])
        camera = ego @ geometry.transform(moment.cam2ego_translation[view], moment.cam2ego_rotation[view])
        boxes = boxes_at(vehicles, moment.timestamps_us[view])
        out[view] = np.rint(255 * coverage(*boxes, geometry.inverse(camera), moment.intrinsics[view], shape))
    return out
