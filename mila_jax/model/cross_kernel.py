"""Attention of the tokens to the text in one Pallas kernel for TPUs.

By XLA every step of it reads and writes scores of all tokens, heads and words in main memory, and copies the queries so that heads come
first. A block of tokens with one head's 128 words needs none of that. The backward kernel computes the weights again. Heads lie side
by side in the last axis and must be a multiple of 128 wide, a TPU's lanes. Formulae and rounding are those of `attention.attend_text`.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from mila_jax.parallel.logical import spec

LANES = 128
TOKENS = 1024  # of one block, at most: all of the backward's arrays stay in VMEM
_SUBLANES = 16  # of bfloat16


def choose_tokens(count: int) -> tuple[int, int]:
    """(tokens of one block, tokens to fill up with so that they divide)."""
    fitting = [n for n in range(_SUBLANES, TOKENS + 1, _SUBLANES) if count % n == 0]
    if fitting and fitting[-1] >= TOKENS // 4:
        return fitting[-1], 0
    tokens = min(TOKENS // 2, -(-count // _SUBLANES) * _SUBLANES)
    return tokens, -count % tokens


def _product(a, b, transposed: bool):
    """[m, x]·[n, x]ᵀ or [m, x]·[x, n] in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, (((1,), (1 if transposed else 0,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)


def _softmax(scores, axis):
    weights = jnp.exp(scores - scores.max(axis, keepdims=True))
    return weights / weights.sum(axis, keepdims=True)


def _scaled(q):
    return q * jnp.asarray(1 / math.sqrt(q.shape[-1]), q.dtype)


def _forward_kernel(q_ref, k_ref, v_ref, bias_ref, out_ref):
    weights = _softmax(_product(_scaled(q_ref[0]), k_ref[0], True) + bias_ref[0], 1)
    out_ref[0] = _product(weights.astype(v_ref.dtype), v_ref[0], False).astype(out_ref.dtype)


def _backward_kernel(q_ref, k_ref, v_ref, turned_ref, do_ref, dq_ref, dk_ref, dv_ref):
    @pl.when(pl.program_id(2) == 0)
    def _():
        dk_ref[...] = jnp.zeros_like(dk_ref)
        dv_ref[...] = jnp.zeros_like(dv_ref)

    q, k, v, do = _scaled(q_ref[0]), k_ref[0], v_ref[0], do_ref[0]
    weights = _softmax(_product(k, q, True) + turned_ref[0], 0)  # [words, tokens], as both sums over tokens want them
    dv_ref[0] += _product(weights.astype(do.dtype), do, False)
    d = _product(v, do, True)
    d = weights * (d - (d * weights).sum(0, keepdims=True))
    dk_ref[0] += _product(d.astype(q.dtype), q, False)
    dq_ref[0] = (_product(d.T.astype(k.dtype), k, False) * (1 / math.sqrt(q.shape[-1]))).astype(dq_ref.dtype)


def _specs(q, words: int, head: int):
    """Grid (samples, heads, blocks of tokens) and the blocks of tokens' arrays and of words'."""
    b, n, width = q.shape
    tokens = choose_tokens(n)[0]
    block = lambda size, place: pl.BlockSpec((1, size, head), place)  # noqa: E731
    return (b, width // head, n // tokens), block(tokens, lambda b, h, i: (b, i, h)), block(words, lambda b, h, i: (b, 0, h))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _fused(q, k, v, bias, head, interpret):
    grid, tokens, words = _specs(q, k.shape[1], head)
    return pl.pallas_call(
        _forward_kernel, grid=grid, in_specs=[tokens, words, words, pl.BlockSpec((1, 1, k.shape[1]), lambda b, h, i: (b, 0, 0))],
        out_specs=tokens, out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype), interpret=interpret, name="text_forward",
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel")),
    )(q, k, v, bias[:, None])  # fmt: skip


def _fused_forward(q, k, v, bias, head, interpret):
    return _fused(q, k, v, bias, head, interpret), (q, k, v, bias)


def _fused_backward(head, interpret, residuals, do):
    q, k, v, bias = residuals
    grid, tokens, words = _specs(q, k.shape[1], head)
    sums = jax.ShapeDtypeStruct(k.shape, jnp.float32)
    dq, dk, dv = pl.pallas_call(
        _backward_kernel, grid=grid, in_specs=[tokens, words, words, pl.BlockSpec((1, k.shape[1], 1), lambda b, h, i: (b, 0, 0)), tokens],
        out_specs=[tokens, words, words], out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), sums, sums], interpret=interpret, name="text_backward",
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
    )(q, k, v, bias[:, :, None], do)  # fmt: skip
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), jnp.zeros_like(bias)


_fused.defvjp(_fused_forward, _fused_backward)


def fused_text_attention(q, k, v, mask, head: int, *, interpret: bool = False):
    """Attention of tokens q [b, …, k·e] to words k, v [b, l, k·e] where mask [b, l] (or None: everywhere); head: e, a multiple of 128.

    Differentiable in q, k and v. Returns an array like q.
    """
    b, words = k.shape[:2]
    bias = jnp.zeros((b, words), jnp.float32) if mask is None else jnp.where(mask, 0.0, -1e30)
    more = -words % LANES
    # Words that fill up the lanes are out of reach even where every real one is masked.
    bias = jnp.pad(bias, ((0, 0), (0, more)), constant_values=-jnp.inf)
    k, v = (jnp.pad(x, ((0, 0), (0, more), (0, 0))) for x in (k, v))
    flat = q.reshape(b, -1, q.shape[-1])
    count = flat.shape[1]
    flat = jnp.pad(flat, ((0, 0), (0, choose_tokens(count)[1]), (0, 0)))
    return _fused(flat, k, v, bias, head, interpret)[:, :count].reshape(q.shape)


def attend_text_fused(q, k, v, mask, axes, head: int):
    """`fused_text_attention` on every device's own part; axes: logical names of q's axes, of which the last are its heads."""
    local = functools.partial(fused_text_attention, head=head)
    if jax.sharding.get_abstract_mesh().empty:
        return local(q, k, v, mask)
    words = spec(axes[0], None, axes[-1])
    mask = jnp.ones(k.shape[:2], bool) if mask is None else mask
    # Not checked for replication: the kernel's outputs carry none of the types that the check reads.
    run = jax.shard_map(local, in_specs=(spec(*axes), words, words, spec(axes[0], None)), out_specs=spec(*axes), check_vma=False)
    return run(q, k, v, mask)
