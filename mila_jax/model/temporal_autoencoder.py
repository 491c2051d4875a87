"""Open-Sora 1.2's temporal autoencoder (`VAE_Temporal`, its `OpenSoraVAE_V1_2` pipeline), in Flax NNX, channels last.

It takes the latents of the 2-D autoencoder, four frames to one, and leaves rows and columns alone:

    encode: [n, t, h, w, 4] -> mean, logvar [n, ceil(t / 4), h, w, 4]
    decode: [n, ceil(t / 4), h, w, 4], t -> [n, t, h, w, 4]

Convolutions are causal in time (norms reach over the whole chunk); what is no multiple of four frames gets zero frames in front. Module
attributes carry the published names (`encoder.block_res_blocks.1.0.conv3.conv`). Source: hpcaitech/Open-Sora v1.2, opensora/models/vae/vae_temporal.py and vae.py.

`TemporalCodec` is the pipeline round it: frames in chunks that do not see each other (17 → 5 latents as published, or each frame by
itself → one latent a frame), then the published normalisation.
"""

import dataclasses
from collections.abc import Mapping

import einops
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mila_jax.errors import UserError
from mila_jax.model.autoencoder import LOGVAR_RANGE
from mila_jax.model.autoencoder_weights import fill_published

CHUNK = 17  # frames of the published pipeline's `micro_frame_size`
SHIFT, SCALE = (-0.10, 0.34, 0.27, 0.98), (3.85, 2.32, 2.33, 3.06)  # vae.py of v1.2, per channel
SPATIAL_SCALE = 0.18215  # what the pipeline multiplies the 2-D latents with (SD 1's factor, although the weights are SDXL's)


@dataclasses.dataclass(frozen=True)
class TemporalConfig:
    """Sizes of the temporal autoencoder; the defaults are the published ones."""

    channels: int = 4
    latent_channels: int = 4
    inner_channels: int = 4  # of the moments between the encoder and quant_conv
    filters: int = 128
    num_res_blocks: int = 4
    channel_multipliers: tuple[int, ...] = (1, 2, 2, 4)
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    num_groups: int = 32

    def __post_init__(self):
        object.__setattr__(self, "channel_multipliers", tuple(int(m) for m in self.channel_multipliers))
        object.__setattr__(self, "temporal_downsample", tuple(bool(d) for d in self.temporal_downsample))
        if self.filters % self.num_groups:
            raise UserError(f"temporal autoencoder: {self.filters} filters do not divide into {self.num_groups} norm groups; change one of the two")

    @property
    def compression(self) -> int:
        """Frames per latent."""
        return 2 ** sum(self.temporal_downsample)

    def widths(self) -> list[int]:
        """Channels of each level."""
        return [self.filters * m for m in self.channel_multipliers]


class CausalConv(nnx.Module):
    """3-D convolution with zero padding: in time on the left only, so that no frame sees a later one."""

    def __init__(self, channels_in: int, channels_out: int, size: int, rngs: nnx.Rngs, *, stride: int = 1, bias: bool = True):
        padding = ((size - 1 + 1 - stride, 0), (size // 2, size // 2), (size // 2, size // 2))
        self.conv = nnx.Conv(channels_in, channels_out, (size,) * 3, strides=(stride, 1, 1), padding=padding, use_bias=bias, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[n, t, h, w, channels_in] -> [n, t / stride, h, w, channels_out]."""
        return self.conv(x)


def _norm(channels: int, groups: int, rngs: nnx.Rngs) -> nnx.GroupNorm:
    return nnx.GroupNorm(channels, num_groups=groups, epsilon=1e-5, use_fast_variance=False, rngs=rngs)


class ResBlock(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1x1 shortcut when the channels change."""

    def __init__(self, channels_in: int, channels_out: int, groups: int, rngs: nnx.Rngs):
        self.norm1 = _norm(channels_in, groups, rngs)
        self.conv1 = CausalConv(channels_in, channels_out, 3, rngs, bias=False)
        self.norm2 = _norm(channels_out, groups, rngs)
        self.conv2 = CausalConv(channels_out, channels_out, 3, rngs, bias=False)
        self.conv3 = CausalConv(channels_in, channels_out, 1, rngs, bias=False) if channels_in != channels_out else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[n, t, h, w, channels_in] -> [n, t, h, w, channels_out]."""
        y = self.conv1(nnx.silu(self.norm1(x)))
        y = self.conv2(nnx.silu(self.norm2(y)))
        return y + (x if self.conv3 is None else self.conv3(x))


class Nothing(nnx.Module):
    """Keeps the published numbering where a level has no convolution of its own."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """x."""
        return x


def _stage(channels_in: int, channels_out: int, config: TemporalConfig, rngs: nnx.Rngs) -> nnx.List:
    ins = [channels_in] + [channels_out] * (config.num_res_blocks - 1)
    return nnx.List([ResBlock(c, channels_out, config.num_groups, rngs) for c in ins])


def _run(blocks, x):
    for block in blocks:
        x = block(x)
    return x


class Encoder(nnx.Module):
    """Latent frames -> moments before quant_conv; each level halves the frames if its flag says so."""

    def __init__(self, config: TemporalConfig, rngs: nnx.Rngs):
        widths = config.widths()
        self.conv_in = CausalConv(config.channels, config.filters, 3, rngs, bias=False)
        ins = [config.filters, *widths[:-1]]
        self.block_res_blocks = nnx.List([_stage(a, b, config, rngs) for a, b in zip(ins, widths)])
        self.conv_blocks = nnx.List(
            [CausalConv(c, c, 3, rngs, stride=2) if down else Nothing() for c, down in zip(widths, config.temporal_downsample)]
        )
        self.res_blocks = _stage(widths[-1], widths[-1], config, rngs)
        self.norm1 = _norm(widths[-1], config.num_groups, rngs)
        self.conv2 = CausalConv(widths[-1], 2 * config.inner_channels, 1, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[n, t, h, w, c] -> [n, t / compression, h, w, 2c]."""
        x = self.conv_in(x)
        for level, blocks in enumerate(self.block_res_blocks):
            x = _run(blocks, x)
            if level < len(self.conv_blocks):
                x = self.conv_blocks[level](x)
        x = _run(self.res_blocks, x)
        return self.conv2(nnx.silu(self.norm1(x)))


class Decoder(nnx.Module):
    """Latents after post_quant_conv -> latent frames; doubling a level's frames is a convolution to twice the channels, unfolded in time."""

    def __init__(self, config: TemporalConfig, rngs: nnx.Rngs):
        widths = config.widths()
        self.conv1 = CausalConv(config.inner_channels, widths[-1], 3, rngs)
        self.res_blocks = _stage(widths[-1], widths[-1], config, rngs)
        ins = [*widths[1:], widths[-1]]  # what the level above leaves
        self.block_res_blocks = nnx.List([_stage(a, b, config, rngs) for a, b in zip(ins, widths)])
        self.conv_blocks = nnx.List([CausalConv(c, 2 * c, 3, rngs) if up else Nothing() for c, up in zip(widths[1:], config.temporal_downsample)])
        self.norm1 = _norm(widths[0], config.num_groups, rngs)
        self.conv_out = CausalConv(widths[0], config.channels, 3, rngs)
        self.doubles = config.temporal_downsample

    def __call__(self, z: jax.Array) -> jax.Array:
        """[n, t, h, w, c] -> [n, compression * t, h, w, c]."""
        x = _run(self.res_blocks, self.conv1(z))
        for level in reversed(range(len(self.block_res_blocks))):
            x = _run(self.block_res_blocks[level], x)
            if level and self.doubles[level - 1]:
                x = einops.rearrange(self.conv_blocks[level - 1](x), "n t h w (c s) -> n (t s) h w c", s=2)
        return self.conv_out(nnx.silu(self.norm1(x)))


class TemporalAutoencoder(nnx.Module):
    """The whole temporal autoencoder; see the module docstring."""

    def __init__(self, config: TemporalConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs)
        self.quant_conv = CausalConv(2 * config.inner_channels, 2 * config.latent_channels, 1, rngs)
        self.post_quant_conv = CausalConv(config.latent_channels, config.inner_channels, 1, rngs)
        self.decoder = Decoder(config, rngs)

    def encode(self, frames: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Latent frames [n, t, h, w, c] -> posterior mean and log variance [n, ceil(t / compression), h, w, c]."""
        front = -frames.shape[1] % self.config.compression
        moments = self.quant_conv(self.encoder(jnp.pad(frames, ((0, 0), (front, 0), (0, 0), (0, 0), (0, 0)))))
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def decode(self, latents: jax.Array, frames: int) -> jax.Array:
        """Latents [n, ceil(frames / compression), h, w, c] -> latent frames [n, frames, h, w, c]."""
        return self.decoder(self.post_quant_conv(latents))[:, -frames % self.config.compression :]


def abstract_temporal(config: TemporalConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """(graphdef, shapes) without allocating."""
    return nnx.split(nnx.eval_shape(lambda: TemporalAutoencoder(config, rngs=nnx.Rngs(0))))


def infer_temporal_config(tensors: Mapping[str, np.ndarray], published: Mapping | None = None) -> TemporalConfig:
    """Sizes from tensor names and shapes; the number of norm groups, which shapes do not tell, from `published` (default 32).

    `UserError` when a tensor that the sizes are read from is missing.
    """

    def shape(name):
        if name not in tensors:
            raise UserError(f"temporal autoencoder weights: tensor {name!r} is missing; is this a VAE_Temporal state dict?")
        return tensors[name].shape

    def numbers(prefix):
        return sorted({int(name[len(prefix) :].split(".")[0]) for name in tensors if name.startswith(prefix)})

    filters, channels = shape("encoder.conv_in.conv.weight")[:2]
    levels = numbers("encoder.block_res_blocks.")
    widths = [shape(f"encoder.block_res_blocks.{i}.0.conv1.conv.weight")[0] for i in levels]
    return TemporalConfig(
        channels=channels, filters=filters,
        latent_channels=shape("post_quant_conv.conv.weight")[1], inner_channels=shape("post_quant_conv.conv.weight")[0],
        num_res_blocks=len(numbers("encoder.block_res_blocks.0.")), channel_multipliers=tuple(w // filters for w in widths),
        temporal_downsample=tuple(i in numbers("encoder.conv_blocks.") for i in levels[:-1]),
        num_groups=int((published or {}).get("num_groups", 32)),
    )  # fmt: skip


def temporal_from_published(tensors: Mapping[str, np.ndarray], config: TemporalConfig) -> nnx.State:
    """Published state dict -> params. `UserError` naming the tensor that is missing, misshapen or left over."""
    return fill_published(tensors, abstract_temporal(config)[1], "temporal autoencoder", config)


def latent_count(frames: int, chunk: int | None = CHUNK, compression: int = 4) -> int:
    """Latents of `frames` frames: per chunk its frames over `compression`, rounded up; one a frame for chunk=1."""
    whole, rest = divmod(frames, chunk)
    return whole * -(-chunk // compression) + -(-rest // compression)


@dataclasses.dataclass(frozen=True)
class TemporalCodec:
    """Latent frames of the 2-D autoencoder <-> normalised temporal latents.

    chunk: frames that are encoded together; 17 as published (→ 5 latents, the first of which holds one frame), 1 for one latent a
    frame, which any frame rate and any number of conditioning frames can be made of. shift, scale: [c], of the temporal latents.
    """

    config: TemporalConfig
    params: nnx.State
    chunk: int = CHUNK
    shift: tuple[float, ...] = SHIFT
    scale: tuple[float, ...] = SCALE

    def __post_init__(self):
        if self.chunk < 1:
            raise UserError(f"temporal chunk {self.chunk} must be at least 1 frame; 17 as published, 1 for a latent a frame")

    def count(self, frames: int) -> int:
        """Latents of so many frames."""
        return latent_count(frames, self.chunk, self.config.compression)

    def encode(self, frames: jax.Array) -> jax.Array:
        """Latent frames [n, t, h, w, c], times 0.18215 as published -> normalised posterior mean [n, count(t), h, w, c]; jit-able."""
        return (self._chunks(frames, self.chunk, lambda model, x: model.encode(x)[0]) - jnp.asarray(self.shift)) / jnp.asarray(self.scale)

    def decode(self, latents: jax.Array, frames: int) -> jax.Array:
        """The inverse: normalised latents [n, count(frames), h, w, c] -> latent frames [n, frames, h, w, c]; jit-able.

        Raises `UserError` when the number of latents is not that of `frames`.
        """
        if latents.shape[1] != self.count(frames):
            raise UserError(f"{frames} frames in chunks of {self.chunk} have {self.count(frames)} temporal latents, not {latents.shape[1]}")
        latents = latents * jnp.asarray(self.scale) + jnp.asarray(self.shift)
        step, left, model = self.count(self.chunk), frames, self._model()
        whole = frames // self.chunk
        out = []
        if whole:  # chunks do not see each other: they are one batch
            x = einops.rearrange(latents[:, : whole * step], "n (k l) h w c -> (n k) l h w c", k=whole)
            out.append(einops.rearrange(model.decode(x, self.chunk), "(n k) t h w c -> n (k t) h w c", k=whole))
            left -= whole * self.chunk
        if left:
            out.append(model.decode(latents[:, whole * step :], left))
        return jnp.concatenate(out, 1)

    def _model(self) -> TemporalAutoencoder:
        return nnx.merge(abstract_temporal(self.config)[0], self.params)

    def _chunks(self, x, size, function):
        model, whole = self._model(), x.shape[1] // size
        out = []
        if whole:
            chunks = einops.rearrange(x[:, : whole * size], "n (k t) h w c -> (n k) t h w c", k=whole)
            out.append(einops.rearrange(function(model, chunks), "(n k) l h w c -> n (k l) h w c", k=whole))
        if x.shape[1] % size:
            out.append(function(model, x[:, whole * size :]))
        return jnp.concatenate(out, 1)


def load_temporal(path, chunk: int = CHUNK) -> tuple[TemporalCodec, str]:
    """(codec, SHA-256) of published temporal weights: VAE_Temporal by itself, or Open-Sora's whole pipeline in one file.

    path: a file, a folder or an address (`weight_files`); a config.json beside it is read for the number of norm groups. The pipeline's file
    brings shift and scale. Raises `UserError` naming the file or the tensor.
    """
    from mila_jax.model.weight_files import read_config_beside, read_tensors

    tensors, _, digest = read_tensors(path)
    parts = split_pipeline(tensors)
    config = infer_temporal_config(parts["temporal"], read_config_beside(path))
    statistics = {key: tuple(float(v) for v in np.ravel(parts[key])) for key in ("shift", "scale") if parts[key] is not None}
    return TemporalCodec(config, temporal_from_published(parts["temporal"], config), chunk, **statistics), digest


def split_pipeline(tensors: Mapping[str, np.ndarray]) -> dict:
    """A state dict of Open-Sora's pipeline as {"spatial", "temporal": tensors, "shift", "scale": arrays or None}.

    One of the temporal part alone comes back as just that. Names in the pipeline: `spatial_vae.module.*`, `temporal_vae.*`, `shift`, `scale`.
    """
    if not any(name.startswith("temporal_vae.") for name in tensors):
        return {"spatial": {}, "temporal": dict(tensors), "shift": None, "scale": None}
    parts = {
        key: {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
        for key, prefix in (("spatial", "spatial_vae.module."), ("temporal", "temporal_vae."))
    }
    return parts | {key: tensors.get(key) for key in ("shift", "scale")}
