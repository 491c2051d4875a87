"""Clip presets: published counts on the real validation split's frame numbers, rules on made-up scenes, the commands."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pytest

from data_pipeline import presets
from data_pipeline.nuscenes.check import check_data
from data_pipeline.nuscenes.reader import open_nuscenes
from mila_jax.cli import main
from mila_jax.errors import UserError
from mila_jax.views import VIEWS
from tests import nuscenes_stub as stub

GAPS = json.loads((pathlib.Path(__file__).parent / "data/val_keyframe_gaps.json").read_text())["gaps"]


@pytest.fixture(scope="module")
def val():
    return presets.scenes_of_gaps(GAPS)


@pytest.mark.parametrize("name, count", [(p.name, p.published) for p in presets.PRESETS.values()])
def test_published_counts(val, name, count):
    preset = presets.PRESETS[name]
    clips, dropped = presets.list_clips(preset, val)
    assert len(clips) == count
    assert all(len(clip.frames) == preset.frames and clip.frames[0] == clip.start for clip in clips)
    if preset.starts == "keyframes":  # every keyframe is a clip or was dropped for a reason
        assert len(clips) + sum(n for reason, n in dropped.items() if reason != "scenes without any clip") == 6019


@pytest.mark.parametrize("frames, count", [(25, 5369), (28, 5268), (32, 5137)])
def test_frames_that_must_be_left(val, frames, count):
    assert len(presets.list_clips(dataclasses.replace(presets.PRESETS["mila-5369"], frames=frames), val)[0]) == count


def test_the_600_are_four_of_each_scene_and_part_of_the_5369(val):
    many, few = ({(c.scene, c.start) for c in presets.list_clips(presets.PRESETS[n], val)[0]} for n in ("mila-5369", "mila-600"))
    assert few < many
    assert [presets.PRESETS[n].conditioning for n in ("mila-5369", "mila-5369-4f", "mila-600")] == [1, 4, 4]  # the paper's table 1
    assert set(np.unique([s for s, _ in few], return_counts=True)[1]) == {4}


def test_hash_depends_on_the_list_only(val):
    clips, _ = presets.list_clips(presets.PRESETS["mila-600"], val)
    assert presets.clip_list_hash(clips) == presets.clip_list_hash(list(clips)) != presets.clip_list_hash(clips[1:])
    samples = presets.list_clips(presets.PRESETS["wcoda-150x4x16"], val)[0]
    assert len({(c.scene, c.sample) for c in samples}) == 600


def scene(n, key=(0,), times=None, missing=()):
    complete = np.ones(n, bool)
    complete[list(missing)] = False
    times = np.arange(n) / 12 if times is None else np.asarray(times)
    return presets.SceneFrames("s", "val", np.rint(times * 1e6).astype(np.int64), np.isin(np.arange(n), key), complete)


def test_frames_by_time_are_the_nearest_ones():
    preset = presets.PRESETS["opendwm-150x16@10"]
    clips, _ = presets.list_clips(preset, [scene(40)])
    assert clips[0].frames == tuple(int(np.floor(i * 1.2 + 0.5)) for i in range(19))
    # A hole of three frames at 1 s: no frame within half a frame of 1.1 s; the keyframe after it is possible.
    times = [i / 12 for i in range(60) if i not in (12, 13, 14)]
    clips, dropped = presets.list_clips(preset, [scene(57, (0, 20), times)])
    assert clips[0].start == 20 and dropped == {"CAM_FRONT has no frame within half a frame of a wanted time": 1}


def test_encoded_moments_that_lack_a_camera_are_had_for_no_preset():
    front, holed = presets.PRESETS["vista-5369"], scene(40, range(0, 40, 6), missing=[3])
    assert [clip.start for clip in presets.list_clips(front, [holed])[0]] == [0, 6, 12]
    clips, dropped = presets.list_clips(front, [dataclasses.replace(holed, only_complete=True)])
    assert [clip.start for clip in clips] == [6, 12] and dropped["another camera has no frame at one of its moments"] == 1


def test_reasons():
    six, front = presets.PRESETS["mila-5369"], presets.PRESETS["vista-5369"]
    assert presets.list_clips(six, [scene(24)]) == ([], {"fewer than 25 frames left in the scene": 1, "scenes without any clip": 1})
    assert presets.list_clips(six, [scene(30, (0, 5), missing=[3])])[1] == {"another camera has no frame at one of its moments": 1}
    assert presets.list_clips(front, [scene(30, (0, 5, 11, 17, 23), missing=[3])])[0][0].start == 0
    assert presets.list_clips(front, [scene(30, (0, 5))])[1]["fewer than 5 keyframes left in the scene"] == 2
    assert presets.list_clips(six, [dataclasses.replace(scene(30), split="train")]) == ([], {})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    stub.write(root / "sim", scenes=3, val_scenes=2, seconds=6.0)
    stub.encode(root / "sim", root / "encoded")
    return root


def test_tables_and_encoded_data_give_the_same_clips(data, capsys, tmp_path):
    for source in ([f"--config.data.nuscenes={data / 'sim'}"], [f"--data={data / 'encoded'}"]):
        assert main(["clips", "--preset=mila-5369", *source, f"--out={tmp_path / f'{len(source[0])}.json'}"]) == 0
    one, other = (json.loads(p.read_text()) for p in sorted(tmp_path.iterdir()))
    assert one["sha256"] == other["sha256"] and one["clips"] == len(one["list"]) > 8
    capsys.readouterr()
    assert main(["clips", "--preset=mila-5369", f"--data={data / 'encoded'}"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    assert len(lines) == one["clips"] and lines[0].split()[:4] == ["scene-0001", "0", "0", "24"]
    assert main(["clips"]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in presets.PRESETS)


def test_clips_that_there_are_not(data, capsys):
    assert main(["clips", "--preset=long-150", f"--data={data / 'encoded'}"]) == 2
    assert "no clip of preset long-150" in capsys.readouterr().err
    assert main(["clips", "--preset=mila", f"--data={data / 'encoded'}"]) == 2
    assert "known: mila-5369" in capsys.readouterr().err
    assert main(["clips", "--preset=mila-600"]) == 2
    assert "data.nuscenes is not set" in capsys.readouterr().err


def test_images_that_a_list_needs_are_looked_for(data, capsys, tmp_path):
    shutil.copytree(data / "sim", tmp_path / "sim")
    arguments = ["clips", "--preset=mila-5369", f"--config.data.nuscenes={tmp_path / 'sim'}"]
    lost = {view: open_nuscenes(tmp_path / "sim", "v1.0-sim").scenes[0].tracks[view].files[9] for view in ("CAM_BACK", "CAM_FRONT")}
    (tmp_path / "sim" / lost["CAM_BACK"]).unlink()
    assert main(arguments) == 1
    text, error = capsys.readouterr()
    assert "scene-0001" in text and error.count("\n") == 1 and lost["CAM_BACK"] in error and error.startswith("error: 1 of")
    assert main(["clips", "--preset=vista-5369", arguments[-1]]) == 0  # the front camera alone
    (tmp_path / "sim" / lost["CAM_FRONT"]).unlink()
    assert main(["clips", "--preset=vista-5369", arguments[-1]]) == 1 and lost["CAM_FRONT"] in capsys.readouterr().err
    for folder in ("samples", "sweeps"):
        shutil.rmtree(tmp_path / "sim" / folder)
    assert main(arguments) == 0  # tables alone are enough for a list


def test_check_reports_what_is_missing(data, capsys, tmp_path):
    arguments = ["prepare", "--check", f"--config.data.nuscenes={data / 'sim'}", f"--out={tmp_path / 'check.json'}"]
    assert main(arguments) == 0
    whole = json.loads((tmp_path / "check.json").read_text())
    nusc = open_nuscenes(data / "sim", "v1.0-sim")
    assert whole["scenes"] == {"val": 2, "train": 1} and whole["missing_files"] == {}
    assert whole["frames"]["train"] == {v: len(nusc.scenes[2].tracks[v].files) for v in VIEWS}
    assert sum(whole["keyframe_gaps"].values()) == sum(n - s for n, s in zip(whole["keyframes"].values(), (2, 1)))
    assert whole["presets"]["mila-5369"]["clips"] > 0 and "fewer than" in str(whole["presets"]["long-150"]["dropped"])
    victim = data / "sim" / nusc.scenes[0].tracks["CAM_BACK"].files[3]
    hidden = victim.rename(victim.with_suffix(".hidden"))
    try:
        assert main(arguments) == 1
        assert f"missing images of CAM_BACK: 1, the first {victim.relative_to(data / 'sim')}" in capsys.readouterr().out
    finally:
        hidden.rename(victim)


def test_half_a_data_set_is_named(data, tmp_path):
    (tmp_path / "v1.0-mini").symlink_to(data / "sim/v1.0-sim")
    report = check_data(open_nuscenes(tmp_path, "v1.0-mini"))
    assert len(report["missing_scenes"]) == 10 and report["missing_files"]["CAM_FRONT"]["count"] > 100


def test_old_encoded_data_without_keyframes(data, tmp_path):
    index = json.loads((data / "encoded/index.json").read_text())
    for found in index["scenes"]:
        del found["front_us"], found["keyframes"]
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="does not say which frames are keyframes"):
        presets.scenes_of_encoded(tmp_path)
