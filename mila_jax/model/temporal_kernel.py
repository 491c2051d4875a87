"""Norm of q and k, rotary embedding and attention over the frames of a place in one Pallas kernel for TPUs.

Apart they are 28 % of a temporal block's modelled time for 0.3 % of its FLOPs: every step of them reads and writes q and k in main
memory, while a place's 28 frames of one head are a few kilobytes. Arrays come and go as the linear layers around have them, frames before
places, and are turned round inside the chip: turned in main memory, each would be a copy and 28 frames filled up to 32. The backward
kernel computes the forward again from q, k and v. Heads must be a multiple of 128 wide, a TPU's lanes. The formulae and their rounding are
those of `norms.rms_norm`, `layers.rotate` and `attention.attend`.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from mila_jax.model.norms import EPSILON
from mila_jax.parallel.logical import spec

PLACES = 16  # of one block, at most: 16 × 28 × 128 keep all of the backward's arrays in VMEM


def _swap_pairs(x):
    """x₁x₀x₃x₂… along the last axis, which are lanes: two rotations of all of them, and a choice."""
    width = x.shape[-1]
    even = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1) % 2 == 0
    return jnp.where(even, pltpu.roll(x, width - 1, x.ndim - 1), pltpu.roll(x, 1, x.ndim - 1))


def _rotate(x, cos, sin):
    return x * cos + _swap_pairs(x) * sin


def _normal(x):
    scale = jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + EPSILON)
    return x * scale, scale


def _prepare(ref, weight, cos, sin):
    """Raw q or k → normalised, its scale, and what attention sees (in the type of the array)."""
    dtype = ref.dtype
    unit, scale = _normal(ref[0].astype(jnp.float32))
    seen = (unit * weight).astype(dtype).astype(jnp.float32)
    return unit, scale, _rotate(seen, cos, sin).astype(dtype)


def _product(a, b, transposed: bool):
    """[p, m, x]·[p, n, x]ᵀ or [p, m, x]·[p, x, n] in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, (((2,), (2 if transposed else 1,)), ((0,), (0,))), precision=precision, preferred_element_type=jnp.float32)


def _softmax(scores, axis):
    weights = jnp.exp(scores - scores.max(axis, keepdims=True))
    return weights / weights.sum(axis, keepdims=True)


def _turn(x):
    """Frames first to places first, and back."""
    return jnp.swapaxes(x, 0, 1)


def _forward_kernel(q_ref, k_ref, v_ref, wq_ref, wk_ref, cos_ref, sin_ref, out_ref):
    cos, sin = cos_ref[...], sin_ref[...]
    _, _, q = _prepare(q_ref, wq_ref[...], cos, sin)
    _, _, k = _prepare(k_ref, wk_ref[...], cos, sin)
    q = q * jnp.asarray(1 / math.sqrt(q.shape[-1]), q.dtype)
    q, k, v = _turn(q), _turn(k), _turn(v_ref[0])
    weights = _softmax(_product(q, k, True), 2).astype(v.dtype)
    out_ref[0] = _turn(_product(weights, v, False).astype(out_ref.dtype))


def _backward_kernel(places, q_ref, k_ref, v_ref, wq_ref, wk_ref, cos_ref, sin_ref, do_ref, dq_ref, dk_ref, dv_ref, dwq_ref, dwk_ref):
    cos, sin, dtype = cos_ref[...], sin_ref[...], q_ref.dtype
    unit_q, scale_q, q = _prepare(q_ref, wq_ref[...], cos, sin)
    unit_k, scale_k, k = _prepare(k_ref, wk_ref[...], cos, sin)
    root = jnp.asarray(1 / math.sqrt(q.shape[-1]), dtype)
    scaled, k, v, do = _turn(q * root), _turn(k), _turn(v_ref[0]), _turn(do_ref[0])
    # Both the weights and their transposes are computed: cheaper than turning them round inside the chip.
    weights, turned = _softmax(_product(scaled, k, True), 2), _softmax(_product(k, scaled, True), 1)
    dv_ref[0] = _turn(_product(turned.astype(dtype), do, False).astype(dtype))
    d, dt = _product(do, v, True), _product(v, do, True)
    d = (weights * (d - (d * weights).sum(2, keepdims=True))).astype(dtype)
    dt = (turned * (dt - (dt * turned).sum(1, keepdims=True))).astype(dtype)
    gradients = ((_product(d, k, False) * root.astype(jnp.float32), unit_q, scale_q, wq_ref, dq_ref, dwq_ref),
                 (_product(dt, scaled, False), unit_k, scale_k, wk_ref, dk_ref, dwk_ref))  # fmt: skip
    for g, unit, scale, weight_ref, d_ref, dw_ref in gradients:
        g = _rotate(_turn(g), cos, -sin)
        product = g * unit
        if places % q_ref.shape[2]:  # places beyond the last hold anything
            place = pl.program_id(1) * q_ref.shape[2] + jax.lax.broadcasted_iota(jnp.int32, product.shape, 1)
            product = jnp.where(place < places, product, 0.0)
        dw_ref[...] = product.sum((0, 1))[None, None, None]
        g = g * weight_ref[...]
        d_ref[0] = (scale * (g - unit * (g * unit).mean(-1, keepdims=True))).astype(dtype)


def _call(kernel, name, arrays, small, outputs, interpret):
    """Runs a kernel over blocks of places and single heads. arrays: [b, t, n, k·e], small: [1 or t, 1, e]; outputs: "like" or "sum" each."""
    b, t, n, width = arrays[0].shape
    e = small[0].shape[-1]
    places = min(PLACES, n)
    blocks = pl.cdiv(n, places)
    block = pl.BlockSpec((1, t, places, e), lambda b, i, h: (b, 0, i, h))
    whole = [pl.BlockSpec(x.shape, lambda b, i, h: (0, 0, 0)) for x in small]
    shapes = {"like": jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype), "sum": jax.ShapeDtypeStruct((b, blocks, 1, width), jnp.float32)}
    specs = {"like": block, "sum": pl.BlockSpec((1, 1, 1, e), lambda b, i, h: (b, i, 0, h))}
    return pl.pallas_call(
        kernel, grid=(b, blocks, width // e), in_specs=[*[block] * 3, *whole, *[block] * (len(arrays) - 3)],
        out_specs=[specs[o] for o in outputs], out_shape=[shapes[o] for o in outputs], interpret=interpret, name=name,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
    )(*arrays[:3], *small, *arrays[3:])  # fmt: skip


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _fused(q, k, v, weights, tables, interpret):
    return _call(_forward_kernel, "temporal_forward", (q, k, v), (*weights, *tables), ["like"], interpret)[0]


def _fused_forward(q, k, v, weights, tables, interpret):
    return _fused(q, k, v, weights, tables, interpret), (q, k, v, weights, tables)


def _fused_backward(interpret, residuals, do):
    q, k, v, weights, tables = residuals
    kernel, outputs = functools.partial(_backward_kernel, q.shape[2]), ["like"] * 3 + ["sum"] * 2
    dq, dk, dv, dwq, dwk = _call(kernel, "temporal_backward", (q, k, v, do), (*weights, *tables), outputs, interpret)
    e = weights[0].shape[-1]
    sums = tuple(x.reshape(-1, e).sum(0)[None, None] for x in (dwq, dwk))
    return dq, dk, dv, sums, jax.tree.map(jnp.zeros_like, tables)


_fused.defvjp(_fused_forward, _fused_backward)


def fused_attention(q, k, v, q_weight, k_weight, rotary, *, interpret: bool = False):
    """Attention over the frames at every place, with q and k raw: arrays [b, t, v, n, k·e] → [b, t, v, n, k·e].

    q_weight, k_weight: of the norms, [e]; rotary: (cosine, sine) [t, e/2] of `layers.rotary_tables`; e must be a multiple of 128.
    Differentiable in all but the tables. Heads lie side by side in the last axis: as an axis of their own, 9 of them would be padded
    to 16, and the compiler would copy every array into the kernel's layout.
    """
    e = q_weight.shape[-1]
    cos, sin = (jnp.repeat(x.astype(jnp.float32), 2, -1) for x in rotary)
    sin = sin * jnp.where(jnp.arange(e) % 2 == 0, -1.0, 1.0)  # x₀ takes -sin of x₁, x₁ takes sin of x₀
    flat = [x.reshape(*x.shape[:2], -1, x.shape[-1]) for x in (q, k, v)]
    cos, sin = cos[:, None], sin[:, None]
    weights = tuple(w.astype(jnp.float32)[None, None] for w in (q_weight, k_weight))
    return _fused(*flat, weights, (cos, sin), interpret).reshape(q.shape)


def attend_fused(q, k, v, q_weight, k_weight, rotary, axes):
    """`fused_attention` on every device's own part; axes: logical names of the arrays' axes [b, t, v, n, k·e], of which t is whole."""
    if jax.sharding.get_abstract_mesh().empty:
        return fused_attention(q, k, v, q_weight, k_weight, rotary)
    partition, whole = spec(*axes), P()
    # Not checked for replication: the kernel's outputs carry none of the types that the check reads.
    local = jax.shard_map(
        fused_attention, in_specs=(*(partition,) * 3, whole, whole, (whole, whole)), out_specs=partition, check_vma=False
    )  # fmt: skip
    return local(q, k, v, q_weight, k_weight, rotary)
