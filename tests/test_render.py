"""The ray caster: one world in six views, repeatable pictures, depth and instance maps that agree with projection."""

import dataclasses

import numpy as np
import pytest

from data_pipeline.simulator.render import Renderer
from data_pipeline.simulator.rig import load_rig
from data_pipeline.simulator.shading import objects
from data_pipeline.simulator.shapes import CABIN, actor_parts
from data_pipeline.simulator.traffic import CAR, Actor, Still
from data_pipeline.simulator.world import make_world
from data_pipeline.simulator.write import SimulatorConfig, simulate
from mila_jax import geometry
from mila_jax.views import neighbours

HEIGHT, WIDTH = 64, 112
DAY, NIGHT, RAIN = 4, 1, 2  # scene indices of seed 0 (asserted below)


@pytest.fixture(scope="module")
def worlds():
    out = {index: make_world(0, index, 20.0) for index in (DAY, NIGHT, RAIN)}
    assert not out[DAY].night and not out[DAY].rain and out[NIGHT].night and out[RAIN].rain
    return out


@pytest.fixture(scope="module")
def views(worlds):
    """Four instants per scene, all cameras at the same time."""
    times = np.array([1.0, 5.0, 9.0, 14.0])[:, None] + np.zeros((1, 6))
    return {index: (times, Renderer(world, load_rig(), HEIGHT, WIDTH).render(times)) for index, world in worlds.items()}


def _world2camera(world, rig, view, time):
    translation, quaternion = world.ego_pose(np.array([time]))
    return geometry.inverse(geometry.transform(translation[0], quaternion[0]) @ rig.cam2ego()[view])


def _lift(depth, world2camera, intrinsics):
    """World points [p, 3] and flat indices [p] of the pixels with a finite depth."""
    height, width = depth.shape
    v, u = np.meshgrid((np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij")
    fx, fy, cx, cy = intrinsics
    seen = np.isfinite(depth.reshape(-1))
    z = depth.reshape(-1)[seen].astype(np.float64)
    points = np.stack([(u.reshape(-1)[seen] - cx) / fx * z, (v.reshape(-1)[seen] - cy) / fy * z, z], -1)
    camera2world = geometry.inverse(world2camera)
    return points @ camera2world[:3, :3].T + camera2world[:3, 3], np.flatnonzero(seen)


def _compare(world, rig, times, out, a, b, rig_for_projection=None):
    """Colour differences (0..255) and depth errors over pixels of view a that view b sees too, over all instants."""
    used = rig_for_projection or rig
    colours, depths = [], []
    for n, time in enumerate(times[:, 0]):
        points, index = _lift(out["depth"][n, a], _world2camera(world, used, a, time), used.intrinsics[a])
        place, depth = geometry.project(points, _world2camera(world, used, b, time), used.intrinsics[b])
        col, row = np.floor(place[:, 0] * WIDTH).astype(int), np.floor(place[:, 1] * HEIGHT).astype(int)
        inside = (depth > 0.5) & (col >= 0) & (col < WIDTH) & (row >= 0) & (row < HEIGHT)
        col, row, depth, index = col[inside], row[inside], depth[inside], index[inside]
        error = np.abs(out["depth"][n, b, row, col] - depth) / depth
        agree = error < 0.08
        depths.append(np.mean(agree) if len(agree) else np.nan)
        here = out["image"][n, a].reshape(-1, 3)[index[agree]].astype(float)
        colours.append(np.abs(here - out["image"][n, b, row[agree], col[agree]]).mean(1))
    return np.concatenate(colours), np.nanmean(depths)


@pytest.mark.parametrize("index", [DAY, NIGHT, RAIN])
def test_neighbouring_views_show_one_world(worlds, views, index):
    rig = load_rig()
    times, out = views[index]
    agreements = []
    for a, b in neighbours():
        for first, second in ((a, b), (b, a)):
            difference, agreement = _compare(worlds[index], rig, times, out, first, second)
            assert len(difference) > 100, (first, second)
            assert np.median(difference) < 3, (rig.names[first], rig.names[second], np.median(difference))
            assert np.mean(difference) < 9, (rig.names[first], rig.names[second], np.mean(difference))
            agreements.append(agreement)
    # Single pairs go lower where a parked car hides the narrow strip that the back camera shares with its neighbours.
    assert np.mean(agreements) > 0.75, agreements


@pytest.mark.parametrize("index", [DAY, NIGHT])
def test_a_camera_turned_by_three_degrees_is_noticed(worlds, views, index):
    """The comparison above has teeth: with wrong extrinsics depths and colours no longer agree."""
    rig = load_rig()
    times, out = views[index]
    turn = geometry.rotation_matrix(geometry.yaw_quaternion(np.radians(3.0)))
    worse = 0
    for a, b in neighbours():
        matrices = geometry.rotation_matrix(rig.quaternion)
        matrices[b] = turn @ matrices[b]
        wrong = dataclasses.replace(rig, quaternion=geometry.quaternion(matrices))
        good, good_depth = _compare(worlds[index], rig, times, out, a, b)
        bad, bad_depth = _compare(worlds[index], rig, times, out, a, b, wrong)
        worse += np.mean(bad) > 1.5 * np.mean(good) or bad_depth < good_depth - 0.1
    assert worse == 6


def test_instances_lie_where_their_centres_project(worlds, views):
    rig = load_rig()
    world = worlds[DAY]
    times, out = views[DAY]
    checked = 0
    for n, time in enumerate(times[:, 0]):
        for actor in world.actors:
            if not actor.category.startswith("vehicle.car"):
                continue
            centre, _ = actor.pose(np.array([time]))
            for view in range(6):
                place, depth = geometry.project(centre, _world2camera(world, rig, view, time), rig.intrinsics[view])
                if not (4 < depth[0] < 40 and (0.03 < place[0]).all() and (place[0] < 0.97).all()):
                    continue
                row, col = int(place[0, 1] * HEIGHT), int(place[0, 0] * WIDTH)
                found, where = out["instance"][n, view, row, col], out["depth"][n, view, row, col]
                if where > depth[0] - 0.75 * actor.size[1]:
                    # Nothing stands before the car, so it must be the car that is seen.
                    assert found == actor.index, (time, actor.index, rig.names[view])
                    checked += 1
    assert checked >= 8


def test_depth_of_the_ground_matches_the_camera_height(worlds):
    world, rig = worlds[DAY], load_rig()
    out = Renderer(world, rig, HEIGHT, WIDTH).render(np.full((1, 6), 0.0))
    view = rig.names.index("CAM_FRONT")
    points, index = _lift(out["depth"][0, view], _world2camera(world, rig, view, 0.0), rig.intrinsics[view])
    # The lowest rows in front of the car show the road, which lies at z = 0 in the world.
    bottom = (index // WIDTH >= HEIGHT - 3) & (out["instance"][0, view].reshape(-1)[index] == 0)
    assert bottom.sum() > 50 and np.abs(points[bottom, 2]).max() < 0.02
    # Where there is sky there is no depth, and no instance either.
    sky = np.isinf(out["depth"])
    assert 0.02 < sky.mean() < 0.6 and (out["instance"][sky] == 0).all() and (out["depth"][~sky] > 0).all()


def test_same_times_same_bytes_and_batches_do_not_matter(worlds, views):
    times, out = views[DAY]
    renderer = Renderer(make_world(0, DAY, 20.0), load_rig(), HEIGHT, WIDTH)
    one = renderer.render(times[2:3])
    for key in out:
        assert out[key][2:3].tobytes() == one[key].tobytes(), key
    other = Renderer(make_world(1, DAY, 20.0), load_rig(), HEIGHT, WIDTH).render(times[2:3])
    assert (other["image"] != one["image"]).mean() > 0.5


def test_each_camera_has_its_own_time(worlds, views):
    times, out = views[DAY]
    late = times[:1].copy()
    late[0, 3] += 0.4
    moved = Renderer(worlds[DAY], load_rig(), HEIGHT, WIDTH).render(late)["image"][0]
    same = [np.array_equal(moved[v], out["image"][0, v]) for v in range(6)]
    assert same == [True, True, True, False, True, True]


def test_pictures_are_exposed_smooth_and_of_the_right_types(views):
    for index, (times, out) in views.items():
        assert out["image"].dtype == np.uint8 and out["image"].shape == (len(times), 6, HEIGHT, WIDTH, 3)
        assert out["depth"].dtype == np.float32 and out["instance"].dtype == np.int32
        image = out["image"].astype(float)
        assert 35 < image.mean() < 200 and image.std() > 15
        # No per-pixel noise: neighbouring pixels mostly agree.
        assert np.median(np.abs(np.diff(image, axis=3))) <= 2
    assert views[NIGHT][1]["image"].mean() < 0.7 * views[DAY][1]["image"].mean()


@pytest.mark.parametrize("variant", [0.2, 0.9])
def test_a_car_has_windows_between_pillars_under_a_roof_of_its_paint(variant):
    """Seen from close by the cabin fills the picture: all of one dark colour, nobody would know it for a car."""
    row = actor_parts(Actor(CAR, (1.88, 4.5, 1.58), 1, Still(0, 0, 0), (0.9, 0.1, 0.1), variant))[1]
    half, taper, waist = row[3:6], row[6], row[14]
    assert row[13] == CABIN and np.isclose(waist, row[2] - half[2])
    middle = waist + half[2]
    shoulder = half[0] - taper * half[2] * 0.9  # half length just below the roof
    places = {  # x, y, z, normal x, normal z
        "front side window": (0.4 * half[0], half[1], middle, 0, 0), "rear side window": (-0.5 * half[0], -half[1], middle, 0, 0),
        "windscreen": (half[0], 0, middle, 0.8, 0.6), "rear window": (-half[0], 0, middle, -0.8, 0.6),
        "middle pillar": (-0.12 * half[0], half[1], middle, 0, 0), "front pillar": (0.97 * half[0], -half[1], middle, 0, 0),
        "windscreen's pillar": (half[0], 0.96 * half[1], middle, 0.8, 0.6),
        "over the doors": (0.4 * shoulder, half[1], waist + 1.95 * half[2], 0, 0), "roof": (0, 0, waist + 2 * half[2], 0, 1),
    }  # fmt: skip
    x, y, z, nx, nz = np.array(list(places.values()), np.float32).T
    ones = np.ones_like(x)
    hit = {
        "x": x, "y": y, "z": z, "normal": (nx, 0 * ones, nz), "half": half[:, None] * ones, "taper": taper * ones, "colour": row[7:10, None] * ones,
        "second": row[10:13, None] * ones, "kind": CABIN * ones.astype(int), "extra": waist * ones, "distance": 4 * ones, "facing": ones,
    }  # fmt: skip
    albedo, emission = objects(hit, {"night": 0.0}, 0.005)
    red, painted = np.asarray(albedo[0]), {"middle pillar", "front pillar", "windscreen's pillar", "over the doors", "roof"}
    assert {name for name, value in zip(places, red) if value > 0.7} == painted
    assert {name for name, value in zip(places, red) if value < 0.3} == places.keys() - painted
    assert not np.asarray(emission).any()
    higher = np.asarray(objects(hit | {"z": z + np.float32(0.1)}, {"night": 0.0}, 0.005)[0])
    assert (higher > albedo)[:, 0].all()  # as if the glass mirrored the sky
    far = np.asarray(objects(hit | {"distance": 60 * ones}, {"night": 0.0}, 0.005)[0])[0]
    np.testing.assert_allclose(far[:2], red[:2], atol=0.1)  # what is thinner than a pixel fades


def test_an_empty_list_of_times_is_an_empty_result(worlds):
    out = Renderer(worlds[DAY], load_rig(), HEIGHT, WIDTH).render(np.zeros((0, 6)))
    assert out["image"].shape == (0, 6, HEIGHT, WIDTH, 3) and out["depth"].shape == (0, 6, HEIGHT, WIDTH)


def test_bytes_do_not_depend_on_the_number_of_processes(tmp_path):
    """The real renderer, in this process and in two fresh ones."""
    config = SimulatorConfig(scenes=2, seconds=1.0, height=16, width=28)
    for workers in (1, 2):
        simulate(tmp_path / str(workers), config, progress=False, workers=workers)
    one, two = ({p.relative_to(tmp_path / w): p.read_bytes() for p in (tmp_path / w).rglob("*") if p.is_file()} for w in ("1", "2"))
    assert len(one) > 100 and one == two
