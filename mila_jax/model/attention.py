"""Attention: one function for all, and the two modules of a block.

Self-attention of the spatial block runs over all tokens of all views of one frame (eq. (3)): with one view it is exactly the
base model's. Temporal self-attention runs over the frames at one place of one view.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from mila_jax.model.layers import Linear, ones, parameter, rms_norm, rotate, xavier, zeros


def attend(q, k, v, mask=None):
    """Softmax attention over the token axis, softmax in float32.

    q: [b, q, k, e], k and v: [b, s, k, e], mask: [b, s] bool (True = may be seen) or None. Returns [b, q, k, e].
    """
    scores = jnp.einsum("bqke,bske->bkqs", q * (1 / math.sqrt(q.shape[-1])), k, preferred_element_type=jnp.float32)
    if mask is not None:
        scores = jnp.where(mask[:, None, None, :], scores, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkqs,bske->bqke", weights, v)


class SelfAttention(nnx.Module):
    """Fused qkv, RMSNorm on q and k (optional), rotary embedding (of frames, or of viewing directions), output projection.

    Published as `attn.{qkv,q_norm,k_norm,proj}` (Open-Sora blocks.py Attention). The fused kernel is stored [d, 3, k, e], so
    that heads are an axis that can be sharded; it is drawn as one matrix [d, 3d].
    """

    def __init__(self, width: int, heads: int, *, qk_norm: bool, rngs: nnx.Rngs, last=xavier):
        head = width // heads
        self.qkv = parameter(rngs, (width, 3, heads, head), xavier, ("embed", None, "heads", "head_dim"), (width, 3 * width))
        self.qkv_bias = parameter(rngs, (3, heads, head), zeros, (None, "heads", "head_dim"))
        self.q_norm = parameter(rngs, (head,), ones, (None,)) if qk_norm else None
        self.k_norm = parameter(rngs, (head,), ones, (None,)) if qk_norm else None
        self.proj = Linear(width, width, ("heads", "embed"), rngs=rngs, init=last)

    def __call__(self, x, rotary=None):
        """x [b, n, d] → [b, n, d]; rotary: tables over the n axis or None."""
        width = x.shape[-1]
        kernel = self.qkv[...].astype(x.dtype)
        qkv = x @ kernel.reshape(width, -1) + self.qkv_bias[...].astype(x.dtype).reshape(-1)
        q, k, v = jnp.moveaxis(qkv.reshape(x.shape[:-1] + kernel.shape[1:]), -3, 0)  # each [b, n, k, e]
        if self.q_norm is not None:
            q, k = rms_norm(q, self.q_norm[...]), rms_norm(k, self.k_norm[...])
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return self.proj(attend(q, k, v).reshape(x.shape))


class CrossAttention(nnx.Module):
    """Attention of the tokens to the text. Published as `cross_attn.{q_linear,kv_linear,proj}`; no norm, no rotary."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs, last=xavier):
        head = width // heads
        self.q = Linear(width, width, ("embed", "heads"), rngs=rngs)
        self.kv = parameter(rngs, (width, 2, heads, head), xavier, ("embed", None, "heads", "head_dim"), (width, 2 * width))
        self.kv_bias = parameter(rngs, (2, heads, head), zeros, (None, "heads", "head_dim"))
        self.proj = Linear(width, width, ("heads", "embed"), rngs=rngs, init=last)

    def __call__(self, x, text, mask):
        """x [b, n, d], text [b, l, d], mask [b, l] bool or None → [b, n, d]."""
        kernel = self.kv[...].astype(x.dtype)
        heads, head = kernel.shape[2:]
        kv = text @ kernel.reshape(kernel.shape[0], -1) + self.kv_bias[...].astype(x.dtype).reshape(-1)
        k, v = jnp.moveaxis(kv.reshape(text.shape[:-1] + (2, heads, head)), -3, 0)
        q = self.q(x).reshape(x.shape[:-1] + (heads, head))
        return self.proj(attend(q, k, v, mask).reshape(x.shape))
