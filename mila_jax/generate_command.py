"""The command `mila generate`: from first frames to video files, window by window."""

import contextlib
import dataclasses
import json
import pathlib
import time

import numpy as np
import tqdm

from mila_jax.decode import open_decoder
from mila_jax.errors import UserError
from mila_jax.evaluate.video import six_view_picture, view_writer
from mila_jax.explain import describe, draw_picture
from mila_jax.flow.rollout import KINDS, collect, new_frames
from mila_jax.generate import Generator, Job, check_fits, find_weights, window_settings
from mila_jax.model.weights import load_model
from mila_jax.prepare import open_codec
from mila_jax.start import FRAME_RATE, choose_trajectory, frame_count, from_folder, from_scene
from mila_jax.unfinished import Unfinished
from mila_jax.views import VIEWS


def generate_command(config, options, *, progress: bool = True) -> pathlib.Path:
    """`mila generate`: makes video.mp4, latents.npz and generate.json in `options.out`; returns the video's path.

    With `options.explain` it prints and draws (schedule.png) what it would do, and returns the picture's path.
    """
    length = frame_count(options.seconds)
    out = writable_folder(options.out)
    model = load_model(find_weights(config))
    config = window_settings(model, config)
    codec = open_codec(config)
    check_fits(model, codec, options.data)
    start = find_start(model, config, codec, options)
    generator = Generator(model, config)
    job = generator.job([start], length, options.seed)
    if options.explain:
        print(describe(job.plan, job.tables, generator.options))
        draw_picture(out / "schedule.png", job.plan, job.tables)
        return out / "schedule.png"
    decoder = open_decoder(codec, config)
    kept = Unfinished(out / "unfinished", identity(generator, job, codec, start, options.seed))
    shape = (1, len(VIEWS), job.plan.window, *model.data["latent_shape"])
    began = time.monotonic()
    windows, resumed = [], 0

    def frames():
        nonlocal resumed
        with tqdm.tqdm(total=job.windows, unit="window", desc="generate", disable=not progress) as bar:
            finished = list(kept.read(shape))[: job.windows]
            resumed = len(finished)
            shown = made = 0
            for number, window in enumerate(generator.stream(job, finished)):
                if number >= resumed:
                    kept.write(number, window)
                windows.append(window)
                stage = KINDS[int(job.rows.kind[number])]
                new = new_frames(job.plan, int(job.rows.kind[number]), window)[0][:, : length - shown]
                for frame in decoder(new) if new.shape[1] else ():
                    shown += 1
                    yield frame
                made += new.shape[1] if number >= resumed else 0
                rate = made / (time.monotonic() - began)
                bar.set_postfix_str("anchors" if stage == "coarse" else f"frame {shown} of {length}, {rate:.1f} frames/s")
                bar.update()  # all windows cost the same, so the time left is told from the first one on

    scale = _display_scale(model.data["image_size"])
    with contextlib.ExitStack() as stack:
        together = stack.enter_context(view_writer(out / "video.mp4", FRAME_RATE))
        each = [stack.enter_context(view_writer(out / f"{name}.mp4", FRAME_RATE)) for name in (VIEWS if options.per_view else ())]
        for frame in frames():
            together(six_view_picture(frame, scale, labels=True))
            for view, add in enumerate(each):
                add(frame[view])
    video = collect(job.plan, np.stack(windows))
    arrays = {"latents": video.latents[0], "anchors": video.anchors, "corrected": video.corrected}
    arrays = {name: np.asarray(value if name == "latents" else value[0], np.float16) for name, value in arrays.items() if value is not None}
    arrays["poses"] = start.trajectory.at(np.arange(1, length + 1) / FRAME_RATE)  # commanded, at each frame; x, y, yaw
    np.savez(out / "latents.npz", views=np.array(VIEWS), intrinsics=start.intrinsics, extrinsics=start.extrinsics, **arrays)
    plan = job.plan
    summary = {
        "seconds": options.seconds, "frames": plan.frames, "text": start.description, "waypoints": options.waypoints or "scene", "seed": options.seed,
        "strategy": plan.strategy, "weights_sha256": model.sha256, "generate_seconds": round(time.monotonic() - began, 1), "steps": config.generate.steps,
        "windows": job.windows, "windows_resumed": resumed, "anchors": plan.anchors, "sampler": dataclasses.asdict(generator.options),
        "window": plan.window, "conditioning": plan.conditioning, "anchor_stride": plan.anchor_stride,
    }  # fmt: skip
    (out / "generate.json").write_text(json.dumps(summary, indent=1))
    kept.remove()
    return out / "video.mp4"


def writable_folder(path) -> pathlib.Path:
    """The folder `path`, made if it is missing. Raises `UserError` if nothing can be written there."""
    out = pathlib.Path(path)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".write").touch()
        (out / ".write").unlink()
    except OSError as error:
        raise UserError(f"cannot write to {out} ({error.strerror}); choose another --out") from None
    return out


def find_start(model, config, codec, options):
    """The `Start` that the options ask for: from a scene of an encoded data set, or from a folder of images."""
    from data_pipeline.clips import read_scene
    from mila_jax.model.text import make_text_encoder

    given = config.window.conditioning
    text_length = model.data["text_shape"][0]
    if options.data:
        if not options.scene:
            raise UserError("--scene is not set; mila prepare's index.json lists the scenes of a data set")
        start, _ = from_scene(read_scene(options.data, options.scene), options.start, given)
        if options.text is not None:
            tokens, mask = make_text_encoder(model.data["text_encoder"], text_length, config.text.get("path"), config.text.get("tokenizer")).encode([options.text])
            start = dataclasses.replace(start, text=tokens[0], text_mask=mask[0], description=options.text)
    else:
        encoder = make_text_encoder(model.data["text_encoder"], text_length, config.text.get("path"), config.text.get("tokenizer"))
        start = from_folder(options.frames, codec, encoder, model.data["image_size"], given, options.text or "")
    trajectory = choose_trajectory(options.waypoints, start, options.seconds, options.speed, bool(options.data))
    return dataclasses.replace(start, trajectory=trajectory, waypoints_known=options.waypoints != "none")


def identity(generator: Generator, job: Job, codec, start, seed: int) -> dict:
    """Everything that decides the windows of a video, as plain values."""
    plan, g = job.plan, generator.config.generate
    return {
        "weights": generator.model.sha256, "autoencoder": codec.sha256, "seed": seed, "frames": plan.frames, "start": start.digest(),
        "generate": {"strategy": plan.strategy, "guidance_text": g.guidance_text, "guidance_waypoints": g.guidance_waypoints},
        "window": {"frames": plan.window, "conditioning": plan.conditioning, "anchor_stride": plan.anchor_stride, "given": plan.given},
        "sampler": dataclasses.asdict(generator.options),
    }  # fmt: skip


def _display_scale(image_size) -> float:
    """Small images are enlarged, so that a player shows them at a size that can be looked at."""
    return max(1.0, round(256 / image_size[1]))
