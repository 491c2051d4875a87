"""Generated videos for other tools: a nuScenes data set that our reader opens, ACT-Bench's folder, and what is refused."""

import json

import numpy as np
import pytest

from data_pipeline.nuscenes.reader import instants, load_image, open_nuscenes
from mila_jax import export
from mila_jax.errors import UserError
from mila_jax.evaluate.video import read_video
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
    from mila_jax.prepare import open_codec

    decoded = list(open_decoder(open_codec(small_config), small_config)(arrays["latents"][:, 7:8]))[0]
    for v in range(len(VIEWS)):
        image = load_image(nusc.root / moments[7].files[v], 36, 64)
        assert np.abs(image.astype(int) - export._resized(decoded[v], (36, 64))).mean() < 8
    with pytest.raises(UserError, match="holds an exported data set already"):
        export.export_command(small_config, [folder], out, format_="nuscenes")


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
