"""A trained world model as one safetensors file: parameters in half precision and everything needed to use them.

The header holds (as JSON) the config, the latents' shape, the text encoder and the autoencoder's hash, so that a file answers by
itself whether it fits a data set. Loading executes nothing.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib

import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mila_jax.errors import UserError
from mila_jax.model.dit import DiTConfig
from mila_jax.model.network import dit_config, make_velocity
from mila_jax.model.precondition import Prior
from mila_jax.model.stdit3_weights import abstract_model
from mila_jax.model.weight_files import local_file

_FOLDER = pathlib.Path(__file__).parents[1] / "weights"
SHIPPED = _FOLDER / "mila_tiny.safetensors"
SHIPPED_GUIDE = _FOLDER / "mila_tiny_guide.safetensors"  # a weaker model for its autoguidance


@dataclasses.dataclass(frozen=True)
class WorldModel:
    """config: the run's ConfigDict; dit: sizes; graphdef and params: the network; prior: of a preconditioned network, else None; data: what the
    training data said of itself (latent_shape, text_encoder, autoencoder hash, …); card: how it was trained; guide: a weaker model that
    generation is to keep away from (`flow.guidance.autoguided`), which is in no file with it, or None."""

    config: ml_collections.ConfigDict
    dit: DiTConfig
    graphdef: object
    params: nnx.State
    prior: Prior | None
    data: dict
    card: dict
    sha256: str
    guide: "WorldModel | None" = None

    @property
    def velocity(self):
        """`velocity(latents, levels, conditions)` with the stored parameters."""
        return make_velocity(self.graphdef, self.params, self.dit, self.prior)


def model_config(config, data: dict) -> DiTConfig:
    """Sizes of the network for a config and a data description (`latent_shape`, `image_size`, `text_shape`)."""
    length, width = data["text_shape"]
    return dit_config(config.model, data["latent_shape"][-1], data["image_size"], width, length, config.get("attention"))


def save_model(path, params: nnx.State, config, data: dict, prior: Prior | None, card: dict) -> None:
    """Writes the file atomically; parameters as float16. `card`: plain values on how the weights were made."""
    path = pathlib.Path(path)
    tensors = {"parameters." + ".".join(map(str, k)): np.asarray(v[...], np.float16) for k, v in nnx.to_flat_state(params)}
    if prior is not None:
        tensors |= {f"prior.{name}": np.asarray(value, np.float32) for name, value in prior._asdict().items()}
    header = {"format": "mila_jax.world_model.1", "config": config.to_json(), "data": json.dumps(data), "card": json.dumps(card)}
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, metadata=header)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):  # what is left of it would keep a full disk full
            partial.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({getattr(error, 'strerror', None) or error}); choose a writable folder with room") from None


def load_model(path) -> WorldModel:
    """Reads a file of `save_model`, also from a bucket (gs://…). Raises `UserError` naming the file, or the tensor that is missing or misshapen."""
    path = local_file(path)
    header, tensors = _read(path, lambda f: {k: f.get_tensor(k) for k in f.keys()})
    config = ml_collections.ConfigDict(json.loads(header["config"]))
    data = json.loads(header["data"])
    dit = model_config(config, data)
    graphdef, params = abstract_model(dit)
    prior = {name: tensors.pop(f"prior.{name}", None) for name in Prior._fields}
    prior = None if prior["weights"] is None else Prior(**prior)
    loaded = {k.removeprefix("parameters."): v for k, v in tensors.items()}
    params = merge_parameters(params, loaded, source=str(path))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return WorldModel(config, dit, graphdef, params, prior, data, json.loads(header["card"]), digest)


def read_header(path) -> tuple[ml_collections.ConfigDict, dict]:
    """(config, data) of the file, its parameters unread; see `WorldModel`. Raises `UserError` as `load_model` does."""
    header, _ = _read(local_file(path), lambda f: None)
    return ml_collections.ConfigDict(json.loads(header["config"])), json.loads(header["data"])


def read_card(path) -> dict:
    """How the weights of the file were made, see `WorldModel`: nothing else is read or computed. Raises `UserError` as `load_model` does."""
    header, _ = _read(local_file(path), lambda f: None)
    return json.loads(header["card"])


def _read(path: pathlib.Path, take):
    """(header, what `take` makes of the open file)."""
    if not path.exists():
        raise UserError(f"{path} does not exist; give the .safetensors file of a trained model")
    try:
        with safe_open(path, framework="numpy") as f:
            header, found = f.metadata() or {}, take(f)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({error}); get it again") from None
    if not header.get("format", "").startswith("mila_jax.world_model."):
        raise UserError(f"{path} is not a mila_jax world model; `mila train` writes model.safetensors")
    return header, found


def merge_parameters(params: nnx.State, arrays: dict, *, source: str) -> nnx.State:
    """`params` with the values of `arrays` (dotted names). Raises `UserError` with the names that are missing, extra or misshapen."""
    flat = {".".join(map(str, k)): (k, v) for k, v in nnx.to_flat_state(params)}
    wrong = sorted(set(flat) ^ set(arrays)) + [n for n in set(flat) & set(arrays) if flat[n][1].shape != arrays[n].shape]
    if wrong:
        raise UserError(f"{source} does not fit the model: missing, unknown or misshapen {', '.join(wrong[:8])} ({len(wrong)} in all)")
    return nnx.from_flat_state({k: v.replace(jnp.asarray(arrays[n], jnp.float32)) for n, (k, v) in flat.items()})
