"""The simulated world: rig, repeatability, vehicle limits, coverage of manoeuvres and weather, clearances."""

import json

import numpy as np
import pytest

from data_pipeline.simulator.population import ego_boxes
from data_pipeline.simulator.rig import RIG_FILE, load_rig
from data_pipeline.simulator.route import EGO_SIZE
from data_pipeline.simulator.traffic import overlap
from data_pipeline.simulator.world import make_world
from mila_jax import geometry
from mila_jax.errors import UserError
from mila_jax.views import VIEWS, view_index

SECONDS = 20.0
BLOCK = 8


@pytest.fixture(scope="module")
def worlds():
    return [make_world(0, index, SECONDS) for index in range(BLOCK)]


def _state(world, times):
    """x, y [n, 2] and unwrapped yaw [n] from the public pose, by finite differences elsewhere."""
    translation, quaternion = world.ego_pose(times)
    return translation[:, :2], np.unwrap(geometry.yaw_of(geometry.rotation_matrix(quaternion)))


def test_rig_has_the_fields_of_view_of_the_real_car():
    rig = load_rig()
    assert rig.names == VIEWS
    fov = np.degrees(rig.horizontal_fov())
    for name, angle in zip(VIEWS, fov, strict=True):
        low, high = (88, 112) if name == "CAM_BACK" else (62, 72)
        assert low < angle < high, (name, angle)


def test_rig_cameras_look_where_their_names_say():
    rig = load_rig()
    axes = rig.cam2ego()[:, :3, 2]
    yaw = np.degrees(np.arctan2(axes[:, 1], axes[:, 0]))
    expected = {"CAM_FRONT": 0, "CAM_FRONT_LEFT": 55, "CAM_FRONT_RIGHT": -55, "CAM_BACK_LEFT": 110, "CAM_BACK_RIGHT": -110, "CAM_BACK": 180}
    for name, angle in expected.items():
        error = (yaw[view_index(name)] - angle + 180) % 360 - 180
        assert abs(error) < 4, (name, error)
    # Image rows run downwards: every camera's y axis points to the ground, and the cameras fire within 50 ms.
    assert (rig.cam2ego()[:, 2, 1] < -0.99).all()
    assert np.ptp(rig.offset_seconds) < 0.05 and rig.offset_seconds[view_index("CAM_FRONT")] == 0


def test_broken_rig_files_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="nowhere.json"):
        load_rig(tmp_path / "nowhere.json")
    document = json.loads(RIG_FILE.read_text())
    del document["cameras"]["CAM_BACK"]
    (tmp_path / "five.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="CAM_BACK"):
        load_rig(tmp_path / "five.json")
    (tmp_path / "text.json").write_text("not json")
    with pytest.raises(UserError, match="text.json"):
        load_rig(tmp_path / "text.json")


def test_same_seed_same_world_other_seed_other_world(worlds):
    times = np.linspace(0, SECONDS, 9)
    again, other = make_world(0, 2, SECONDS), make_world(1, 2, SECONDS)
    for a, b in zip(worlds[2].ego_pose(times), again.ego_pose(times), strict=True):
        assert a.tobytes() == b.tobytes()
    assert again.description == worlds[2].description
    assert again.scenery.boxes.tobytes() == worlds[2].scenery.boxes.tobytes()
    assert [a.pose(times)[0].tobytes() for a in again.actors] == [a.pose(times)[0].tobytes() for a in worlds[2].actors]
    assert not np.allclose(other.ego_pose(times)[0], again.ego_pose(times)[0])


def test_eight_scenes_cover_manoeuvres_weather_hours_and_cities(worlds):
    assert {"straight", "left", "right", "stop"} <= {w.manoeuvre for w in worlds}
    assert sum(w.night for w in worlds) >= 2 and sum(w.rain for w in worlds) >= 2
    assert {w.location.split("-")[0] for w in worlds} == {"boston", "singapore"}
    assert len({w.name for w in worlds}) == BLOCK


def test_descriptions_say_what_the_flags_say(worlds):
    for w in worlds:
        assert w.night == ("night" in w.description.lower()) and w.rain == ("rain" in w.description.lower())
        if w.manoeuvre in ("left", "right"):
            assert f"turn {w.manoeuvre}" in w.description.lower()


def test_the_ego_does_what_its_manoeuvre_is_called(worlds):
    times = np.arange(0, SECONDS, 0.1)
    for w in worlds:
        xy, yaw = _state(w, times)
        turned = np.degrees(yaw[-1] - yaw[0])
        standing = (np.linalg.norm(np.diff(xy, axis=0), axis=1) < 1e-3).sum() * 0.1
        if w.manoeuvre == "left":
            assert 50 < turned < 130
        elif w.manoeuvre == "right":
            assert -130 < turned < -50
        else:
            assert abs(turned) < 45
        assert (standing > 2.0) == (w.manoeuvre == "stop"), (w.manoeuvre, standing)


def test_ego_motion_is_a_bicycle_within_limits(worlds):
    step = 0.02
    times = np.arange(0, SECONDS, step)
    for w in worlds:
        xy, yaw = _state(w, times)
        velocity = np.gradient(xy, step, axis=0)
        speed = np.linalg.norm(velocity, axis=1)
        assert speed.max() < 15
        assert np.abs(np.gradient(speed, step)).max() <= 3.0
        assert np.abs(speed * np.gradient(yaw, step)).max() <= 3.5
        # The rear axle cannot slide: its velocity lies along the heading.
        sideways = -velocity[:, 0] * np.sin(yaw) + velocity[:, 1] * np.cos(yaw)
        assert np.abs(sideways).max() < 0.05
        # Nor leave the road: the rear axle's middle keeps half a car's width from the kerb.
        assert w.network.road_distance(xy).max() < -0.8


def test_actors_keep_clear_of_the_ego_and_of_each_other(worlds):
    times = np.arange(0, SECONDS, 0.05)
    for w in worlds[:4]:
        ego = ego_boxes(w.drive, times)
        tracks = []
        for actor in w.actors:
            centre, yaw = actor.pose(times)
            assert np.allclose(centre[:, 2], actor.size[2] / 2)
            tracks.append(np.concatenate([centre[:, :2], yaw[:, None]], 1))
            assert not overlap(ego, EGO_SIZE, tracks[-1], actor.size).any(), (w.name, actor.index, actor.category)
        for i, a in enumerate(w.actors):
            for j in range(i):
                gap = np.linalg.norm(tracks[i][:, :2] - tracks[j][:, :2], axis=1).min()
                if gap < a.size[1] + w.actors[j].size[1]:
                    assert not overlap(tracks[i], a.size, tracks[j], w.actors[j].size).any(), (w.name, a.index, j + 1)


def test_overlap_sees_rotated_rectangles():
    a = np.array([[0.0, 0.0, 0.0]])
    long = (2.0, 6.0)
    assert overlap(a, long, np.array([[0.0, 3.9, np.pi / 2]]), long)[0]
    assert not overlap(a, long, np.array([[0.0, 3.9, 0.0]]), long)[0]
    # Corner to corner: bounding circles meet, the rectangles do not.
    assert not overlap(a, long, np.array([[4.5, 2.5, np.pi / 4]]), (0.5, 1.0))[0]


def test_actors_are_annotated_like_nuscenes(worlds):
    times = np.linspace(0, SECONDS, 21)
    for w in worlds:
        assert [a.index for a in w.actors] == list(range(1, len(w.actors) + 1))
        moved = 0
        for actor in w.actors:
            names = actor.attribute(times)
            travelled = np.linalg.norm(np.diff(actor.pose(times)[0][[0, -1]], axis=0))
            moved += travelled > 1
            if actor.category.startswith("movable_object"):
                assert set(names) == {""}
            elif actor.category.startswith("human"):
                assert set(names) <= {"pedestrian.moving", "pedestrian.standing"}
            elif actor.category in ("vehicle.bicycle", "vehicle.motorcycle"):
                assert set(names) <= {"cycle.with_rider", "cycle.without_rider"}
            else:
                assert set(names) <= {"vehicle.moving", "vehicle.stopped", "vehicle.parked"}
            if "vehicle.parked" in names:
                assert travelled == 0
        assert moved >= 5 and len({a.category for a in w.actors}) >= 4


def test_vehicles_drive_on_the_side_of_their_country(worlds):
    for w in worlds:
        side = 1 if w.location.startswith("boston") else -1
        times = np.array([0.0])
        xy, yaw = _state(w, times)
        _, d = w.network.streets[0].locate(xy)
        assert np.sign(d[0]) == -side  # the ego starts along +s


def test_buildings_stand_clear_of_the_roads(worlds):
    for w in worlds[:3]:
        houses = w.scenery.boxes[w.scenery.boxes[:, 13] == 1]
        assert len(houses) > 20
        for sx in (-1, 0, 1):
            for sy in (-1, 0, 1):
                x, y = sx * houses[:, 3], sy * houses[:, 4]
                c, s = houses[:, 15], houses[:, 16]
                corner = houses[:, :2] + np.stack([x * c - y * s, x * s + y * c], -1)
                assert w.network.road_distance(corner).min() > 2.0


def test_short_scenes_and_long_scenes_can_be_made():
    for seconds in (1.0, 45.0):
        w = make_world(3, 1, seconds)
        xy, _ = _state(w, np.array([-0.04, 0.0, seconds, seconds + 0.04]))
        assert np.isfinite(xy).all() and w.seconds == seconds
