"""The weights in mila_jax/weights, on a simulated street that neither was trained on (another seed)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from data_pipeline.clips import ClipSource, ClipSpec
from mila_jax.choose_model import load_chosen
from mila_jax.config import load_config
from mila_jax.demo import demo
from mila_jax.flow.rectified_flow import add_noise, masked_loss, velocity_target
from mila_jax.generate import check_fits
from mila_jax.model.conditions import from_clip
from mila_jax.model.autoencoder_weights import training_card
from mila_jax.model.network import make_velocity
from mila_jax.model.weights import SHIPPED, SHIPPED_GUIDE, load_model
from mila_jax.prepare import SHIPPED_AUTOENCODER, open_codec, prepare, simulate_from_config
from mila_jax.scores import held_out_images, reconstruction


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """configs/tiny.py with two short scenes of a new seed, written and encoded."""
    root = tmp_path_factory.mktemp("shipped")
    c = load_config("configs/tiny.py")
    c.simulate.update(scenes=2, val_scenes=1, seconds=3.0, seed=11, workers=1)
    c.data.nuscenes, c.data.dir = str(root / "nuscenes"), str(root / "encoded")
    c.text.encoder = "table"
    simulate_from_config(c, c.data.nuscenes, progress=False)
    prepare(c, progress=False)
    return c


@pytest.fixture(scope="module")
def model():
    return load_model(SHIPPED)


def test_files_are_small_and_belong_together(model):
    assert SHIPPED.stat().st_size + SHIPPED_GUIDE.stat().st_size + SHIPPED_AUTOENCODER.stat().st_size < 20e6
    assert (SHIPPED.parent / "MODEL_CARD.md").exists()
    assert load_chosen(load_config("configs/tiny.py")).guide.sha256 == load_model(SHIPPED_GUIDE).sha256  # it fits
    check_fits(model, open_codec(load_config("configs/tiny.py")))
    assert model.data["text_encoder"] == "minilm"


def test_reconstruction_of_new_streets(config):
    """One scene may be harder than the average of many, which MODEL_CARD.md tells; a broken autoencoder is far below both."""
    images = held_out_images(config.data.nuscenes, config.data.version, config.data.image_size, 96)
    psnr, back = reconstruction(open_codec(config), images)
    card = training_card(SHIPPED_AUTOENCODER)
    assert card["psnr_db_held_out"] > 26
    assert back.shape == images.shape and psnr > card["psnr_db_held_out"] - 3


@pytest.mark.slow
def test_demo_takes_the_shipped_weights(tmp_path):
    c = load_config("configs/demo.py")
    c.simulate.seconds = 8.0
    c.generate.steps = 2
    page = demo(c, tmp_path / "demo", seconds=0.5, progress=False).read_text()
    assert "mila_tiny.safetensors" in page and "guided by a weaker model" in page and not (tmp_path / "demo" / "train").exists()


def test_network_knows_more_than_linear_statistics(config, model):
    """Velocity errors on generated frames of new streets, against the preconditioner alone (the network's output set to zero)."""
    source = ClipSource(config.data.dir, "val", [ClipSpec(8, 2, 12.0)], [1.0])
    clips = [source[i] for i in np.linspace(0, len(source) - 1, 4).astype(int)]
    clip = jax.tree.map(lambda *x: jnp.stack([jnp.asarray(y) for y in x]), *clips)
    latents = clip["latents"].astype(jnp.float32)
    noise = jax.random.normal(jax.random.key(0), latents.shape)
    levels = jnp.broadcast_to(jnp.where(jnp.arange(8) < 2, 0.0, 0.6), latents.shape[:3])
    noisy, target = add_noise(latents, noise, levels), velocity_target(latents, noise)
    velocity = jax.jit(lambda params: make_velocity(model.graphdef, params, model.dit, model.prior)(noisy, levels, from_clip(clip)))

    def error(params):
        return float(masked_loss(velocity(params), target, levels > 0).mean)

    silent = nnx.from_flat_state([(k, jax.tree.map(jnp.zeros_like, v) if k[0] == "final" else v) for k, v in nnx.to_flat_state(model.params)])
    assert error(model.params) < 0.9 * error(silent)
