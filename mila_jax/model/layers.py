"""The small parts of the backbone: parameters, linear layers, norms, tables.

Letters used in all of `mila_jax.model`: b batch, v view, t frame, h w latent grid, n tokens of one view of one frame, d width,
k heads, e head width, l text tokens. Tables (rotary, position, time) are computed in float32 whatever the compute type: in
bfloat16 neighbouring time steps and positions collide.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mila_jax.model import cpu_gradients
from mila_jax.model.cpu_gradients import gradient_on_cpu
from mila_jax.model.remat import HIDDEN, keep
from mila_jax.parallel.logical import constrain


def xavier(key, shape):
    """Glorot-uniform for a matrix [fan_in, fan_out], as the published model initialises every linear layer."""
    limit = math.sqrt(6 / (shape[0] + shape[1]))
    return jax.random.uniform(key, shape, jnp.float32, -limit, limit)


def normal(std):
    """Normal initialiser with standard deviation `std`."""
    return lambda key, shape: std * jax.random.normal(key, shape, jnp.float32)


def zeros(key, shape):
    """Zero initialiser (the layer starts as if it were not there)."""
    del key
    return jnp.zeros(shape, jnp.float32)


def ones(key, shape):
    """One initialiser."""
    del key
    return jnp.ones(shape, jnp.float32)


def parameter(rngs: nnx.Rngs, shape, init, axes, matrix_shape=None):
    """One float32 parameter with its logical axes: the single place where shape, init and axes meet.

    `matrix_shape`: the 2-D shape that `init` sees, where fan-in and fan-out are not those of the stored shape (fused qkv).
    """
    if len(axes) != len(shape):
        raise ValueError(f"parameter of shape {shape} needs as many logical axes, got {axes}")
    value = init(rngs.params(), matrix_shape or shape).reshape(shape)
    return nnx.Param(value, out_sharding=axes)


@gradient_on_cpu(cpu_gradients.product)
def product(x, kernel):
    """x [..., inputs] times kernel [inputs, outputs]."""
    return x @ kernel


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product_of_kept(x, kernel, name):
    return product(x, kernel)


_product_of_kept.defvjp(
    lambda x, kernel, name: (product(x, kernel), (keep(x, name), kernel)), lambda name, kept, g: jax.vjp(product, *kept)[1](g)
)  # fmt: skip


class Linear(nnx.Module):
    """y = x W + b with W [inputs, outputs]; computes in the type of x."""

    def __init__(self, inputs: int, outputs: int, axes, *, rngs: nnx.Rngs, init=xavier):
        self.kernel = parameter(rngs, (inputs, outputs), init, axes)
        self.bias = parameter(rngs, (outputs,), zeros, axes[1:])

    def __call__(self, x):
        return product(x, self.kernel[...].astype(x.dtype)) + self.bias[...].astype(x.dtype)

    def of_kept(self, x, name: str):
        """The same of an x that bears a name for the policies of `remat`, for the gradient of the kernel only.

        A value that is named on its way through the program gets a rounding to its own type, so that it is the same where it is kept and
        where it is not. Of the result of a kernel that would be a pass of its own over memory.
        """
        return _product_of_kept(x, self.kernel[...].astype(x.dtype), name) + self.bias[...].astype(x.dtype)

    def of_heads(self, x):
        """The same of x [..., k, e] with inputs = k·e, whose last axes are not merged: on a TPU that would copy it."""
        kernel = self.kernel[...].astype(x.dtype).reshape(*x.shape[-2:], -1)
        return jnp.einsum("...ke,ked->...d", x, kernel) + self.bias[...].astype(x.dtype)


class MLP(nnx.Module):
    """Linear → activation → Linear. `feature_axis`: the logical axis of the inputs; None for features that are not the width's."""

    def __init__(
        self, inputs: int, hidden: int, outputs: int, *, rngs: nnx.Rngs, activation=nnx.silu, first=xavier, last=xavier, feature_axis=None
    ):  # fmt: skip
        self.fc1 = Linear(inputs, hidden, (feature_axis, "mlp"), rngs=rngs, init=first)
        self.fc2 = Linear(hidden, outputs, ("mlp", "embed"), rngs=rngs, init=last)
        self.activation = activation

    def __call__(self, x, axes=None):
        """x [..., inputs] → [..., outputs]; axes: logical axes of x, to state how the hidden layer is split (None: not stated)."""
        hidden = self.fc1(x)
        if axes is not None:
            hidden = keep(constrain(hidden, *axes[:-1], "mlp"), HIDDEN)
        return self.fc2(self.activation(hidden))


@gradient_on_cpu(cpu_gradients.gelu_tanh)
def gelu_tanh(x):
    """GELU in its tanh form (the published MLP's)."""
    return jax.nn.gelu(x, approximate=True)


@gradient_on_cpu(cpu_gradients.gated)
def gated(x, gate, y):
    """x + gate · y, for x and y [..., n, d] and gate [..., 1, d]."""
    return x + gate * y


def time_table(t, width: int = 256):
    """Sinusoidal embedding, cosines first: t [...] → [..., width] (Open-Sora, blocks.py TimestepEmbedder)."""
    half = width // 2
    frequencies = jnp.exp(-math.log(1e4) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


def position_table(rows: int, columns: int, width: int, image_size, base_size: int):
    """2-D sine-cosine table [rows·columns, width]: the first half of the channels encodes the column, the second the row.

    image_size: (height, width) in pixels and base_size: the resolution at which positions count 0, 1, 2, …, both as in
    Open-Sora's PositionEmbedding2D.
    """
    base = round(math.sqrt(rows * columns))
    scale = math.sqrt(image_size[0] * image_size[1]) / base_size
    inverse = 1e4 ** (-2 * np.arange(width // 4, dtype=np.float32) / (width // 2))

    def encode(count):  # by NumPy: in the program, a compiler may compute sines again for every token that they are added to
        angles = (np.arange(count, dtype=np.float32) / scale * (base / count))[:, None] * inverse
        return jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], -1), jnp.float32)

    row, column = encode(rows), encode(columns)
    table = jnp.concatenate(
        [jnp.broadcast_to(column[None], (rows, columns, width // 2)), jnp.broadcast_to(row[:, None], (rows, columns, width // 2))], -1
    )
    return table.reshape(rows * columns, width)


def rotary_tables(frames: int, head_width: int):
    """Cosine and sine [frames, head_width / 2] of the frame index, theta 1e4 (frame rate is told by the fps embedding)."""
    inverse = 1e4 ** (-2 * np.arange(head_width // 2, dtype=np.float32) / head_width)
    angles = np.arange(frames, dtype=np.float32)[:, None] * inverse
    return jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)


def ray_rotary_tables(rays, columns: int, head_width: int):
    """Cosine and sine [..., head_width / 2] of viewing directions rays [..., 3] in the ego frame.

    Ours, for attention over all views: patches that look the same way are alike whichever camera they are of. Two thirds of the
    pairs turn with the azimuth, in whole numbers so that the ring closes, the others with the elevation. The fastest turns by
    about half a circle from one of a view's `columns` patches to the next (a camera of 70°).
    """
    pairs = head_width // 2
    fastest = math.pi * columns / math.radians(70)
    around, upward = pairs - pairs // 3, pairs // 3
    whole = jnp.round(fastest ** (jnp.arange(around) / max(around - 1, 1)))
    rising = 2 * (fastest / 2) ** (jnp.arange(upward) / max(upward - 1, 1))
    azimuth = jnp.arctan2(rays[..., 1], rays[..., 0])
    elevation = jnp.arctan2(rays[..., 2], jnp.sqrt(jnp.square(rays[..., :2]).sum(-1)))
    angles = jnp.concatenate([azimuth[..., None] * whole, elevation[..., None] * rising], -1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x, tables):
    """Rotary embedding of x [..., t, k, e] by interleaved pairs (x₀x₁)(x₂x₃)…; tables [..., t, e/2], e.g. from `rotary_tables`.

    The partner of each element comes by a matrix of 0 and ±1, which is exact: taking pairs apart and together again makes the TPU
    compiler copy the whole array in float32, with its last axis of two filled up to 128. Its precision tells it from the product of
    a linear layer, so that no `model.remat` keeps it (mila_jax/model/remat.py).
    """
    cos, sin = (jnp.repeat(table, 2, -1)[..., :, None, :] for table in tables)  # [..., t, 1, e]
    width = x.shape[-1]
    partner = np.zeros((width, width), np.float32)
    partner[np.arange(1, width, 2), np.arange(0, width, 2)] = -1
    partner[np.arange(0, width, 2), np.arange(1, width, 2)] = 1
    turned = jnp.matmul(x, jnp.asarray(partner, x.dtype), precision="highest", preferred_element_type=jnp.float32)
    return (x.astype(jnp.float32) * cos + turned * sin).astype(x.dtype)


def pairs_apart(x):
    """Elements x₀x₁x₂x₃… of the last axis → x₀x₂…x₁x₃…: first of all pairs the first, then the second."""
    return jnp.swapaxes(x.reshape(x.shape[:-1] + (-1, 2)), -2, -1).reshape(x.shape)


@gradient_on_cpu(cpu_gradients.rotate_apart)
def rotate_apart(x, cos, sin):
    """`rotate` for pairs set apart, x [..., t, k, e] by tables [..., t, e/2]: a CPU computes with long rows, not with neighbours."""
    first, second = jnp.split(x.astype(jnp.float32), 2, -1)
    cos, sin = cos[..., :, None, :], sin[..., :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1).astype(x.dtype)


def fourier(x, longest: float, shortest: float, bands: int):
    """Fourier features of each scalar of x [..., m] → [..., m·(2·bands+1)] (the paper's eq. (1)).

    Periods fall geometrically from `longest` to `shortest`, in the unit of x; x / longest itself is kept beside them.
    """
    periods = longest * (shortest / longest) ** (jnp.arange(bands, dtype=jnp.float32) / max(bands - 1, 1))
    x = x.astype(jnp.float32)
    angles = 2 * math.pi * x[..., None] / periods
    features = jnp.concatenate([x[..., None] / longest, jnp.sin(angles), jnp.cos(angles)], -1)
    return features.reshape(x.shape[:-1] + (-1,))


def rotation_matrix(quaternion):
    """Unit quaternions [..., 4] (w first) to rotation matrices [..., 3, 3]; the same for q and -q."""
    w, x, y, z = jnp.moveaxis(quaternion, -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return jnp.stack([jnp.stack(row, -1) for row in rows], -2)
