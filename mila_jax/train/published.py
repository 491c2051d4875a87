"""Starting from published STDiT3 weights (Open-Sora 1.2): the base model's parameters, with MiLA's new modules at their start.

The new embeddings end in layers that start at zero, and spatial attention over all views is the base model's attention with more tokens: on
one view the first step computes exactly what the base model does.
"""

import pathlib

from safetensors import SafetensorError, safe_open

from mila_jax.errors import UserError
from mila_jax.model import stdit3_weights
from mila_jax.model.weight_files import local_file

MARK = "x_embedder.proj.weight"


def is_published(path) -> bool:
    """Whether the file holds a state dict of published names. Raises `UserError` if it cannot be read."""
    if pathlib.Path(path).suffix != ".safetensors":
        return pathlib.Path(path).suffix in (".pt", ".pth", ".bin")
    path = local_file(path)
    if not path.exists():
        return False  # whoever loads it says so
    try:
        with safe_open(path, framework="numpy") as f:
            return MARK in f.keys()
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({error}); get it again") from None


def read_state_dict(path) -> dict:
    """Name → array of a .safetensors, .pt or .pth file; nothing in it is executed."""
    path = local_file(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; set train.init_from to a file of published weights")
    if path.suffix == ".safetensors":
        with safe_open(path, framework="numpy") as f:
            return {k: f.get_tensor(k) for k in f.keys()}
    from mila_jax.evaluate.torch_files import read_torch_file

    return read_torch_file(path)


def published_parameters(path, config, seed: int):
    """The parameter tree of a `DiT(config)` with the file's values; the new modules are drawn from `seed`.

    Raises `UserError` with the names of tensors that are missing, misshapen or unknown.
    """
    _, params = stdit3_weights.create(config, seed)
    return stdit3_weights.load(params, config, read_state_dict(path), source=str(path))
