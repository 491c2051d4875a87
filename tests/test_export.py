"""Generated videos for other tools: a nuScenes data set that our reader opens, ACT-Bench's folder, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest

from data_pipeline.nuscenes.reader import instants, load_image, open_nuscenes
from data_pipeline.clips import read_scene
from data_pipeline.nuscenes.annotations import read_box_tracks
from data_pipeline.simulator import tables
from mila_jax import drift_command as drift_command_module
from mila_jax import export, geometry
from mila_jax.drift_command import drift_command
from mila_jax.errors import UserError
from mila_jax.evaluate.video import read_video
from mila_jax.model.autoencoder_weights import Codec
from mila_jax.prepare import open_codec
from mila_jax.start import from_scene
from mila_jax.views import VIEWS


def _video(folder, config, frames=60, **changes):
    """A folder as `mila generate` makes it, of random latents on a left curve."""
    r = np.random.default_rng(0)
    folder.mkdir()
    t = np.arange(1, frames + 1) / 12
    arrays = {
        "latents": r.normal(size=(6, frames, 4, 6, 4)).astype(np.float16), "poses": np.stack([8 * t, 0.2 * t**2, 0.05 * t], -1),
        "intrinsics": np.tile([0.8, 1.4, 0.5, 0.5], (6, 1)).astype(np.float32), "extrinsics": r.normal(size=(6, 7)).astype(np.float32),
    } | changes  # fmt: skip
    arrays["extrinsics"][:, 3:] /= np.linalg.norm(arrays["extrinsics"][:, 3:], axis=-1, keepdims=True)
    np.savez(folder / "latents.npz", **arrays)
    (folder / "generate.json").write_text(json.dumps({"frames": frames, "text": "Rain, turn left"}))
    return folder, arrays


def test_nuscenes_is_read_back(small_config, tmp_path):
    folder, arrays = _video(tmp_path / "a", small_config)
    other, _ = _video(tmp_path / "b", small_config, frames=13)
    out = export.export_command(small_config, [folder, other], tmp_path / "out", format_="nuscenes", size=(36, 64))
    nusc = open_nuscenes(out, export.VERSION)
    assert [s.name for s in nusc.scenes] == ["scene-0001", "scene-0002"] and all(s.split == "val" for s in nusc.scenes)
    moments = instants(nusc.scenes[0])
    assert len(moments) == 60 and [i for i, m in enumerate(moments) if m.key] == list(range(0, 60, 6))
    assert len(instants(nusc.scenes[1])) == 13
    np.testing.assert_allclose(np.diff([m.timestamp_us for m in moments]), 1e6 / 12, atol=1)
    np.testing.assert_allclose([m.ego_translation[1, :2] for m in moments], arrays["poses"][:, :2], atol=1e-6)
    np.testing.assert_allclose(moments[0].intrinsics, arrays["intrinsics"], rtol=1e-5)
    np.testing.assert_allclose(moments[0].cam2ego_translation, arrays["extrinsics"][:, :3], rtol=1e-5)
    from mila_jax.decode import open_decoder

    decoded = list(open_decoder(open_codec(small_config), small_config)(arrays["latents"][:, 7:8]))[0]
    for v in range(len(VIEWS)):
        image = load_image(nusc.root / moments[7].files[v], 36, 64)
        assert np.abs(image.astype(int) - export.resized(decoded[v], (36, 64))).mean() < 8
    with pytest.raises(UserError, match="holds an exported data set already"):
        export.export_command(small_config, [folder], out, format_="nuscenes")


def test_what_is_no_finished_video_or_of_another_kind_is_one_line(small_config, tmp_path, monkeypatch):
    """By export and by drift, before anything is decoded."""
    monkeypatch.setattr(Codec, "decode", lambda *_: pytest.fail("pictures were decoded before everything was checked"))

    codec = open_codec(small_config)
    for command in (export, drift_command_module):
        monkeypatch.setattr(command, "open_codec", lambda config: codec)

    def broken(name, about=None, damage=None, **changes):
        folder, _ = _video(tmp_path / name, small_config, **changes)
        record = {"frames": 60, "strategy": "recurrent"} if about is None else about
        (folder / "generate.json").write_text(record if isinstance(record, str) else json.dumps(record))
        if damage:
            damage(folder / "latents.npz")
        return folder

    r = np.random.default_rng(0)
    cases = {
        broken("lacks", damage=lambda path: path.unlink()): "has no finished video",
        broken("cut", damage=lambda path: path.write_bytes(path.read_bytes()[:5000])): "has no finished video",
        broken("json", about="{"): "has no finished video",
        broken("list", about="[]"): "are not as mila generate writes them",
        broken("empty", about={}): "are not as mila generate writes them",
        broken("fewer", about={"frames": 61, "strategy": "recurrent"}): "has 60 latents, generate.json tells of 61",
        broken("poses", poses=np.zeros((59, 3))): "latents.npz has poses",
        broken("nan", latents=np.full((6, 60, 4, 6, 4), np.nan, np.float16)): "no finite numbers",
        broken("channels", latents=r.normal(size=(6, 60, 4, 6, 8)).astype(np.float16)): "has latents of",
        broken("autoencoder", about={"frames": 60, "strategy": "recurrent", "identity": {"autoencoder": ["0", None]}}): "another autoencoder",
    }
    for folder, message in cases.items():
        with pytest.raises(UserError, match=message) as error:
            export.export_command(small_config, [folder], tmp_path / "out", format_="nuscenes")
        assert str(folder) in str(error.value)
    cases[broken("size", latents=r.normal(size=(6, 60, 2, 6, 4)).astype(np.float16))] = "has latents of"
    cases[broken("strategy", about={"frames": 60})] = "does not tell strategy"
    for folder, message in cases.items():
        with pytest.raises(UserError, match=message):
            drift_command(small_config, [folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    codec = dataclasses.replace(codec, sha256="0" * 64)
    with pytest.raises(UserError, match="encoded with another autoencoder"):
        drift_command(small_config, [tmp_path / "size"], tmp_path / "out")


def _following(folder, config, begin=1.0, frames=50, swerve=0.0):
    """A folder of a video that follows a recorded scene, but for `swerve` metres to the side at its end; and that scene."""
    scene = read_scene(config.data.dir, "scene-0002")
    start, _ = from_scene(scene, begin, 2)
    poses = start.trajectory.at(np.arange(1, frames + 1) / 12)
    poses[:, 1] += np.linspace(0, swerve, frames)
    _video(folder, config, frames, poses=poses, intrinsics=start.intrinsics, extrinsics=start.extrinsics.copy())
    about = {"frames": frames, "text": "", "scene": start.scene, "time_us": start.time_us}
    (folder / "generate.json").write_text(json.dumps(about))
    return folder


def _rows(folder, version):
    return {path.stem: json.loads(path.read_text()) for path in (folder / version).glob("*.json")}


def test_boxes_are_where_the_recorded_objects_are_then(small_config, tmp_path, capsys):
    """The stub's cars stand 8 and 16 m ahead of the ego and keep that distance: at any time, so at that of the generated keyframes too."""
    folder = _following(tmp_path / "a", small_config)
    out = export.export_command(small_config, [folder], tmp_path / "out", format_="nuscenes")
    assert "boxes of scene-0002" in capsys.readouterr().err
    told, made, source = (
        json.loads((out / "export.json").read_text()),
        _rows(out, export.VERSION),
        _rows(_root(small_config), small_config.data.version),
    )
    assert told[0]["follows"] == made["scene"][0]["name"] == "scene-0002" and told[0]["boxes"] == len(made["sample_annotation"]) == 2 * len(
        made["sample"]
    )
    assert made["log"][0]["location"] == "boston-seaport" and made["scene"][0]["description"] == "Straight road 2"
    poses, data = {r["token"]: r for r in made["ego_pose"]}, made["sample_data"]
    sensors = {c["token"]: s["channel"] for c in made["calibrated_sensor"] for s in made["sensor"] if s["token"] == c["sensor_token"]}
    lidar = {r["sample_token"]: poses[r["ego_pose_token"]] for r in data if sensors[r["calibrated_sensor_token"]] == "LIDAR_TOP"}
    samples = {r["token"]: r["timestamp"] for r in made["sample"]}
    names = {r["token"]: r["name"] for r in made["category"] + made["attribute"]}
    instances = {r["token"]: r for r in made["instance"]}
    ahead = []
    for row in made["sample_annotation"]:
        ego = lidar[row["sample_token"]]
        assert ego["timestamp"] == samples[row["sample_token"]]
        local = geometry.inverse(geometry.transform(ego["translation"], ego["rotation"])) @ [*row["translation"], 1]
        ahead.append(round(local[0], 2))
        assert abs(local[1]) < 1e-6 and names[instances[row["instance_token"]]["category_token"]] == "vehicle.car"
        assert [names[a] for a in row["attribute_tokens"]] == ["vehicle.moving"] and row["num_lidar_pts"] >= 1
    assert set(ahead) == {8.0, 16.0}
    # Keyframes lie where the recorded ones do, but for half a frame, and no two times are those of the source.
    recorded = np.array([r["timestamp"] for r in source["sample"]])
    gaps = np.abs(np.array(sorted(samples.values()))[:, None] - recorded).min(1)
    assert gaps.max() <= 1e6 / 24 + 1 and gaps.max() > 0
    nusc = open_nuscenes(out, export.VERSION)
    for name in VIEWS:
        theirs = next(s for s in open_nuscenes(small_config.data.nuscenes, small_config.data.version).scenes if s.name == "scene-0002").tracks[name]
        track = nusc.scenes[0].tracks[name]
        np.testing.assert_allclose(
            track.ego_translation[:, 0], np.interp(track.timestamps_us, theirs.timestamps_us, theirs.ego_translation[:, 0]), atol=0.02
        )
    for row in made["instance"]:
        chain, token = [], row["first_annotation_token"]
        rows = {r["token"]: r for r in made["sample_annotation"]}
        while token:
            chain.append(token)
            token = rows[token]["next"]
        assert len(chain) == row["nbr_annotations"] and chain[-1] == row["last_annotation_token"]


def _root(config):
    return open_nuscenes(config.data.nuscenes, config.data.version).root


def test_videos_on_other_ways_have_no_boxes(small_config, tmp_path, capsys):
    """A path changed by hand, a scene twice, a video that says nothing of its scene, another data set."""
    folders = [
        _following(tmp_path / "a", small_config),
        _following(tmp_path / "b", small_config, swerve=1.5),
        _following(tmp_path / "c", small_config),
    ]
    folders.append(_video(tmp_path / "d", small_config)[0])
    out = export.export_command(small_config, folders, tmp_path / "out", format_="nuscenes")
    told = json.loads((out / "export.json").read_text())
    assert [row["scene"] for row in told] == ["scene-0002", "scene-0002a", "scene-0003", "scene-0004"]
    assert [row["boxes"] > 0 for row in told] == [True, False, True, False]
    assert "1.5 m and 0.00 rad apart" in told[1]["why_no_boxes"] and "names no recorded scene" in told[3]["why_no_boxes"]
    assert capsys.readouterr().err.count("no boxes") == 2
    about = json.loads((folders[0] / "generate.json").read_text())
    for change, message in (
        ({"scene": "scene-0009"}, "has no scene 'scene-0009'"),
        ({"time_us": 5}, "has no frame at 5"),
        ({"latents": 10}, "temporal latents"),
    ):
        (folders[0] / "generate.json").write_text(json.dumps(about | change))
        with pytest.raises(UserError, match=message):
            export.export_command(small_config, folders[:1], tmp_path / "more", format_="nuscenes")
    assert not (tmp_path / "more").exists()


def test_boxes_turn_between_two_moments():
    """Half of a turn by 0.8 rad is one by 0.4, whichever sign the quaternions have; equal rotations stay."""
    first, second = geometry.yaw_quaternion(0.2), geometry.yaw_quaternion(1.0)
    for other in (second, -second):
        np.testing.assert_allclose(geometry.interpolate_rotation(first, other, 0.5), geometry.yaw_quaternion(0.6), atol=1e-12)
    np.testing.assert_allclose(geometry.interpolate_rotation(first, first, np.array([0.0, 0.3])), [first, first], atol=1e-12)


def test_annotation_tables_that_do_not_belong_together(small_config, tmp_path):
    folder = tmp_path / "v"
    folder.mkdir()
    source = _rows(_root(small_config), small_config.data.version)
    for lost in ("instance", "category", "attribute"):
        for name in ("sample_annotation", "instance", "category", "attribute"):
            (folder / f"{name}.json").write_text(json.dumps([] if name == lost else source[name]))
        with pytest.raises(UserError, match=f"not in table '{lost}'"):
            read_box_tracks(folder, [r["token"] for r in source["sample"]], [r["timestamp"] for r in source["sample"]])


def test_devkit_reads_it_too(small_config, tmp_path):
    nuscenes = pytest.importorskip("nuscenes", reason="nuscenes-devkit is not installed")
    folder, _ = _video(tmp_path / "a", small_config)
    out = export.export_command(small_config, [folder], tmp_path / "out", format_="nuscenes")
    found = nuscenes.NuScenes(version=export.VERSION, dataroot=str(out), verbose=False)
    sample = found.sample[0]
    assert set(sample["data"]) == {*VIEWS, "LIDAR_TOP"} and sample["anns"] == []


def test_act_bench_gets_numbered_front_videos(small_config, tmp_path):
    folder, _ = _video(tmp_path / "left_0123", small_config)
    out = export.export_command(small_config, [folder], tmp_path / "out", format_="act-bench")
    frames, rate = read_video(out / "left_0123.mp4")
    assert len(frames) == 44 and rate == 10.0
    assert export._act_frames()[:6].tolist() == [0, 1, 2, 4, 5, 6]


def test_two_videos_of_one_name_do_not_become_one_file(small_config, tmp_path):
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
    folders = [_video(tmp_path / part / "left_0123", small_config)[0] for part in ("a", "b")]
    with pytest.raises(UserError, match="left_0123 are of one ACT-Bench sample"):
        export.export_command(small_config, folders, tmp_path / "out", format_="act-bench")


def test_what_act_bench_would_stumble_over_is_refused(small_config, tmp_path):
    """Its scorer reads all .mp4 of the folder and tells them by the number at the end of their names, as an integer."""
    video, other = (_video(tmp_path / name, small_config)[0] for name in ("left_0123", "right_123"))
    with pytest.raises(UserError, match="left_0123 and right_123 are of one ACT-Bench sample"):
        export.export_command(small_config, [video, other], tmp_path / "out", format_="act-bench")
    (tmp_path / "out").mkdir()
    for name, message in (("video.mp4", "ends in no number"), ("x_000123.mp4", "is of a sample to be exported")):
        path = tmp_path / "out" / name
        path.touch()
        with pytest.raises(UserError, match=f"{name} {message}"):
            export.export_command(small_config, [video], tmp_path / "out", format_="act-bench")
        assert path.exists()
        path.unlink()


@pytest.mark.parametrize("size", ["00x00", "10x1600", "900x70000", "900"])
def test_sizes_that_no_picture_has(size):
    with pytest.raises(UserError, match=f"--size={size}"):
        export.parse_size(size)


def test_an_export_that_was_cut_short_is_made_again(small_config, tmp_path):
    folder, _ = _video(tmp_path / "a", small_config, frames=12)
    out = export.export_command(small_config, [folder], tmp_path / "out", format_="nuscenes")
    with pytest.raises(UserError, match="holds an exported data set already"):
        export.export_command(small_config, [folder], out, format_="nuscenes")
    (out / export.VERSION / "splits.json").unlink()  # the last file
    (out / export.VERSION / "sample_data.json").write_text("[")
    export.export_command(small_config, [folder], out, format_="nuscenes")
    assert tables.read_json(out / export.VERSION / "sample_data.json")


def test_refusals_come_before_any_work(small_config, tmp_path):
    (tmp_path / "none").mkdir()
    short, _ = _video(tmp_path / "short_1", small_config, frames=12)
    unnamed, _ = _video(tmp_path / "left", small_config)
    for folder, format_, message in (
        (tmp_path / "none", "nuscenes", "no finished video"), (short, "act-bench", "44 at 10 Hz"), (unnamed, "act-bench", "must end in _"), (short, "kitti", "--format=kitti"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            export.export_command(small_config, [folder], tmp_path / "out", format_=format_)
    assert not (tmp_path / "out").exists()
    with np.load(short / "latents.npz") as z:
        np.savez(short / "latents.npz", latents=z["latents"], poses=z["poses"])
    with pytest.raises(UserError, match="lacks extrinsics, intrinsics"):
        export.export_command(small_config, [short], tmp_path / "out", format_="nuscenes")
