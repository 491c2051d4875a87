"""Softmax attention with a gradient of its own, for CPUs: every product reads the large weights as they lie in memory.

Left to automatic differentiation, XLA's CPU compiler splits the forward softmax (its parts are wanted again) and makes
transposed copies of the weights for the gradients of keys and values. Here those two are products whose result is transposed
instead, which is small.
"""

import jax
import jax.numpy as jnp
import numpy as np


def _dot(a, b, a_axes, b_axes, batch: int):
    """Product of a and b over the given axes, result in float32 with a's other axes before b's; `batch` leading axes are common."""
    common = tuple(range(batch))
    # The CPU has no product of bfloat16 arrays with a float32 result; of the same numbers in float32 it is the same.
    return jax.lax.dot_general(a.astype(jnp.float32), b.astype(jnp.float32), ((a_axes, b_axes), (common, common)))


@jax.custom_vjp
def softmax_attention(q, k, v, mask):
    """softmax(q · k) v, softmax in float32; scaling of q is the caller's.

    q: [*batch, *queries, e], k and v: [*batch, s, e], mask: [*batch, *queries, s] bool (True = may be seen; broadcastable) or None.
    Returns [*batch, *queries, e] in the type of v.
    """
    return _forward(q, k, v, mask)[0]


def _forward(q, k, v, mask):
    batch, last = k.ndim - 2, q.ndim - 1
    scores = _dot(q, k, (last,), (k.ndim - 1,), batch)
    if mask is not None:
        # Added, not selected: the compiler then keeps product and softmax in one piece.
        scores += jnp.where(mask, 0.0, -1e30)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    # The sum divides the result, a head's few elements, and not the weights, of which there is one for each key.
    inverse = 1 / weights.sum(-1, keepdims=True)
    weights = weights.astype(v.dtype)
    y = (_dot(weights, v, (last,), (k.ndim - 2,), batch) * inverse).astype(v.dtype)
    return y, (q, k, v, weights, inverse, y)


def _backward(saved, g):
    q, k, v, weights, inverse, y = saved
    batch, last = k.ndim - 2, q.ndim - 1
    queries = tuple(range(batch, last))
    g = g.astype(jnp.float32) * inverse
    dv = _dot(g, weights, queries, queries, batch)  # [*batch, e, s]
    inner = jnp.sum(g * y, -1, keepdims=True)
    ds = (weights * (_dot(g, v, (last,), (k.ndim - 1,), batch) - inner)).astype(q.dtype)
    dq = _dot(ds, k, (last,), (k.ndim - 2,), batch)
    dk = _dot(q, ds, queries, queries, batch)  # [*batch, e, s]
    return dq.astype(q.dtype), jnp.swapaxes(dk, -2, -1).astype(k.dtype), jnp.swapaxes(dv, -2, -1).astype(v.dtype), None


softmax_attention.defvjp(_forward, _backward)


TOKENS = 64  # of one product


def short_attention(q, k, v):
    """The same over few tokens at many places: q, k and v [..., places, t, k, e], attention over t. Returns an array of that shape.

    A product of its own for every place and head takes far longer to start than to compute. Some places share one, as many as
    make about `TOKENS` tokens, under a mask by which none sees another's.
    """
    places, t = q.shape[-4:-2]
    together = max(n for n in range(1, max(TOKENS // t, 1) + 1) if places % n == 0)
    shape = q.shape[:-4] + (places // together, together * t) + q.shape[-2:]
    q, k, v = (jnp.swapaxes(y.reshape(shape), -3, -2) for y in (q, k, v))
    place = np.arange(together * t) // t
    y = softmax_attention(q, k, v, place[:, None] == place if together > 1 else None)
    return jnp.swapaxes(y, -3, -2).reshape(*shape[:-4], places, t, *shape[-2:])
