"""Long six-view videos: from a `Start` to latents, and from latents to files."""

import dataclasses
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from mila_jax.errors import UserError
from mila_jax.evaluate.video import write_six_views, write_view
from mila_jax.flow.guidance import guided
from mila_jax.flow.plan import RolloutPlan, Windows, plan_rollout
from mila_jax.flow.rollout import SamplerOptions, rollout
from mila_jax.model import conditions as conditions_module
from mila_jax.model.conditions import Conditions
from mila_jax.model.network import make_velocity
from mila_jax.model.weights import SHIPPED, WorldModel, load_model
from mila_jax.prepare import describe_data, open_codec
from mila_jax.start import FRAME_RATE, Start, choose_trajectory, frame_count, from_folder, from_scene
from mila_jax.views import VIEWS


def sampler_options(model: WorldModel, config) -> SamplerOptions:
    """How windows are denoised: the config's `window` and `generate` sections."""
    w, g = config.window, config.generate
    return SamplerOptions(
        steps=g.steps, family=w.tpd_family, alpha=w.tpd_strength, a=w.anchor_error, sigma_a=w.anchor_level, shift=g.shift, temperature=g.temperature,
    )


def make_plan(config, frames: int, given: int) -> RolloutPlan:
    """The rollout of `frames` frames at 12 Hz after `given` first ones."""
    w = config.window
    return plan_rollout(
        frames, fps=FRAME_RATE, window=w.frames, conditioning=w.conditioning, anchor_stride=w.anchor_stride, strategy=config.generate.strategy, given=given
    )


def stage_conditions(start: list[Start], windows: Windows | None) -> Conditions | None:
    """Conditions of all windows of a stage for a batch of starts; leaves lead with [W, b]."""
    if windows is None:
        return None
    count, frames = windows.indices.shape
    b, v = len(start), len(VIEWS)

    def lead(per_start):  # [b, …] → [W, b, …]
        return jnp.asarray(np.broadcast_to(np.stack(per_start), (count, b) + np.shape(per_start[0])))

    waypoints = np.stack([s.trajectory.waypoints(windows.times, windows.reference / windows.video_fps) for s in start], 1)
    none = jnp.zeros((count, b), bool)
    return Conditions(
        text=lead([s.text for s in start]),
        text_mask=lead([s.text_mask for s in start]),
        waypoints=jnp.asarray(waypoints),
        intrinsics=lead([np.broadcast_to(s.intrinsics[:, None], (v, frames, 4)) for s in start]),
        extrinsics=lead([np.broadcast_to(s.extrinsics[:, None], (v, frames, 7)) for s in start]),
        frame_times=jnp.asarray(np.broadcast_to(windows.frame_times[:, None], (count, b, frames)), jnp.float32),
        fps=jnp.full((count, b), windows.fps, jnp.float32),
        drop_text=none,
        drop_waypoints=none,
    )


def generation_velocity(graphdef, params, dit, prior, generate):
    """The velocity that windows are denoised with: the network, guided as the config's `generate` section says."""
    velocity = make_velocity(graphdef, params, dit, prior)
    drops = (conditions_module.drop_text, conditions_module.drop_waypoints)
    return guided(velocity, drops, (generate.guidance_text, generate.guidance_waypoints))


class Generator:
    """A model with its sampler; compiles once per plan."""

    def __init__(self, model: WorldModel, config):
        self.model, self.config = model, config
        self.options = sampler_options(model, config)
        self._compiled = {}

    def __call__(self, start: list[Start], frames: int, seed: int = 0):
        """Latents [b, v, frames, h, w, c] (normalised) after the given frames of each start, and the plan.

        All starts must have equally many given frames. The same seed gives the same video.
        """
        given = start[0].first_latents.shape[1]
        plan = make_plan(self.config, frames, given)
        first = jnp.asarray(np.stack([s.first_latents for s in start]))
        stages = [stage_conditions(start, w) for w in (plan.coarse, plan.refine, plan.bootstrap)]
        compiled = self._compiled.setdefault((frames, given), self._compile(plan))
        return compiled(self.model.params, first, *stages, jax.random.key(seed)), plan

    def _compile(self, plan):
        model, g = self.model, self.config.generate

        def run(params, first, coarse, refine, bootstrap, key):
            velocity = generation_velocity(model.graphdef, params, model.dit, model.prior, g)
            return rollout(velocity, first, plan, coarse, refine, key, self.options, bootstrap_conditions=bootstrap)

        return jax.jit(run)


def decode_frames(codec, latents, *, progress: bool = False):
    """Yields frames uint8 [v, H, W, 3] of latents [v, t, h, w, c] (normalised), a few at a time."""
    latents = np.asarray(latents, np.float32).swapaxes(0, 1)  # [t, v, …]
    t, v = latents.shape[:2]
    frames_at_once = max(1, codec.chunk // v)
    for first in tqdm.tqdm(range(0, t, frames_at_once), desc="decode", unit="chunk", disable=not progress):
        part = latents[first : first + frames_at_once]
        images = codec.decode(part.reshape((-1,) + part.shape[2:]))
        yield from images.reshape((len(part), v) + images.shape[1:])


def find_weights(config) -> pathlib.Path:
    """The weights file of `generate.weights`: a file, a training folder, or (unset) the shipped one."""
    path = pathlib.Path(config.generate.weights or SHIPPED)
    if path.is_dir():
        path = path / "model.safetensors"
    return path


def check_fits(model: WorldModel, codec, data_dir=None) -> None:
    """Raises `UserError` if the autoencoder, or the encoded data set in `data_dir`, is not of the kind that the model was trained on."""
    if model.data.get("autoencoder_sha256") != codec.sha256:
        raise UserError("the model was trained on latents of another autoencoder; set autoencoder.path to that one's file")
    if data_dir is None:
        return
    data = describe_data(data_dir)
    remedies = {
        "autoencoder_sha256": "prepare it with that autoencoder (autoencoder.path)",
        "latent_shape": "prepare it at that size (data.image_size)",
        "text_encoder": "prepare it with that text encoder (text.encoder; mila doctor says how to install one)",
        "text_shape": "prepare it with that text.length",
    }
    for key, remedy in remedies.items():
        if data.get(key) != model.data.get(key):
            raise UserError(f"{data_dir} has {key} {data.get(key)}, the model was trained with {model.data.get(key)}; {remedy}")


def window_settings(model: WorldModel, config):
    """The config with the sizes of the window that the model was trained on (they cannot differ from the weights')."""
    config = config.copy_and_resolve_references()
    for key in ("frames", "conditioning", "anchor_stride"):
        config.window[key] = model.config.window[key]
    return config


def generate_command(config, options, *, progress: bool = True) -> pathlib.Path:
    """`mila generate`: returns the folder with video.mp4, latents.npz, and generate.json."""
    from data_pipeline.clips import read_scene
    from mila_jax.model.text import make_text_encoder

    length = frame_count(options.seconds)
    out = pathlib.Path(options.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".write").touch()
        (out / ".write").unlink()
    except OSError as error:
        raise UserError(f"cannot write to {out} ({error.strerror}); choose another --out") from None
    model = load_model(find_weights(config))
    config = window_settings(model, config)
    codec = open_codec(config)
    check_fits(model, codec, options.data)
    given = config.window.conditioning
    text_length = model.data["text_shape"][0]
    if options.data:
        if not options.scene:
            raise UserError("--scene is not set; mila prepare's index.json lists the scenes of a data set")
        scene = read_scene(options.data, options.scene)
        start, _ = from_scene(scene, options.start, given)
        if options.text is not None:
            encoder = make_text_encoder(model.data["text_encoder"], text_length, config.text.get("path"), config.text.get("tokenizer"))
            tokens, mask = encoder.encode([options.text])
            start = dataclasses.replace(start, text=tokens[0], text_mask=mask[0], description=options.text)
    else:
        encoder = make_text_encoder(model.data["text_encoder"], text_length, config.text.get("path"), config.text.get("tokenizer"))
        start = from_folder(options.frames, codec, encoder, model.data["image_size"], given, options.text or "")
    trajectory = choose_trajectory(options.waypoints, start, options.seconds, options.speed, bool(options.data))
    start = dataclasses.replace(start, trajectory=trajectory)
    began = time.monotonic()
    result, plan = Generator(model, config)([start], length, options.seed)
    latents = np.asarray(result.latents[0])
    generated = time.monotonic() - began
    frames = []

    def tee():
        for frame in decode_frames(codec, latents, progress=progress):
            if options.per_view:
                frames.append(frame)
            yield frame

    write_six_views(out / "video.mp4", tee(), FRAME_RATE, scale=_display_scale(model.data["image_size"]))
    for view, name in enumerate(VIEWS if options.per_view else ()):
        write_view(out / f"{name}.mp4", (f[view] for f in frames), FRAME_RATE)
    np.savez(out / "latents.npz", latents=latents.astype(np.float16), views=np.array(VIEWS))
    summary = {
        "seconds": options.seconds, "frames": plan.frames, "text": start.description, "waypoints": options.waypoints or "scene", "seed": options.seed,
        "strategy": plan.strategy, "weights_sha256": model.sha256, "generate_seconds": round(generated, 1), "steps": config.generate.steps,
    }  # fmt: skip
    (out / "generate.json").write_text(json.dumps(summary, indent=1))
    return out / "video.mp4"


def _display_scale(image_size) -> float:
    """Small images are enlarged, so that a player shows them at a size that can be looked at."""
    return max(1.0, round(256 / image_size[1]))
