"""The demo from end to end at a small size, and that a second run reuses everything."""

import json
import pathlib

import numpy as np
import pytest

from data_pipeline.simulator.write import SimulatorConfig, claim, simulate
from mila_jax.choose_model import load_chosen
from mila_jax.demo import _generate, demo
from mila_jax.errors import UserError
from mila_jax.generate import window_settings
from mila_jax.train.loop import train
from mila_jax.unfinished import Unfinished
from tests import nuscenes_stub


def test_demo_ends_in_a_report_and_reuses_what_is_finished(small_config, tmp_path, monkeypatch):
    config = small_config.copy_and_resolve_references()
    config.train.steps, config.train.eval_every = 2, 2
    config.simulate.update(scenes=2, val_scenes=1, seconds=6.0, workers=1)

    def stub(config, out, progress):
        simulate(out, SimulatorConfig(scenes=2, seconds=6.0, height=32, width=48), progress, nuscenes_stub.World, nuscenes_stub.Renderer)

    monkeypatch.setattr("mila_jax.demo.simulate_from_config", stub)
    path = demo(config, tmp_path / "demo", train_first=True, seconds=2.5, progress=False)
    assert path == tmp_path / "demo" / "report.html"
    page = path.read_text()
    assert page.count("<video") == 2 and "FD-EffNetLite0" in page and "Held-out loss" in page and "Agreement of neighbouring views where" in page
    assert "http://" not in page and "https://" not in page
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "demo").rglob("*") if p.suffix in (".mp4", ".jpg", ".array_record")}
    (tmp_path / "demo" / "video" / "recorded.mp4").unlink()  # as if it had been killed while that was written: everything else stays
    demo(config, tmp_path / "demo", train_first=True, seconds=2.5, progress=False)
    assert len(times) > 2 and all(p.exists() and (p.stat().st_mtime_ns == t) == (p.name != "recorded.mp4") for p, t in times.items())

    def begun(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("mila_jax.demo.simulate_from_config", begun)
    with pytest.raises(KeyboardInterrupt):
        demo(config, tmp_path / "demo", train_first=True, fresh=True, seconds=2.5, progress=False)
    assert not any(p.exists() for p in times)


def test_fresh_deletes_nothing_that_no_demo_made(small_config, tmp_path):
    (tmp_path / "nuscenes" / "v1.0-trainval").mkdir(parents=True)
    for fresh in (False, True):
        with pytest.raises(UserError, match="no demo made"):
            demo(small_config, tmp_path, fresh=fresh, train_first=True, progress=False)
    assert (tmp_path / "nuscenes" / "v1.0-trainval").exists()


def test_lengths_that_make_no_sense_end_before_any_work(small_config, tmp_path):
    for seconds in (0, -1, float("nan"), 0.1, 1e9):
        with pytest.raises(UserError, match="--seconds"):
            demo(small_config, tmp_path / "demo", train_first=True, seconds=seconds, progress=False)
    assert not (tmp_path / "demo").exists()


def test_scenes_of_a_longer_demo_are_used_for_a_shorter_one(small_config, tmp_path, monkeypatch):
    asked = []

    def simulated(config, out, progress):
        asked.append(config.simulate.seconds)
        raise KeyboardInterrupt

    monkeypatch.setattr("mila_jax.demo.simulate_from_config", simulated)
    (tmp_path / "timings.json").write_text("{}")
    claim(tmp_path / "nuscenes" / small_config.data.version, SimulatorConfig(seconds=63.0))
    for seconds in (10, 60, 70):
        with pytest.raises(KeyboardInterrupt):
            demo(small_config, tmp_path, train_first=True, seconds=seconds, progress=False)
    assert asked == [63, 63, 73]


def test_an_interrupted_video_goes_on_or_is_left_for_one_of_other_settings(small_config, tmp_path, monkeypatch):
    config = small_config.copy_and_resolve_references()
    config.train.dir, config.train.steps = str(tmp_path / "train"), 2
    config.generate.weights = str(train(config, progress=False).model)
    model = load_chosen(config)
    config = window_settings(model, config)
    folder, write = tmp_path / "video", Unfinished.write

    Unfinished(folder / "unfinished", {"seed": 7}).write(5, np.zeros(1))

    def interrupted(self, number, window):
        write(self, number, window)
        raise KeyboardInterrupt

    monkeypatch.setattr(Unfinished, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _generate(config, model, folder, 1.5, 18, False)
    assert [p.name for p in (folder / "unfinished").glob("*.npy")] == ["window-00000.npy"]
    monkeypatch.setattr(Unfinished, "write", write)
    _generate(config, model, folder, 1.5, 18, False)
    assert json.loads((folder / "generate.json").read_text())["windows_resumed"] == 1 and not (folder / "unfinished").exists()


def test_an_address_is_no_folder(small_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--out=gs://b/demo is an address; give a folder of this machine"):
        demo(small_config, "gs://b/demo", train_first=True, progress=False)
    assert not list(tmp_path.iterdir())


def test_unwritable_folder(small_config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out"):
        demo(small_config, pathlib.Path(tmp_path / "file" / "demo"), train_first=True, progress=False)
