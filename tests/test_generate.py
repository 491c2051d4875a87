"""From weights to videos, and the command line around it."""

import dataclasses
import errno
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from ml_collections import ConfigDict
from PIL import Image

from data_pipeline.clips import read_scene
from data_pipeline.nuscenes.reader import open_nuscenes
from data_pipeline.records import read_index
from mila_jax import cli, generate, rollout_program, start
from mila_jax import scores as scores_module
from mila_jax.choose_model import find_guide, load_chosen, signature, with_guide
from mila_jax.config import load_config
from mila_jax.decode import deciding, deciding_window
from mila_jax.errors import UserError
from mila_jax.evaluate.video import read_video
from mila_jax.flow.rollout import collect
from mila_jax.generate_command import otherwise_than_trained, read_generated, writable_folder
from mila_jax.model.autoencoder_weights import Codec
from mila_jax.model.weights import SHIPPED, SHIPPED_GUIDE, load_model, save_model
from mila_jax.parallel.logical import mesh_axes
from mila_jax.prepare import open_codec
from mila_jax.rollout_program import Network, Parameters, RolloutProgram
from mila_jax.start import from_scene, read_frames
from mila_jax.train.loop import train
from mila_jax.unfinished import Unfinished, is_finished
from mila_jax.views import VIEWS


@pytest.fixture(scope="module")
def trained(small_config, tmp_path_factory):
    """(config with weights, val scene): two steps of training; the pictures mean nothing."""
    config = small_config.copy_and_resolve_references()
    config.train.dir = str(tmp_path_factory.mktemp("weights"))
    config.train.steps = 2
    outcome = train(config, progress=False)
    config.generate.weights = str(outcome.model)
    scene = next(s.name for s in read_index(config.data.dir).scenes if s.split == "val")
    return config, scene


def run(config, *arguments):
    """The command with the paths of `config`; returns its exit code."""
    settings = [
        f"--config.generate.weights={config.generate.weights}",
        f"--config.autoencoder.path={config.autoencoder.path}",
        "--config.generate.steps=2",
    ]
    return cli.main([arguments[0], "--quiet", *settings, *arguments[1:]])


def test_same_seed_same_video_and_batch_does_not_matter(trained):
    config, name = trained
    model = load_model(config.generate.weights)
    scene = read_scene(config.data.dir, name)
    a, _ = from_scene(scene, 1.0, 2)
    b, _ = from_scene(scene, 2.0, 2)
    generator = generate.Generator(model, config)
    first, plan = generator([a], 13, seed=3)
    again, _ = generator([a], 13, seed=3)
    other, _ = generator([a], 13, seed=4)
    both, _ = generator([a, b], 13, seed=3)
    assert first.latents.shape == (1, 6, 13, *model.data["latent_shape"])
    assert plan.coarse.count == 1 and plan.refine.count == 3
    np.testing.assert_array_equal(first.latents, again.latents)
    assert np.abs(first.latents - other.latents).max() > 1e-3
    np.testing.assert_allclose(both.latents[0], first.latents[0], atol=1e-3)


def test_conditions_follow_the_plan(trained):
    config, name = trained
    start, _ = from_scene(read_scene(config.data.dir, name), 1.0, 2)
    plan = generate.make_plan(config, 12, 2)
    coarse, fine = (generate.stage_conditions([start], w) for w in (plan.coarse, plan.refine))
    np.testing.assert_allclose(coarse.frame_times[0, 0], [-1 / 12, 0, 0.5, 1, 1.5, 2, 2.5, 3], atol=1e-6)
    np.testing.assert_allclose(fine.frame_times[1, 0], np.arange(-1, 7) / 12, atol=1e-6)
    assert float(coarse.fps[0, 0]) == 2 and float(fine.fps[0, 0]) == 12
    # The stub's car drives straight ahead at 8 m/s, so waypoints are 8 m/s times the frame's time in every window.
    for conditions in (coarse, fine):
        np.testing.assert_allclose(conditions.waypoints[..., 0], 8 * conditions.frame_times, atol=0.05)
        np.testing.assert_allclose(conditions.waypoints[..., 1:], 0, atol=0.05)


@pytest.mark.parametrize("strategy", ["recurrent", "divide_and_conquer"])
def test_other_strategies(trained, strategy):
    config, name = trained
    config = config.copy_and_resolve_references()
    config.generate.strategy = strategy
    start, _ = from_scene(read_scene(config.data.dir, name), 1.0, 2)
    result, _ = generate.Generator(load_model(config.generate.weights), config)([start], 7)
    assert result.latents.shape[2] == 7 and np.isfinite(result.latents).all()


def test_streaming_gives_the_bits_of_one_call(trained):
    config, name = trained
    start, _ = from_scene(read_scene(config.data.dir, name), 1.0, 2)
    generator = generate.Generator(load_model(config.generate.weights), config)
    video, plan = generator([start], 20, seed=3)
    job = generator.job([start], 20, seed=3)
    windows = list(generator.stream(job))
    streamed = collect(plan, np.stack(windows))
    assert len(windows) == job.windows == plan.windows == 5
    assert np.array_equal(streamed.latents, video.latents) and np.array_equal(streamed.corrected, video.corrected)
    resumed = list(generator.stream(job, iter(windows[:3])))
    assert all(np.array_equal(a, b) for a, b in zip(resumed, windows, strict=True))
    several = config.copy_and_resolve_references()
    several.generate.windows_per_call = 2
    assert all(np.array_equal(a, b) for a, b in zip(generator.with_config(several).stream(job), windows, strict=True))
    recurrent = config.copy_and_resolve_references()
    recurrent.generate.strategy, recurrent.window.tpd_strength, recurrent.generate.shift = "recurrent", 0.0, 0.0
    programs = generator._program.advance._cache_size()
    other = generator.with_config(recurrent)
    assert len(list(other.stream(other.job([start], 40)))) == 7 and generator._program.advance._cache_size() == programs  # nothing was compiled
    assert other.options.shift == pytest.approx(np.sqrt(32 * 48 / 512**2 * 8))
    with pytest.raises(ValueError, match="guidance"):
        recurrent.generate.guidance_text = 2.0
        generator.with_config(recurrent)


def test_peak_memory_of_ten_seconds_and_a_minute(trained):
    config, name = trained
    start, _ = from_scene(read_scene(config.data.dir, name), 1.0, 2)
    generator = generate.Generator(load_model(config.generate.weights), config)
    jobs = [generator.job([start], frames) for frames in (120, 720)]
    short, long = (generator.lower(job).compile().memory_analysis() for job in jobs)
    assert abs(long.temp_size_in_bytes - short.temp_size_in_bytes) <= 0.02 * short.temp_size_in_bytes
    grown = long.output_size_in_bytes - short.output_size_in_bytes
    latents = (jobs[1].windows - jobs[0].windows) * 6 * 8 * int(np.prod(generator.model.data["latent_shape"])) * 4
    assert grown == latents  # the windows that come out, nothing else


def test_sizes_of_windows_are_the_models_unless_generation_asks_for_others(trained):
    config, name = trained
    model = load_model(config.generate.weights)
    asked = config.copy_and_resolve_references()
    asked.window.frames = 99
    assert generate.window_settings(model, asked).window.frames == 8
    asked.generate.update(window=10, conditioning=4)
    sizes = generate.window_settings(model, asked).window
    assert (sizes.frames, sizes.conditioning, sizes.anchor_stride) == (10, 4, 6)
    asked.window.inner_anchors = True  # the model's own counts
    assert not generate.window_settings(model, asked).window.inner_anchors
    inner = asked.copy_and_resolve_references()
    inner.generate.update(inner_anchors=True, anchor_stride=3)
    assert generate.make_plan(generate.window_settings(model, inner), 8, 4).refine.inner == (6,)
    model.config.window.inner_anchors = True
    assert generate.window_settings(model, asked).window.inner_anchors
    model.config.window.inner_anchors = False
    start, _ = from_scene(read_scene(config.data.dir, name), 1.0, 4)
    generator = generate.Generator(model, generate.window_settings(model, asked))
    video, plan = generator([start], 8)
    assert video.latents.shape[2] == 8 and np.isfinite(video.latents).all() and plan.refine.indices.shape == (2, 10)
    with pytest.raises(UserError, match="first_latents"):
        generator.job([dataclasses.replace(start, first_latents=start.first_latents[:, :, 1:])], 8)
    asked.generate.jdc = False
    assert generate.make_plan(generate.window_settings(model, asked), 8, 4).strategy == "divide_and_conquer"
    asked.generate.conditioning = -1
    with pytest.raises(UserError, match="generate.conditioning"):
        generate.window_settings(model, asked)


def test_guidance_in_one_pass_or_in_turn(trained):
    config, name = trained
    start, _ = from_scene(read_scene(config.data.dir, name), 1.0, 2)
    model, videos = load_model(config.generate.weights), []
    for batched in (True, False):
        c = config.copy_and_resolve_references()
        c.generate.update(guidance_text=2.0, guidance_waypoints=3.0, guidance_batched=batched, strategy="recurrent")
        videos.append(generate.Generator(model, c)([start], 6)[0].latents)
    np.testing.assert_allclose(*videos, atol=2e-4)


@struct.dataclass
class Dropped:
    """As much of the conditions as guidance touches."""

    drop_text: jax.Array
    drop_waypoints: jax.Array


@pytest.mark.parametrize("batched", [True, False])
def test_each_scale_is_of_its_condition(monkeypatch, batched):
    """A velocity of 1 with the text and 10 with the waypoints: with nothing dropped 11, without text 10, without both 0."""
    known = lambda x, levels, given: x + (1.0 * ~given.drop_text + 10.0 * ~given.drop_waypoints)[:, None]  # noqa: E731
    monkeypatch.setattr(rollout_program, "make_velocity", lambda *_: known)
    settings = ConfigDict(dict(guidance_text=2.0, guidance_waypoints=3.0, guidance_batched=batched))
    velocity = rollout_program.generation_velocity(Network(None, None, None), Parameters(None), settings)
    nothing = jnp.zeros(2, bool)
    np.testing.assert_allclose(velocity(jnp.zeros((2, 1)), jnp.zeros((2, 1)), Dropped(nothing, nothing)), 3 * (10 - 0) + 2 * (11 - 10))


def test_a_guide_is_kept_away_from_after_the_other_guidance(monkeypatch):
    """Text guidance makes 2 (1 - 0) of the model's velocity; the guide's is 0.5, with the text."""
    known = lambda _, params, *__: lambda x, levels, given: x + (params * ~given.drop_text)[:, None]  # noqa: E731
    monkeypatch.setattr(rollout_program, "make_velocity", known)
    settings = ConfigDict(dict(guidance_text=2.0, guidance_waypoints=1.0, guidance_batched=True, guidance_model=1.5))
    network = Network(None, None, None, Network(None, None, None))
    given = jnp.zeros((2, 1)), jnp.zeros((2, 1)), Dropped(jnp.zeros(2, bool), jnp.zeros(2, bool))
    velocity = rollout_program.generation_velocity(network, Parameters(1.0, 0.5), settings)
    np.testing.assert_allclose(velocity(*given), 0.5 + 1.5 * (2.0 - 0.5))
    settings.guidance_model = 1.0
    np.testing.assert_allclose(rollout_program.generation_velocity(network, Parameters(1.0, 0.5), settings)(*given), 2.0)


def test_the_guide_sees_videos_whole_where_only_passes_are_split(monkeypatch):
    """Kernels refuse a batch of one that is said to be split."""
    seen = {}

    def noting(_, params, *__):
        return lambda x, levels, given: (seen.update({params: mesh_axes("batch")}), x)[1]

    monkeypatch.setattr(rollout_program, "make_velocity", noting)
    settings = ConfigDict(dict(guidance_text=1.0, guidance_waypoints=1.0, guidance_batched=True, guidance_model=1.5))
    network = Network(None, None, None, Network(None, None, None))
    for split, axes in ((True, ("data", "fsdp")), (False, ())):
        rollout_program.generation_velocity(network, Parameters("model", "guide"), settings, split)(jnp.zeros(1), jnp.zeros(1), None)
        assert seen == {"model": ("data", "fsdp"), "guide": axes}


def test_the_command_takes_the_guide(trained, tmp_path, capsys):
    """The guide has weights of its own; the video of another scale is another one, and says so."""
    config, name = trained
    theirs = load_model(config.generate.weights)
    doubled = jax.tree.map(lambda x: 2 * x, theirs.params)
    save_model(tmp_path / "guide.safetensors", doubled, theirs.config, theirs.data, theirs.prior, {})
    arguments = ["generate", f"--data={config.data.dir}", f"--scene={name}", "--seconds=0.5", "--config.generate.strategy=recurrent"]
    guided = [*arguments, f"--config.generate.guide={tmp_path}/guide.safetensors"]
    assert run(config, *arguments, f"--out={tmp_path}/plain") == 0 and run(config, *guided, f"--out={tmp_path}/guided") == 0
    plain, video = (read_generated(tmp_path / folder) for folder in ("plain", "guided"))
    assert (
        plain[0]["made_by"] == theirs.sha256
        and video[0]["made_by"].startswith(f"{theirs.sha256}+")
        and video[0]["made_by"].endswith(f"@{config.generate.guidance_model:g}")
    )
    assert np.abs(video[1]["latents"].astype(np.float32) - plain[1]["latents"]).max() > 0.01
    capsys.readouterr()
    assert run(config, *guided, f"--out={tmp_path}/guided", "--config.generate.guidance_model=2") == 2 and "weights" in capsys.readouterr().err


def test_which_guide(trained):
    config = trained[0].copy_and_resolve_references()
    assert find_guide(config) is None and load_chosen(config).guide is None
    config.generate.guide = os.path.dirname(config.generate.weights)
    chosen = load_chosen(config)
    assert (
        chosen.guide.sha256 == chosen.sha256
        and signature(chosen, config.generate) == f"{chosen.sha256}+{chosen.sha256}@{config.generate.guidance_model:g}"
    )
    config.generate.guidance_model = 1.0
    assert find_guide(config) is None and signature(load_chosen(config), config.generate) == chosen.sha256
    config.generate.update(guidance_model=1.5, guide="nowhere.safetensors")
    with pytest.raises(UserError, match="generate.guide: nowhere.safetensors does not exist"):
        load_chosen(config)
    for weights in (None, str(SHIPPED), os.path.relpath(SHIPPED)):
        config.generate.update(weights=weights, guide=None)
        assert find_guide(config) == SHIPPED_GUIDE
    model = load_model(trained[0].generate.weights)
    for key in ("autoencoder_sha256", "latent_shape", "text_encoder"):
        with pytest.raises(UserError, match=f"other.*trained with {key}.*generate.guide"):
            with_guide(model, dataclasses.replace(model, data=model.data | {key: "another"}), "other")


def test_interrupted_generation_goes_on_at_the_last_finished_window(trained, tmp_path, capsys, monkeypatch):
    config, name = trained
    arguments = ["generate", f"--data={config.data.dir}", f"--scene={name}", "--seconds=2"]
    assert run(config, *arguments, f"--out={tmp_path}/whole") == 0
    stream, made = generate.Generator.stream, []

    def interrupted(self, job, finished=()):
        for number, window in enumerate(stream(self, job, finished)):
            if number == 3 and not made:
                made.append(number)
                raise KeyboardInterrupt
            yield window

    monkeypatch.setattr(generate.Generator, "stream", interrupted)
    assert run(config, *arguments, f"--out={tmp_path}/cut") == 130
    kept = tmp_path / "cut" / "unfinished"
    assert len(list(kept.glob("window-*.npy"))) == 3 and not (tmp_path / "cut" / "video.mp4").exists()
    capsys.readouterr()
    assert run(config, *arguments, f"--out={tmp_path}/cut", "--seed=1") == 2
    assert "seed (0 then, 1 now)" in capsys.readouterr().err
    (kept / "window-00002.npy").write_bytes(b"cut off")
    assert run(config, *arguments, f"--out={tmp_path}/cut") == 0
    assert json.loads((tmp_path / "cut" / "generate.json").read_text())["windows_resumed"] == 2
    assert not kept.exists()
    with np.load(tmp_path / "cut" / "latents.npz") as cut, np.load(tmp_path / "whole" / "latents.npz") as whole:
        assert cut["anchors"].shape[:2] == (6, 4)
        assert all(np.array_equal(cut[key], whole[key]) for key in whole.files)
    assert (tmp_path / "cut" / "video.mp4").read_bytes() == (tmp_path / "whole" / "video.mp4").read_bytes()


def test_a_finished_video_is_kept(trained, tmp_path, capsys, monkeypatch):
    """The same command again tells so and makes nothing; another video is refused; whatever is missing of it is made again."""
    config, name = trained
    arguments = ["generate", f"--data={config.data.dir}", f"--scene={name}", f"--out={tmp_path}"]
    assert run(config, *arguments, "--seconds=0.5") == 0
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    call = RolloutProgram.__call__
    monkeypatch.setattr(RolloutProgram, "__call__", lambda *_: pytest.fail("a window was begun for a video that is kept"))
    capsys.readouterr()
    assert run(config, *arguments, "--seconds=0.5") == 0
    told = capsys.readouterr()
    assert "finished" in told.err and told.out.strip() == f"{tmp_path}/video.mp4"
    for other, key in {
        "--seed=1": "seed (0 then, 1 now)", "--seconds=1": "frames (6 then, 12 now)", "--text=Night": "start.text", "--waypoints=left": "start.waypoints",
        "--start=2": "start.first frames", "--config.generate.steps=3": "sampler.steps (2 then, 3 now)", "--config.generate.decode_tile=5": "decode_tile",
    }.items():  # fmt: skip
        assert run(config, *arguments, "--seconds=0.5", other) == 2
        error = capsys.readouterr().err
        assert "another finished video" in error and key in error and error.count("\n") == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == made
    monkeypatch.setattr(RolloutProgram, "__call__", call)
    (tmp_path / "video.mp4").unlink()
    assert run(config, *arguments, "--seconds=0.5", "--per-view") == 0
    assert (tmp_path / "video.mp4").read_bytes() == made["video.mp4"] and (tmp_path / "CAM_BACK.mp4").exists()
    (tmp_path / "generate.json").write_text("{}")
    assert run(config, *arguments, "--seconds=0.5") == 2
    assert "generate.json" in capsys.readouterr().err


def test_a_window_that_cannot_be_kept_is_told(tmp_path, monkeypatch):
    kept = Unfinished(tmp_path / "unfinished", {"seed": 0})
    kept.write(0, np.zeros((1, 2)))

    def full(file, *_):
        file.write(b"some")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match="window-00001.npy cannot be written .No space left"):
        kept.write(1, np.zeros((1, 2)))
    assert sorted(path.name for path in kept.folder.iterdir()) == ["identity.json", "window-00000.npy"]


def test_damaged_windows_are_made_again_and_unknown_files_stay(tmp_path):
    kept = Unfinished(tmp_path / "unfinished", {"seed": 0})
    kept.write(0, np.zeros((1, 2)))
    (kept.folder / "window-00001.npy").write_bytes(b"PK\x03\x04")
    assert len(list(kept.read((1, 2)))) == 1
    (tmp_path / "video.mp4").touch()
    assert not is_finished(tmp_path, {}, ["video.mp4", "latents.npz"])  # of a run that ended between two files
    kept.remove()
    with pytest.raises(UserError, match="holds video.mp4, and nothing tells"):
        is_finished(tmp_path, {}, ["video.mp4", "latents.npz"])


def test_windows_of_another_video_are_removed_where_they_may_be(tmp_path):
    Unfinished(tmp_path / "unfinished", {"seed": 0}).write(0, np.zeros((1, 2)))
    with pytest.raises(UserError, match="seed .0 then, 1 now"):
        Unfinished(tmp_path / "unfinished", {"seed": 1})
    assert len(list(Unfinished(tmp_path / "unfinished", {"seed": 0}, replace=True).read((1, 2)))) == 1
    other = Unfinished(tmp_path / "unfinished", {"seed": 1}, replace=True)
    assert not list(other.read((1, 2))) and json.loads((other.folder / "identity.json").read_text()) == {"seed": 1}


def test_an_address_is_no_folder_to_write_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--out=gs://b/x is an address; give a folder of this machine"):
        writable_folder("gs://b/x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seconds", (-5.0, float("nan"), float("inf"), 99.0))
def test_a_start_outside_the_scene_is_refused(seconds):
    """Also with one given frame, when the scene's first instant would do for all that comes before it."""
    scene = {"name": "s", "times": np.arange(48) / 12}
    with pytest.raises(UserError, match=f"--start={seconds:g} lies outside scene 's', which lasts 3.9 s; choose between 0.00 and 3.8"):
        from_scene(scene, seconds, 1)


def test_first_frames_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    for view in VIEWS:
        Image.fromarray(noise).save(tmp_path / f"{view}.png")
    assert np.array_equal(read_frames(tmp_path, (32, 48))[3, 0], noise)
    file = tmp_path / "CAM_BACK.png"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"^--frames: .*CAM_BACK.png is not a readable image \(.*truncated.*\); replace the file$"):
        read_frames(tmp_path, (32, 48))
    file.unlink()
    file.symlink_to("nowhere")
    monkeypatch.setattr(start, "_image_size", lambda path: (48, 32))  # as if it had gone just after that
    with pytest.raises(UserError, match="^--frames: .*CAM_BACK.png is not a readable image .*No such file"):
        read_frames(tmp_path, (32, 48))


def test_names_of_kept_results_do_not_change_with_settings_that_are_not_used(trained):
    config = trained[0].copy_and_resolve_references()
    before = deciding(config.generate), deciding_window(config.window)
    assert all("inner_anchors" not in names for names in before) and "decode_tile" not in before[0]
    config.generate.inner_anchors, config.window.inner_anchors = False, True
    assert deciding(config.generate)["inner_anchors"] is False and deciding_window(config.window)["inner_anchors"] is True


def test_explain(trained, tmp_path, capsys):
    config, name = trained
    arguments = ["generate", f"--data={config.data.dir}", f"--scene={name}", "--seconds=2", "--explain", "--config.generate.anchor_stride=12"]
    assert run(config, *arguments, f"--out={tmp_path}/e") == 0
    text = capsys.readouterr().out
    assert (
        "24 frames at 12 Hz in 5 windows" in text
        and "coarse   1     1  -1 0 | 12 24 36 48 60 72" in text
        and "7 8 9 10 11 12*" in text.replace("5 6 | ", "")
    )
    with Image.open(tmp_path / "e" / "schedule.png") as picture:
        assert picture.width > 3 * 8 * 30
    assert sorted(p.name for p in (tmp_path / "e").iterdir()) == ["schedule.png"]
    inner = ["--config.generate.anchor_stride=3", "--config.generate.inner_anchors=True"]
    assert run(config, *arguments[:-1], *inner, f"--out={tmp_path}/e") == 0
    assert "refine   1    12  -1 0 | 1 2 3* 4 5 6*" in capsys.readouterr().out
    assert run(config, *arguments[:-1], "--config.generate.anchor_stride=6", inner[1], f"--out={tmp_path}/e") == 2
    assert "generate.inner_anchors=True needs several coarse frames in the 6 new frames" in capsys.readouterr().err
    assert run(config, *arguments[:-1], "--config.generate.conditioning=1", f"--out={tmp_path}/e") == 0
    assert "coarse frames are 7 frames apart: the 6 that the model was trained with do not fit 7 new frames" in capsys.readouterr().err


def test_from_a_data_set(trained, tmp_path, capsys):
    config, name = trained
    arguments = ["generate", f"--data={config.data.dir}", f"--scene={name}", "--seconds=1", f"--out={tmp_path}", "--per-view"]
    assert run(config, *arguments) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "video.mp4")
    frames, fps = read_video(tmp_path / "video.mp4")
    assert frames.shape[0] == 12 and fps == 12
    assert all((tmp_path / f"{v}.mp4").exists() for v in VIEWS)
    with np.load(tmp_path / "latents.npz") as z:
        assert z["latents"].shape[:2] == (6, 12)
    assert json.loads((tmp_path / "generate.json").read_text())["frames"] == 12


def test_from_a_folder_of_images(trained, tmp_path):
    """Two layouts of the folder, one given frame (fewer than the model's two), a manoeuvre and a file of waypoints."""
    config, _ = trained
    r = np.random.default_rng(0)
    for view in VIEWS:
        (tmp_path / "flat").mkdir(exist_ok=True)
        (tmp_path / "deep" / view).mkdir(parents=True)
        for i in range(2):
            picture = Image.fromarray(r.integers(0, 255, (32, 48, 3), dtype=np.uint8))
            picture.save(tmp_path / "deep" / view / f"{i}.png")
        picture.save(tmp_path / "flat" / f"{view}_0.jpg")
    (tmp_path / "w.csv").write_text("t,x,y,yaw\n-1,-5,0,0\n5,25,0,0\n")
    assert run(config, "generate", f"--frames={tmp_path}/deep", "--waypoints=left", "--seconds=0.5", f"--out={tmp_path}/a", "--text=Night") == 0
    assert run(config, "generate", f"--frames={tmp_path}/flat", f"--waypoints={tmp_path}/w.csv", "--seconds=0.5", f"--out={tmp_path}/b") == 0
    assert read_video(tmp_path / "b" / "video.mp4")[0].shape[0] == 6


def test_mistakes_are_one_line_with_exit_code_2(trained, tmp_path, capsys, monkeypatch):
    config, name = trained
    monkeypatch.setattr(Codec, "encode", lambda *_: pytest.fail("an image was encoded before everything was checked"))
    monkeypatch.setattr(RolloutProgram, "__call__", lambda *_: pytest.fail("a window was begun before everything was checked"))
    data, out = f"--data={config.data.dir}", f"--out={tmp_path}/o"
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.csv").write_text("t,x,y,yaw\n0,0,0,0\n1,5,0,0\n")
    (tmp_path / "fast.csv").write_text("t,x,y,yaw\n0,0,0,0\n10,5000,0,0\n")
    (tmp_path / "gap.csv").write_text("t,x,y,yaw\n" + "".join(f"{t},{8 * t},0,0\n" for t in (0, 0.5, 1, 1.5, 2, 5, 5.5, 6, 9)))
    (tmp_path / "ms.csv").write_text("t,x,y,yaw\n0,0,0,0\n10000,80,0,0\n")
    (tmp_path / "degrees.csv").write_text("t,x,y,yaw\n0,0,0,0\n5,20,0,20\n10,40,20,60\n")
    for folder in ("sizes", "shape", "lack", "good"):
        (tmp_path / folder).mkdir()
        for number, view in enumerate(VIEWS[: 5 if folder == "lack" else 6]):
            size = {"sizes": (48 + number, 32), "shape": (48, 48), "lack": (48, 32), "good": (48, 32)}[folder]
            Image.new("RGB", size).save(tmp_path / folder / f"{view}.png")
    cases = {
        "no scene 'nowhere'": ["generate", data, "--scene=nowhere", out],
        "--start": ["generate", data, f"--scene={name}", "--start=99", out],
        "is not a folder": ["generate", f"--frames={tmp_path}/none", "--waypoints=stop", out],
        "CAM_FRONT": ["generate", f"--frames={tmp_path}/empty", "--waypoints=stop", out],
        "sideways": ["generate", data, f"--scene={name}", "--waypoints=sideways", out],
        "short.csv ends at 1 s": ["generate", data, f"--scene={name}", f"--waypoints={tmp_path}/short.csv", out],
        "cannot write to": ["generate", data, f"--scene={name}", f"--out={tmp_path}/file/x"],
        "--out=gs://b/x is an address; give a folder of this machine": ["generate", data, f"--scene={name}", "--out=gs://b/x"],
        "--seconds=0 must": ["generate", data, f"--scene={name}", "--seconds=0", out],
        "--seconds=nan must": ["generate", data, f"--scene={name}", "--seconds=nan", out],
        "fast.csv has x, y that move at 500 m/s": ["generate", data, f"--scene={name}", f"--waypoints={tmp_path}/fast.csv", out],
        "--seed=-1 must": ["generate", data, f"--scene={name}", "--seed=-1", out],
        "--seed=4294967296 must": ["generate", data, f"--scene={name}", "--seed=4294967296", out],
        "--speed=90": ["generate", data, f"--scene={name}", "--waypoints=left", "--speed=90", out],
        "CAM_FRONT.png is 49×32": ["generate", f"--frames={tmp_path}/sizes", "--waypoints=stop", out],
        "other proportions": ["generate", f"--frames={tmp_path}/shape", "--waypoints=stop", out],
        "no images of CAM_BACK_LEFT": ["generate", f"--frames={tmp_path}/lack", "--waypoints=stop", out],
        "recorded drive ends": ["generate", data, f"--scene={name}", "--seconds=60", out],
        "gap.csv has a gap in t from 2 to 5 s": ["generate", data, f"--scene={name}", f"--waypoints={tmp_path}/gap.csv", out],
        "ms.csv has a t from 0 to 10000 s": ["generate", data, f"--scene={name}", f"--waypoints={tmp_path}/ms.csv", out],
        "degrees.csv has a yaw": ["generate", data, f"--scene={name}", f"--waypoints={tmp_path}/degrees.csv", out],
        "short.csv ends at 1 s, before": ["generate", f"--frames={tmp_path}/good", f"--waypoints={tmp_path}/short.csv", out],
        "--waypoints must be given": ["generate", f"--frames={tmp_path}/good", out],
        "mesh sizes": ["generate", f"--frames={tmp_path}/good", "--waypoints=stop", out, "--config.mesh.context=3"],
        "--scene goes with --data": ["generate", f"--frames={tmp_path}/good", "--waypoints=stop", out, f"--scene={name}"],
        "--start goes with --data": ["generate", f"--frames={tmp_path}/good", "--waypoints=stop", out, "--start=2"],
        "generate.decode_frames=0": ["generate", f"--frames={tmp_path}/good", "--waypoints=stop", out, "--config.generate.decode_frames=0"],
    }
    for setting in (
        "generate.steps=0", "generate.steps=-2", "window.tpd_strength=9", "window.tpd_strength=nan", "generate.shift=-1", "generate.shift=inf",
        "generate.windows_per_call=0", "generate.guidance_text=nan", "generate.guidance_waypoints=-1", "generate.guidance_model=-1",
        "generate.temperature=2", "window.anchor_error=2", "window.anchor_level=0", "autoencoder.temporal='nosuch'",
    ):  # fmt: skip
        key, value = setting.split("=")
        value = value.strip("'")
        message = f"{setting} " if "anchor" not in key else f"{key}: "
        cases[message] = ["generate", data, f"--scene={name}", out, f"--config.{key}={value}"]
    for message, arguments in cases.items():
        assert run(config, *arguments) == 2, message
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert cli.main(["generate", data, f"--scene={name}", out, f"--config.generate.weights={tmp_path}/none.safetensors"]) == 2
    assert "none.safetensors" in capsys.readouterr().err


def test_the_wrong_autoencoder_is_noticed(trained, tmp_path, capsys, small_config):
    from mila_jax.model.autoencoder_weights import load_autoencoder, save_autoencoder

    config, name = trained
    sizes, params, shift, scale = load_autoencoder(config.autoencoder.path)
    other = tmp_path / "other.safetensors"
    save_autoencoder(other, sizes, jax.tree.map(lambda x: x + 0.01, params), shift, scale, {})
    settings = [f"--config.generate.weights={config.generate.weights}", f"--config.autoencoder.path={other}"]
    assert cli.main(["generate", f"--data={config.data.dir}", f"--scene={name}", f"--out={tmp_path}/o", *settings]) == 2
    assert "another autoencoder" in capsys.readouterr().err
    assert open_codec(small_config).sha256 != open_codec(config_with(config, other)).sha256


def test_data_of_another_kind_is_noticed(trained, monkeypatch):
    config, _ = trained
    model, codec = load_model(config.generate.weights), open_codec(config)
    generate.check_fits(model, codec, config.data.dir)
    for key, value in {"text_encoder": "minilm", "latent_shape": [1, 2, 3], "text_shape": [4, 5], "autoencoder_sha256": "0"}.items():
        other = dataclasses.replace(model, data=model.data | {key: value})
        with pytest.raises(UserError, match="another autoencoder" if key == "autoencoder_sha256" else key):
            generate.check_fits(other, codec, config.data.dir)
    monkeypatch.setattr(generate, "describe_data", lambda _: model.data | {"text_sha256": "1"})
    generate.check_data(model, "data")  # trained before that was written down
    with pytest.raises(UserError, match="data has text_sha256 1, the model was trained with 2; .*text.path"):
        generate.check_data(dataclasses.replace(model, data=model.data | {"text_sha256": "2"}), "data")


def test_evaluate_prints_scores(trained, tmp_path, capsys, monkeypatch):
    config, _ = trained
    data = [f"--config.data.dir={config.data.dir}", f"--config.data.nuscenes={config.data.nuscenes}"]
    sizes, held_out = [], scores_module.held_out_images
    monkeypatch.setattr(scores_module, "held_out_images", lambda root, version, size: sizes.append(tuple(size)) or held_out(root, version, size))
    assert run(config, "evaluate", *data, "--clips=1", "--seconds=0.5", f"--out={tmp_path}/scores.json") == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert json.loads(capsys.readouterr().out) == scores and sizes == [(32, 48)]  # the model's, whatever the config says
    assert [row["views"] for row in scores["distances"]] == ["multi", "front"]
    assert scores["distances"][0]["FD-EffNetLite0"] > 0 and np.isfinite(scores["reconstruction_psnr_db"])
    (tmp_path / "file").write_text("")
    unwritable = {f"--out={tmp_path}/file/x.json": "x.json", f"--out={tmp_path}": "it is a folder"}
    monkeypatch.setattr(RolloutProgram, "__call__", lambda *_: pytest.fail("a window was begun before everything was checked"))
    wrong_lengths = {"--clips=0": "--clips=0", "--seconds=0.1": "--seconds=0.1", "--seconds=500": "longer than val scene"}
    for wrong, message in (unwritable | wrong_lengths).items():
        assert run(config, "evaluate", *data, wrong) == 2
        assert message in capsys.readouterr().err


def test_simulate_command_writes_a_data_set(tmp_path, capsys):
    sizes = ["--config.simulate.scenes=1", "--config.simulate.seconds=1", "--config.simulate.height=16", "--config.simulate.width=28"]
    assert cli.main(["simulate", f"--out={tmp_path}/data", "--quiet", *sizes]) == 0
    assert capsys.readouterr().out.strip() == f"{tmp_path}/data"
    assert [s.name for s in open_nuscenes(tmp_path / "data", "v1.0-sim").scenes] == ["scene-0001"]
    assert cli.main(["simulate", f"--out={tmp_path}/data", "--quiet", *sizes, "--config.simulate.seed=1"]) == 2
    assert "simulated with seed=0" in capsys.readouterr().err


def test_broken_data_is_one_line_that_names_the_file(small_config, tmp_path, capsys):
    """Through the command: a corrupt JPEG, a table with a missing token, a cut and a damaged shard."""
    c = small_config
    common = ["--quiet", "--config.data.image_size=(32, 48)", f"--config.autoencoder.path={c.autoencoder.path}", "--config.text.encoder=table"]

    def fails(*arguments):
        assert cli.main([*arguments, *common]) == 2
        error = capsys.readouterr().err.splitlines()
        assert error[-1].startswith("error: ") and not any("Traceback" in line for line in error)
        return error[-1]

    shutil.copytree(c.data.nuscenes, tmp_path / "images")
    picture = sorted((tmp_path / "images" / "sweeps" / "CAM_FRONT").iterdir())[3]
    picture.write_bytes(picture.read_bytes()[:100])
    assert picture.name in fails("prepare", f"--config.data.nuscenes={tmp_path}/images", f"--config.data.dir={tmp_path}/out")
    shutil.copytree(c.data.nuscenes, tmp_path / "tables")
    table = tmp_path / "tables" / "v1.0-sim" / "calibrated_sensor.json"
    table.write_text(json.dumps(json.loads(table.read_text())[1:]))
    assert "calibrated_sensor" in fails("prepare", f"--config.data.nuscenes={tmp_path}/tables", f"--config.data.dir={tmp_path}/out2")
    for name, damage in {"cut": lambda b: b[: len(b) // 2], "damaged": lambda b: b[:70_000] + bytes(20_000) + b[90_000:]}.items():
        shutil.copytree(c.data.dir, tmp_path / name)
        shard = tmp_path / name / "train-00000.array_record"
        shard.write_bytes(damage(shard.read_bytes()))
        sizes = ["--config.train.batch=4", "--config.train.steps=40", "--config.model.width=16", "--config.model.depth=1", "--config.model.heads=2"]
        message = fails(
            "train",
            f"--config.data.dir={tmp_path}/{name}",
            f"--config.train.dir={tmp_path}/run-{name}",
            "--config.train.fps_weights=(1.0, 0.0)",
            *sizes,
        )
        assert "train-00000.array_record" in message


def config_with(config, autoencoder):
    """`config` with another autoencoder file."""
    config = config.copy_and_resolve_references()
    config.autoencoder.path = str(autoencoder)
    return config


def test_noise_other_than_trained_is_told():
    config, model = load_config("configs/tiny.py"), load_model(SHIPPED)
    assert otherwise_than_trained(model, config) == []
    config.window.tpd_strength = 0.25
    assert otherwise_than_trained(model, config) == [f"window.tpd_strength=0.25, the model was trained with {model.config.window.tpd_strength}"]


def test_unknown_keys_and_commands(capsys, tmp_path):
    assert cli.main(["train", "--config.train.stepz=5"]) == 2
    assert "did you mean config.train.steps" in capsys.readouterr().err
    assert cli.main(["train", "--config=nowhere.py"]) == 2
    assert "configs/tiny.py" in capsys.readouterr().err
    assert cli.main(["ablate", "--config.seed=-1", f"--out={tmp_path}/o"]) == 2
    assert "seed=-1 must lie between 0 and" in capsys.readouterr().err
    assert cli.main(["train", "--config.train.steps=many"]) == 2
    assert "steps" in capsys.readouterr().err
    (tmp_path / "broken.py").write_text("def get_config(:")
    assert cli.main(["train", f"--config={tmp_path}/broken.py"]) == 2
    assert "SyntaxError" in capsys.readouterr().err
    (tmp_path / "x.json").write_text("{}")
    assert cli.main(["train", f"--config={tmp_path}/x.json"]) == 2
    assert cli.main(["train", f"--config={tmp_path}/tiny.py"]) == 2  # a path is taken literally, though configs/tiny.py exists
    assert "does not exist" in capsys.readouterr().err
    assert cli.main(["train"]) == 2
    assert "data.dir" in capsys.readouterr().err
    assert cli.main(["prepare", f"--config.data.nuscenes={tmp_path}/x", f"--config.data.dir={tmp_path}/y"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit) as error:
        cli.main(["train", "--stepz=5"])
    assert error.value.code == 2
    capsys.readouterr()
    for mistake in (
        ["generate", "--seconds=many", "--data=d", "--out=o"],
        ["generate", "--out=o"],
        ["nosuch"],
        ["generate", "--frames=f", "--data=d", "--out=o"],
    ):
        with pytest.raises(SystemExit) as error:
            cli.main(mistake)
        text = capsys.readouterr().err
        assert error.value.code == 2 and text.startswith("error: ") and text.count("\n") == 1
    assert cli.main([]) == 0
