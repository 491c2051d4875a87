"""The temporal autoencoder: recorded numbers, chunks, one latent a frame, and what wrong weights say."""

import json
import types

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from mila_jax.errors import UserError
from mila_jax.model.autoencoder_weights import load_autoencoder
from mila_jax.model.temporal_autoencoder import TemporalCodec, infer_temporal_config, latent_count, load_temporal, temporal_from_published
from mila_jax.parity.__main__ import check_file
from mila_jax.prepare import note_scale
from tests.conftest import DATA


@pytest.fixture(scope="module")
def tensors():
    with np.load(DATA / "vae_temporal.npz") as z:
        return {k[2:]: z[k] for k in z.files if k.startswith("w/")}


@pytest.fixture(scope="module")
def parts(tensors):
    config = infer_temporal_config(tensors, {"num_groups": 4})
    return config, temporal_from_published(tensors, config)


def test_recorded_numbers():
    rows = check_file(DATA / "vae_temporal.npz")
    assert len(rows) == 21 and all(error <= tolerance for _, error, tolerance in rows), rows


def test_sizes_are_read_from_the_tensors(parts):
    config = parts[0]
    assert (config.filters, config.num_res_blocks, config.channel_multipliers, config.compression) == (12, 1, (1, 2, 2, 4), 4)
    assert config.temporal_downsample == (False, True, True)


@pytest.mark.parametrize("frames, latents", [(1, 1), (16, 4), (17, 5), (34, 10), (51, 15), (102, 30), (204, 60), (408, 120), (40, 12)])
def test_latents_of_a_video(frames, latents):
    assert latent_count(frames) == latents and latent_count(frames, chunk=1) == frames


def test_one_latent_a_frame(parts):
    codec = TemporalCodec(*parts, chunk=1)
    x = jax.random.normal(jax.random.key(0), (2, 3, 2, 3, 4))
    z = jax.jit(codec.encode)(x)
    assert z.shape == x.shape
    single = jax.jit(codec.encode)(x[:, 1:2])
    np.testing.assert_allclose(z[:, 1:2], single, atol=1e-5)
    assert codec.decode(z, 3).shape == x.shape


def test_pictures_of_another_scale_are_noted(capsys):
    """An autoencoder of SDXL's own factor under weights that were trained with Open-Sora's."""
    for factor, told in ((0.18215, 0), (0.13025, 1)):
        note_scale(types.SimpleNamespace(scale=np.full(4, 1 / factor, np.float32), shift=np.zeros(4, np.float32)))
        assert capsys.readouterr().err.count("times 0.18215") == told


def test_chunks_do_not_see_each_other(parts):
    codec = TemporalCodec(*parts, chunk=5)
    encode = jax.jit(codec.encode)
    x = jax.random.normal(jax.random.key(1), (1, 12, 2, 2, 4))
    z = np.asarray(encode(x))
    assert z.shape[1] == 2 + 2 + 1 == codec.count(12)
    changed = np.flatnonzero(np.abs(np.asarray(encode(x.at[:, 6].add(1.0))) - z).max((0, 2, 3, 4)) > 1e-6)
    # Frame 6 lies in chunk 2; both of its latents change, since norms reach over the whole chunk.
    assert list(changed) == [2, 3]
    with pytest.raises(UserError, match="12 frames in chunks of 5 have 5 temporal latents, not 4"):
        codec.decode(z[:, :4], 12)
    with pytest.raises(UserError, match="temporal chunk 0"):
        TemporalCodec(*parts, chunk=0)


def test_missing_wrong_and_unknown_tensors_are_named(tensors, parts):
    name = "decoder.block_res_blocks.2.0.conv3.conv.weight"
    for change, message in (
        (lambda t: t.pop(name), f"{name}' is missing"),
        (lambda t: t.update({name: t[name][:, :1]}), f"{name}' has shape"),
        (lambda t: t.update(extra=t[name]), "unknown tensor 'extra'"),
    ):
        broken = dict(tensors)
        change(broken)
        with pytest.raises(UserError, match=message):
            temporal_from_published(broken, parts[0])
    with pytest.raises(UserError, match="encoder.conv_in.conv.weight' is missing"):
        infer_temporal_config({})


def test_whole_pipeline_in_one_file(tensors, golden, tmp_path):
    spatial = {k[2:]: v for k, v in golden("autoencoder_kl").items() if k.startswith("w/")}
    both = {f"temporal_vae.{k}": v for k, v in tensors.items()} | {f"spatial_vae.module.{k}": v for k, v in spatial.items()}
    both |= {"shift": np.arange(4, dtype=np.float32).reshape(1, 4, 1, 1, 1), "scale": np.full((1, 4, 1, 1, 1), 2, np.float32)}
    save_file(both, tmp_path / "model.safetensors")
    groups = json.loads(str(golden("autoencoder_kl")["config_json"])).get("norm_num_groups", 32)
    (tmp_path / "config.json").write_text(json.dumps({"num_groups": 4, "norm_num_groups": groups}))
    codec, digest = load_temporal(tmp_path / "model.safetensors", chunk=1)
    assert codec.shift == (0, 1, 2, 3) and codec.scale == (2, 2, 2, 2) and len(digest) == 64 and codec.chunk == 1
    config, params, shift, scale = load_autoencoder(tmp_path / "model.safetensors")
    np.testing.assert_allclose(scale, 1 / 0.18215, rtol=1e-6)
    assert np.all(shift == 0) and nnx.to_flat_state(params) and config.latent_channels == 4
