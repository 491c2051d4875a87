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


SCORES, PARTS = 2**16, 16  # of a head, at one time and without a gradient; parts at most


@jax.custom_vjp
def softmax_attention(q, k, v, mask):
    """softmax(q · k) v, softmax in float32; scaling of q is the caller's.

    q: [*batch, n, e], k and v: [*batch, s, e], mask: [*batch, n, s] bool (True = may be seen; broadcastable) or None.
    Returns [*batch, n, e] in the type of v.
    """
    # Some queries at a time: the scores are far larger than all else, and of a few they stay in the processor's cache.
    count = q.shape[-2]
    step = -(-count // min(PARTS, -(-count * k.shape[-2] // SCORES)))
    parts = [slice(start, start + step) for start in range(0, count, step)]
    masks = [mask if mask is None or mask.shape[-2] == 1 else mask[..., part, :] for part in parts]
    y = [_forward(q[..., part, :], k, v, seen)[0] for part, seen in zip(parts, masks)]
    return jnp.concatenate(y, -2) if len(y) > 1 else y[0]


def _forward(q, k, v, mask):
    batch, last = k.ndim - 2, q.ndim - 1
    scores = _dot(q, k, (last,), (last,), batch)
    if mask is not None:
        # Added, not selected: the compiler then keeps product and softmax in one piece.
        scores += jnp.where(mask, 0.0, -1e30)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    # The sum divides the result, a head's few elements, and not the weights, of which there is one for each key.
    inverse = 1 / weights.sum(-1, keepdims=True)
    weights = weights.astype(v.dtype)
    y = (_dot(weights, v, (last,), (last - 1,), batch) * inverse).astype(v.dtype)
    return y, (q, k, v, weights, inverse, y)


def _backward(saved, g):
    q, k, v, weights, inverse, y = saved
    batch, last, queries = k.ndim - 2, q.ndim - 1, (q.ndim - 2,)
    g = g.astype(jnp.float32) * inverse
    dv = _dot(g, weights, queries, queries, batch)  # [*batch, e, s]
    inner = jnp.sum(g * y, -1, keepdims=True)
    ds = (weights * (_dot(g, v, (last,), (last,), batch) - inner)).astype(q.dtype)
    dq = _dot(ds, k, (last,), (last - 1,), batch)
    dk = _dot(q, ds, queries, queries, batch)  # [*batch, e, s]
    return dq.astype(q.dtype), jnp.swapaxes(dk, -2, -1).astype(k.dtype), jnp.swapaxes(dv, -2, -1).astype(v.dtype), None


softmax_attention.defvjp(_forward, _backward)


TOKENS = 24  # of one product


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
