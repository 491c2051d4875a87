"""AutoencoderKL: the published 2-D image autoencoder (diffusers `AutoencoderKL`), in Flax NNX, channels last.

    encode: images [n, H, W, 3] in [-1, 1]  ->  mean, logvar [n, h, w, c]
    decode: latents [n, h, w, c]            ->  images [n, H, W, 3]

with H/h = W/w = pixel_unshuffle * 2^(levels - 1). Module attributes carry the published names (`encoder.down_blocks.0.resnets…`),
so that `autoencoder_weights` maps a published state dict by name alone. Modules hold no random state and are used functionally:

    graphdef, params = nnx.split(AutoencoderKL(config, rngs=nnx.Rngs(0)))
    mean, logvar = jax.jit(lambda p, x: nnx.merge(graphdef, p).encode(x))(params, images)

`pixel_unshuffle` is our one addition (1 = published): the image is folded space-to-depth before the encoder and unfolded after the
decoder. Full-resolution convolutions over few channels are what a small machine does slowest; folding removes them.
"""

import dataclasses
import functools

import einops
import jax
import jax.numpy as jnp
from flax import nnx

from mila_jax.errors import UserError

LOGVAR_RANGE = (-30.0, 20.0)  # clamp of DiagonalGaussianDistribution


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of an `AutoencoderKL`; field names are those of the published config.json. The defaults are the SD/SDXL autoencoder."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    pixel_unshuffle: int = 1

    def __post_init__(self):
        object.__setattr__(self, "block_out_channels", tuple(int(c) for c in self.block_out_channels))
        if not self.block_out_channels:
            raise UserError("autoencoder config: block_out_channels is empty; give at least one level")
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise UserError(
                    f"autoencoder config: block_out_channels {self.block_out_channels} do not divide into "
                    f"norm_num_groups {self.norm_num_groups}; change one of the two"
                )

    @property
    def compression(self) -> int:
        """Pixels per latent along height and along width."""
        return self.pixel_unshuffle * 2 ** (len(self.block_out_channels) - 1)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(h, w, c) for images of `height` x `width`; UserError when the image size does not divide."""
        if height % self.compression or width % self.compression:
            raise UserError(
                f"image size {height}x{width} does not divide by the autoencoder's compression {self.compression}; "
                f"choose multiples of {self.compression}"
            )
        return height // self.compression, width // self.compression, self.latent_channels


def _conv(channels_in: int, channels_out: int, size: int, rngs: nnx.Rngs, stride: int = 1, padding=None) -> nnx.Conv:
    padding = size // 2 if padding is None else padding
    return nnx.Conv(channels_in, channels_out, (size, size), strides=stride, padding=padding, rngs=rngs)


def _norm(channels: int, groups: int, rngs: nnx.Rngs) -> nnx.GroupNorm:
    # The fast variance E[x²] - E[x]² loses digits that the published weights' parity needs.
    return nnx.GroupNorm(channels, num_groups=groups, epsilon=1e-6, use_fast_variance=False, rngs=rngs)


class ResnetBlock(nnx.Module):
    """x + conv3(silu(norm(conv3(silu(norm(x)))))), with a 1x1 shortcut when the channels change."""

    def __init__(self, channels_in: int, channels_out: int, groups: int, *, rngs: nnx.Rngs):
        self.norm1 = _norm(channels_in, groups, rngs)
        self.conv1 = _conv(channels_in, channels_out, 3, rngs)
        self.norm2 = _norm(channels_out, groups, rngs)
        self.conv2 = _conv(channels_out, channels_out, 3, rngs)
        self.conv_shortcut = _conv(channels_in, channels_out, 1, rngs) if channels_in != channels_out else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """[n, h, w, channels_in] -> [n, h, w, channels_out]."""
        y = self.conv1(nnx.silu(self.norm1(x)))
        y = self.conv2(nnx.silu(self.norm2(y)))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nnx.Module):
    """Single-head self-attention over the h*w tokens of one image, with residual; logits scaled by channels^-1/2."""

    def __init__(self, channels: int, groups: int, *, rngs: nnx.Rngs):
        self.group_norm = _norm(channels, groups, rngs)
        self.to_q = nnx.Linear(channels, channels, rngs=rngs)
        self.to_k = nnx.Linear(channels, channels, rngs=rngs)
        self.to_v = nnx.Linear(channels, channels, rngs=rngs)
        self.to_out = nnx.List([nnx.Linear(channels, channels, rngs=rngs)])  # a list because the published name is to_out.0

    def __call__(self, x: jax.Array) -> jax.Array:
        """[n, h, w, d] -> same."""
        tokens = einops.rearrange(self.group_norm(x), "n h w d -> n (h w) d")
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        weights = jax.nn.softmax(jnp.einsum("nqd,nkd->nqk", q, k) * q.shape[-1] ** -0.5, axis=-1)
        y = self.to_out[0](jnp.einsum("nqk,nkd->nqd", weights, v))
        return x + y.reshape(x.shape)


class MidBlock(nnx.Module):
    """ResnetBlock, Attention, ResnetBlock at the deepest level."""

    def __init__(self, channels: int, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        groups = config.norm_num_groups
        self.resnets = nnx.List([ResnetBlock(channels, channels, groups, rngs=rngs) for _ in range(2)])
        self.attentions = nnx.List([Attention(channels, groups, rngs=rngs)] if config.mid_block_add_attention else [])

    def __call__(self, x: jax.Array) -> jax.Array:
        """[n, h, w, d] -> same."""
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Downsample(nnx.Module):
    """3x3 convolution of stride 2, padded on the right and at the bottom only."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.conv = _conv(channels, channels, 3, rngs, stride=2, padding=((0, 1), (0, 1)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """[n, 2h, 2w, d] -> [n, h, w, d]."""
        return self.conv(x)


class Upsample(nnx.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.conv = _conv(channels, channels, 3, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[n, h, w, d] -> [n, 2h, 2w, d]."""
        return self.conv(einops.repeat(x, "n h w d -> n (h r) (w s) d", r=2, s=2))


class DownBlock(nnx.Module):
    """`layers` residual blocks, then a downsample unless this is the deepest level."""

    def __init__(self, channels_in: int, channels_out: int, layers: int, groups: int, last: bool, *, rngs: nnx.Rngs):
        widths = [channels_in] + [channels_out] * layers
        self.resnets = nnx.List([ResnetBlock(a, b, groups, rngs=rngs) for a, b in zip(widths, widths[1:])])
        self.downsamplers = nnx.List([] if last else [Downsample(channels_out, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """[n, h, w, channels_in] -> [n, h/2, w/2, channels_out] (h, w when last)."""
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlock(nnx.Module):
    """`layers` residual blocks, then an upsample unless this is the shallowest level."""

    def __init__(self, channels_in: int, channels_out: int, layers: int, groups: int, last: bool, *, rngs: nnx.Rngs):
        widths = [channels_in] + [channels_out] * layers
        self.resnets = nnx.List([ResnetBlock(a, b, groups, rngs=rngs) for a, b in zip(widths, widths[1:])])
        self.upsamplers = nnx.List([] if last else [Upsample(channels_out, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """[n, h, w, channels_in] -> [n, 2h, 2w, channels_out] (h, w when last)."""
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class Encoder(nnx.Module):
    """Folded image -> 2 * latent_channels moments, before quant_conv."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = _conv(config.in_channels * config.pixel_unshuffle**2, widths[0], 3, rngs)
        self.down_blocks = nnx.List(
            [
                DownBlock(widths[max(i - 1, 0)], widths[i], config.layers_per_block, groups, i == len(widths) - 1, rngs=rngs)
                for i in range(len(widths))
            ]
        )
        self.mid_block = MidBlock(widths[-1], config, rngs=rngs)
        self.conv_norm_out = _norm(widths[-1], groups, rngs)
        self.conv_out = _conv(widths[-1], 2 * config.latent_channels, 3, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[n, H/p, W/p, 3p²] -> [n, h, w, 2c]."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))


class Decoder(nnx.Module):
    """Latents, after post_quant_conv -> folded image; up_blocks.0 is the deepest level and every level has one layer more."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = _conv(config.latent_channels, widths[0], 3, rngs)
        self.mid_block = MidBlock(widths[0], config, rngs=rngs)
        self.up_blocks = nnx.List(
            [
                UpBlock(widths[max(i - 1, 0)], widths[i], config.layers_per_block + 1, groups, i == len(widths) - 1, rngs=rngs)
                for i in range(len(widths))
            ]
        )
        self.conv_norm_out = _norm(widths[-1], groups, rngs)
        self.conv_out = _conv(widths[-1], config.out_channels * config.pixel_unshuffle**2, 3, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[n, h, w, c] -> [n, H/p, W/p, 3p²]."""
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(nnx.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
    """The whole autoencoder; see the module docstring."""

    def __init__(self, config: AutoencoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        c = config.latent_channels
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        self.quant_conv = _conv(2 * c, 2 * c, 1, rngs) if config.use_quant_conv else None
        self.post_quant_conv = _conv(c, c, 1, rngs) if config.use_post_quant_conv else None

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images [n, H, W, 3] in [-1, 1] -> posterior mean and log variance (clamped to [-30, 20]), each [n, h, w, c].

        Like the published model it takes sizes that do not divide by the compression (h and w round down);
        callers that need images of the same size back check with `config.latent_shape`.
        """
        p = self.config.pixel_unshuffle
        moments = self.encoder(einops.rearrange(images, "n (h p) (w q) c -> n h w (p q c)", p=p, q=p))
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, *LOGVAR_RANGE)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Latents [n, h, w, c], not normalised -> images [n, H, W, 3], about [-1, 1] (not clipped)."""
        p = self.config.pixel_unshuffle
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return einops.rearrange(self.decoder(latents), "n h w (p q c) -> n (h p) (w q) c", p=p, q=p)


def make_autoencoder(config: AutoencoderConfig, seed: int = 0) -> tuple[nnx.GraphDef, nnx.State]:
    """(graphdef, params) of a freshly initialised autoencoder; the same seed gives the same bytes."""
    make = jax.jit(lambda: nnx.state(AutoencoderKL(config, rngs=nnx.Rngs(seed)), nnx.Param))
    return abstract_autoencoder(config)[0], make()


@functools.cache
def _abstract(config: AutoencoderConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: AutoencoderKL(config, rngs=nnx.Rngs(0))))


def abstract_autoencoder(config: AutoencoderConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """(graphdef, shapes) without allocating: `shapes` holds jax.ShapeDtypeStruct leaves."""
    graphdef, shapes = _abstract(config)
    return graphdef, jax.tree.map(lambda x: x, shapes)  # a tree of its own: states can be changed in place
