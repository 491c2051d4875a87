"""View agreement on a world that is known: ground pattern below, pattern by direction above."""

import numpy as np
import pytest

from mila_jax.errors import UserError
from mila_jax.evaluate.consistency import agreement_table, bowl_points, overlaps, view_agreement
from mila_jax.geometry import inverse, project, quaternion, transform

HEIGHT, WIDTH = 48, 84
YAWS = np.radians([55.0, 0, -55, -110, 180, 110])  # order of VIEWS
WIDE = np.array([65.0, 65, 65, 65, 90, 65])


def rig():
    intrinsics, rotations = [], []
    for yaw, wide in zip(YAWS, np.radians(WIDE), strict=True):
        fx = 0.5 / np.tan(wide / 2)
        intrinsics.append((fx, fx * 16 / 9, 0.5, 0.53))
        forward, left = np.array([np.cos(yaw), np.sin(yaw), 0]), np.array([-np.sin(yaw), np.cos(yaw), 0])
        rotations.append(quaternion(np.stack([-left, [0, 0, -1], forward], -1)))
    translation = np.stack([0.8 + 0.8 * np.cos(YAWS), 0.5 * np.sin(YAWS), np.full(6, 1.5)], -1)
    return np.array(intrinsics), translation, np.array(rotations)


def pattern(u, v, phase):
    """Smooth colours over two coordinates."""
    return 128 + 100 * np.stack([np.sin(u + phase), np.cos(1.3 * v + phase), np.sin(0.7 * (u + v) - phase)], -1)


def render(phases):
    """[t, 6, H, W, 3]: every camera's picture of the patterned world, ray by ray."""
    intrinsics, translation, rotation = rig()
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    video = np.empty((len(phases), 6, HEIGHT, WIDTH, 3), np.uint8)
    for view in range(6):
        fx, fy, cx, cy = intrinsics[view]
        rays = np.stack([((columns + 0.5) / WIDTH - cx) / fx, ((rows + 0.5) / HEIGHT - cy) / fy, np.ones(rows.shape)], -1)
        rays = rays @ transform(translation[view], rotation[view])[:3, :3].T
        below = rays[..., 2] < 0
        reach = np.where(below, -translation[view, 2] / np.where(below, rays[..., 2], -1), 0)
        ground = translation[view, :2] + reach[..., None] * rays[..., :2]
        # Colours by direction keep the far ground smooth: log distance, not distance.
        ground_colour = [np.log1p(np.hypot(*np.moveaxis(ground, -1, 0))) * 4, np.arctan2(ground[..., 1], ground[..., 0]) * 12]
        sky_colour = [np.arctan2(rays[..., 1], rays[..., 0]) * 12, rays[..., 2] / np.hypot(rays[..., 0], rays[..., 1]) * 9]
        for t, phase in enumerate(phases):
            video[t, view] = np.where(below[..., None], pattern(*ground_colour, phase), pattern(*sky_colour, phase))
    return video


def test_a_consistent_world_agrees_and_wrong_pairings_do_not():
    video = render([0.0, 1.0, 2.5])
    strips = overlaps(*rig(), HEIGHT, WIDTH, radius=1e5)
    assert [(s.first, s.second) for s in strips] == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 0)]
    assert all(len(s.rows) > 100 for s in strips)
    right, wrong = view_agreement(video, strips), view_agreement(video, strips, swap=2)
    assert right["correlation"].shape == (3, 6)
    assert right["correlation"].min() > 0.97 and right["difference"].max() < 12
    assert wrong["correlation"].mean() < 0.5 and wrong["difference"].mean() > 30


def test_table_orders_consistent_before_inconsistent():
    video = render([0.0, 1.0, 2.5, 4.0])
    torn = video.copy()
    torn[:, ::2] = video[::-1, ::2]  # every second camera shows another moment
    rows = agreement_table({"real": video, "torn": torn}, *rig(), radius=1e5)
    assert [r["video"] for r in rows] == ["real", "torn"]
    assert rows[0]["correlation"] > 0.97 > rows[1]["correlation"] + 0.2
    assert rows[0]["difference"] < rows[1]["difference"]
    assert rows[0]["wrong_pairing_correlation"] < 0.5


def test_strips_are_where_points_of_the_bowl_project():
    intrinsics, translation, rotation = rig()
    strips = overlaps(intrinsics, translation, rotation, HEIGHT, WIDTH, radius=25.0)
    points = [(16.0, 8.0, 0.0), (25 * np.cos(0.48), 25 * np.sin(0.48), 3.0)]  # ground and wall, seen by FRONT_LEFT and FRONT
    strip = strips[0]
    for point in np.array(points):
        places = []
        for view in (strip.first, strip.second):
            fraction, depth = project(point[None], inverse(transform(translation[view], rotation[view])), intrinsics[view])
            assert depth[0] > 0
            places.append(fraction[0] * [WIDTH, HEIGHT] - 0.5)
        column, row = np.round(places[0]).astype(int)
        at = np.flatnonzero((strip.rows == row) & (strip.columns == column))
        assert len(at) == 1
        shift = places[0] - [column, row]
        assert np.hypot(strip.x[at[0]] + shift[0] - places[1][0], strip.y[at[0]] + shift[1] - places[1][1]) < 0.5


def test_bowl_points_lie_on_the_bowl():
    rng = np.random.default_rng(0)
    points = bowl_points(np.array([1.5, 0.4, 1.6]), rng.normal(size=(200, 3)), 30.0)
    distance = np.hypot(points[:, 0], points[:, 1])
    on_ground, on_wall = np.abs(points[:, 2]) < 1e-9, np.abs(distance - 30) < 1e-9
    assert (on_ground | on_wall).all() and on_ground.sum() > 50 and on_wall.sum() > 50
    assert distance.max() < 30 + 1e-9 and points[:, 2].min() > -1e-9


def test_cameras_that_share_nothing_are_an_error():
    intrinsics, translation, rotation = rig()
    narrow = intrinsics * [8, 8, 1, 1]
    with pytest.raises(UserError, match="no two neighbouring cameras overlap"):
        view_agreement(np.zeros((1, 6, HEIGHT, WIDTH, 3), np.uint8), overlaps(narrow, translation, rotation, HEIGHT, WIDTH))
