"""Every size of a step from the config alone: no data set is opened, and everything that does not divide is refused here.

Only a guide's sizes stand in its weights file; `with_guide_sizes` puts them into the config before anything else sees it.
"""

import dataclasses

from mila_jax.choose_model import weights_file
from mila_jax.chunks import CHUNKS, check_window
from mila_jax.errors import UserError
from mila_jax.flow.guidance import guidance_weights
from mila_jax.model.dit import DiTConfig
from mila_jax.model.weights import model_config, read_header
from mila_jax.parallel.aot.options import STEPS
from mila_jax.parallel.logical import rules_from_config, use_rules
from mila_jax.parallel.mesh import axis_sizes, check_accumulation, check_divides
from mila_jax.rollout_program import evaluations, generation_rules


@dataclasses.dataclass(frozen=True)
class Sizes:
    """data: what a data set would say of itself (as `prepare.describe_data`); dit: the network; mesh: axis → size.

    batch: samples (train) or videos (sample) a step over all devices; passes: evaluations of the network for one sample (2 with
    classifier-free guidance); frames: of a window; guide: sizes of the weaker model that guides it, or None.
    """

    step: str
    data: dict
    dit: DiTConfig
    mesh: dict[str, int]
    batch: int
    passes: int
    frames: int
    guide: DiTConfig | None = None

    @property
    def tokens(self) -> int:
        """Tokens of one view of one frame."""
        height, width, _ = self.data["latent_shape"]
        return -(-height // self.dit.patch[1]) * -(-width // self.dit.patch[2])

    @property
    def of_guide(self) -> "Sizes | None":
        """The same step of the guide alone, which sees each sample once."""
        return None if self.guide is None else dataclasses.replace(self, dit=self.guide, passes=1, guide=None)


def data_description(config) -> dict:
    """The sizes of a data set that `mila prepare` would make with this config (section `plan` for what only files know)."""
    if len(config.data.image_size) != 2:
        raise UserError(f"data.image_size={tuple(config.data.image_size)} must be (height, width), e.g. --config.data.image_size='(256, 448)'")
    height, width = config.data.image_size
    by = config.plan.compression
    for key in ("compression", "latent_channels", "text_width", "sample_batch"):
        if config.plan[key] < 1:
            raise UserError(f"plan.{key}={config.plan[key]} must be at least 1")
    if height % by or width % by:
        raise UserError(f"data.image_size={tuple(config.data.image_size)} does not divide by plan.compression={by}; change one of them")
    return {
        "latent_shape": [height // by, width // by, config.plan.latent_channels],
        "image_size": [height, width],
        "text_shape": [config.text.length, config.plan.text_width],
    }


def check_temporal(config) -> None:
    """Raises `UserError` where windows and rates cannot be made of the latents of `autoencoder.temporal`; window.frames then counts latents."""
    kind = config.autoencoder.get("temporal", "none")
    if kind not in CHUNKS:
        raise UserError(f"autoencoder.temporal={kind!r} is unknown; use {', '.join(CHUNKS)}")
    if (chunks := CHUNKS[kind]) is not None:
        check_window(chunks, config.window.frames, config.window.conditioning)
        for fps in config.train.fps:
            chunks.stride(fps)


def with_guide_sizes(config, step: str):
    """The config with `plan.guide`, the sections `model` and `attention` of the model that `generate.guide` names, if `step` evaluates one.

    Raises `UserError` for a file that cannot be read, or is for other latents or text than the config's.
    """
    config = config.copy_and_resolve_references()
    g = config.generate
    if step != "sample" or not g.get("guide") or g.get("guidance_model", 1.0) == 1:
        return config
    theirs, data = read_header(weights_file(g.guide))
    for key, ours in data_description(config).items():
        if list(data[key]) != ours:
            raise UserError(f"generate.guide={g.guide} was trained with {key} {data[key]}, the config has {ours}; give weights for the same data")
    with config.plan.unlocked():
        config.plan.guide = {key: theirs[key] for key in ("model", "attention") if key in theirs}
    return config


class _Mesh:
    """What `check_divides` wants to know of a mesh."""

    def __init__(self, shape):
        self.shape = shape


def plan_sizes(config, devices: int, step: str) -> Sizes:
    """Sizes of `step` ("train" or "sample") on `devices` devices, of a config that passed `with_guide_sizes`.

    Raises `UserError` naming the key for anything that cannot work."""
    if step not in STEPS:
        raise UserError(f"--step={step} is unknown; use {' or '.join(STEPS)}")
    data = data_description(config)
    check_temporal(config)
    dit, guide = model_config(config, data), config.plan.get("guide")
    guide = None if guide is None else model_config(guide, data)
    mesh = axis_sizes(config.mesh, devices)
    passes = 1
    if step == "sample":
        passes = sum(w != 0 for w in guidance_weights((config.generate.guidance_text, config.generate.guidance_waypoints)))
    batch = config.train.batch if step == "train" else config.plan.sample_batch
    if batch < 1:
        raise UserError(f"train.batch={batch} must be at least 1")
    sizes = Sizes(step, data, dit, mesh, batch, passes, config.window.frames, guide)
    if step == "sample":  # as `generation_mesh` and `Layout` do
        samples = evaluations(config.generate, batch)
        if samples % mesh["data"]:
            raise UserError(
                f"plan.sample_batch={batch} gives {samples} sample(s) at a time (with guidance in one batch), no multiple of mesh.data={mesh['data']}; "
                "change one of them"
            )
        for each, whose in ((sizes, ""), (sizes.of_guide, "the guide's ")):
            if each is not None:
                generation_rules(config, each.dit, _Mesh(mesh), samples, config.window.frames, each.tokens, whose)
        return sizes
    with use_rules(**rules_from_config(config)):
        check_accumulation(config.train, _Mesh(mesh))
        check_divides(_Mesh(mesh), batch, dit.heads, dit.width, config.window.frames, sizes.tokens)
    return sizes
