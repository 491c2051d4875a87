"""Latents of a temporal autoencoder from preparation to video: which frames each covers, in clips, plans and what is shown."""

import json

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from data_pipeline.clips import ClipSource, ClipSpec, find_starts, read_scene
from data_pipeline.nuscenes.reader import instants, load_image, open_nuscenes
from data_pipeline.records import read_index
from mila_jax import cli
from mila_jax.chunks import CHUNKS, chunks_of
from mila_jax.decode import VideoDecoder
from mila_jax.errors import UserError
from mila_jax.evaluate.video import read_video
from mila_jax.flow.plan import fits, plan_rollout
from mila_jax.flow.rollout import KINDS, make_rows, new_frames
from mila_jax.model.temporal_autoencoder import latent_count
from mila_jax.config import load_config
from mila_jax.generate_command import check_single_pictures
from mila_jax.parallel.aot.sizes import plan_sizes
from mila_jax.prepare import describe_data, open_codec, open_video_codec, prepare
from mila_jax.start import from_scene
from mila_jax.train.loop import train
from mila_jax.views import VIEWS
from tests.conftest import DATA

CHUNK = CHUNKS["chunk17"]


def with_temporal(config, folder, kind):
    """`config` with the recorded temporal weights (random, small), and folders of its own under `folder`."""
    config = config.copy_and_resolve_references()
    with np.load(DATA / "vae_temporal.npz") as z:
        save_file({k[2:]: z[k] for k in z.files if k.startswith("w/")}, folder / "temporal.safetensors")
    (folder / "config.json").write_text(json.dumps({"num_groups": 4}))
    config.autoencoder.temporal, config.autoencoder.temporal_path = kind, str(folder / "temporal.safetensors")
    config.data.dir, config.train.dir = str(folder / "encoded"), str(folder / "train")
    config.window.frames, config.window.conditioning, config.window.anchor_stride = 10, 5, 5
    config.train.fps, config.train.fps_weights = (12.0,), (1.0,)
    config.model.precondition, config.model.sweep = "none", 0
    return config


@pytest.fixture(scope="module")
def chunked(small_config, tmp_path_factory):
    config = with_temporal(small_config, tmp_path_factory.mktemp("chunked"), "chunk17")
    prepare(config, progress=False)
    return config


def test_which_frames_a_latent_covers():
    np.testing.assert_array_equal(CHUNK.last_frame(np.arange(-5, 11)), [-17, -13, -9, -5, -1, 0, 4, 8, 12, 16, 17, 21, 25, 29, 33, 34])
    for latents in (1, 5, 10, 40):
        assert latent_count(CHUNK.frame_count(latents)) == latents
    for given in (1, 5, 10):
        for frames in range(1, 60):
            more = CHUNK.latents_for(frames, given)
            covered = CHUNK.frame_count(given + more) - CHUNK.frame_count(given)
            assert (given + more) % 5 == 0 and frames <= covered < frames + 17
    np.testing.assert_allclose(CHUNK.seconds(np.array([0, 4, 5, 9]), 4), np.array([-16, 0, 1, 17]) / 12)


def test_a_missing_frame_ends_its_chunk():
    times = np.delete(np.arange(80) / 12, 20)
    np.testing.assert_array_equal(CHUNK.starts(times), [0, 20, 37, 54])
    assert len(CHUNK.starts(np.arange(16) / 12)) == 0


def test_rates_that_latents_have():
    assert [CHUNK.stride(fps) for fps in (12.0, 0.706, 12 / 34)] == [1, 5, 10]
    assert [CHUNK.rate(stride) for stride in (1, 5, 10)] == pytest.approx([12, 12 / 17, 12 / 34])
    for fps in (2.0, 1.0, 0.5):
        with pytest.raises(UserError, match=f"train.fps={fps:g} is no rate of latents"):
            CHUNK.stride(fps)


@pytest.mark.parametrize("spec", [ClipSpec(10, 5, 12.0), ClipSpec(10, 1, 12.0), ClipSpec(10, 5, 0.706), ClipSpec(10, 5, 0.706, 0.706)])
def test_clips_begin_with_the_first_latent_of_a_chunk(spec):
    """In a drive of 20 chunks with a frame missing between the ninth and the tenth: no clip reaches over that."""
    spec = ClipSpec(spec.frames, spec.conditioning, spec.fps, spec.conditioning_fps, CHUNK)
    frames = CHUNK.last_frame(np.arange(100))
    times = (frames + (frames >= 9 * 17)) / 12
    starts, chosen = find_starts(times, spec)
    numbers = spec.numbers() - spec.numbers()[0]
    length, phase = numbers[-1] + 1, spec.numbers()[0] % 5
    expected = [s for s in range(phase, 101 - length, 5) if not s < 45 <= s + length - 1]
    assert phase == (4 if spec.conditioning_fps < 12 else 0) and len(expected) > 0
    np.testing.assert_array_equal(chosen, np.array(expected)[:, None] + numbers)
    np.testing.assert_array_equal(starts, chosen[:, spec.conditioning - 1])


def test_prepared_latents_are_those_of_their_frames(chunked):
    """And the index says so."""
    index = read_index(chunked.data.dir)
    assert index.meta["temporal"] == "chunk17" and chunks_of(describe_data(chunked.data.dir)) == CHUNK
    codec = open_codec(chunked)
    video = open_video_codec(chunked, codec)
    nusc = open_nuscenes(chunked.data.nuscenes, chunked.data.version)
    scene = nusc.scenes[0]
    moments, found = instants(scene), read_scene(chunked.data.dir, scene.name)
    count = len(found["latents"])
    first = CHUNK.starts([m.timestamp_us * 1e-6 for m in moments])
    assert count == 5 * len(first) >= 15
    last = [moments[start + frame] for start in first for frame in (0, 4, 8, 12, 16)]
    np.testing.assert_array_equal(found["timestamps"], [m.timestamps_us for m in last])
    np.testing.assert_array_equal(found["ego_translation"], [m.ego_translation for m in last])
    np.testing.assert_array_equal(found["cam2ego_rotation"], np.asarray([m.cam2ego_rotation for m in last], np.float32))
    second = [load_image(nusc.root / m.files[2], *chunked.data.image_size) for m in moments[first[1] : first[1] + 17]]
    pictures = (codec.encode(np.stack(second)) - codec.shift) / codec.scale
    np.testing.assert_allclose(video.encode(pictures[None])[0], found["latents"][5:10, 2], atol=2e-3, rtol=2e-3)


def test_a_clip_of_latents(chunked):
    source = ClipSource(chunked.data.dir, "train", [ClipSpec(10, 5, 12.0), ClipSpec(10, 1, 12.0)])
    for number in range(len(source)):
        clip = source[number]
        spec = ClipSpec(10, int(clip["conditioning"]), 12.0, chunks=CHUNK)
        assert clip["latents"].shape[:2] == (6, 10) and clip["fps"] == 12
        assert np.abs(clip["frame_times"] - spec.offsets()).max() <= 1 / 24 and clip["frame_times"][spec.conditioning - 1] == 0
    with pytest.raises(UserError, match="multiples of 5"):
        ClipSource(chunked.data.dir, "train", [ClipSpec(8, 5, 12.0)])
    with pytest.raises(UserError, match="train.fps=2 is no rate"):
        ClipSource(chunked.data.dir, "train", [ClipSpec(10, 5, 2.0)])


@pytest.mark.parametrize("given", [1, 5, 10])
@pytest.mark.parametrize("strategy", ["recurrent", "coarse_to_refine", "divide_and_conquer"])
def test_windows_of_a_plan_are_those_of_training(given, strategy):
    plan = plan_rollout(90, window=15, conditioning=5, anchor_stride=10, strategy=strategy, given=given, chunks=CHUNK)
    for stage, windows in plan.stages.items():
        for number in range(windows.count):
            cond = windows.conditioning
            coarse = {"fps": 12 / 34, "conditioning_fps": 12.0 if number == 0 else 12 / 34}
            spec = ClipSpec(15, cond, chunks=CHUNK, **(coarse if stage == "coarse" else {"fps": 12.0}))
            np.testing.assert_allclose(windows.frame_times[number], spec.offsets(), atol=1e-9)
            np.testing.assert_array_equal((windows.indices[number] + given - 1) % 5, spec.numbers() % 5)
            assert windows.fps == pytest.approx(spec.told_fps)
    refine = plan.refine
    np.testing.assert_allclose(refine.reference_times, refine.times[:, 4])
    assert refine.times[-1, -1] == pytest.approx((CHUNK.last_frame(given - 1 + refine.indices[-1, -1]) - CHUNK.last_frame(given - 1)) / 12)


@pytest.mark.parametrize(
    "sizes, words", [({"window": 8}, "multiples of 5"), ({"conditioning": 1}, "go on from whole chunks"), ({"given": 3}, "go on from whole chunks")]
)
def test_windows_that_are_no_whole_chunks(sizes, words):
    with pytest.raises(UserError, match=words):
        plan_rollout(20, **({"window": 10, "conditioning": 5, "chunks": CHUNK} | sizes))


class Numbered:
    """A temporal codec whose latents hold their frames' numbers: one a channel, the first of a chunk in the last channel."""

    chunks = CHUNK

    def encode(self, frames):
        return np.pad(frames[..., 0], ((0, 0), (3, 0), (0, 0), (0, 0))).reshape(len(frames), -1, 4, 1, 1).transpose(0, 1, 3, 4, 2)

    def decode(self, latents):
        frames = latents.transpose(0, 1, 4, 2, 3).reshape(len(latents), -1, 20, 1, 1)[:, :, 3:]
        return frames.reshape(len(latents), -1, 1, 1, 1)


@pytest.mark.parametrize("given", [1, 5])
@pytest.mark.parametrize("strategy", ["recurrent", "coarse_to_refine"])
def test_frames_are_shown_in_order(given, strategy):
    """Latents that know their frames' numbers, put into the windows of a plan, come out as frames 1, 2, 3 … of the video."""
    numbers = np.arange(17 * 20).reshape(20, 17)
    drive = np.concatenate([Numbered().encode(chunk[None, :, None, None, None]) for chunk in numbers], 1)
    wanted = 60
    count = CHUNK.latents_for(wanted, given)
    plan = plan_rollout(count, window=10, conditioning=5, strategy=strategy, given=given, chunks=CHUNK)
    rows = make_rows(plan, {stage: np.zeros((windows.count, 1)) for stage, windows in plan.stages.items()})
    indices = np.concatenate([windows.indices for windows in plan.stages.values()]) + given - 1
    decoder = VideoDecoder(lambda latents: iter(latents.swapaxes(0, 1)), Numbered(), drive[:, :given])
    shown, taken = [], 0
    for kind, index in zip(rows.kind, indices):
        new = new_frames(plan, int(kind), drive[None, :, np.clip(index, 0, None)])[0][:, : count - taken]
        taken += new.shape[1]
        assert KINDS[int(kind)] != "coarse" or new.shape[1] == 0
        shown += [int(frame.ravel()[0]) for frame in (decoder(new) if new.shape[1] else ())]
    first = CHUNK.frame_count(given)
    assert shown[:wanted] == list(range(first, first + wanted)) and len(shown) < wanted + 17
    assert decoder.waiting.shape[1] == 0


@pytest.fixture(scope="module")
def trained(chunked):
    config = chunked.copy_and_resolve_references()
    config.train.steps, config.train.eval_every, config.train.eval_steps, config.train.eval_batches = 2, 2, 1, 1
    config.train.trainable = ("final.*",)  # a gradient through the whole network is most of the step, and not what this is about
    config.generate.weights = str(train(config, progress=False).model)
    return config


def run(config, *arguments):
    a = config.autoencoder
    settings = {
        "generate.weights": config.generate.weights, "generate.steps": 2, "autoencoder.path": a.path, "autoencoder.temporal": a.temporal,
        "autoencoder.temporal_path": a.temporal_path,
    }  # fmt: skip
    return cli.main([*arguments, "--quiet", *(f"--config.{key}={value}" for key, value in settings.items())])


@pytest.mark.parametrize("seconds", (-5.0, float("nan"), 99.0))
def test_a_start_near_no_chunk_is_refused(seconds):
    scene = {"name": "s", "times": CHUNK.last_frame(np.arange(15)) / 12, "chunks": CHUNK}
    with pytest.raises(UserError, match=f"--start={seconds:g}: no chunk of scene 's' ends near it; choose between 1.33 and 2.75"):
        from_scene(scene, seconds, 5)


def test_from_a_scene_to_a_video(trained, tmp_path):
    scene = next(s.name for s in read_index(trained.data.dir).scenes if s.split == "val")
    assert (
        run(
            trained,
            "generate",
            f"--data={trained.data.dir}",
            f"--scene={scene}",
            "--start=1.4",
            "--seconds=2.5",
            "--waypoints=left",
            f"--out={tmp_path}",
        )
        == 0
    )
    assert len(read_video(tmp_path / "video.mp4")[0]) == 30
    about = json.loads((tmp_path / "generate.json").read_text())
    assert (about["frames"], about["latents"]) == (30, 10)
    with np.load(tmp_path / "latents.npz") as z:
        assert z["latents"].shape[:2] == (6, 10) and z["poses"].shape == (30, 3)
    start, _ = from_scene(read_scene(trained.data.dir, scene), 1.4, 5)
    np.testing.assert_array_equal(start.first_latents, read_scene(trained.data.dir, scene)["latents"][:5].swapaxes(0, 1))


@pytest.mark.parametrize("images, given", [(2, 1), (18, 5)])
def test_from_images_to_a_video(trained, tmp_path, images, given):
    rng = np.random.default_rng(0)
    for view in VIEWS:
        (tmp_path / "frames" / view).mkdir(parents=True)
        for i in range(images):
            Image.fromarray(rng.integers(0, 255, (32, 48, 3), np.uint8)).save(tmp_path / "frames" / view / f"{i:03d}.png")
    assert run(trained, "generate", f"--frames={tmp_path / 'frames'}", "--waypoints=straight", "--seconds=1", f"--out={tmp_path / 'out'}") == 0
    assert len(read_video(tmp_path / "out/video.mp4")[0]) == 12
    assert json.loads((tmp_path / "out/generate.json").read_text())["latents"] == (5 if given == 5 else 4)


def test_other_commands_say_that_they_cannot(trained, tmp_path, capsys):
    plain = trained.copy_and_resolve_references()
    plain.autoencoder.temporal = "none"
    scene = read_index(trained.data.dir).scenes[0].name
    assert run(plain, "generate", f"--data={trained.data.dir}", f"--scene={scene}", "--seconds=2", f"--out={tmp_path}") == 2
    assert "autoencoder.temporal=chunk17" in capsys.readouterr().err
    for command in (
        ("evaluate", f"--config.data.dir={trained.data.dir}"), ("evaluate", "--preset=mila-600", f"--out={tmp_path}/e", f"--config.data.dir={trained.data.dir}"),
        ("ablate", f"--config.data.dir={trained.data.dir}", f"--out={tmp_path}/a"), ("drift", "none", f"--config.data.dir={trained.data.dir}", f"--out={tmp_path}/d"),
    ):  # fmt: skip
        assert run(trained, *command) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and ("temporal" in error or "clips of mila-600" in error), error


def test_coarse_latents_are_whole_chunks_apart():
    with pytest.raises(UserError, match="generate.anchor_stride=2 must be a multiple of the 5 latents of a chunk"):
        plan_rollout(90, window=15, conditioning=5, anchor_stride=2, chunks=CHUNK)
    assert plan_rollout(90, window=35, conditioning=5, anchor_stride=10, chunks=CHUNK).anchors == 3
    assert not fits(6, 30, CHUNK) and fits(10, 30, CHUNK) and fits(6, 30)


def test_videos_of_temporal_latents_are_told(tmp_path):
    for about in ({"frames": 10, "latents": 5}, {"frames": 10, "latents": 10, "temporal": "frame"}):
        with pytest.raises(UserError, match="holds temporal latents .* mila drift"):
            check_single_pictures(tmp_path, about, "drift")
    check_single_pictures(tmp_path, {"frames": 10}, "drift")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({}, None),
        ({"window.frames": 8}, "multiples of 5"),
        ({"train.fps": (12.0, 2.0)}, "train.fps=2 is no rate"),
        ({"autoencoder.temporal": "x"}, "'x' is unknown"),
    ],
)
def test_plans_of_temporal_latents(changes, words):
    config = load_config("configs/tiny.py")
    config.autoencoder.temporal, config.window.frames, config.window.conditioning, config.train.fps = "chunk17", 10, 5, (12.0, 0.706)
    config.update_from_flattened_dict(changes)
    if words is None:
        assert plan_sizes(config, 4, "train").frames == 10
    else:
        with pytest.raises(UserError, match=words):
            plan_sizes(config, 4, "train")


def test_one_latent_a_frame(small_config, tmp_path):
    config = with_temporal(small_config, tmp_path, "frame")
    prepare(config, progress=False)
    name = read_index(config.data.dir).scenes[0].name
    found, plain = read_scene(config.data.dir, name), read_scene(small_config.data.dir, name)
    np.testing.assert_array_equal(found["timestamps"], plain["timestamps"])
    assert found["chunks"] is None and found["latents"].shape == plain["latents"].shape
    video = open_video_codec(config, open_codec(config))
    latents = plain["latents"].astype(np.float32).swapaxes(0, 1)
    encoded = video.encode(latents)
    np.testing.assert_allclose(encoded[:, 20], found["latents"][20], atol=3e-2)
    assert video.decode(encoded).shape == latents.shape
