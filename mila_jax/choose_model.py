"""Which model a config asks for: the weights files of its section `generate`, read."""

import dataclasses
import pathlib

from data_pipeline.storage import is_remote
from mila_jax.errors import UserError
from mila_jax.model.weight_files import local_file
from mila_jax.model.weights import SHIPPED, SHIPPED_GUIDE, WorldModel, load_model


def weights_file(weights) -> pathlib.Path:
    """The weights file that a setting names: a file, or a training folder's; either also in a bucket (gs://…), from which it is fetched."""
    if is_remote(weights):
        return local_file(weights if str(weights).endswith(".safetensors") else f"{str(weights).rstrip('/')}/model.safetensors")
    path = pathlib.Path(weights)
    return path / "model.safetensors" if path.is_dir() else path


def find_weights(config) -> pathlib.Path:
    """The weights file of `generate.weights`; unset: the shipped one."""
    return weights_file(config.generate.weights or SHIPPED)


def find_guide(config) -> pathlib.Path | None:
    """The weights file of `generate.guide`; unset: the shipped one for the shipped weights, None for others. None, too, with a
    `generate.guidance_model` of 1."""
    g = config.generate
    if g.get("guidance_model", 1.0) == 1:
        return None
    if g.get("guide"):
        return weights_file(g.guide)
    shipped = not g.weights or not is_remote(g.weights) and pathlib.Path(g.weights).resolve() == SHIPPED.resolve()
    return SHIPPED_GUIDE if shipped else None


def load_chosen(config) -> WorldModel:
    """The model that `generate.weights` names, with the guide that `generate.guide` names.

    Raises `UserError` naming the key and the file that cannot be read, or what the guide has not in common with the model.
    """
    model, guide = _load("generate.weights", find_weights(config)), find_guide(config)
    return model if guide is None else with_guide(model, _load("generate.guide", guide), str(config.generate.get("guide") or guide))


def _load(key: str, path: pathlib.Path) -> WorldModel:
    try:
        return load_model(path)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def signature(model: WorldModel, generate) -> str:
    """What made a video, in one word: the hash of the weights, and of a guide's with its scale."""
    return model.sha256 if model.guide is None else f"{model.sha256}+{model.guide.sha256}@{generate.guidance_model:g}"


DESCRIBED = ("autoencoder_sha256", "latent_shape", "temporal", "temporal_sha256", "text_encoder", "text_shape", "text_sha256")


def unlike(data: dict, other: dict) -> str | None:
    """The first key of `DESCRIBED` in which two descriptions of data (`WorldModel.data`) differ, or None."""
    for key in DESCRIBED:
        mine, theirs = data.get(key), other.get(key)
        # A text encoder without weights of its own has no hash, nor have descriptions of before it was written down.
        if mine != theirs and not (key == "text_sha256" and None in (mine, theirs)):
            return key
    return None


def with_guide(model: WorldModel, guide: WorldModel, name: str) -> WorldModel:
    """`model` with a guide, which may have other sizes, but has to be for the same latents and text. Raises `UserError` otherwise."""
    ours, theirs = ({"temporal": "none"} | each.data for each in (model, guide))
    if key := unlike(ours, theirs):
        raise UserError(
            f"{name} was trained with {key} {theirs.get(key)}, the model with {ours.get(key)}; set generate.guide to weights for the same data"
        )
    return dataclasses.replace(model, guide=guide)
