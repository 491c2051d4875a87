"""STDiT3 files: `w/*` weights under published names, `in/*`, `out` and `config_json`; or, for training files, gradients.

Layouts of the file: latents [b, c, t, h, w]; `in/x_mask` True = noisy frame. At clean frames the original's final layer is
modulated twice (a quirk of its code that nothing depends on), so outputs are compared where x_mask is True.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mila_jax.errors import UserError
from mila_jax.model import stdit3_weights
from mila_jax.model.conditions import Conditions
from mila_jax.model.dit import DiTConfig

CASES = ("masked", "nomask")
FORWARD_TOLERANCE = 5e-5
GRADIENT_TOLERANCE = 1e-3
# STDiT3Config's own, for what a file does not say.
DEFAULTS = {"patch_size": [1, 2, 2], "in_channels": 4, "mlp_ratio": 4.0, "pred_sigma": True, "qk_norm": True, "input_sq_size": 512}


def matches(keys) -> bool:
    """True for files of this format (forward or training)."""
    return "w/x_embedder.proj.weight" in keys or any(f"{case}/loss" in keys for case in CASES)


def _config(npz) -> DiTConfig:
    c = DEFAULTS | json.loads(str(npz["config_json"]))
    return DiTConfig(
        width=c["hidden_size"], depth=c["depth"], heads=c["num_heads"], patch=tuple(c["patch_size"]), in_channels=c["in_channels"],
        out_channels=c["in_channels"], text_width=c["caption_channels"], text_length=c["model_max_length"], mlp_ratio=c["mlp_ratio"],
        image_size=(float(npz["in/height"][0]), float(npz["in/width"][0])), input_sq_size=c["input_sq_size"],
        pred_sigma=c["pred_sigma"], qk_norm=c["qk_norm"], new_embeddings=False,
    )  # fmt: skip


def _conditions(npz, config: DiTConfig) -> Conditions:
    b, _, t = npz["in/x"].shape[:3]
    text = npz["in/y"][:, 0]
    mask = np.ones(text.shape[:2], bool)
    if "in/mask" in npz:
        mask = np.tile(npz["in/mask"].astype(bool), (b // len(npz["in/mask"]), 1))
    none = jnp.zeros((b,), bool)
    fps = np.tile(np.atleast_1d(npz["in/fps"]), b // np.size(npz["in/fps"]))
    return Conditions(
        jnp.asarray(text), jnp.asarray(mask), jnp.zeros((b, t, 3)), jnp.zeros((b, 1, t, 4)), jnp.zeros((b, 1, t, 7)), jnp.zeros((b, t)),
        jnp.asarray(fps), none, none,
    )  # fmt: skip


def _to_ours(x):
    return jnp.asarray(np.moveaxis(x, 1, -1))[:, None]  # [b, c, t, h, w] → [b, 1, t, h, w, c]


def _frame_mask(npz, patch_frames: int):
    """x_mask by latent frame [b, t]; True everywhere without one. With a temporal patch the file holds it by token frame."""
    b, _, t = npz["in/x"].shape[:3]
    if "in/x_mask" not in npz:
        return np.ones((b, t), bool)
    mask = npz["in/x_mask"].astype(bool)
    return mask if mask.shape[1] == t else np.repeat(mask, patch_frames, axis=1)[:, :t]


def _load(npz):
    config = _config(npz)
    graphdef, params = stdit3_weights.create(config)
    weights = {k[2:]: npz[k] for k in npz if k.startswith("w/")}
    return config, graphdef, stdit3_weights.load(params, config, weights, source="w/*")


def check(npz, folder=None) -> list[tuple[str, float, float]]:
    """(output, largest absolute error, tolerance) for each output in the file; `folder` is where a training file's weights lie."""
    training = any(f"{case}/loss" in npz for case in CASES)
    with jax.default_matmul_precision("highest"):  # accelerators round float32 matmuls otherwise
        return _check_training(npz, folder) if training else _check_forward(npz)


def _check_forward(npz):
    config, graphdef, params = _load(npz)
    noisy = _frame_mask(npz, config.patch[0])
    timesteps = jnp.asarray(np.where(noisy, npz["in/timestep"][:, None], 0).astype(np.float32))[:, None]
    forward = jax.jit(lambda p, *a: nnx.merge(graphdef, p)(*a))
    out = forward(params, _to_ours(npz["in/x"]), timesteps, _conditions(npz, config))
    want = np.moveaxis(npz["out"], 1, -1)[:, None]
    error = np.abs(np.asarray(out) - want)[np.broadcast_to(noisy[:, None], out.shape[:3])]
    if not error.size:
        raise UserError("in/x_mask is False everywhere: no frame of this file can be compared (see the top of mila_jax/parity/stdit3.py)")
    return [("out", float(error.max()), FORWARD_TOLERANCE)]


def _check_training(npz, folder):
    base = npz
    if "config_json" not in npz:  # weights and conditions lie in another file
        base_name = json.loads(str(npz["meta_json"]))["weights"].split()[0]
        path = pathlib.Path(folder or ".") / base_name
        if not path.exists():
            raise UserError(f"this training file needs the weights in {path}; put {base_name} beside it")
        with np.load(path, allow_pickle=False) as z:
            base = {k: z[k] for k in z.files}
    base = {"in/x": npz["in/x0"]} | base
    config, graphdef, params = _load(base)
    conditions = _conditions(base, config)
    x0, noise = _to_ours(npz["in/x0"]), _to_ours(npz["in/noise"])
    results = []
    for case in (case for case in CASES if f"{case}/loss" in npz):
        noisy = _frame_mask(base, config.patch[0])
        noisy = noisy if case == "masked" else np.ones_like(noisy)
        timesteps = jnp.asarray(np.where(noisy, npz["in/t"][:, None], 0).astype(np.float32))[:, None]
        weight = jnp.asarray(noisy, jnp.float32)[:, None, :, None, None, None]

        def losses(p, timesteps=timesteps, weight=weight):
            level = (timesteps / 1000)[..., None, None, None]
            x = (1 - level) * x0 + level * noise
            v = nnx.merge(graphdef, p)(x, timesteps, conditions)[..., : config.out_channels]
            per_element = jnp.square(v - (x0 - noise)) * weight
            return per_element.sum((1, 2, 3, 4, 5)) / jnp.broadcast_to(weight, v.shape).sum((1, 2, 3, 4, 5))

        def mean_loss(p, losses=losses):
            values = losses(p)
            return values.mean(), values

        (_, values), grads = jax.jit(jax.value_and_grad(mean_loss, has_aux=True))(params)
        results.append((f"{case}/loss", float(np.abs(np.asarray(values) - npz[f"{case}/loss"]).max()), FORWARD_TOLERANCE))
        ours = stdit3_weights.save(grads, config)
        worst = 0.0
        for name in npz:
            if name.startswith(f"{case}/grad/"):
                want = npz[name]
                got = ours[name.removeprefix(f"{case}/grad/")]
                worst = max(worst, float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-8)))
        if worst or any(k.startswith(f"{case}/grad/") for k in npz):
            results.append((f"{case}/grad (relative)", worst, GRADIENT_TOLERANCE))
    return results
