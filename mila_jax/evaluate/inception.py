"""Inception-v3 as FID uses it: 2048 features of `pt_inception-2015-12-05-6726825d.pth`.

The file holds the network of the 2015-12-05 TensorFlow graph, which differs from today's Inception-v3 and has to be followed
with its oddities: mean-pooling branches do not count the padding, and the last block (Mixed_7c) pools by maximum. The input is
uint8, resized to 299 with TensorFlow 1's bilinear method and scaled as (x − 128) / 128. `resize="squash"` with x / 127.5 − 1 is
what pytorch-fid (0.3.0) does instead; the two give different values.
Structure checked against pytorch-fid's module (tests/test_evaluate_torch_parity.py).
"""

import jax.numpy as jnp

from mila_jax.evaluate import convolutions
from mila_jax.evaluate.convolutions import Tensors, max_pool, mean_pool
from mila_jax.evaluate.torch_files import check_sha256, read_torch_file

FEATURES = 2048
SIZE = 299
SHA256 = "6726825d"  # the start of it, which the published file's name carries


def build(unit, x):
    """x [n, 299, 299, 3] -> features [n, 2048]. Layer names are those of the file."""

    def branch(x, *layers):
        for name, out, kernel, *rest in layers:
            x = unit(x, name, out, kernel, *rest)
        return x

    def pooled(x, name, out, maximum=False):
        x = max_pool(x, (3, 3), (1, 1)) if maximum else mean_pool(x, (3, 3))
        return unit(x, f"{name}.branch_pool", out, (1, 1))

    def block_a(x, name, pool):
        return jnp.concatenate([
            unit(x, f"{name}.branch1x1", 64, (1, 1)),
            branch(x, (f"{name}.branch5x5_1", 48, (1, 1)), (f"{name}.branch5x5_2", 64, (5, 5))),
            branch(x, *((f"{name}.branch3x3dbl_{i}", out, (k, k)) for i, out, k in ((1, 64, 1), (2, 96, 3), (3, 96, 3)))),
            pooled(x, name, pool),
        ], -1)  # fmt: skip

    def block_c(x, name, c):
        return jnp.concatenate([
            unit(x, f"{name}.branch1x1", 192, (1, 1)),
            branch(x, *((f"{name}.branch7x7_{i}", out, k) for i, out, k in ((1, c, (1, 1)), (2, c, (1, 7)), (3, 192, (7, 1))))),
            branch(x, *((f"{name}.branch7x7dbl_{i}", out, k)
                        for i, out, k in ((1, c, (1, 1)), (2, c, (7, 1)), (3, c, (1, 7)), (4, c, (7, 1)), (5, 192, (1, 7))))),
            pooled(x, name, 192),
        ], -1)  # fmt: skip

    def block_e(x, name, maximum):
        single = unit(x, f"{name}.branch3x3_1", 384, (1, 1))
        double = branch(x, (f"{name}.branch3x3dbl_1", 448, (1, 1)), (f"{name}.branch3x3dbl_2", 384, (3, 3)))
        return jnp.concatenate([
            unit(x, f"{name}.branch1x1", 320, (1, 1)),
            unit(single, f"{name}.branch3x3_2a", 384, (1, 3)), unit(single, f"{name}.branch3x3_2b", 384, (3, 1)),
            unit(double, f"{name}.branch3x3dbl_3a", 384, (1, 3)), unit(double, f"{name}.branch3x3dbl_3b", 384, (3, 1)),
            pooled(x, name, 192, maximum),
        ], -1)  # fmt: skip

    x = unit(x, "Conv2d_1a_3x3", 32, (3, 3), 2, "VALID")
    x = unit(x, "Conv2d_2a_3x3", 32, (3, 3), 1, "VALID")
    x = max_pool(unit(x, "Conv2d_2b_3x3", 64, (3, 3)), (3, 3), (2, 2), "VALID")
    x = unit(x, "Conv2d_3b_1x1", 80, (1, 1))
    x = max_pool(unit(x, "Conv2d_4a_3x3", 192, (3, 3), 1, "VALID"), (3, 3), (2, 2), "VALID")
    x = block_a(block_a(block_a(x, "Mixed_5b", 32), "Mixed_5c", 64), "Mixed_5d", 64)
    x = jnp.concatenate([
        unit(x, "Mixed_6a.branch3x3", 384, (3, 3), 2, "VALID"),
        branch(x, ("Mixed_6a.branch3x3dbl_1", 64, (1, 1)), ("Mixed_6a.branch3x3dbl_2", 96, (3, 3)), ("Mixed_6a.branch3x3dbl_3", 96, (3, 3), 2, "VALID")),
        max_pool(x, (3, 3), (2, 2), "VALID"),
    ], -1)  # fmt: skip
    for name, channels in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        x = block_c(x, name, channels)
    x = jnp.concatenate([
        branch(x, ("Mixed_7a.branch3x3_1", 192, (1, 1)), ("Mixed_7a.branch3x3_2", 320, (3, 3), 2, "VALID")),
        branch(x, ("Mixed_7a.branch7x7x3_1", 192, (1, 1)), ("Mixed_7a.branch7x7x3_2", 192, (1, 7)), ("Mixed_7a.branch7x7x3_3", 192, (7, 1)),
               ("Mixed_7a.branch7x7x3_4", 192, (3, 3), 2, "VALID")),
        max_pool(x, (3, 3), (2, 2), "VALID"),
    ], -1)  # fmt: skip
    return block_e(block_e(x, "Mixed_7b", False), "Mixed_7c", True).mean((1, 2))


def shapes():
    """dict layer name -> kernel shape HWIO."""
    return convolutions.shapes_of(build, (1, SIZE, SIZE, 3))


def load_params(path, check=True):
    """Weights of the FID file, batch norms folded in: dict name -> {kernel, bias}.

    check: refuse files whose SHA-256 is not the published one's. Raises `UserError` naming the file, or the tensor that is missing
    or of another shape.
    """
    if check:
        check_sha256(path, SHA256)
    tensors = Tensors(path, read_torch_file(path))
    return {name: tensors.torch_unit(name, shape, f"{name}.conv", f"{name}.bn") for name, shape in shapes().items()}


def forward(params, x):
    """x: [n, 299, 299, 3], scaled to about −1..1. Returns features [n, 2048]."""
    return convolutions.apply(build, params, x)
