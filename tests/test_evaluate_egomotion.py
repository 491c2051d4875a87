"""Motion read from video, on streets whose motion is known."""

import json
import shutil

import numpy as np
import pytest

from data_pipeline.records import read_index
from mila_jax import drift_command as drift_command_module
from mila_jax.drift_command import drift_command
from mila_jax.errors import UserError
from mila_jax.evaluate import drift, egomotion
from mila_jax.evaluate.consistency import bowl_points, overlaps
from mila_jax.geometry import rotation_matrix, yaw_quaternion

HEIGHT, WIDTH = 32, 48
INTRINSICS = np.tile([0.8, 1.2, 0.5, 0.5], (6, 1))


def _rig():
    """Six cameras 1.5 m above the ground, looking round in steps of 60 degrees: [6, 7]."""
    ahead = np.array([0.5, -0.5, 0.5, -0.5])  # camera z is ego x
    out = []
    for yaw in np.arange(6) * np.pi / 3:
        a, b = yaw_quaternion(yaw), ahead
        w = a[0] * b[0] - a[1:] @ b[1:]
        out.append([0.8, 0.0, 1.5, w, *(a[0] * b[1:] + b[0] * a[1:] + np.cross(a[1:], b[1:]))])
    return np.array(out)


def _picture(rig, pose):
    """uint8 [6, H, W, 3] of a patterned ground and wall (80 m) seen from pose (x, y, yaw)."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    views = []
    for (fx, fy, cx, cy), outer in zip(INTRINSICS, rig):
        rays = np.stack([((columns + 0.5) / WIDTH - cx) / fx, ((rows + 0.5) / HEIGHT - cy) / fy, np.ones(rows.shape)], -1).reshape(-1, 3)
        p = bowl_points(outer[:3], rays @ rotation_matrix(outer[3:]).T, 80.0)
        c, s = np.cos(pose[2]), np.sin(pose[2])
        x, y, z = c * p[:, 0] - s * p[:, 1] + pose[0], s * p[:, 0] + c * p[:, 1] + pose[1], p[:, 2]
        value = 128 + 40 * np.sin(0.9 * x + 1) + 30 * np.sin(0.7 * y + 0.31 * x) + 30 * np.sin(1.3 * z) * np.cos(0.05 * y)
        views.append(np.repeat(value.reshape(HEIGHT, WIDTH, 1), 3, -1))
    return np.clip(np.stack(views), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("speed", "rate"), [(0.6, 0.03), (0.3, -0.04), (0.0, 0.0)])
def test_motion_of_a_known_drive_is_read(speed, rate):
    rig = _rig()
    true = np.tile([speed * np.cos(rate / 2), speed * np.sin(rate / 2), rate], (9, 1))
    frames = np.stack([_picture(rig, pose) for pose in egomotion.integrate(true)])
    found = egomotion.EgoMotion(INTRINSICS, rig)(frames)
    assert found.shape == (9, 3)
    np.testing.assert_allclose(found[:, 2], rate, atol=0.006)
    np.testing.assert_allclose(found[:, 0], true[:, 0], atol=0.1)


def test_inertia_decides_between_equal_fits():
    costs = np.ones((5, egomotion.SPEEDS))
    costs[:, 20] = 0.5
    costs[2, 5] = 0.4  # a marking that repeats fits better once
    speeds = np.linspace(0, egomotion.FASTEST, egomotion.SPEEDS)
    np.testing.assert_allclose(egomotion.steady(costs), speeds[20])
    assert costs.argmin(1)[2] == 5


def test_following_is_zero_for_the_commanded_way_and_counts_what_leads_off_it():
    t = np.arange(25) / 12
    poses = np.stack([8 * t, 0.3 * t**2, 0.1 * t], -1)
    moves = drift.movements(poses)
    np.testing.assert_allclose(egomotion.integrate(moves), poses, atol=1e-9)
    same = egomotion.following(moves, moves)
    assert same["ade_m"] == same["fde_m"] == same["yaw_deg"] == 0
    straight = np.tile([0.5, 0, 0], (24, 1))
    found = egomotion.following(straight * 1.1, straight)
    assert found["fde_m"] == pytest.approx(1.2) and found["ade_m"] == pytest.approx(0.625) and found["path_m"] == pytest.approx(12)
    assert egomotion.following(straight + [0, 0, 0.01], straight)["yaw_deg"] == pytest.approx(np.degrees(0.125))


def test_drift_tells_how_videos_follow_their_waypoints(small_config, tmp_path):
    folder = tmp_path / "video"
    folder.mkdir()
    r, t = np.random.default_rng(0), np.arange(1, 14) / 12
    arrays = {"latents": r.normal(size=(6, 13, 4, 6, 4)).astype(np.float16), "poses": np.stack([6 * t, 0 * t, 0 * t], -1)}
    np.savez(folder / "latents.npz", intrinsics=INTRINSICS, extrinsics=_rig(), **arrays)
    (folder / "generate.json").write_text(json.dumps({"frames": 13, "strategy": "corrected", "anchor_stride": 4}))
    true = [[0.5, 0, 0]]

    def features(images):
        return images.reshape(len(images), -1)[:, :4].astype(float)

    page = drift_command(small_config, [folder], tmp_path / "out", extractor=features, motion=True, ego_motion=lambda f: true * (len(f) - 1))
    found = json.loads((tmp_path / "out" / "drift.json").read_text())
    (row,) = found["following"]["corrected"]
    assert row["video"] == "video" and row["ade_m"] == pytest.approx(0, abs=1e-9) and row["path_m"] == pytest.approx(5.5)
    assert found["following"]["recorded"] and found["curves"]["corrected"]["speed_error"]["mean"] == pytest.approx([0], abs=1e-9)
    assert "ade_m" in page.read_text()
    with pytest.raises(UserError, match="video is given 2 times"):
        drift_command(small_config, [folder, tmp_path / "out" / ".." / "video"], tmp_path / "out")
    # A longer one that nobody told a way, of the same strategy.
    shutil.copytree(folder, tmp_path / "free")
    np.savez(
        tmp_path / "free" / "latents.npz",
        intrinsics=INTRINSICS,
        extrinsics=_rig(),
        latents=np.tile(arrays["latents"], (1, 2, 1, 1, 1)),
        poses=np.zeros((26, 3)),
    )
    (tmp_path / "free" / "generate.json").write_text(json.dumps({"frames": 26, "strategy": "corrected", "waypoints": "none"}))
    folders = [folder, tmp_path / "free"]
    page = drift_command(small_config, folders, tmp_path / "both", extractor=features, motion=True, ego_motion=lambda f: true * (len(f) - 1))
    found = json.loads((tmp_path / "both" / "drift.json").read_text())
    assert [row["video"] for row in found["following"]["corrected"]] == ["video"] and "speed_error" not in found["curves"]["corrected"]
    assert "corrected: the first 1 s, which all 2 videos have; the longest has 2." in page.read_text()


def test_only_videos_of_one_start_are_paired():
    """A named manoeuvre has the same waypoints wherever it begins."""
    arrays = {"poses": np.zeros((12, 3))}
    one = {"text": "Rain", "frames": 12, "seed": 0, "scene": "scene-0001", "time_us": 5, "identity": {"start": {"first frames": "a"}}}
    drives = [
        drift_command_module._drive(one | changes, arrays) for changes in ({}, {"scene": "scene-0002"}, {"time_us": 6}, {"strategy": "recurrent"})
    ]
    assert drives[0] == drives[3] and len(set(drives)) == 3
    folders = [
        drift_command_module._drive({k: v for k, v in one.items() if k != "scene"} | {"identity": {"start": start}}, arrays) for start in ("a", "b")
    ]
    assert len(set(folders)) == 2


def test_drift_measures_each_video_with_its_own_cameras(small_config, tmp_path, monkeypatch):
    """Two videos of one name in two folders, of cars with other cameras than the recorded one's."""
    r, seen = np.random.default_rng(0), []

    def strips(intrinsics, translation, rotation, *size):
        seen.append(np.asarray(translation))
        return overlaps(intrinsics, translation, rotation, *size)

    monkeypatch.setattr(drift_command_module, "overlaps", strips)
    folders, rigs = [tmp_path / part / "video" for part in "ab"], [_rig() + np.float32([shift, 0, 0, 0, 0, 0, 0]) for shift in (1, 2)]
    for folder, rig in zip(folders, rigs):
        folder.mkdir(parents=True)
        arrays = {"latents": r.normal(size=(6, 13, 4, 6, 4)).astype(np.float16), "anchors": np.zeros((6, 2, 4, 6, 4), np.float16)}
        np.savez(folder / "latents.npz", intrinsics=INTRINSICS, extrinsics=rig, corrected=arrays["anchors"] + 1, **arrays)
        (folder / "generate.json").write_text(json.dumps({"frames": 13, "strategy": "corrected", "anchor_stride": 6, "anchor_frames": [9, 15]}))
    drift_command(small_config, folders, tmp_path / "out", extractor=lambda images: images.reshape(len(images), -1)[:, :4].astype(float))
    assert all(any(np.array_equal(found, rig[:, :3]) for found in seen) for rig in rigs)
    found = json.loads((tmp_path / "out" / "drift.json").read_text())["anchor_residual"]
    assert found == {str(folder): [[0.75, 1.0], [1.25, 1.0]] for folder in folders}


def test_drift_wants_a_second_of_each_recorded_scene(small_config, tmp_path, monkeypatch):
    index = read_index(small_config.data.dir)
    index.scenes[0].timestamps_us = index.scenes[0].timestamps_us[:11]
    monkeypatch.setattr(drift_command_module, "read_index", lambda folder: index)
    with pytest.raises(UserError, match="val scene scene-0001 has fewer than 12 instants"):
        drift_command(small_config, [tmp_path], tmp_path / "out")
