"""Tables → tracks → instants, the official splits, and one clear line for every kind of broken data set."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from data_pipeline.nuscenes import reader, splits
from data_pipeline.nuscenes.reader import instants, load_image, open_nuscenes
from data_pipeline.simulator.rig import load_rig
from mila_jax.errors import UserError
from mila_jax.views import VIEWS, view_index
from tests import nuscenes_stub as stub


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("sim")
    stub.write(path, seconds=6.0)
    return path


@pytest.fixture
def tables(root, tmp_path):
    """A copy of the metadata that a test may break."""
    shutil.copytree(root / "v1.0-sim", tmp_path / "v1.0-sim")
    return tmp_path


def edit(root, name, change):
    """Rewrites table `name` under `root` after change(rows)."""
    path = root / "v1.0-sim" / f"{name}.json"
    rows = json.loads(path.read_text())
    path.write_text(json.dumps(change(rows) or rows))


def test_tracks_are_in_time_order_with_calibration_as_fractions(root):
    nusc, rig = open_nuscenes(root, "v1.0-sim"), load_rig()
    assert [s.name for s in nusc.scenes] == ["scene-0001", "scene-0002"]
    assert [s.split for s in nusc.scenes] == ["val", "train"] and nusc.scenes[0].location == "boston-seaport"
    for scene in nusc.scenes:
        for v, name in enumerate(VIEWS):
            track = scene.tracks[name]
            assert np.all(np.diff(track.timestamps_us) > 0) and len(track.files) == len(track.timestamps_us)
            np.testing.assert_allclose(track.intrinsics[0], rig.intrinsics[v])
            np.testing.assert_allclose(track.cam2ego_translation[0], rig.translation[v])
            x = track.ego_translation[:, 0] - track.ego_translation[0, 0]
            np.testing.assert_allclose(x, stub.SPEED * (track.timestamps_us - track.timestamps_us[0]) * 1e-6, atol=1e-6)


def test_order_of_rows_does_not_matter(root, tables):
    edit(tables, "sample_data", lambda rows: rows[::-1])
    a, b = open_nuscenes(root, "v1.0-sim"), open_nuscenes(tables, "v1.0-sim")
    for x, y in zip(a.scenes, b.scenes):
        assert all(x.tracks[n].files == y.tracks[n].files for n in VIEWS)


def test_an_instant_holds_the_frames_of_one_turn(root):
    rig = load_rig()
    for scene in open_nuscenes(root, "v1.0-sim").scenes:
        found = instants(scene)
        spread = np.array([i.timestamps_us for i in found]) - np.array([i.timestamp_us for i in found])[:, None]
        np.testing.assert_allclose(spread * 1e-6, np.tile(rig.offset_seconds, (len(found), 1)), atol=1e-3)
        # No image is used twice, although CAM_BACK_LEFT of a turn may fire nearer to the next turn's CAM_FRONT.
        files = [f for i in found for f in i.files]
        assert len(files) == len(set(files))
        # Each camera record has its own pose.
        x = np.array([i.ego_translation[:, 0] for i in found])
        np.testing.assert_allclose(x - x[:, [1]], stub.SPEED * spread * 1e-6, atol=1e-6)


def test_an_instant_with_a_missing_camera_is_left_out(root, tables):
    scene = open_nuscenes(root, "v1.0-sim").scenes[0]
    before = instants(scene)
    victims = [before[9].files[view_index("CAM_BACK")], before[20].files[0], before[30].files[view_index("CAM_FRONT")]]
    edit(tables, "sample_data", lambda rows: [r for r in rows if r["filename"] not in victims])
    after = instants(open_nuscenes(tables, "v1.0-sim").scenes[0])
    stamps = [i.timestamp_us for i in before]
    assert [i.timestamp_us for i in after] == [t for k, t in enumerate(stamps) if k not in (9, 20, 30)]


def test_nearest():
    times = np.array([0, 10, 30])
    assert list(reader.nearest(times, np.array([-5, 4, 5, 6, 20, 21, 99]))) == [0, 0, 0, 1, 1, 2, 2]
    assert list(reader.nearest(np.array([7]), np.array([0, 9]))) == [0, 0]


def test_official_splits():
    lists = {name: splits.official_scenes(name) for name in splits.OFFICIAL_RANGES}
    assert {k: len(v) for k, v in lists.items()} == {"train": 700, "val": 150, "test": 150, "mini_train": 8, "mini_val": 2}
    assert len(set(lists["train"]) | set(lists["val"]) | set(lists["test"])) == 1000
    assert lists["mini_val"] == ["scene-0103", "scene-0916"] and set(lists["mini_val"]) <= set(lists["val"])
    # A fact of the official lists: two of the mini training scenes are validation scenes of the full version.
    assert set(lists["mini_train"]) - set(lists["train"]) == {"scene-0553", "scene-0796"} <= set(lists["val"])


def test_versions_with_and_without_official_split(tables):
    folder = tables / "v1.0-sim"
    (folder / "splits.json").unlink()
    with pytest.raises(UserError, match="splits.json is missing"):
        open_nuscenes(tables, "v1.0-sim")
    folder.rename(tables / "v1.0-trainval")
    assert [s.split for s in open_nuscenes(tables, "v1.0-trainval").scenes] == ["train", "train"]
    (tables / "v1.0-trainval").rename(tables / "v1.0-mini")
    with pytest.raises(UserError, match="'scene-0001'.*in no split of the official split of v1.0-mini"):
        open_nuscenes(tables, "v1.0-mini")
    (tables / "v1.0-mini/splits.json").write_text('{"train": 3}')
    with pytest.raises(UserError, match="splits.json"):
        open_nuscenes(tables, "v1.0-mini")


def test_wrong_root_and_version(root, tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        open_nuscenes(tmp_path / "nowhere", "v1.0-sim")
    with pytest.raises(UserError, match=r"v1.0-trainval is missing; versions in .*: v1.0-sim$"):
        open_nuscenes(root, "v1.0-trainval")


def test_broken_tables(tables):
    path = tables / "v1.0-sim/ego_pose.json"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"ego_pose.json is not valid JSON"):
        open_nuscenes(tables, "v1.0-sim")
    path.unlink()
    with pytest.raises(UserError, match=r"ego_pose.json is missing"):
        open_nuscenes(tables, "v1.0-sim")
    path.write_bytes(content)
    edit(tables, "ego_pose", lambda rows: rows[7].pop("rotation") and None)
    with pytest.raises(UserError, match=r"ego_pose.json: .*`rotation`.*\[7\]"):
        open_nuscenes(tables, "v1.0-sim")


@pytest.mark.parametrize(
    "table, key, target",
    [
        ("sample_data", "ego_pose_token", "ego_pose"),
        ("sample_data", "calibrated_sensor_token", "calibrated_sensor"),
        ("sample_data", "sample_token", "sample"),
        ("calibrated_sensor", "sensor_token", "sensor"),
        ("sample", "scene_token", "scene"),
        ("scene", "log_token", "log"),
    ],
)
def test_a_token_that_points_nowhere(tables, table, key, target):
    def change(rows):
        rows[0][key] = "lost"

    edit(tables, table, change)
    with pytest.raises(UserError, match=rf"{table}.json: {key} 'lost' .*not in table '{target}'"):
        open_nuscenes(tables, "v1.0-sim")


def test_scene_without_a_camera(tables):
    edit(tables, "sample_data", lambda rows: [r for r in rows if "__CAM_BACK__" not in r["filename"]])
    with pytest.raises(UserError, match="'scene-0001' has no record of CAM_BACK"):
        open_nuscenes(tables, "v1.0-sim")


def test_camera_without_calibration(tables):
    def change(rows):
        for row in rows:
            row["camera_intrinsic"] = []

    edit(tables, "calibrated_sensor", change)
    with pytest.raises(UserError, match="camera_intrinsic"):
        open_nuscenes(tables, "v1.0-sim")


def test_images_of_any_size(tmp_path):
    ramp = np.linspace(20, 220, 1600)[None, :, None] * np.ones((900, 1, 3))
    Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / "a.jpg", quality=95)
    small = load_image(tmp_path / "a.jpg", 64, 112)
    assert small.shape == (64, 112, 3) and small.dtype == np.uint8
    expected = 20 + 200 * (np.arange(112) + 0.5) / 112
    assert np.abs(small.mean((0, 2)) - expected).max() < 2
    assert load_image(tmp_path / "a.jpg", 900, 1600).shape == (900, 1600, 3)


def test_missing_and_corrupt_image(tmp_path):
    with pytest.raises(UserError, match="gone.jpg is missing"):
        load_image(tmp_path / "gone.jpg", 8, 8)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / "cut.jpg")
    content = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.jpg").write_text("not an image")
    for name in ("cut.jpg", "text.jpg"):
        with pytest.raises(UserError, match=f"{name} is not a readable image"):
            load_image(tmp_path / name, 64, 64)
