"""The demo from end to end at a small size, and that a second run reuses everything."""

import pathlib

import pytest

from data_pipeline.simulator.write import SimulatorConfig, simulate
from mila_jax.demo import demo
from mila_jax.errors import UserError
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


def test_unwritable_folder(small_config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out"):
        demo(small_config, pathlib.Path(tmp_path / "file" / "demo"), train_first=True, progress=False)
