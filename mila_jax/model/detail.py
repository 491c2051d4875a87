"""Convolutions at every place of the latents, around a backbone whose tokens are patches of them.

Ours, not the paper's (switch: `model.detail`). A patch of the embedded model is 2 × 2 places of 114 channels, what the corridors show among them,
and all of it has to go through one token. A car that passes close by is a few places, so where its edges lie is lost there. So what the network sees
also takes a way of its own, place by place and with its neighbours: into the tokens, and past them, together with what the tokens came to,
to the way out.
"""

import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from mila_jax.model.layers import Linear, gelu_tanh, zeros
from mila_jax.model.norms import layer_norm
from mila_jax.parallel.logical import constrain

# [b, t, v, h, w, c]: a view of a frame is an image of its own, so that frames are split as in spatial attention.
PLACES = ("batch", "frames", None, None, None, None)
BLOCKS = 2  # after the tokens; one before


class Convolution(nnx.Module):
    """3 × 3, zero-padded, over h and w of [..., h, w, c].

    As one product with nine shifted copies side by side: a convolution would take b, t and v as one axis, which is split over devices twice.
    """

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.taps = Linear(9 * width, width, (None, None), rngs=rngs)

    def __call__(self, x):
        h, w = x.shape[-3:-1]
        padded = jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(1, 1), (1, 1), (0, 0)])
        shifted = [padded[..., row : row + h, column : column + w, :] for row in range(3) for column in range(3)]
        return self.taps(jnp.concatenate(shifted, -1))


class ConvolutionBlock(nnx.Module):
    """x + two convolutions of its norm."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.first, self.second = Convolution(width, rngs=rngs), Convolution(width, rngs=rngs)

    def __call__(self, x):
        return constrain(x + self.second(gelu_tanh(self.first(layer_norm(x)))), *PLACES)


class Detail(nnx.Module):
    """Both ways start at zero: a network that grows into them is the one that it was.

    channels: of what the network sees; d: the backbone's width; patch: (frames, rows, columns); outputs: channels at a place.
    """

    def __init__(self, channels: int, width: int, d: int, patch, outputs: int, *, rngs: nnx.Rngs):
        size = patch[0] * patch[1] * patch[2]
        self.patch = patch
        self.seen = Linear(channels, width, (None, None), rngs=rngs)
        self.before = ConvolutionBlock(width, rngs=rngs)
        self.enter = Linear(size * width, d, (None, "embed"), rngs=rngs, init=zeros)
        self.tokens = Linear(d, size * width, ("embed", None), rngs=rngs)
        self.after = nnx.List([ConvolutionBlock(width, rngs=rngs) for _ in range(BLOCKS)])
        self.leave = Linear(width, outputs, (None, None), rngs=rngs, init=zeros)

    def look(self, x):
        """x [b, v, t, h, w, channels] whose sizes are multiples of the patch's → features [b, t, v, h, w, width] and what they add to the tokens
        [b, t, v, n, d]."""
        pt, ph, pw = self.patch
        features = self.before(constrain(self.seen(constrain(jnp.swapaxes(x, 1, 2), *PLACES)), *PLACES))
        tokens = rearrange(features, "b (t pt) v (h ph) (w pw) c -> b t v (h w) (pt ph pw c)", pt=pt, ph=ph, pw=pw)
        return features, self.enter(tokens)

    def __call__(self, features, tokens):
        """features as `look` gave them, tokens [b, t, v, n, d] at the backbone's end → [b, v, t, h, w, outputs]."""
        pt, ph, pw = self.patch
        told = rearrange(
            self.tokens(tokens), "b t v (h w) (pt ph pw c) -> b (t pt) v (h ph) (w pw) c", h=features.shape[3] // ph, pt=pt, ph=ph, pw=pw
        )
        x = constrain(features + told, *PLACES)
        for block in self.after:
            x = block(x)
        return jnp.swapaxes(self.leave(layer_norm(x)), 1, 2)
