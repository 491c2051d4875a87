"""Published convolutional networks as functions: one function says what a network is, for its weights' shapes and its forward pass.

An architecture is a function `build(unit, x)`, where `unit(x, name, out, kernel, stride=1, padding="SAME")` is a convolution
with its (folded) batch norm. `shapes_of` runs it without numbers and collects the shape of every kernel, so a weight file is
checked tensor by tensor before anything is computed.
"""

import jax
import jax.numpy as jnp
import numpy as np

from mila_jax.errors import UserError

EPSILON = 1e-3  # of the batch norms, in Inception-v3 and in I3D


def _numbers(rank):
    return ("NHWC", "HWIO", "NHWC") if rank == 4 else ("NDHWC", "DHWIO", "NDHWC")


def _convolve(x, kernel, stride, padding):
    # In full float32 on every device: accelerators would round to fewer bits, and scores would differ from one to the other.
    return jax.lax.conv_general_dilated(x, kernel, (stride,) * (x.ndim - 2), padding, dimension_numbers=_numbers(x.ndim), precision="highest")


def shapes_of(build, shape):
    """dict name -> kernel shape (places…, in, out) of `build` on input `shape`."""
    found = {}

    def unit(x, name, out, kernel, stride=1, padding="SAME", active=True):
        found[name] = (*kernel, x.shape[-1], out)
        return _convolve(x, jnp.zeros(found[name]), stride, padding)

    jax.eval_shape(lambda x: build(unit, x), jax.ShapeDtypeStruct(shape, jnp.float32))
    return found


def apply(build, params, x):
    """`build` with params (name -> kernel, bias) on x."""

    def unit(x, name, out, kernel, stride=1, padding="SAME", active=True):
        x = _convolve(x, params[name]["kernel"], stride, padding) + params[name]["bias"]
        return jax.nn.relu(x) if active else x

    return build(unit, x)


def folded(kernel, mean, variance, scale=1.0, shift=0.0):
    """Convolution and batch norm as one: {kernel, bias}, float32; kernel [places…, in, out], the others [out]."""
    scale = np.asarray(scale, np.float64) / np.sqrt(np.asarray(variance, np.float64) + EPSILON)
    bias = np.asarray(shift, np.float64) - np.asarray(mean, np.float64) * scale
    return {"kernel": (kernel * scale).astype(np.float32), "bias": np.broadcast_to(bias, kernel.shape[-1:]).astype(np.float32)}


class Tensors:
    """Tensors of a weight file by name, with errors that name the file, the tensor and both shapes."""

    def __init__(self, path, flat):
        self.path, self.flat = path, flat

    def take(self, name, shape):
        """The tensor of this name and shape as float32."""
        if name not in self.flat:
            raise UserError(f"{self.path}: tensor {name} {tuple(shape)} is missing; this is not the network's weight file")
        found = np.asarray(self.flat[name])
        if found.shape != tuple(shape):
            raise UserError(f"{self.path}: tensor {name} has shape {found.shape}, expected {tuple(shape)}; this is not the network's weight file")
        if found.dtype.kind != "f" or not np.isfinite(found).all():
            raise UserError(f"{self.path}: tensor {name} holds {found.dtype} or NaN, expected finite floating-point numbers; fetch the file again")
        return found.astype(np.float32)

    def torch_unit(self, name, shape, convolution, norm):
        """A convolution and batch norm in PyTorch's layout (out, in, places…), folded; shape as in `shapes_of`."""
        rank = len(shape) - 2
        kernel = self.take(f"{convolution}.weight", (shape[-1], shape[-2], *shape[:-2]))
        kernel = kernel.transpose(*range(2, 2 + rank), 1, 0)
        mean, variance, scale, shift = (self.take(f"{norm}.{part}", shape[-1:]) for part in ("running_mean", "running_var", "weight", "bias"))
        return folded(kernel, mean, variance, scale, shift)


def max_pool(x, window, stride, padding="SAME"):
    """Max pooling over the places of x [n, places…, c]; window and stride: one number per place."""
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, *window, 1), (1, *stride, 1), padding)


def mean_pool(x, window, padding="SAME"):
    """Mean pooling at stride 1 that leaves padding out of the count."""
    ones = jnp.ones((1, *x.shape[1:-1], 1), x.dtype)
    total, count = (jax.lax.reduce_window(y, 0.0, jax.lax.add, (1, *window, 1), (1,) * x.ndim, padding) for y in (x, ones))
    return total / count
