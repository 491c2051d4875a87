"""LayerNorm and RMSNorm with gradients written for accelerators (one CPU has others, `mila_jax.model.cpu_gradients`).

A norm costs what its arrays take to go through memory, so passes over them are what counts. Automatic differentiation of the mean and of
the variance asks for one more than the closed form of the gradient, and recomputation for the backward pass one more to find statistics
again that take a thousandth of the memory: they bear a name (`remat.STATISTICS`) by which they are kept.
"""

import jax
import jax.numpy as jnp

from mila_jax.model import cpu_gradients
from mila_jax.model.cpu_gradients import gradient_on_cpu
from mila_jax.model.remat import STATISTICS, keep

EPSILON = 1e-6


def _statistics(x):
    """Mean and inverse deviation of x [..., d] over its last axis: two arrays [...] in float32."""
    y = x.astype(jnp.float32)
    mean = y.mean(-1)
    # Of an array in bfloat16, whose own rounding is a thousand times coarser, both come in one pass.
    variance = jnp.maximum((y * y).mean(-1) - mean * mean, 0.0) if x.dtype == jnp.bfloat16 else jnp.square(y - mean[..., None]).mean(-1)
    return mean, jax.lax.rsqrt(variance + EPSILON)


def _normal(x, mean, inverse):
    return (x.astype(jnp.float32) - mean[..., None]) * inverse[..., None]


def layer_norm(x):
    """LayerNorm over the last axis without affine parameters; statistics in float32, result in the type of x."""
    return _normal(x, *_statistics(x)).astype(x.dtype)


@jax.custom_vjp
def _modulated(x, shift, scale):
    return layer_norm(x) * (1 + scale) + shift


def _modulated_forward(x, shift, scale):
    mean, inverse = (keep(s, STATISTICS) for s in _statistics(x))
    return _normal(x, mean, inverse).astype(x.dtype) * (1 + scale) + shift, (x, mean, inverse, scale)


def _modulated_backward(residuals, g):
    x, mean, inverse, scale = residuals
    norm, wide = _normal(x, mean, inverse), g.astype(jnp.float32)
    weighted = wide * (1 + scale.astype(jnp.float32))
    along = (weighted * norm).mean(-1, keepdims=True)
    dx = inverse[..., None] * (weighted - weighted.mean(-1, keepdims=True) - norm * along)
    return dx.astype(x.dtype), wide.sum(-2, keepdims=True).astype(scale.dtype), (wide * norm).sum(-2, keepdims=True).astype(scale.dtype)


_modulated.defvjp(_modulated_forward, _modulated_backward)


@gradient_on_cpu(cpu_gradients.modulated_norm)
def modulated_norm(x, shift, scale):
    """`layer_norm` of x [..., n, d], times 1 + scale, plus shift (both [..., 1, d])."""
    return _modulated(x, shift, scale)


def _inverse(x):
    return jax.lax.rsqrt(jnp.square(x.astype(jnp.float32)).mean(-1) + EPSILON)


@jax.custom_vjp
def _rms(x, weight):
    return (x.astype(jnp.float32) * _inverse(x)[..., None] * weight).astype(x.dtype)


def _rms_forward(x, weight):
    inverse = keep(_inverse(x), STATISTICS)
    return (x.astype(jnp.float32) * inverse[..., None] * weight).astype(x.dtype), (x, inverse, weight)


def _rms_backward(residuals, g):
    x, inverse, weight = residuals
    norm, wide = x.astype(jnp.float32) * inverse[..., None], g.astype(jnp.float32)
    weighted = wide * weight
    dx = inverse[..., None] * (weighted - norm * (weighted * norm).mean(-1, keepdims=True))
    return dx.astype(x.dtype), (wide * norm).sum(range(x.ndim - 1))


_rms.defvjp(_rms_forward, _rms_backward)


@gradient_on_cpu(cpu_gradients.rms_norm)
def rms_norm(x, weight):
    """RMSNorm over the last axis in float32 with weight [e]; result in the type of x."""
    return _rms(x, weight)
