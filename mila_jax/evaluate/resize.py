"""The ways in which published scorers bring pictures to the size of their network. They differ, and scores with them.

All work on float [n, H, W, c] in 0..255 and are two small matrix products, so they compile everywhere.
"""

import jax.numpy as jnp
import numpy as np

from mila_jax.errors import UserError


def _weights(length, out, half_pixel):
    """Bilinear weights [out, length] without anti-aliasing."""
    place = np.arange(out) * (length / out)
    if half_pixel:
        place = np.maximum((np.arange(out) + 0.5) * (length / out) - 0.5, 0)
    low = np.minimum(np.floor(place).astype(int), length - 1)
    high = np.minimum(low + 1, length - 1)
    share = np.clip(place - low, 0, 1)
    matrix = np.zeros((out, length), np.float32)
    np.add.at(matrix, (np.arange(out), low), 1 - share)
    np.add.at(matrix, (np.arange(out), high), share)
    return matrix


def _bilinear(x, height, width, half_pixel):
    rows, columns = (jnp.asarray(_weights(*pair, half_pixel)) for pair in ((x.shape[1], height), (x.shape[2], width)))
    return jnp.einsum("oh,nhwc,pw->nopc", rows, x, columns, precision="highest")


def bilinear(x, height, width):
    """PyTorch's bilinear interpolation (align_corners=False, no anti-aliasing)."""
    return _bilinear(x, height, width, half_pixel=True)


def cubic_weights(length, out, ratio=None):
    """Weights [out, length] of PyTorch's bicubic interpolation (a = -0.75, edges repeated); ratio: places of the input for one of the output."""
    ratio = length / out if ratio is None else ratio
    place = (np.arange(out) + 0.5) * ratio - 0.5
    low = np.floor(place).astype(int)
    matrix = np.zeros((out, length), np.float32)
    for offset in range(-1, 3):
        d = np.abs(place - (low + offset))
        near, far = 1.25 * d**3 - 2.25 * d**2 + 1, -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
        np.add.at(matrix, (np.arange(out), np.clip(low + offset, 0, length - 1)), np.where(d <= 1, near, far))
    return matrix


def bicubic(x, height, width):
    """PyTorch's bicubic interpolation (align_corners=False, no anti-aliasing); values may leave their range."""
    rows, columns = (jnp.asarray(cubic_weights(*pair)) for pair in ((x.shape[1], height), (x.shape[2], width)))
    return jnp.einsum("oh,nhwc,pw->nopc", rows, x, columns, precision="highest")


def short_side(shape, size):
    """(height, width) with the short side of `size` and the long one in proportion, rounded down as torchvision does."""
    short = min(shape)
    return tuple(size if n == short else int(size * n / short) for n in shape)


def tf1(x, size):
    """TensorFlow 1's resize_bilinear (corners not aligned, no half pixels), to a square: the original FID and FVD."""
    return _bilinear(x, size, size, half_pixel=False)


def squash(x, size):
    """PyTorch's bilinear interpolation (align_corners=False, no anti-aliasing), to a square."""
    return _bilinear(x, size, size, half_pixel=True)


def crop(x, size):
    """The short side to `size` as in `squash`, the long one in proportion (rounded up), then the centre square."""
    short = min(x.shape[1:3])
    height, width = (size if n == short else int(np.ceil(n * size / short)) for n in x.shape[1:3])
    x = _bilinear(x, height, width, half_pixel=True)
    top, left = (height - size) // 2, (width - size) // 2
    return x[:, top : top + size, left : left + size]


METHODS = {"tf1": tf1, "squash": squash, "crop": crop}


def method(name):
    """The function of that name; `UserError` with the known names otherwise."""
    if name not in METHODS:
        raise UserError(f"unknown resize {name!r}; known: {', '.join(METHODS)}")
    return METHODS[name]
