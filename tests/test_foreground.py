"""Where vehicles are in the pictures: boxes in time and in the image, what is kept of them, and what the loss makes of it."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial import ConvexHull, Delaunay

from data_pipeline import records
from data_pipeline.clips import ClipSource, ClipSpec, read_scene
from data_pipeline.foreground import HOLD_US, NEAR, RAYS, Vehicles, boxes_at, coverage, read_vehicles
from data_pipeline.nuscenes.reader import instants, open_nuscenes
from mila_jax import geometry
from mila_jax.errors import UserError
from mila_jax.flow.rectified_flow import masked_loss
from mila_jax.train.step import draw, loss, vehicle_weights
from tests import nuscenes_stub as stub
from tests.parallel_probe import OBJECTIVE, make_clip
from tests.test_train_step import KEY, TINY, abstract_model, parameters  # noqa: F401  (a fixture)

META = {"autoencoder": "stub", "foreground": "vehicles"}
SECOND = 1_000_000
FORWARD = np.array([[0.0, -1, 0, 0], [0, 0, -1, 1.5], [1, 0, 0, 0], [0, 0, 0, 1]])  # a camera 1.5 m above the origin, looking along x
LENS = (0.8, 1.4, 0.5, 0.5)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("sim")
    stub.write(path, scenes=2, seconds=3.0)
    return path


@pytest.fixture(scope="module")
def encoded(root, tmp_path_factory):
    path = tmp_path_factory.mktemp("enc")
    stub.encode(root, path, meta=META)
    return path


def vehicles(rows):
    """Boxes of rows (instance, seconds, x)."""
    rows = np.array(rows, np.float64)
    n = len(rows)
    place = np.stack([rows[:, 2], 0 * rows[:, 2], 0 * rows[:, 2]], -1)
    return Vehicles(rows[:, 0].astype(int), (rows[:, 1] * SECOND).astype(int), place, np.ones((n, 3)), np.tile([1.0, 0, 0, 0], (n, 1)))


def test_boxes_between_before_and_after_their_annotations():
    scene = vehicles([(3, 0.5, 10), (3, 1.0, 14), (3, 3.0, 50), (5, 1.0, 100)])

    def at(seconds):
        return sorted(boxes_at(scene, seconds * SECOND)[0][:, 0].round(6).tolist())

    assert at(0.75) == [12, 100] and at(1.0) == [14, 100] and at(0.5) == [10]
    hold = HOLD_US / SECOND
    assert at(0.5 - hold) == [10] and at(0.49 - hold) == []
    assert at(1 + hold) == [14, 100] and at(1.01 + hold) == []  # not through the gap of two seconds
    assert at(3 - hold) == [50] and at(2) == []


@pytest.mark.parametrize(
    "x, y, yaw", [(12, 3, 0.3), (6, -1, 2.0), (2.0, 3.0, 0.1), (1.0, 2.0, 0.1), (0.0, -2.0, 0.5), (-1.02, 1.29, 5.95), (-9, 0, 0)],
    ids=["far", "near", "at the side", "cut", "beside", "mostly behind", "behind"],
)  # fmt: skip
def test_coverage_is_that_of_the_outline_of_the_visible_part_of_a_box(x, y, yaw):
    size, shape = np.array([1.9, 4.6, 1.6]), (8, 14)
    rotation = geometry.yaw_quaternion(yaw)
    got = coverage(np.array([[x, y, 0.8]]), size[None], rotation[None], FORWARD, LENS, shape)
    # The part in front of a plane is the hull of what of the twelve edges lies there; they are taken as rows of points 0.2 mm apart.
    along, ends = np.linspace(-0.5, 0.5, 20_001), np.stack(np.meshgrid([-0.5, 0.5], [-0.5, 0.5]), -1).reshape(-1, 2)
    edges = [np.insert(np.repeat(ends, len(along), 0), axis, np.tile(along, 4), 1) for axis in range(3)]
    inside = np.concatenate(edges) * size[[1, 0, 2]]
    points = inside @ geometry.rotation_matrix(rotation).T + (x, y, 0.8)
    place, depth = geometry.project(points, FORWARD, LENS)
    place = place[depth >= NEAR]
    fine = RAYS
    columns, rows = ((np.arange(n * fine) + 0.5) / (n * fine) for n in (shape[1], shape[0]))
    expected = np.zeros(shape)
    if len(place):
        outline = place[ConvexHull(place).vertices]
        centres = np.stack(np.meshgrid(columns, rows), -1).reshape(-1, 2)
        expected = (Delaunay(outline).find_simplex(centres) >= 0).reshape(shape[0], fine, shape[1], fine).mean((1, 3))
    assert (expected.max() > 0.3) == (x > -9)
    assert np.abs(got - expected).mean() < 0.003 and np.abs(got - expected).max() < 0.2  # rays along the outline itself


def test_a_car_beside_us_covers_no_sky():
    """The parts of it that lie outside the image do not spread over the rows that it has there."""
    got = coverage(np.array([[2.0, 3.0, 0.8]]), np.array([[1.9, 4.6, 1.6]]), np.array([[1.0, 0, 0, 0]]), FORWARD, LENS, (8, 14))
    assert got[4:].max() > 0.9 and not got[:3].any()  # its roof is 10 cm above the camera


def test_of_several_boxes_the_largest_part_counts():
    two = np.array([[12.0, 3, 0.8], [12.0, -3, 0.8]])
    sizes, rotations = np.ones((2, 3)), np.tile([1.0, 0, 0, 0], (2, 1))
    both = coverage(two, sizes, rotations, FORWARD, LENS, (4, 7))
    each = [coverage(two[i : i + 1], sizes[:1], rotations[:1], FORWARD, LENS, (4, 7)) for i in (0, 1)]
    np.testing.assert_allclose(both, np.maximum(*each))
    np.testing.assert_allclose(coverage(two[:0], sizes[:0], rotations[:0], FORWARD, LENS, (4, 7)), 0)


def test_records_tell_where_the_car_ahead_is(root, encoded):
    """The stub's car 1 stays 8 m ahead, car 2 is hidden behind it and left out, car 3 is too far away to be annotated."""
    nusc = open_nuscenes(root, "v1.0-sim")
    for scene in nusc.scenes:
        assert len(set(read_vehicles(nusc)[scene.token].instance)) == 1
        found = read_scene(encoded, scene.name)["foreground"]
        assert found.dtype == np.uint8 and found.shape == (len(instants(scene)), 6, *stub.LATENT_SHAPE[:2])
        assert (found[:, 1] > 10).any((1, 2)).all() and (found[:, [3, 4, 5]] == 0).all()
        # Camera and car move alike; before the first annotation and after the last the box stays behind.
        assert np.ptp(found[1:-1, 1].astype(int), axis=0).max() <= 2


def test_tfds_and_clips_know_it(encoded):
    import tensorflow_datasets as tfds

    source = tfds.builder_from_directory(str(encoded)).as_data_source(split="train")
    assert source[0]["foreground"].shape == (6, *stub.LATENT_SHAPE[:2])
    clips = ClipSource(encoded, "train", [ClipSpec(4, 1, 12.0)], foreground=True)
    scene = read_scene(encoded, clips.reader.scenes[0].name)["foreground"]
    batch, row = clips.batch([0, 1]), clips.clips[0][1][clips.locate(1)[1]]
    assert batch["foreground"].shape == (2, 6, 4, *stub.LATENT_SHAPE[:2]) and batch["foreground"].dtype == np.uint8
    np.testing.assert_array_equal(batch["foreground"][1], scene[row].swapaxes(0, 1))
    assert "foreground" not in ClipSource(encoded, "train", [ClipSpec(4, 1, 12.0)])[0]


def test_data_without_it_is_refused_where_it_is_wanted(root, tmp_path):
    stub.encode(root, tmp_path)
    assert not records.has_foreground(records.read_index(tmp_path).meta)
    with pytest.raises(UserError, match="train.foreground_weight.*data.foreground=True"):
        ClipSource(tmp_path, "train", [ClipSpec(4, 1, 12.0)], foreground=True)


def test_moved_boxes_are_encoded_again_and_missing_ones_are_told(tmp_path):
    stub.write(tmp_path / "sim", scenes=2, seconds=2.0)
    stub.encode(tmp_path / "sim", tmp_path / "enc", meta=META)
    before = read_scene(tmp_path / "enc", "scene-0001")["foreground"]
    table = tmp_path / "sim/v1.0-sim/sample_annotation.json"
    rows = json.loads(table.read_text())
    for row in rows:
        row["translation"][1] += 2.0
    table.write_text(json.dumps(rows))
    stub.encode(tmp_path / "sim", tmp_path / "enc", meta=META)
    assert (read_scene(tmp_path / "enc", "scene-0001")["foreground"] != before).any()
    table.write_text(json.dumps([row | {"instance_token": "nothing"} for row in rows]))
    with pytest.raises(UserError, match="instance_token 'nothing' of row .* is not in table 'instance'"):
        stub.encode(tmp_path / "sim", tmp_path / "other", meta=META)
    table.write_text("[]\n")
    with pytest.raises(UserError, match="has no annotations, which data.foreground=True needs"):
        stub.encode(tmp_path / "sim", tmp_path / "other", meta=META)


def test_weights_of_places_in_the_loss():
    r = np.random.default_rng(0)
    predicted, target = r.normal(size=(2, 2, 6, 3, 2, 4, 5))
    mask, weight = r.random((2, 3)) < 0.7, r.uniform(1, 4, (2, 6, 3, 2, 4))
    got = masked_loss(predicted, target, mask, jnp.asarray(weight))
    whole = np.broadcast_to(weight[..., None] * mask[:, None, :, None, None, None], predicted.shape)
    assert float(got.mean) == pytest.approx((whole * (predicted - target) ** 2).sum() / whole.sum(), rel=1e-5)
    assert float(got.count) == pytest.approx(whole.sum(), rel=1e-5)
    plain, ones = masked_loss(predicted, target, mask), masked_loss(predicted, target, mask, jnp.ones(weight.shape))
    np.testing.assert_allclose(ones.sample_sum, plain.sample_sum, rtol=1e-5)
    np.testing.assert_allclose(ones.sample_count, plain.sample_count)


def test_a_step_weighs_vehicles(parameters):  # noqa: F811
    graphdef, _ = abstract_model(TINY)
    clip = make_clip()
    shape = clip["latents"].shape[:-1]
    places = np.zeros(shape, np.uint8)
    places[..., :1, :] = 255
    heavy = dataclasses.replace(OBJECTIVE, foreground_weight=3.0)
    of = jax.jit(functools.partial(loss, graphdef=graphdef, config=TINY, prior=None), static_argnames="objective")

    def value(objective, where=None):
        return of(parameters, clip if where is None else clip | {"foreground": where}, KEY, objective=objective)

    plain = value(OBJECTIVE)
    np.testing.assert_allclose(value(OBJECTIVE, places).mean, plain.mean, rtol=1e-6)
    np.testing.assert_allclose(value(heavy, np.full(shape, 255, np.uint8)).mean, plain.mean, rtol=1e-5)
    np.testing.assert_allclose(value(heavy, 0 * places).mean, plain.mean, rtol=1e-5)
    # Four times the vehicles' sum and once the others': from the loss of each part alone.
    part = float(value(heavy, places).sum) - float(plain.sum)
    share = float(value(heavy, places).count) / float(plain.count)
    assert share == pytest.approx(1 + 3 / shape[3], rel=1e-5) and 0 < part < 3 * float(plain.sum)
    clean = draw(clip, KEY, OBJECTIVE).clean
    assert bool(clean.any()) and float(value(heavy, places).mean) != pytest.approx(float(plain.mean), rel=1e-4)


def test_vehicles_of_the_first_frames_weigh_their_views():
    clip = {"conditioning": np.array([1, 2]), "foreground": np.zeros((2, 6, 4, 2, 4), np.uint8)}
    covered = clip["foreground"]
    covered[0, 0, 0, 0] = 255  # half of a view in the only frame given
    covered[0, 1, 1:] = 255  # vehicles come later
    covered[1, 2, 1, 0, 0] = 255  # an eighth in the second of two
    covered[1, 2, 0, 0, 0] = 51
    objective = dataclasses.replace(OBJECTIVE, foreground_weight=4.0, foreground_of="given")
    wanted = np.ones(covered.shape, np.float32)
    wanted[0, 0], wanted[1, 2] = 3.0, 1.5
    np.testing.assert_allclose(vehicle_weights(clip, objective), wanted, rtol=1e-6)
    assert vehicle_weights(clip, dataclasses.replace(objective, foreground_weight=0.0)) is None
