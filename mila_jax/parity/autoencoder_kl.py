"""Parity of `AutoencoderKL` with published outputs: the weights in the file go through the loader for published checkpoints.

File keys: `w/<published tensor name>`, `in/x` [n, 3, H, W] with `out/encoder`, `out/mean`, `out/logvar`, and `in/z` [n, c, h, w]
with `out/dec` (all NCHW, float32), and `config_json` (for norm_num_groups; 32 when absent).
"""

import json
from collections.abc import Iterable, Mapping

import jax
import numpy as np
from flax import nnx

from mila_jax.errors import UserError
from mila_jax.model.autoencoder import abstract_autoencoder
from mila_jax.model.autoencoder_weights import from_published, infer_config

TOLERANCE = 5e-5  # largest absolute difference in float32


def matches(keys: Iterable[str]) -> bool:
    """Whether a file with these keys is an AutoencoderKL golden."""
    return {"w/encoder.conv_in.weight", "w/decoder.conv_in.weight"} <= set(keys)


def check(npz: Mapping[str, np.ndarray]) -> list[tuple[str, float, float]]:
    """(output name, largest absolute error, tolerance) for each output in the file; UserError on wrong tensors or no outputs."""
    tensors = {key[2:]: npz[key] for key in npz if key.startswith("w/")}
    published = json.loads(str(npz["config_json"])) if "config_json" in npz else {}
    config = infer_config(tensors, published)
    graphdef, _ = abstract_autoencoder(config)
    model = nnx.merge(graphdef, from_published(tensors, config))

    outputs = {}
    with jax.default_matmul_precision("highest"):  # accelerators round float32 matmuls to bf16 otherwise
        if "in/x" in npz:
            images = npz["in/x"].transpose(0, 2, 3, 1)
            outputs["encoder"] = jax.jit(model.encoder)(images)  # moments before quant_conv
            outputs["mean"], outputs["logvar"] = jax.jit(model.encode)(images)
        if "in/z" in npz:
            outputs["dec"] = jax.jit(model.decode)(npz["in/z"].transpose(0, 2, 3, 1))
    rows = []
    for name, output in outputs.items():
        if f"out/{name}" not in npz:
            continue
        expected = npz[f"out/{name}"].transpose(0, 2, 3, 1)
        if output.shape != expected.shape:
            raise UserError(f"out/{name} has shape {expected.shape} (channels last), the autoencoder gives {output.shape}")
        rows.append((f"out/{name}", float(np.abs(np.asarray(output) - expected).max()), TOLERANCE))
    if not rows:
        raise UserError("autoencoder golden holds no input and output pair: expected in/x with out/mean or out/encoder, or in/z with out/dec")
    return rows
