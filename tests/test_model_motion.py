"""Carrying frames along the car's motion: exact on worlds that are corridors, and rigid motions in general."""

import jax.numpy as jnp
import numpy as np

from data_pipeline.simulator.rig import load_rig
from mila_jax import geometry
from mila_jax.model import motion
from mila_jax.views import VIEWS, view_index

HEIGHT, WIDTH = 16, 28


def carried(x, waypoints, intrinsics, extrinsics, corridor=motion.CORRIDORS[0]):
    """Latents of all frames in all frames."""
    return motion.carry(x, motion.find(*x.shape[3:5], waypoints, intrinsics, extrinsics, corridor))


def _rig(frames: int):
    rig = load_rig()
    intrinsics = np.broadcast_to(rig.intrinsics[None, :, None], (1, 6, frames, 4))
    extrinsics = np.concatenate([rig.translation, rig.quaternion], -1)
    return jnp.asarray(intrinsics, jnp.float32), jnp.asarray(np.broadcast_to(extrinsics[None, :, None], (1, 6, frames, 7)), jnp.float32)


def _paint(points):
    """A smooth colour of each world point [..., 3] → [..., 2]."""
    return jnp.stack([jnp.sin(points[..., 0] / 9) + jnp.cos(points[..., 1] / 7), jnp.cos(points[..., 2] / 4 + points[..., 0] / 20)], -1)


def _render(waypoints, moves=0.0):
    """Six views of the corridor itself, which moves with the car: exact only for walls along the direction of travel. moves: speed of its paint."""
    intrinsics, extrinsics = _rig(len(waypoints))
    rays = motion.camera_rays(intrinsics, extrinsics, HEIGHT, WIDTH)
    points = motion.corridor_points(extrinsics[..., None, None, :3], rays)
    ahead = jnp.asarray(waypoints)[None, None, :, None, None, :]
    world = motion.turn(points, ahead[..., 2]) + jnp.concatenate([ahead[..., :2], 0 * ahead[..., :1]], -1)
    return _paint(world - moves * jnp.concatenate([ahead[..., :2], 0 * ahead[..., :1]], -1)), intrinsics, extrinsics


def _inner(x):
    return x[..., 2:-2, 3:-3, :]


def test_a_car_that_stands_sees_its_own_pictures():
    x, intrinsics, extrinsics = _render(np.zeros((3, 3), np.float32))
    y = carried(x, jnp.zeros((1, 3, 3)), intrinsics, extrinsics)
    assert y.shape == (1, 6, 3, 3, HEIGHT, WIDTH, 2)
    for i in range(3):
        for j in range(3):
            np.testing.assert_allclose(y[:, :, i, j], x[:, :, j], atol=2e-3)


def test_straight_drive_through_a_corridor_is_predicted():
    waypoints = np.array([[0, 0, 0], [4, 0, 0], [9, 0, 0]], np.float32)
    x, intrinsics, extrinsics = _render(waypoints)
    y = carried(x, jnp.asarray(waypoints)[None], intrinsics, extrinsics)
    for view in ("CAM_FRONT_LEFT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT"):
        v = view_index(view)
        still = float(jnp.abs(_inner(x[0, v, 2] - x[0, v, 0])).mean())
        moved = float(jnp.abs(_inner(y[0, v, 2, 0] - x[0, v, 2])).mean())
        assert moved < 0.3 * still, (view, moved, still)
    # The other way round in time, too: what lay ahead is then behind.
    v = view_index("CAM_FRONT_LEFT")
    assert float(jnp.abs(_inner(y[0, v, 0, 2] - x[0, v, 0])).mean()) < 0.3 * float(jnp.abs(_inner(x[0, v, 2] - x[0, v, 0])).mean())


def test_traffic_is_predicted_by_the_corridor_that_moves_with_it():
    waypoints = np.array([[0, 0, 0], [2, 0, 0], [4, 0, 0]], np.float32)
    v = view_index("CAM_FRONT_LEFT")
    errors = {}
    for paint in (0.0, 1.0, -1.0):
        x, intrinsics, extrinsics = _render(waypoints, paint)
        for moves in (0.0, 1.0, -1.0):
            corridor = motion.CORRIDORS[0]._replace(moves=moves)
            y = carried(x, jnp.asarray(waypoints)[None], intrinsics, extrinsics, corridor)
            errors[paint, moves] = float(jnp.abs(_inner(y[0, v, 2, 0] - x[0, v, 2])).mean())
    for paint in (0.0, 1.0, -1.0):
        assert all(errors[paint, paint] < 0.4 * errors[paint, moves] for moves in (0.0, 1.0, -1.0) if moves != paint), errors
    assert {corridor.moves for corridor in motion.CORRIDORS} == {0.0, 1.0, -1.0}


def test_a_turn_on_the_spot_takes_from_the_neighbouring_camera():
    """After 55° to the left CAM_FRONT looks where CAM_FRONT_LEFT looked; distances hardly matter for a turn."""
    yaw = np.radians(55)
    waypoints = np.array([[0, 0, 0], [0, 0, yaw]], np.float32)
    intrinsics, extrinsics = _rig(2)
    marked = jnp.zeros((1, 6, 2, HEIGHT, WIDTH, 1)).at[:, view_index("CAM_FRONT_LEFT")].set(1.0)
    y = carried(marked, jnp.asarray(waypoints)[None], intrinsics, extrinsics)
    assert float(y[0, view_index("CAM_FRONT"), 1, 0, :, 8:20].mean()) > 0.9
    assert float(y[0, view_index("CAM_BACK"), 1, 0].mean()) < 0.1


def test_frames_carried_to_themselves_are_untouched():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 3, 4, 7, 5)), jnp.float32)
    intrinsics, extrinsics = (jnp.broadcast_to(r, (2,) + r.shape[1:]) for r in _rig(3))
    waypoints = jnp.asarray([[[0, 0, 0], [3.0, 1.0, 0.1], [8.0, 2.0, 0.2]]] * 2)
    y = carried(x, waypoints, intrinsics, extrinsics)
    for i in range(3):
        np.testing.assert_array_equal(y[:, :, i, i], x[:, :, i])
    # Samples of a batch do not mix.
    alone = carried(x[1:], waypoints[1:], intrinsics[1:], extrinsics[1:])
    np.testing.assert_allclose(alone, y[1:], atol=1e-5)


def test_views_and_their_cameras_may_be_in_any_order():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 6, 2, 4, 7, 3)), jnp.float32)
    intrinsics, extrinsics = _rig(2)
    waypoints = jnp.asarray([[[0, 0, 0], [5.0, 0.5, 0.3]]])
    order = np.array([3, 1, 5, 0, 4, 2])
    y = carried(x, waypoints, intrinsics, extrinsics)
    z = carried(x[:, order], waypoints, intrinsics[:, order], extrinsics[:, order])
    np.testing.assert_allclose(z, y[:, order], atol=1e-5)


def test_rays_and_look_up_agree_with_pinhole_projection():
    rig = load_rig()
    intrinsics, extrinsics = (r[0, :, 0] for r in _rig(1))
    rays = np.asarray(motion.camera_rays(intrinsics, extrinsics, HEIGHT, WIDTH))
    point = np.asarray(extrinsics[:, :3])[:, None, None] + 12.0 * rays
    for v in range(len(VIEWS)):
        place, depth = geometry.project(point[v].reshape(-1, 3), geometry.inverse(rig.cam2ego()[v]), rig.intrinsics[v])
        np.testing.assert_allclose(place[:, 0].reshape(HEIGHT, WIDTH)[0], (np.arange(WIDTH) + 0.5) / WIDTH, atol=1e-4)
        np.testing.assert_allclose(depth, 12.0, rtol=1e-4)
        camera, found = motion.look_up(jnp.asarray(point[v]), jnp.full((HEIGHT, WIDTH), v), intrinsics, extrinsics)
        assert (np.asarray(camera) == v).all()
        np.testing.assert_allclose(np.asarray(found)[..., 1].reshape(-1), place[:, 1], atol=1e-4)
