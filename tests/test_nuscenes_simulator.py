"""The simulator writes the nuScenes v1.0 format: tables that belong together, real irregular timing, the same bytes for the same
seed, scene by scene."""

import json

import numpy as np
import pytest
from PIL import Image

from data_pipeline.simulator import annotate, tables
from data_pipeline.simulator.rig import load_rig
from data_pipeline.simulator.timing import make_schedule
from data_pipeline.simulator.write import remove, simulated_seconds
from mila_jax import geometry
from mila_jax.errors import UserError
from mila_jax.views import VIEWS, view_index
from tests import nuscenes_stub as stub


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("sim")
    stub.write(path)
    return path


@pytest.fixture(scope="module")
def rows(root):
    return {name: json.loads((root / "v1.0-sim" / f"{name}.json").read_text()) for name in tables.TABLES}


def test_timing_is_the_real_data_s():
    offsets = load_rig().offset_seconds
    gaps, counts_differ = [], 0
    for seed in range(30):
        s = make_schedule(20.0, offsets, np.random.default_rng(seed))
        gaps += list(np.diff(np.flatnonzero(s.key)))
        assert s.key[0] and s.key[-1] and not s.dropped[s.key].any() and s.cameras.min() >= 0
        assert 0.040 < np.ptp(s.cameras[0]) * 1e-6 < 0.046
        steps = np.diff(s.cameras[:, view_index("CAM_FRONT")]) * 1e-6
        assert np.all((abs(steps - 0.05) < 0.002) | (abs(steps - 0.1) < 0.002)) and len(set(np.rint(steps * 20))) == 2
        assert abs(steps.mean() - 1 / 12) < 0.001
        counts_differ += len(set((~s.dropped).sum(0))) > 1
    assert set(gaps) == {4, 5, 6, 7} and np.mean(np.array(gaps) == 6) > 0.7
    assert counts_differ > 15
    with pytest.raises(ValueError, match="too short"):
        make_schedule(0.3, offsets, np.random.default_rng(0))


def test_tables_hold_every_token_they_name(rows):
    known = {name: {r["token"] for r in rows[name]} for name in rows}
    assert all(len(known[name]) == len(rows[name]) > 0 for name in rows)
    for row in rows["sample_data"]:
        assert row["sample_token"] in known["sample"] and row["ego_pose_token"] in known["ego_pose"]
        assert row["calibrated_sensor_token"] in known["calibrated_sensor"]
    for row in rows["sample_annotation"]:
        assert row["sample_token"] in known["sample"] and row["instance_token"] in known["instance"]
        assert row["visibility_token"] in known["visibility"] and set(row["attribute_tokens"]) <= known["attribute"]
    assert {r["category_token"] for r in rows["instance"]} <= known["category"]
    assert {r["sensor_token"] for r in rows["calibrated_sensor"]} == known["sensor"]
    assert {t for r in rows["map"] for t in r["log_tokens"]} == known["log"]
    for name in ("sample", "sample_data", "sample_annotation"):
        by_token = {r["token"]: r for r in rows[name]}
        for row in rows[name]:
            assert not row["next"] or by_token[row["next"]]["prev"] == row["token"]
            assert not row["prev"] or by_token[row["prev"]]["next"] == row["token"]


def test_files_lie_where_the_tables_say(root, rows):
    channel = {r["token"]: r["channel"] for r in rows["sensor"]}
    channel = {r["token"]: channel[r["sensor_token"]] for r in rows["calibrated_sensor"]}
    for row in rows["sample_data"]:
        name = channel[row["calibrated_sensor_token"]]
        folder = "samples" if row["is_key_frame"] else "sweeps"
        assert row["filename"].startswith(f"{folder}/{name}/n008-") and f"__{name}__{row['timestamp']}." in row["filename"]
        path = root / row["filename"]
        if name in VIEWS:
            with Image.open(path) as image:
                assert image.format == "JPEG" and image.size == (row["width"], row["height"]) == (stub.WIDTH, stub.HEIGHT)
        else:
            assert row["is_key_frame"] and np.fromfile(path, np.float32).reshape(-1, 5).shape[0] > 0
    assert all((root / r["filename"]).exists() for r in rows["map"])


def test_sweeps_name_the_following_sample_and_carry_their_own_pose(rows):
    sample_time = {r["token"]: r["timestamp"] for r in rows["sample"]}
    first = {r["first_sample_token"] for r in rows["scene"]}
    before = {r["token"]: sample_time[r["prev"]] for r in rows["sample"] if r["prev"]}
    pose = {r["token"]: r for r in rows["ego_pose"]}
    sweeps = [r for r in rows["sample_data"] if not r["is_key_frame"]]
    assert len(sweeps) > 100
    for row in sweeps:
        assert row["sample_token"] not in first
        assert before[row["sample_token"]] < row["timestamp"] < sample_time[row["sample_token"]]
    scene_of = {r["token"]: r["scene_token"] for r in rows["sample"]}
    for scene in rows["scene"]:
        records = [r for r in rows["sample_data"] if scene_of[r["sample_token"]] == scene["token"]]
        start = min(r["timestamp"] for r in records)
        x0 = min(pose[r["ego_pose_token"]]["translation"][0] for r in records)
        for row in records:
            p = pose[row["ego_pose_token"]]
            assert p["timestamp"] == row["timestamp"]
            assert p["translation"][0] - x0 == pytest.approx(stub.SPEED * (row["timestamp"] - start) * 1e-6, abs=1e-6)


def test_annotations(rows):
    # The third car of the stub is farther than 60 m.
    assert len(rows["instance"]) == 2 * len(rows["scene"])
    by_instance = {i["token"]: [a for a in rows["sample_annotation"] if a["instance_token"] == i["token"]] for i in rows["instance"]}
    for instance in rows["instance"]:
        mine = by_instance[instance["token"]]
        assert instance["nbr_annotations"] == len(mine)
        assert instance["first_annotation_token"] == mine[0]["token"] and instance["last_annotation_token"] == mine[-1]["token"]
        assert all(a["num_lidar_pts"] > 0 for a in mine)
    seen = [{a["visibility_token"] for a in mine} for mine in by_instance.values()]
    assert seen == [{"4"}, {"1"}] * len(rows["scene"])


def test_lidar_points_lie_on_what_the_cameras_see():
    rig = load_rig()
    camera2ego = rig.cam2ego()
    depth = np.full((6, 32, 56), np.inf, np.float32)
    depth[2] = 12.5
    points = annotate.lidar_points(depth, camera2ego, rig.intrinsics, step=8)
    assert points.shape == (4 * 7, 5)
    uv, z = geometry.project(points[:, :3].astype(np.float64), geometry.inverse(camera2ego[2]), rig.intrinsics[2])
    np.testing.assert_allclose(z, 12.5, atol=1e-5)
    np.testing.assert_allclose(sorted(set(np.round(uv[:, 0] * 56, 3))), np.arange(4, 56, 8) + 0.5, atol=1e-2)


def test_same_seed_same_bytes_and_more_scenes_extend(root, tmp_path):
    stub.write(tmp_path / "again")
    assert stub.tree_bytes(tmp_path / "again") == stub.tree_bytes(root)
    stub.write(tmp_path / "again", scenes=3)
    stub.write(tmp_path / "three", scenes=3)
    assert stub.tree_bytes(tmp_path / "again") == stub.tree_bytes(tmp_path / "three")
    assert json.loads((tmp_path / "three/v1.0-sim/splits.json").read_text()) == {
        "train": ["scene-0002", "scene-0003"],
        "val": ["scene-0001"],
    }
    stub.write(tmp_path / "other", scenes=1, seed=1)
    assert not set(stub.tree_bytes(tmp_path / "other" / "samples")) & set(stub.tree_bytes(root / "samples"))


def test_interrupted_run_goes_on_where_it_stopped(root, tmp_path):
    rendered = []

    class Counting(stub.Renderer):
        def __init__(self, *arguments):
            rendered.append(1)
            super().__init__(*arguments)

    class Failing(Counting):
        def render(self, times):
            if len(rendered) == 2:
                raise KeyboardInterrupt
            return super().render(times)

    with pytest.raises(KeyboardInterrupt):
        stub.write(tmp_path, renderer=Failing)
    assert not (tmp_path / "v1.0-sim/scene.json").exists()
    stub.write(tmp_path, renderer=Counting)
    assert len(rendered) == 3
    assert stub.tree_bytes(tmp_path) == stub.tree_bytes(root)
    # A scene of which a file is gone is made again, the other one is not.
    next((tmp_path / "sweeps/CAM_BACK").iterdir()).unlink()
    stub.write(tmp_path, renderer=Counting)
    assert len(rendered) == 4 and stub.tree_bytes(tmp_path) == stub.tree_bytes(root)


def test_other_settings_in_the_same_folder_are_refused(root, tmp_path):
    with pytest.raises(UserError, match=r"seed=0, now asked for seed=5; choose another folder"):
        stub.write(root, seed=5)
    (tmp_path / "v1.0-sim").mkdir()
    (tmp_path / "v1.0-sim/scene.json").write_text("[]")
    with pytest.raises(UserError, match="did not write"):
        stub.write(tmp_path)
    with pytest.raises(UserError, match="not deleted"):
        remove(tmp_path, "v1.0-sim")


def test_remove_spares_other_data_sets(tmp_path):
    stub.write(tmp_path, scenes=1)
    stub.write(tmp_path, scenes=1, seed=3, version="v1.0-two")
    kept = {p.name for p in (tmp_path / "v1.0-two").glob("*.json")}
    remove(tmp_path, "v1.0-sim")
    assert not (tmp_path / "v1.0-sim").exists() and {p.name for p in (tmp_path / "v1.0-two").glob("*.json")} == kept
    for row in json.loads((tmp_path / "v1.0-two/sample_data.json").read_text()):
        assert (tmp_path / row["filename"]).exists()
    remove(tmp_path, "v1.0-two")
    assert not list(tmp_path.rglob("*.jpg"))


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"scenes": 0}, "simulate.scenes=0"),
        ({"val_scenes": 3}, "simulate.val_scenes=3"),
        ({"seconds": 0.5}, "simulate.seconds=0.5"),
        ({"seconds": float("nan")}, "simulate.seconds=nan"),
        ({"seed": -1}, "simulate.seed=-1"),
    ],
)
def test_impossible_settings(tmp_path, settings, words):
    with pytest.raises(UserError, match=words):
        stub.write(tmp_path, **settings)


def test_length_of_what_is_there(root, tmp_path):
    wanted = json.loads((root / "v1.0-sim" / "simulator.json").read_text())["seconds"]
    assert simulated_seconds(root, "v1.0-sim") == wanted > 0 and simulated_seconds(tmp_path, "v1.0-sim") is None


def test_an_address_is_no_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--out=gs://b/sim is an address; give a folder of this machine"):
        stub.write("gs://b/sim")
    assert not list(tmp_path.iterdir())


def test_unwritable_root(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another folder"):
        stub.write(tmp_path / "file")
