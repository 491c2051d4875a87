"""Attention: one function for all, and the two modules of a block.

Self-attention of the spatial block runs over all tokens of all views of one frame (eq. (3)): with one view it is exactly the
base model's. Temporal self-attention runs over the frames at one place of one view. Except on one CPU, batch axes are never merged: a
merged axis of which one factor is split over the mesh has no sharding of its own, and the compiler would gather it.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx

from mila_jax.model.cpu_gradients import for_one_cpu
from mila_jax.model.cross_kernel import attend_text_fused
from mila_jax.model.layers import Linear, ones, pairs_apart, parameter, product, rotate, rotate_apart, xavier, zeros
from mila_jax.model.norms import rms_norm
from mila_jax.model.remat import ATTENTION, INPUTS, keep
from mila_jax.model.softmax_attention import TOKENS, short_attention, softmax_attention
from mila_jax.model.splash import attend_splash, device_kind
from mila_jax.model.temporal_kernel import attend_fused
from mila_jax.parallel.logical import constrain

KERNELS = ("xla", "splash")  # of spatial attention
TEMPORAL_KERNELS = TEXT_KERNELS = ("xla", "fused")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Logical names of the axes [..., n, k, e] of q, k and v as they are made from the stream, and, while attention is computed, of
    queries and results, and of keys and values."""

    made: tuple
    queries: tuple
    keys: tuple


SPATIAL = Layout(*(("batch", "frames", None, "heads", None),) * 3)  # [b, t, v·n, k, e]
TEMPORAL = Layout(
    ("batch", None, "places", "temporal_frames", "heads", None), ("batch", None, "places", "query_frames", "temporal_heads", None),
    ("batch", None, "places", "key_frames", "temporal_heads", None),
)  # [b, v, n, t, k, e]  # fmt: skip


def project(x, kernel, bias, *, cut: bool, apart: int = 0):
    """Fused projections of x [..., d] by kernel [d, m, k, e] and bias [m, k, e] → m arrays [..., k, e].

    cut: by m products with parts of the kernel. For arrays of many tokens, slices of one large result, and its gradient put together
    again, would be copies of q, k and v on a TPU. apart: of the first so many, the pairs are set apart (`layers.pairs_apart`), on one CPU only.
    """
    kernel, bias = kernel.astype(x.dtype), bias.astype(x.dtype)
    if for_one_cpu():  # whose compiler would transpose both x and the result for the products below
        parts = ((kernel[:, i], bias[i]) for i in range(len(bias)))
        parts = (tuple(map(pairs_apart, part)) if i < apart else part for i, part in enumerate(parts))
        return [product(x, w.reshape(len(w), -1)).reshape(x.shape[:-1] + b.shape) + b for w, b in parts]
    if cut:
        return [jnp.einsum("...d,dke->...ke", x, kernel[:, i]) + bias[i] for i in range(len(bias))]
    return [y + b for y, b in zip(jnp.einsum("...d,dmke->m...ke", x, kernel), bias)]


def attend(q, k, v):
    """Softmax attention over the token axis, softmax in float32.

    q: [..., q, k, e], k and v: [..., s, k, e]. Returns [..., q, k, e].
    """
    q = q * (1 / math.sqrt(q.shape[-1]))
    if for_one_cpu():
        if q.ndim > 4 and q.shape == k.shape and 2 * q.shape[-3] <= TOKENS:
            return short_attention(q, k, v)
        q, k, v = (jnp.swapaxes(y, -3, -2) for y in (q, k, v))
        return jnp.swapaxes(softmax_attention(q, k, v, None), -3, -2)
    # Temporal attention (28 frames at each of 2,688 places) stays in this form. Modelled by the TPU compiler's own cycle estimates on one
    # temporal block (v5p, width 1152, 9 heads of 128): places or frames outermost 6.93 ms both, softmax in bfloat16 6.82 (within the
    # model's error, so it stays in float32), four places in one product with a block-diagonal mask 9.03, heads of 72 8.58.
    scores = jnp.einsum("...qke,...ske->...kqs", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("...kqs,...ske->...qke", weights, v)


def attend_text(q, k, v, mask=None):
    """Softmax attention of every token [b, t, v, n] to the text, softmax in float32.

    q: [b, t, v, n, k, e], k and v: [b, l, k, e], mask: [b, l] bool (True = may be seen) or None. Returns [b, t, v, n, k, e].
    """
    q = q * (1 / math.sqrt(q.shape[-1]))
    if for_one_cpu():
        flat = q.reshape(len(q), -1, *q.shape[-2:])  # one axis of queries: with several, products and softmax get copies between them
        y = softmax_attention(*(jnp.swapaxes(a, 1, 2) for a in (flat, k, v)), None if mask is None else mask[:, None, None])
        return jnp.swapaxes(y, 1, 2).reshape(q.shape)
    # Modelled as above with cross-attention in the block: tokens in their own axes 8.44 ms, in one flat axis 8.45, softmax in bfloat16
    # 8.74. The axes stay apart, since a flat one could not stay split over frames or places.
    if mask is not None:
        # Tied to the keys of this layer: the mask alone does not change from layer to layer, so that it would be spread out to the
        # size of the scores once, ahead of all layers, and sent from devices to devices in each.
        k, bias = jax.lax.optimization_barrier((k, jnp.where(mask, 0.0, -1e30)))
    scores = jnp.einsum("btvnke,blke->bktvnl", q, k, preferred_element_type=jnp.float32)
    if mask is not None:
        scores = scores + bias[:, None, None, None, None, :]
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bktvnl,blke->btvnke", weights, v)


def attend_spatially(q, k, v, kernel: str):
    """Attention over all tokens of a frame; arrays [b, t, v·n, k, e]. kernel: xla | splash (which elsewhere than on TPUs is xla)."""
    kind = device_kind() if kernel == "splash" else ""
    return attend_splash(q, k, v, SPATIAL.queries, kind) if kind.startswith("TPU") else attend(q, k, v)


class SelfAttention(nnx.Module):
    """Fused qkv, RMSNorm on q and k (optional), rotary embedding (of frames, or of viewing directions), output projection.

    Published as `attn.{qkv,q_norm,k_norm,proj}` (Open-Sora blocks.py Attention). The fused kernel is stored [d, 3, k, e], so
    that heads are an axis that can be sharded; it is drawn as one matrix [d, 3d].
    """

    def __init__(self, width: int, heads: int, *, qk_norm: bool, layout: Layout, kernel: str, rngs: nnx.Rngs, last=xavier):
        head = width // heads
        self.layout, self.kernel = layout, kernel
        self.qkv = parameter(rngs, (width, 3, heads, head), xavier, ("embed", None, "heads", "head_dim"), (width, 3 * width))
        self.qkv_bias = parameter(rngs, (3, heads, head), zeros, (None, "heads", "head_dim"))
        self.q_norm = parameter(rngs, (head,), ones, (None,)) if qk_norm else None
        self.k_norm = parameter(rngs, (head,), ones, (None,)) if qk_norm else None
        self.proj = Linear(width, width, ("heads", "embed"), rngs=rngs, init=last)

    def __call__(self, x, rotary=None):
        """x [..., n, d] → [..., n, d], attention over the n axis; rotary: tables over it or None."""
        # One CPU turns pairs that lie apart, as the kernels of queries and keys then give them: what is common to both leaves their products alone.
        apart = rotary is not None and for_one_cpu()
        made = project(x, self.qkv[...], self.qkv_bias[...], cut=True, apart=2 if apart else 0)  # each [..., n, k, e]
        q, k, v = (keep(constrain(y, *self.layout.made), INPUTS) for y in made)
        if self.q_norm is not None:
            weights = (pairs_apart(w[...]) if apart else w[...] for w in (self.q_norm, self.k_norm))
            q, k = (rms_norm(y, w) for y, w in zip((q, k), weights))
        if rotary is not None:
            q, k = (rotate_apart(y, *rotary) if apart else rotate(y, rotary) for y in (q, k))
        q, k, v = constrain(q, *self.layout.queries), constrain(k, *self.layout.keys), constrain(v, *self.layout.keys)
        y = attend_spatially(q, k, v, self.kernel) if self.layout is SPATIAL else attend(q, k, v)
        y = constrain(y, *self.layout.queries)
        splash = self.layout is SPATIAL and self.kernel == "splash" and device_kind().startswith("TPU")
        y = y if splash else keep(y, ATTENTION)  # splash keeps its result itself, with its statistics
        return self.proj(y.reshape(x.shape)) if for_one_cpu() else self.proj.of_heads(y)

    @property
    def fused(self) -> bool:
        """Whether the program being traced calls `over_frames`."""
        return self.kernel == "fused" and device_kind().startswith("TPU")

    def over_frames(self, x, rotary):
        """As a call of the module, by one kernel between the two projections, for x [b, t, v, n, d] with attention over t."""
        width = x.shape[-1]
        kernel, bias = self.qkv[...].astype(x.dtype).reshape(width, 3, width), self.qkv_bias[...].astype(x.dtype).reshape(3, width)
        # As in `Layout`: where the arrays are made and where attention sees them. The last names stand for heads and head width.
        made, axes = ("batch", "temporal_frames", None, "places", "heads"), ("batch", "query_frames", None, "places", "temporal_heads")
        q, k, v = (constrain(keep(constrain(x @ kernel[:, m] + bias[m], *made), INPUTS), *axes) for m in range(3))
        y = constrain(attend_fused(q, k, v, self.q_norm[...], self.k_norm[...], rotary, axes), *axes)
        return self.proj.of_kept(y, ATTENTION)


class CrossAttention(nnx.Module):
    """Attention of the tokens to the text. Published as `cross_attn.{q_linear,kv_linear,proj}`; no norm, no rotary."""

    def __init__(self, width: int, heads: int, *, kernel: str, rngs: nnx.Rngs, last=xavier):
        head = width // heads
        self.kernel = kernel
        self.q = Linear(width, width, ("embed", "heads"), rngs=rngs)
        self.kv = parameter(rngs, (width, 2, heads, head), xavier, ("embed", None, "heads", "head_dim"), (width, 2 * width))
        self.kv_bias = parameter(rngs, (2, heads, head), zeros, (None, "heads", "head_dim"))
        self.proj = Linear(width, width, ("heads", "embed"), rngs=rngs, init=last)

    def __call__(self, x, text, mask, axes):
        """x [b, t, v, n, d] with logical axes `axes`, text [b, l, d], mask [b, l] bool or None → [b, t, v, n, d]."""
        k, v = (keep(constrain(y, "batch", None, "heads", None), INPUTS) for y in project(text, self.kv[...], self.kv_bias[...], cut=False))
        sides = (*axes[:-1], "heads")
        q = keep(constrain(self.q(x), *sides), INPUTS)
        if self.kernel == "fused" and device_kind().startswith("TPU"):
            flat = (y.reshape(*y.shape[:2], -1) for y in (k, v))  # heads side by side
            return self.proj(constrain(attend_text_fused(q, *flat, mask, sides, k.shape[-1]), *sides))
        q = constrain(q.reshape(x.shape[:-1] + k.shape[2:]), *sides, None)
        y = keep(constrain(attend_text(q, k, v, mask), *sides, None), ATTENTION)
        return self.proj(y.reshape(x.shape))
