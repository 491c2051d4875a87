"""`mila evaluate --preset` and `mila report` on a small data set: frames, resuming, cards, errors."""

import dataclasses
import json

import numpy as np
import pytest

from data_pipeline import presets
from data_pipeline.presets import scenes_of_encoded
from mila_jax import preset_scores
from mila_jax.cli import main
from mila_jax.errors import UserError
from mila_jax.evaluate.networks import Network
from mila_jax.train.loop import train

SHORT = presets.ClipPreset("short", "six", 11, 1, "keyframes", fid_from=1, source="tests")


def _pictures(frames):
    return np.asarray(frames, np.float32).mean((1, 2))


def _videos(frames):
    means = np.asarray(frames, np.float32).mean((2, 3))
    return np.concatenate([means.mean(1), np.abs(np.diff(means, axis=1)).mean(1)], -1)


NETWORKS = [Network("FD-test", "means", "aa" * 32, "none", False, _pictures, 16), Network("FVD-test", "means of clips", "bb" * 32, "none", True, _videos, 2)]


@pytest.fixture(scope="module")
def trained(small_config, tmp_path_factory):
    config = small_config.copy_and_resolve_references()
    config.train.dir = str(tmp_path_factory.mktemp("preset") / "train")
    config.train.steps, config.generate.steps = 2, 1
    config.generate.weights = str(train(config, progress=False).model)
    return config


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "short", SHORT)
    monkeypatch.setitem(presets.PRESETS, "slow", dataclasses.replace(SHORT, name="slow", fps=6, conditioning=3, fid_from=3, fvd_from=1))
    monkeypatch.setattr(preset_scores, "parse_networks", lambda texts, preset: NETWORKS)


PARSE = preset_scores.parse_networks  # `known` puts another in its place


def test_networks_by_option(monkeypatch):
    monkeypatch.setattr(preset_scores, "open_network", lambda name, path, **settings: (name, path, settings))
    options = ["effnet@112", "i3d", "i3d:crop=a:b.pt", "inception=c@d.pth", "inception:squash=c.pth"]
    assert PARSE(options, presets.PRESETS["opendwm-150x16@10"]) == [
        ("effnet", None, {"size": 112}), ("i3d", None, {"method": "squash"}), ("i3d", "a:b.pt", {"method": "crop"}),
        ("inception", "c@d.pth", {}), ("inception", "c.pth", {"method": "squash"}),
    ]  # fmt: skip
    assert PARSE(["i3d"], presets.PRESETS["mila-600"]) == [("i3d", None, {"method": "tf1"})]
    for bad in ("i3d@112", "effnet:squash", "effnet@big"):
        with pytest.raises(UserError, match=f"--network={bad}"):
            PARSE([bad])


def test_scores_with_cards_resumed_and_compared(trained, tmp_path, monkeypatch):
    page = preset_scores.preset_command(trained, "short", tmp_path / "a", limit=4, progress=False).read_text()
    assert page.count("<video") == 3 and "Protocol" in page
    record = json.loads((tmp_path / "a" / "scores.json").read_text())
    rows = {(r["card"]["score"], r["card"]["views"]): r for r in record["scores"]}
    assert set(rows) == {(s, v) for s in ("FD-test", "FVD-test") for v in ("multi", "front")}
    card = rows["FD-test", "multi"]["card"]
    assert (card["frames"], card["first"], card["given"], card["n_real"], card["real"]) == (10, 1, 1, 4, "images")
    assert rows["FVD-test", "front"]["card"]["frames"] == 11
    assert all(np.isfinite(r["distance"]) and "real halves" in r and "real frozen" in r for r in rows.values())
    assert rows["FVD-test", "multi"]["real frozen"] > 0 and rows["FVD-test", "multi"]["real shuffled"] >= 0

    # One clip's file is lost: only that one is made again, and the scores are the same.
    files = sorted((tmp_path / "a" / "clips").glob("*.npz"))
    assert len(files) == 4
    files[1].unlink()
    made = []
    video = preset_scores.PresetBench.video
    monkeypatch.setattr(preset_scores.PresetBench, "video", lambda self, clip: made.append(clip) or video(self, clip))
    preset_scores.preset_command(trained, "short", tmp_path / "a", limit=4, progress=False)
    again = json.loads((tmp_path / "a" / "scores.json").read_text())
    assert len(made) == 1
    for before, after in zip(record["scores"], again["scores"]):
        assert after["card"] == before["card"] and after["distance"] == pytest.approx(before["distance"], rel=1e-5, abs=1e-6)

    preset_scores.preset_command(trained, "short", tmp_path / "b", limit=2, progress=False)
    text = preset_scores.report_command(tmp_path / "a", tmp_path / "b", tmp_path / "ab.html")
    assert text.count("NOT comparable") == 4 and "clips_sha256" in text and "n_real" in text
    assert "NOT comparable" in (tmp_path / "ab.html").read_text()
    assert preset_scores.report_command(tmp_path / "a", tmp_path / "a").count(", equal (halves") == 4


def test_frames_of_a_clip_are_the_given_ones_then_the_generated_at_the_presets_times(trained, tmp_path):
    bench = preset_scores.PresetBench(trained, presets.get_preset("slow"), NETWORKS, tmp_path)
    clip = presets.list_clips(bench.preset, scenes_of_encoded(trained.data.dir))[0][0]
    numbers = bench.instants(clip)
    gaps = np.diff(bench.stamps[clip.scene][numbers])
    np.testing.assert_allclose(gaps, 1e6 / 6, atol=1e6 / 24)
    fake, real = bench.video(clip)
    assert fake.shape == real.shape == (6, 11, 32, 48, 3)
    np.testing.assert_array_equal(fake[:, :3], real[:, :3])
    assert (fake[:, 3:] != real[:, 3:]).any()
    bench.generator = lambda starts, count, seed: (_numbered(count), None)
    bench.decoder = lambda latents: np.moveaxis(latents, 1, 0)  # "pictures" that are their frame's number
    made, _ = bench.video(clip)
    assert made[0, 3:, 0, 0, 0].tolist() == [2, 4, 6, 8, 10, 12, 14, 16]  # every second frame at 12 Hz is one at 6 Hz


def _numbered(count):
    class Rollout:
        latents = np.broadcast_to(np.arange(1, count + 1, dtype=np.uint8)[None, None, :, None, None, None], (1, 6, count, 32, 48, 3))

    return Rollout


def test_real_frames_are_images_or_decoded_latents_and_missing_ones_are_named(trained, tmp_path):
    encoded = trained.copy_and_resolve_references()
    encoded.data.nuscenes = None
    bench = preset_scores.PresetBench(encoded, SHORT, NETWORKS, tmp_path)
    assert bench.real.described == "decoded from their latents"
    clip = presets.list_clips(SHORT, scenes_of_encoded(trained.data.dir))[0][0]
    scene = preset_scores.read_scene(trained.data.dir, clip.scene)
    assert bench.real(scene, [0, 5]).shape == (6, 2, 32, 48, 3)
    images = preset_scores.PresetBench(trained, SHORT, NETWORKS, tmp_path).real
    with pytest.raises(UserError, match="has no scene 'other'"):
        images(scene | {"name": "other"}, [0])


def test_mistakes_end_in_one_line(trained, tmp_path, capsys):
    for argument, message in ((["--preset=nothing", f"--out={tmp_path}/x"], "unknown preset"), (["--preset=short"], "--out is not set")):
        code = main(["evaluate", "--config=configs/tiny.py", f"--config.data.dir={trained.data.dir}", *argument])
        assert code == 2 and message in capsys.readouterr().err
    with pytest.raises(UserError, match="must be at least 2"):
        preset_scores.preset_command(trained, "short", tmp_path / "y", limit=1, progress=False)
    with pytest.raises(UserError, match="has 0 clips of long-150"):
        preset_scores.preset_command(trained, "long-150", tmp_path / "y", progress=False)
    (tmp_path / "z").mkdir()
    with pytest.raises(UserError, match="scores.json is not there"):
        preset_scores.report_command(tmp_path / "z", tmp_path / "z")
