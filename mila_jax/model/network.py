"""From a config and parameters to `velocity(latents, levels, conditions)`, the network as `mila_jax.flow` sees it."""

import jax.numpy as jnp
from flax import nnx

from mila_jax.errors import UserError
from mila_jax.model.dit import DiTConfig
from mila_jax.model.motion import CORRIDORS
from mila_jax.model.precondition import Prior, input_channels, mixture_size, preconditioned

PRECONDITIONS = ("none", "motion")


def dit_config(model, latent_channels: int, image_size, text_width: int, text_length: int, attention=None) -> DiTConfig:
    """`DiTConfig` of a config's `model` section for latents of `latent_channels`.

    image_size: (height, width) in pixels; attention: the config's section of that name (older files have none).
    Raises `UserError` naming the key of a value that cannot work.
    """
    if model.precondition not in PRECONDITIONS:
        raise UserError(f"model.precondition={model.precondition!r} is unknown; use one of {', '.join(PRECONDITIONS)}")
    sweep = model.get("sweep", 0)  # of no consequence without the motion prior
    if not 0 <= sweep <= len(CORRIDORS):
        raise UserError(f"model.sweep={sweep} must lie between 0 and {len(CORRIDORS)}")
    motion, evidence = model.precondition == "motion", model.get("evidence", False)
    if motion and evidence and not sweep:
        raise UserError("model.evidence=True needs corridors to choose from; set model.sweep, or model.evidence=False")
    mixture = model.get("mixture", False)
    if motion and mixture and not sweep:
        raise UserError("model.mixture=True needs corridors to weigh; set model.sweep, or model.mixture=False")
    config = DiTConfig(
        width=model.width, depth=model.depth, heads=model.heads, patch=tuple(model.patch),
        in_channels=input_channels(latent_channels, sweep, evidence) if motion else latent_channels, out_channels=latent_channels,
        sweep=sweep if motion else 0, evidence=evidence and motion,
        mixture=mixture_size(sweep, evidence) if mixture and motion else 0, detail=model.get("detail", 0),
        text_width=text_width, text_length=text_length, mlp_ratio=model.mlp_ratio, image_size=tuple(image_size),
        input_sq_size=model.input_sq_size, pred_sigma=model.pred_sigma, qk_norm=model.qk_norm,
        fourier_bands=model.fourier_bands, ray_rotary=model.get("ray_rotary", False), dtype=model.dtype, remat=model.remat,
        attention_kernel=(attention or {}).get("kernel", "xla"), temporal_kernel=(attention or {}).get("temporal", "xla"),
        text_kernel=(attention or {}).get("text", "xla"),
    )  # fmt: skip
    config.check()
    return config


def make_velocity(graphdef, params, config: DiTConfig, prior: Prior | None = None):
    """The velocity function of a `DiT` given as (graphdef, params).

    prior: what a preconditioned network was trained with, None for a plain one.
    """

    def network(latents, levels, conditions):
        out = nnx.merge(graphdef, params)(latents, 1000.0 * levels, conditions)
        return jnp.concatenate([out[..., : config.out_channels], out[..., out.shape[-1] - config.mixture :]], -1)

    if prior is None:
        return network
    return preconditioned(network, prior, config.sweep, config.evidence, config.mixture > 0)
