"""Parity of the temporal autoencoder with published outputs; the weights in the file go through the loader for published ones.

File keys, all arrays [n, c, t, h, w]: `w/<published tensor name>`; `T<t>/in` with `T<t>/mean`, `/logvar`, and `/dec` = the decoded mean;
`pipe<t>/in` with `pipe<t>/z` = normalised latents in chunks, and `/dec` = those decoded. `config_json`: num_groups, shift, scale.
"""

import json
import re
from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx

from mila_jax.errors import UserError
from mila_jax.model.temporal_autoencoder import (
    CHUNK, SCALE, SHIFT, TemporalCodec, abstract_temporal, infer_temporal_config, temporal_from_published,
)  # fmt: skip

TOLERANCE = 1e-4


def matches(keys) -> bool:
    """Whether a file with these keys is one of this format."""
    return {"w/encoder.conv_in.conv.weight", "w/decoder.conv_out.conv.weight"} <= set(keys)


def _last(x) -> np.ndarray:
    return np.moveaxis(np.asarray(x, np.float32), 1, -1)


def check(npz: Mapping[str, np.ndarray]) -> list[tuple[str, float, float]]:
    """(output name, largest absolute error, tolerance) for each output; UserError on wrong tensors or no outputs."""
    tensors = {key[2:]: npz[key] for key in npz if key.startswith("w/")}
    published = json.loads(str(npz["config_json"])) if "config_json" in npz else {}
    config = infer_temporal_config(tensors, published)
    params = temporal_from_published(tensors, config)
    codec = TemporalCodec(
        config, params, int(published.get("micro_frame_size", CHUNK)), tuple(published.get("shift", SHIFT)), tuple(published.get("scale", SCALE))
    )
    graphdef = abstract_temporal(config)[0]
    encode = jax.jit(lambda p, x: nnx.merge(graphdef, p).encode(x))
    decode = jax.jit(lambda p, z, frames: nnx.merge(graphdef, p).decode(z, frames), static_argnums=2)
    outputs = {}
    with jax.default_matmul_precision("highest"):
        for case in sorted({key.split("/")[0] for key in npz if re.fullmatch(r"(T|pipe)\d+/in", key)}):
            x = _last(npz[f"{case}/in"])
            if case.startswith("T"):
                outputs[f"{case}/mean"], outputs[f"{case}/logvar"] = encode(params, x)
                if f"{case}/mean" in npz:
                    outputs[f"{case}/dec"] = decode(params, _last(npz[f"{case}/mean"]), x.shape[1])
            else:
                outputs[f"{case}/z"] = jax.jit(codec.encode)(x)
                if f"{case}/z" in npz:
                    outputs[f"{case}/dec"] = jax.jit(codec.decode, static_argnums=1)(_last(npz[f"{case}/z"]), x.shape[1])
    rows = []
    for name, output in outputs.items():
        if name in npz:
            expected = _last(npz[name])
            if output.shape != expected.shape:
                raise UserError(f"{name} has shape {expected.shape} (channels last), the temporal autoencoder gives {output.shape}")
            rows.append((name, float(np.abs(np.asarray(output) - expected).max()), TOLERANCE))
    if not rows:
        raise UserError("temporal autoencoder file holds no input and output pair: expected T<frames>/in with /mean, or pipe<frames>/in with /z")
    return rows
