"""Autoencoder weights: published state dicts in, our own trained file in and out, and the codec that the rest of the project uses.

One layout for both. Our file is a published state dict (diffusers names, OIHW convolutions) as fp16 safetensors, plus metadata:
`config` (AutoencoderConfig), `shift` and `scale` (per channel), `card` (what made it). So one loader, `from_published`, reads
everything, and the parity check on published weights covers our own files too.
"""

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mila_jax.errors import UserError
from mila_jax.model.autoencoder import AutoencoderConfig, abstract_autoencoder
from mila_jax.model.weight_files import file_sha256, local_file, read_config_beside, read_tensors

FORMAT = "mila_jax.autoencoder/1"
OLD_ATTENTION_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # diffusers before 0.18


def infer_config(tensors: Mapping[str, np.ndarray], published: Mapping | None = None, pixel_unshuffle: int = 1) -> AutoencoderConfig:
    """Config from tensor names and shapes; `published` is the config.json, needed only for what shapes do not tell.

    Shapes do not tell the number of norm groups: `published["norm_num_groups"]`, default 32. UserError when a tensor that the
    sizes are read from is missing, or when `published` asks for a block that this autoencoder does not have.
    """
    published = published or {}
    for key, known in (("act_fn", {"silu"}), ("down_block_types", {"DownEncoderBlock2D"}), ("up_block_types", {"UpDecoderBlock2D"})):
        values = published.get(key, [])
        for value in [values] if isinstance(values, str) else values:
            if value not in known:
                raise UserError(f"autoencoder config: {key} {value!r} is not supported; supported: {', '.join(sorted(known))}")

    def shape(name):
        if name not in tensors:
            raise UserError(f"autoencoder weights: tensor {name!r} is missing; is this an AutoencoderKL state dict?")
        return tensors[name].shape

    def count(prefix):
        found = {name[len(prefix) :].split(".")[0] for name in tensors if name.startswith(prefix)}
        return len(found)

    fold = pixel_unshuffle**2
    levels = count("encoder.down_blocks.")
    return AutoencoderConfig(
        in_channels=shape("encoder.conv_in.weight")[1] // fold,
        out_channels=shape("decoder.conv_out.weight")[0] // fold,
        block_out_channels=tuple(shape(f"encoder.down_blocks.{i}.resnets.0.conv1.weight")[0] for i in range(levels)),
        layers_per_block=count("encoder.down_blocks.0.resnets."),
        latent_channels=shape("decoder.conv_in.weight")[1],
        norm_num_groups=int(published.get("norm_num_groups", 32)),
        mid_block_add_attention=count("encoder.mid_block.attentions.") > 0,
        use_quant_conv="quant_conv.weight" in tensors,
        use_post_quant_conv="post_quant_conv.weight" in tensors,
        pixel_unshuffle=pixel_unshuffle,
    )


def _published_name(path: tuple) -> str:
    *modules, leaf = (str(part) for part in path)
    return ".".join([*modules, {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)])


def _current_name(name: str) -> str:
    """`name` with the attention projections' old names replaced."""
    if ".attentions." not in name:
        return name
    head, projection, leaf = name.rsplit(".", 2)
    return f"{head}.{OLD_ATTENTION_NAMES.get(projection, projection)}.{leaf}"


def from_published(tensors: Mapping[str, np.ndarray], config: AutoencoderConfig) -> nnx.State:
    """Published state dict -> params (float32) of an AutoencoderKL of `config`.

    Convolutions OIHW -> HWIO, linear layers transposed; attention projections stored as 1x1 convolutions are accepted.
    UserError naming the tensor when one is missing, has the wrong shape, or is left over.
    """
    tensors = {_current_name(name): value for name, value in tensors.items()}
    return fill_published(tensors, abstract_autoencoder(config)[1], "autoencoder", config)


# PyTorch's axes → ours, by their number: linear [out, in], convolutions [out, in, (depth,) height, width].
_AXES = {2: (1, 0), 4: (2, 3, 1, 0), 5: (2, 3, 4, 1, 0)}


def fill_published(tensors: Mapping[str, np.ndarray], shapes: nnx.State, what: str, config) -> nnx.State:
    """`shapes` (a module's abstract state whose attributes carry the published names) with the tensors' values, as float32.

    UserError, calling the network `what`, naming the tensor that is missing, has a shape that does not fit `config`, or is left over.
    """
    flat, used = {}, set()
    for path, leaf in nnx.to_flat_state(shapes):
        name = _published_name(path)
        if name not in tensors:
            raise UserError(f"{what} weights: tensor {name!r} is missing; is this a complete state dict?")
        value = np.asarray(tensors[name], np.float32)
        if path[-1] == "kernel":
            if value.ndim == 4 and len(leaf.shape) == 2:
                value = value[:, :, 0, 0]
            value = value.transpose(_AXES[value.ndim]) if value.ndim in _AXES else value
        if value.shape != leaf.shape:
            raise UserError(
                f"{what} weights: tensor {name!r} has shape {tuple(tensors[name].shape)}, which does not fit the "
                f"config {config}; pass the config.json that belongs to these weights"
            )
        flat[path] = nnx.Param(jnp.asarray(value))
        used.add(name)
    extra = sorted(set(tensors) - used)
    if extra:
        raise UserError(f"{what} weights: unknown tensor {extra[0]!r} ({len(extra)} in all); is this a state dict of that network alone?")
    return nnx.from_flat_state(flat)


def to_published(params: nnx.State) -> dict[str, np.ndarray]:
    """Params -> state dict with published names and layouts, the inverse of `from_published`."""
    tensors = {}
    for path, leaf in nnx.to_flat_state(params):
        value = np.asarray(leaf[...])
        if path[-1] == "kernel":
            value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
        tensors[_published_name(path)] = np.ascontiguousarray(value)
    return tensors


def save_autoencoder(path, config: AutoencoderConfig, params: nnx.State, shift, scale, card: Mapping) -> None:
    """Writes our weights file: fp16 safetensors with config, latent shift and scale [c], and the training card (JSON-able).

    Atomic: the file appears complete or not at all. UserError when a weight does not fit into fp16 or the folder cannot be written.
    """
    path = Path(path)
    tensors = {name: value.astype(np.float16) for name, value in to_published(params).items()}
    for name, value in tensors.items():
        if not np.isfinite(value).all():
            raise UserError(f"autoencoder weights: tensor {name!r} is not finite in fp16; train again with a lower learning rate")
    metadata = {
        "format": FORMAT,
        "config": json.dumps(dataclasses.asdict(config)),
        "shift": json.dumps([float(value) for value in shift]),
        "scale": json.dumps([float(value) for value in scale]),
        "card": json.dumps(dict(card), sort_keys=True),
    }
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, metadata)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}; choose a writable folder with room") from error


def _read(path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    local = local_file(path)
    if not local.exists():
        raise UserError(f"no autoencoder weights at {path}; train them with `python -m mila_jax.train.autoencoder`")
    if local.suffix != ".safetensors":
        return read_tensors(local)[:2]
    try:
        with safe_open(local, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read autoencoder weights {path}: {error}; the file is broken or not safetensors") from error


PIPELINE = "spatial_vae.module."  # the 2-D autoencoder's place in the file of Open-Sora's whole VAE
PIPELINE_SCALE = 0.18215


def load_autoencoder(path) -> tuple[AutoencoderConfig, nnx.State, np.ndarray, np.ndarray]:
    """(config, params, shift [c], scale [c]) from our file, from published weights (.safetensors, .pth) with their config.json beside
    them, or from the file of Open-Sora's whole VAE; on this machine or in a bucket.

    Published weights have no per-channel statistics: shift and scale come from `shift_factor` (0) and 1 / `scaling_factor` (1).
    Normalised latents are (latents - shift) / scale. UserError when the file is absent, broken, or not an autoencoder.
    """
    tensors, metadata = _read(path)
    if metadata.get("format") == FORMAT:
        config = AutoencoderConfig(**json.loads(metadata["config"]))
        shift, scale = (np.array(json.loads(metadata[key]), np.float32) for key in ("shift", "scale"))
        return config, from_published(tensors, config), shift, scale
    published = read_config_beside(path)
    if any(name.startswith(PIPELINE) for name in tensors):
        tensors = {name[len(PIPELINE) :]: value for name, value in tensors.items() if name.startswith(PIPELINE)}
        # The pipeline's config.json is about the pipeline; its factor is always this one.
        published = {"scaling_factor": PIPELINE_SCALE, "norm_num_groups": (published or {}).get("norm_num_groups", 32)}
    if published is None:
        raise UserError(f"{path} was not written by mila_jax and has no config.json beside it; put the published config.json there")
    config = infer_config(tensors, published)
    shift = np.full(config.latent_channels, published.get("shift_factor") or 0.0, np.float32)
    scale = np.full(config.latent_channels, 1 / (published.get("scaling_factor") or 1.0), np.float32)
    return config, from_published(tensors, config), shift, scale


def training_card(path) -> dict:
    """What made our weights file (data, seed, steps, PSNR …); {} for published weights."""
    return json.loads(_read(path)[1].get("card", "{}"))


@dataclasses.dataclass(frozen=True)
class Codec:
    """Images <-> latents in fixed chunks, so that each image size compiles once whatever the number of images."""

    config: AutoencoderConfig
    params: nnx.State
    shift: np.ndarray  # [c]
    scale: np.ndarray  # [c]
    sha256: str
    chunk: int
    _encode: Callable  # (params, uint8 [chunk, H, W, 3]) -> [chunk, h, w, c]
    _decode: Callable  # (params, float32 [chunk, h, w, c]) -> uint8 [chunk, H, W, 3]
    devices: int = 1  # that share a chunk: what goes through together is the next multiple of their number

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(h, w, c) for images of this size; UserError when it does not divide."""
        return self.config.latent_shape(height, width)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """uint8 [n, H, W, 3] -> posterior mean float32 [n, h, w, c], NOT normalised."""
        self.latent_shape(*images.shape[1:3])
        return self._in_chunks(self._encode, np.asarray(images))

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """NORMALISED latents [n, h, w, c] -> uint8 [n, H, W, 3]."""
        return self._in_chunks(self._decode, np.asarray(latents, np.float32))

    def _in_chunks(self, function: Callable, items: np.ndarray) -> np.ndarray:
        outputs, chunk = [], -(-self.chunk // self.devices) * self.devices
        for start in range(0, max(len(items), 1), chunk):
            part = items[start : start + chunk]
            padding = np.zeros((chunk - len(part), *items.shape[1:]), items.dtype)
            outputs.append(np.asarray(function(self.params, np.concatenate([part, padding])))[: len(part)])
        return np.concatenate(outputs)


def to_pixels(images: jax.Array) -> jax.Array:
    """[-1, 1] -> uint8 0 … 255, rounded and clipped."""
    return jnp.clip(jnp.round((images + 1) * 127.5), 0, 255).astype(jnp.uint8)


def from_pixels(images: jax.Array) -> jax.Array:
    """uint8 0 … 255 -> float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1


def make_codec(path, chunk: int = 24) -> Codec:
    """The codec of a weights file (see `load_autoencoder`). Raises what loading raises.

    At least `chunk` images go through at a time, split over this host's devices: the next multiple of their number.
    """
    config, params, shift, scale = load_autoencoder(path)
    graphdef, _ = abstract_autoencoder(config)
    mesh = jax.sharding.Mesh(np.array(jax.local_devices()), ("images",))
    whole, split = (jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes)) for axes in ((), ("images",)))
    chunk = -(-chunk // mesh.size) * mesh.size
    params = jax.device_put(jax.tree.map(np.asarray, params), whole)  # from the host: what is made under a mesh of several hosts lies on all of them

    @functools.partial(jax.jit, in_shardings=(whole, split), out_shardings=split)
    def encode(params, images):
        return nnx.merge(graphdef, params).encode(from_pixels(images))[0]

    @functools.partial(jax.jit, in_shardings=(whole, split), out_shardings=split)
    def decode(params, latents):
        return to_pixels(nnx.merge(graphdef, params).decode(latents * scale + shift))

    def put(function):  # one process of several may not hand arrays of the host to a program that splits them
        return lambda params, items: function(params, jax.device_put(items, split))

    return Codec(config, params, shift, scale, file_sha256(path), chunk, put(encode), put(decode), mesh.size)
