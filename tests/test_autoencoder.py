"""Autoencoder: published weights, our weights file, the codec, and training that resumes bit for bit."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

from mila_jax.errors import UserError
from mila_jax.model.autoencoder import AutoencoderConfig, abstract_autoencoder
from mila_jax.model.autoencoder_weights import (
    file_sha256,
    from_published,
    infer_config,
    load_autoencoder,
    make_codec,
    save_autoencoder,
    to_published,
    training_card,
)
from mila_jax.parity import autoencoder_kl
from mila_jax.train import autoencoder as training
from mila_jax.train.autoencoder import AutoencoderTraining, batch_at, draw_moves, main, moved, psnr, train_autoencoder
from tests.shared_programs import kept_however_small

# One level: samplers between levels are below, in what is read and written, and in the published numbers.
TINY = AutoencoderConfig(block_out_channels=(8,), layers_per_block=1, latent_channels=3, norm_num_groups=4, pixel_unshuffle=4)
TRAINING, STEPS, SEED = AutoencoderTraining(model=TINY, batch_size=8, learning_rate=3e-3, warmup=10, ema=0.9), 60, 3
CONFIGS = [
    AutoencoderConfig(block_out_channels=(8,), layers_per_block=1, latent_channels=2, norm_num_groups=2),
    AutoencoderConfig(block_out_channels=(4, 8, 8, 12), layers_per_block=2, latent_channels=4, norm_num_groups=4),
    AutoencoderConfig(
        block_out_channels=(8, 4),
        layers_per_block=3,
        latent_channels=5,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    ),
]


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Runs with the same settings share the step that they compile, and what is made anew each time is kept however small."""
    with pytest.MonkeyPatch.context() as patch, kept_however_small():
        patch.setattr(training, "make_train_step", functools.cache(training.make_train_step))
        yield


def random_weights(config, seed=0):
    """Weights for tests of what is written and read, which need not be those that training starts from: nothing is compiled."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype(np.float32), abstract_autoencoder(config)[1])


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory):
    """A weights file of random TINY weights with a shift and scale per channel."""
    path = tmp_path_factory.mktemp("tiny") / "autoencoder.safetensors"
    save_autoencoder(path, TINY, random_weights(TINY, seed=1), [0.1, 0.2, -0.3], [1.0, 2.0, 0.5], {"steps": 7})
    return path


def smooth_frames(count, seed=0, height=16, width=24):
    """Colour ramps of random direction, uint8 [count, height, width, 3]: easy to learn in a few steps."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    a, b, c = rng.uniform(-1, 1, (3, count, 1, 1, 3))
    images = 0.5 + 0.25 * (a * y[..., None] + b * x[..., None] + c)
    return np.clip(images * 255, 0, 255).astype(np.uint8)


def test_published_outputs_match(golden):
    npz = golden("autoencoder_kl")
    assert autoencoder_kl.matches(npz)
    rows = autoencoder_kl.check(npz)
    assert {name for name, _, _ in rows} == {"out/encoder", "out/mean", "out/logvar", "out/dec"}
    for name, error, tolerance in rows:
        assert error <= tolerance, name


def test_parity_check_sees_one_wrong_weight(golden):
    npz = {**golden("autoencoder_kl")}
    npz["w/decoder.mid_block.attentions.0.to_v.bias"] = npz["w/decoder.mid_block.attentions.0.to_v.bias"] + 0.05
    errors = {name: error / tolerance for name, error, tolerance in autoencoder_kl.check(npz)}
    assert errors["out/mean"] < 1 < errors["out/dec"]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{len(c.block_out_channels)}levels")
def test_config_is_inferred_and_state_dict_round_trips(config):
    params = random_weights(config)
    tensors = to_published(params)
    inferred = infer_config(tensors, {"norm_num_groups": config.norm_num_groups})
    assert inferred == config
    back = from_published(tensors, inferred)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    assert len(tensors) == len(jax.tree.leaves(params))


def test_published_layout_is_out_in_height_width():
    config = CONFIGS[1]
    tensors = to_published(random_weights(config))
    assert tensors["encoder.conv_in.weight"].shape == (4, 3, 3, 3)
    assert tensors["encoder.conv_out.weight"].shape == (8, 12, 3, 3)
    assert tensors["decoder.up_blocks.0.resnets.2.conv1.weight"].shape == (12, 12, 3, 3)  # one layer more, deepest first
    assert "decoder.up_blocks.3.upsamplers.0.conv.weight" not in tensors
    assert tensors["quant_conv.weight"].shape == (8, 8, 1, 1)


def test_old_attention_names_and_1x1_convolutions_load():
    config = CONFIGS[0]
    params = random_weights(config)
    new_to_old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    tensors = {}
    for name, value in to_published(params).items():
        for new, old in new_to_old.items():
            if new in name:
                name, value = name.replace(new, old), value[:, :, None, None] if value.ndim == 2 else value
        tensors[name] = value
    assert any(".proj_attn." in name for name in tensors)
    jax.tree.map(np.testing.assert_array_equal, from_published(tensors, config), params)


def test_wrong_tensors_are_named():
    config = CONFIGS[0]
    tensors = to_published(random_weights(config))
    name = "decoder.mid_block.resnets.1.norm2.bias"
    with pytest.raises(UserError, match=f"{name}.*missing"):
        from_published({key: value for key, value in tensors.items() if key != name}, config)
    with pytest.raises(UserError, match=f"{name}.*shape"):
        from_published({**tensors, name: np.zeros(3, np.float32)}, config)
    with pytest.raises(UserError, match="loss.logvar"):
        from_published({**tensors, "loss.logvar": np.zeros((), np.float32)}, config)
    with pytest.raises(UserError, match="encoder.conv_in.weight.*missing"):
        infer_config({})
    with pytest.raises(UserError, match="AttnDownEncoderBlock2D"):
        infer_config(tensors, {"down_block_types": ["AttnDownEncoderBlock2D"]})
    with pytest.raises(UserError, match="norm_num_groups"):
        infer_config(tensors)  # 8 channels do not divide into the default of 32 groups


def test_downsampling_pads_right_and_bottom_only():
    """A change in the top left pixel reaches the first latent row; with left padding a stride-2 3x3 would centre elsewhere."""
    config = AutoencoderConfig(block_out_channels=(4, 4), layers_per_block=1, latent_channels=1, norm_num_groups=4)
    down = nnx.merge(abstract_autoencoder(config)[0], random_weights(config)).encoder.down_blocks[0].downsamplers[0]
    x = np.zeros((1, 8, 8, 4), np.float32)
    x[0, 1, 1] = 1.0  # window of output (0, 0) is rows and columns 0..2; of output (1, 1) it is 2..4
    changed = np.abs(np.asarray(down(x)) - np.asarray(down(np.zeros_like(x)))).sum(-1)[0] > 0
    assert changed[0, 0] and changed.sum() == 1


def test_codec_is_independent_of_chunking_and_keeps_normalisation(tiny_file):
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 24, 3), dtype=np.uint8)
    codec = make_codec(tiny_file, chunk=2)
    latents = codec.encode(images)
    assert latents.dtype == np.float32 and latents.shape[1:] == codec.latent_shape(16, 24) == (4, 6, 3)
    np.testing.assert_allclose(latents, make_codec(tiny_file, chunk=8).encode(images), atol=1e-5)
    config, params, shift, scale = load_autoencoder(tiny_file)
    decoded = codec.decode((latents - codec.shift) / codec.scale)
    model = nnx.merge(abstract_autoencoder(config)[0], params)
    direct = (np.asarray(jax.jit(model.decode)(latents)) + 1) * 127.5
    assert decoded.dtype == np.uint8 and decoded.shape == images.shape
    assert np.abs(decoded - np.clip(direct, 0, 255)).max() <= 0.51
    assert codec.encode(images[:0]).shape == (0, 4, 6, 3)
    with pytest.raises(UserError, match="does not divide"):
        codec.encode(np.zeros((1, 18, 24, 3), np.uint8))


def test_weights_file_keeps_config_statistics_and_card(tiny_file):
    config, params, shift, scale = load_autoencoder(tiny_file)
    assert config == TINY and training_card(tiny_file) == {"steps": 7}
    np.testing.assert_allclose(shift, [0.1, 0.2, -0.3], rtol=1e-6)
    np.testing.assert_allclose(scale, [1.0, 2.0, 0.5])
    given = random_weights(TINY, seed=1)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.float16(a), np.float16(b)), params, given)
    assert make_codec(tiny_file).sha256 == file_sha256(tiny_file) and len(file_sha256(tiny_file)) == 64


def test_published_safetensors_load_with_their_config_beside_them(tmp_path):
    config = CONFIGS[1]
    path = tmp_path / "vae.safetensors"
    save_file(to_published(random_weights(config)), path)
    with pytest.raises(UserError, match="config.json"):
        load_autoencoder(path)
    (tmp_path / "config.json").write_text(json.dumps({"norm_num_groups": 4, "scaling_factor": 0.5, "shift_factor": None}))
    loaded, _, shift, scale = load_autoencoder(path)
    assert loaded == config and shift.tolist() == [0] * 4 and scale.tolist() == [2] * 4


def test_a_place_that_is_no_folder_is_one_clear_line(tmp_path, tiny_file):
    (tmp_path / "file").touch()
    config, params, shift, scale = load_autoencoder(tiny_file)
    with pytest.raises(UserError, match="cannot write"):
        save_autoencoder(tmp_path / "file" / "a.safetensors", config, params, shift, scale, {})


def test_missing_and_broken_files_are_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="no autoencoder weights at .*absent"):
        make_codec(tmp_path / "absent.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00not json at all!")
    with pytest.raises(UserError, match="broken.safetensors"):
        make_codec(broken)


def test_training_learns_and_resumes_bit_for_bit(tmp_path, monkeypatch):
    frames, held_out = smooth_frames(64), smooth_frames(16, seed=1)

    def run(name):
        path = train_autoencoder(frames, held_out, TRAINING, tmp_path / name, STEPS, SEED, log_every=10, save_every=20, progress=False)
        return path, [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    save = training.save_state

    def save_and_keep_the_first(folder, state, identity):
        save(folder, state, identity)
        if int(state.step) == 20:  # what a run that ends here leaves to go on from
            shutil.copytree(folder, tmp_path / "parts")

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_state", save_and_keep_the_first)
        path, rows = run("whole")
    assert [row["step"] for row in rows] == [10, 20, 30, 40, 50, 60]
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"] and rows[-1]["psnr"] > rows[1]["psnr"], rows
    config_back, _, shift, scale = load_autoencoder(path)
    assert config_back == TINY and (scale > 0).all() and np.abs(shift).max() < 10
    card = training_card(path)
    assert card["steps"] == 60 and card["seed"] == 3 and card["images_seen"] == 480
    codec = make_codec(path)
    normalised = (codec.encode(frames) - codec.shift) / codec.scale
    np.testing.assert_allclose(normalised.mean((0, 1, 2)), 0, atol=0.05)
    np.testing.assert_allclose(normalised.std((0, 1, 2)), 1, atol=0.05)
    assert abs(psnr(held_out, codec.decode((codec.encode(held_out) - codec.shift) / codec.scale)).mean() - card["psnr_db_held_out"]) < 0.2

    made = []
    monkeypatch.setattr(training, "batch_at", lambda *arguments: made.append(arguments[-1]) or batch_at(*arguments))
    resumed, _ = run("parts")
    assert made == list(range(20, STEPS)) and load_bytes(resumed) == load_bytes(path)


def test_the_command_trains_on_a_data_set(small_config, tmp_path, monkeypatch, capsys):
    """Stopped before its first step: compiling that, or the embedded sizes, is what would take long."""
    tiny = dataclasses.make_dataclass("Tiny", [("model", AutoencoderConfig, TINY)], bases=(AutoencoderTraining,), frozen=True)
    monkeypatch.setattr("mila_jax.train.autoencoder.AutoencoderTraining", tiny)
    data = small_config.data.nuscenes
    where = [f"--out={tmp_path}/run", "--height=32", "--width=48", "--max-frames=40", "--batch-size=4"]
    main([f"--data={data}", *where, "--minutes=0", "--steps=7"])
    path = tmp_path / "run" / "autoencoder.safetensors"
    assert capsys.readouterr().out.strip() == str(path)
    card = training_card(path)
    assert (card["steps"], card["image_size"], card["data"]) == (0, [32, 48], "nuscenes v1.0-sim") and 20 < card["train_frames"] <= 40
    here = [f"--data={data}", *where]
    for arguments, words in (([f"--data={tmp_path}", *where], str(tmp_path)), ([*here, "--height=31"], "31"), ([*here, "--init-from=x"], "at x"),
        ([*here, "--max-frames=0"], "--max-frames=0"), ([*here, "--out=gs://b/run"], "--out=gs://b/run is an address"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        said = capsys.readouterr().err.splitlines()[-1]
        assert stopped.value.code == 2 and said.startswith("error: ") and words in said


def load_bytes(path):
    """All weights of a file as bytes."""
    return {name: value.tobytes() for name, value in to_published(load_autoencoder(path)[1]).items()}


def test_moves_shift_and_enlarge_about_the_middle():
    x = np.random.default_rng(0).normal(size=(3, 8, 16, 2)).astype(np.float32)
    shift, zoom = np.array([[0, 0], [0.25, -0.125], [0, 0]], np.float32), np.array([1, 1, 2], np.float32)
    y, inside = (np.asarray(a) for a in jax.jit(moved)(x, (shift, zoom)))
    np.testing.assert_array_equal(y[0], x[0])
    assert inside[0].all()
    np.testing.assert_allclose(y[1, :6, 2:], x[1, 2:, :14], atol=1e-6)  # two rows down, two columns to the left
    assert inside[1, :6, 2:].all() and not inside[1, 6:].any() and not inside[1, :, :2].any()
    # Twice as large: a pixel of the result is three quarters of the nearest and a quarter of the next, along each axis.
    rows = 0.75 * x[2, 2:6, 4:12] + 0.25 * x[2, 1:5, 4:12]
    want = 0.75 * rows + 0.25 * (0.75 * x[2, 2:6, 3:11] + 0.25 * x[2, 1:5, 3:11])
    np.testing.assert_allclose(y[2, 0::2, 0::2], want, atol=1e-6)


def test_moves_are_the_same_for_images_and_latents():
    """What is shifted by a whole latent is shifted by `compression` pixels."""
    images = np.repeat(np.repeat(np.random.default_rng(0).normal(size=(1, 4, 6, 1)), 8, 1), 8, 2).astype(np.float32)
    move = (np.array([[0.25, 0]], np.float32), np.ones(1, np.float32))
    y, _ = jax.jit(moved)(images, move)
    z, _ = jax.jit(moved)(images[:, ::8, ::8], move)
    np.testing.assert_allclose(y[:, :24:8], z[:, :3].repeat(8, 2), atol=1e-5)


def test_a_share_of_the_images_is_moved():
    config = AutoencoderTraining(model=TINY, equivariance=0.5)
    shift, zoom = (np.asarray(a) for a in jax.jit(draw_moves, static_argnums=(1, 2))(jax.random.key(0), 2000, config))
    still = (shift == 0).all(1)
    assert 0.45 < still.mean() < 0.55 and (zoom[still] == 1).all()
    assert 0.2 < (zoom > 1).mean() < 0.3 and np.abs(shift).max() <= 0.12 and zoom.max() <= 1.4


def test_training_goes_on_from_a_weights_file(tmp_path, tiny_file):
    frames = smooth_frames(16)
    run = functools.partial(train_autoencoder, frames, frames, steps=STEPS, seed=SEED, progress=False)
    path = run(TRAINING, tmp_path / "run", minutes=0, init_from=tiny_file)
    assert load_bytes(path) == load_bytes(tiny_file)
    run(TRAINING, tmp_path / "run", init_from=tiny_file)
    with pytest.raises(UserError, match="another"):
        run(TRAINING, tmp_path / "run")
    other = dataclasses.replace(TRAINING, model=dataclasses.replace(TINY, latent_channels=5))
    with pytest.raises(UserError, match="has other sizes"):
        run(other, tmp_path / "other", init_from=tiny_file)


def test_training_refuses_another_runs_folder_and_sizes_that_do_not_divide(tmp_path):
    frames = smooth_frames(16)
    run = functools.partial(train_autoencoder, steps=STEPS, seed=SEED, progress=False)
    run(frames, frames, TRAINING, tmp_path / "run")
    with pytest.raises(UserError, match="number of steps or frames"):
        run(frames[::-1], frames, TRAINING, tmp_path / "run")
    # A file from before frames were written down is of any.
    with safe_open(tmp_path / "run" / "state.safetensors", framework="numpy") as file:
        tensors, identity = {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["identity"])
    assert identity.pop("frames").startswith("16 ")
    save_file(tensors, tmp_path / "run" / "state.safetensors", {"identity": json.dumps(identity)})
    run(frames[::-1], frames, TRAINING, tmp_path / "run")
    with pytest.raises(UserError, match="belongs to a run with another config"):
        run(frames, frames, dataclasses.replace(TRAINING, kl=1.0), tmp_path / "run")
    with pytest.raises(UserError, match="does not divide"):
        run(frames[:, :15], frames, TRAINING, tmp_path / "other")
    with pytest.raises(UserError, match="at least one"):
        run(frames, frames[:0], TRAINING, tmp_path / "other")


def test_sizes_that_do_not_divide_into_groups_name_the_key():
    with pytest.raises(UserError, match="norm_num_groups"):
        AutoencoderConfig(block_out_channels=(10,), norm_num_groups=4)
