"""Gradients written for CPUs, of the small parts of the backbone (`mila_jax.model.layers` uses them; attention has its own file).

XLA's CPU compiler is fast at products of matrices and at chains of element-wise operations, but many times slower at sums of products
that are no products of matrices, and it copies arrays to transpose them. Automatic differentiation makes both. Elsewhere than on one
CPU the parts are differentiated automatically: other compilers, and programs split over a mesh, are better off with that.
"""

import functools
import math

import jax
import jax.numpy as jnp

from mila_jax.model.splash import device_kind


def for_one_cpu() -> bool:
    """Whether the program being traced is for a single CPU device, or for several with samples of their own each (`mesh.data`).

    Split in any other way, as in tests of sharding, programs compile like those for accelerators.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return device_kind() == "cpu" and (mesh.empty or mesh.size == mesh.shape.get("data", 1))


def gradient_on_cpu(backward):
    """Decorator: on one CPU the function's gradient is `backward(arguments, g)` → one gradient for each argument."""

    def decorate(function):
        by_hand = jax.custom_vjp(function)
        by_hand.defvjp(lambda *arguments: (function(*arguments), arguments), backward)

        @functools.wraps(function)
        def call(*arguments):
            return (by_hand if for_one_cpu() else function)(*arguments)

        return call

    return decorate


def sum_tokens(x):
    """Sum over the tokens: [..., n, d] → [..., 1, d]."""
    return jnp.ones(x.shape[:-2] + (1, x.shape[-2]), x.dtype) @ x


def weighted_mean(x, weights):
    """Mean over the width of x [..., n, d] times weights [..., 1, d] → [..., n, 1]."""
    return x @ (jnp.swapaxes(weights, -2, -1) / x.shape[-1])


def product(arguments, g):
    """Of x [..., inputs] @ kernel [inputs, outputs]: the narrower of x and g is copied, transposed, and nothing else."""
    x, kernel = arguments
    tokens = tuple(range(x.ndim - 1))
    wider = kernel.shape[0] <= kernel.shape[1]
    return g @ kernel.T, jnp.tensordot(x, g, (tokens, tokens)) if wider else jnp.tensordot(g, x, (tokens, tokens)).T


def gelu_tanh(arguments, g):
    """Of GELU in its tanh form, in one pass."""
    (x,) = arguments
    a, b = math.sqrt(2 / math.pi), 0.044715
    tanh = jnp.tanh(a * (x + b * x**3))
    return (g * (0.5 * (1 + tanh) + 0.5 * a * x * (1 - tanh * tanh) * (1 + 3 * b * x * x)),)


def modulated_norm(arguments, g):
    """Of LayerNorm(x [..., n, d]) · (1 + scale) + shift, both [..., 1, d]."""
    x, _, scale = (y.astype(jnp.float32) for y in arguments)
    centred = x - x.mean(-1, keepdims=True)
    inverse = jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + 1e-6)
    norm, wide, weights = centred * inverse, g.astype(jnp.float32), 1 + scale
    dscale = wide * norm  # of each token
    dx = inverse * (wide * weights - weighted_mean(wide, weights) - norm * weighted_mean(dscale, weights))
    return dx.astype(g.dtype), sum_tokens(wide).astype(g.dtype), sum_tokens(dscale).astype(g.dtype)


def gated(arguments, g):
    """Of x + gate · y, for x and y [..., n, d] and gate [..., 1, d]."""
    _, gate, y = arguments
    return g, sum_tokens(g.astype(jnp.float32) * y.astype(jnp.float32)).astype(gate.dtype), g * gate


def rms_norm(arguments, g):
    """Of RMSNorm of x over its last axis, times weight [e]."""
    x, weight = arguments
    wide, y = g.astype(jnp.float32), x.astype(jnp.float32)
    inverse = jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + 1e-6)
    norm = y * inverse
    dweight = wide * norm  # of each token
    dx = inverse * (wide * weight - norm * weighted_mean(dweight, weight[None]))
    return dx.astype(x.dtype), sum_tokens(dweight.reshape(-1, len(weight)))[0]


def rotate_apart(arguments, g):
    """Of pairs of x [..., t, k, e] turned by tables [..., t, e/2]: turned back. The tables are no parameters."""
    _, cos, sin = arguments
    first, second = jnp.split(g.astype(jnp.float32), 2, -1)
    cos, sin = cos[..., :, None, :], sin[..., :, None, :]
    return jnp.concatenate([first * cos + second * sin, second * cos - first * sin], -1).astype(g.dtype), None, None
