"""The command `mila generate`: from first frames to video files, window by window."""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import re
import sys
import time
import zipfile

import numpy as np
import tqdm

from data_pipeline.storage import is_remote
from mila_jax.choose_model import load_chosen, signature
from mila_jax.chunks import chunks_of
from mila_jax.decode import Decoder, VideoDecoder, open_decoder
from mila_jax.errors import UserError
from mila_jax.evaluate.video import atomic_path, six_view_picture, view_writer
from mila_jax.explain import describe, draw_picture
from mila_jax.flow.rollout import KINDS, Rollout, collect, new_frames
from mila_jax.generate import Generator, Job, check_fits, window_settings
from mila_jax.prepare import open_codec, open_video_codec
from mila_jax.start import FRAME_RATE, Start, check_seed, choose_trajectory, frame_count, from_images, from_scene, read_frames
from mila_jax.unfinished import Unfinished, is_finished
from mila_jax.views import VIEWS


def generate_command(config, options, *, replace: bool = False, progress: bool = True) -> pathlib.Path:
    """`mila generate`: makes video.mp4, latents.npz and generate.json in `options.out`; returns the video's path.

    With `options.explain` it prints and draws (schedule.png) what it would do, and returns the picture's path. A video that is finished there already
    is told and kept. Raises `UserError` if the folder holds another one, finished or not; with `replace`, only if that one is finished.
    """
    length = frame_count(options.seconds)
    check_seed(options.seed)
    out = writable_folder(options.out)
    model = load_chosen(config)
    trained = model.config.window.anchor_stride
    config = window_settings(model, config)
    if config.generate.strategy != "recurrent" and config.window.anchor_stride != trained and not config.generate.anchor_stride:
        new = config.window.frames - config.window.conditioning
        print(
            f"coarse frames are {config.window.anchor_stride} frames apart: the {trained} that the model was trained with do not fit {new} new frames a "
            "window; generate.window or generate.anchor_stride set it otherwise",
            file=sys.stderr,
        )
    codec = open_codec(config)
    video = open_video_codec(config, codec)
    check_fits(model, codec, options.data, video)
    decoder, generator = open_decoder(codec, config), Generator(model, config)
    model = generator.model  # with its parameters on the mesh; the others can go
    start = find_start(model, config, codec, options, video)
    if video is not None:
        decoder = VideoDecoder(decoder, video, start.first_latents)
    chunks = chunks_of(model.data)
    job = generator.job([start], length if chunks is None else chunks.latents_for(length, start.first_latents.shape[1]), options.seed)
    for line in otherwise_than_trained(model, config):
        print(line, file=sys.stderr)
    if options.explain:
        print(describe(job.plan, job.tables, generator.options))
        draw_picture(out / "schedule.png", job.plan, job.tables)
        return out / "schedule.png"
    about = identity(generator, job, codec, start, options.seed)
    finished = about | {"length": length, "decode_tile": config.generate.decode_tile}
    if is_finished(out, finished, ["video.mp4", "latents.npz", *(f"{name}.mp4" for name in (VIEWS if options.per_view else ()))]):
        print(f"{out} holds this video already, finished; remove that folder to make it again", file=sys.stderr)
        return out / "video.mp4"
    kept = Unfinished(out / "unfinished", about, replace)
    for partial in out.glob(".*.mp4"):  # of a run that was killed
        if (found := re.fullmatch(r"\.(video|CAM_\w+)\.(\d+)\.mp4", partial.name)) and not runs(int(found[2])):
            partial.unlink()
    making = Making(generator, job, decoder, kept, length)
    write_videos(out, making.frames(progress), _display_scale(model.data["image_size"]), options.per_view)
    save_latents(out / "latents.npz", collect(job.plan, np.stack(making.windows)), start, length)
    summary = {
        "seconds": options.seconds, "text": start.description, "waypoints": options.waypoints or "scene", "seed": options.seed,
        "scene": start.scene, "time_us": start.time_us, "temporal": model.data.get("temporal", "none"), **making.summary(),
        "identity": finished,
    }  # fmt: skip
    with atomic_path(out / "generate.json") as path:
        path.write_text(json.dumps(summary, indent=1))
    kept.remove()
    return out / "video.mp4"


def runs(process: int) -> bool:
    """Whether a process of that number runs on this machine."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    return True


@dataclasses.dataclass
class Making:
    """A video of `length` frames while it is made: its windows so far, of which the first `resumed` were found on disk; `began`: when it was
    begun."""

    generator: Generator
    job: Job
    decoder: Decoder | VideoDecoder
    kept: Unfinished
    length: int
    windows: list = dataclasses.field(default_factory=list)
    resumed: int = 0
    began: float = dataclasses.field(default_factory=time.monotonic)

    def frames(self, progress: bool):
        """Yields the frames uint8 [v, H, W, 3] of the video; each window is kept on disk before its frames are decoded."""
        job, made, taken, left = self.job, 0, 0, self.length
        shape = (1, len(VIEWS), job.plan.window, *self.generator.model.data["latent_shape"])
        finished = list(self.kept.read(shape))[: job.windows]
        self.resumed = len(finished)
        with tqdm.tqdm(total=job.windows, unit="window", desc="generate", disable=not progress) as bar:
            for number, window in enumerate(self.generator.stream(job, finished)):
                if number >= self.resumed:
                    self.kept.write(number, window)
                self.windows.append(window)
                kind = int(job.rows.kind[number])
                new = new_frames(job.plan, kind, window)[0][:, : job.plan.frames - taken]
                for frame in itertools.islice(self.decoder(new) if new.shape[1] else (), left):
                    left -= 1
                    yield frame
                taken += new.shape[1]
                made += new.shape[1] if number >= self.resumed else 0
                rate = made / (time.monotonic() - self.began)
                bar.set_postfix_str("anchors" if KINDS[kind] == "coarse" else f"frame {self.length - left} of {self.length}, {rate:.1f} frames/s")
                bar.update()  # all windows cost the same, so the time left is told from the first one on

    def summary(self) -> dict:
        """How it was made, as plain values."""
        plan, generator = self.job.plan, self.generator
        return {
            "frames": self.length, "latents": plan.frames, "strategy": plan.strategy, "weights_sha256": generator.model.sha256,
            "made_by": signature(generator.model, generator.config.generate), "steps": generator.options.steps,
            "generate_seconds": round(time.monotonic() - self.began, 1), "windows": self.job.windows, "windows_resumed": self.resumed,
            "anchors": plan.anchors, "sampler": dataclasses.asdict(generator.options), "window": plan.window, "conditioning": plan.conditioning,
            "anchor_stride": plan.anchor_stride, "anchor_frames": plan.anchor_frames.tolist(), "mesh": dict(generator.layout.mesh.shape),
        }  # fmt: skip


def write_videos(out: pathlib.Path, frames, scale: float, per_view: bool) -> None:
    """Writes video.mp4 of all six views, and one mp4 of each if asked for, as the frames come."""
    with contextlib.ExitStack() as stack:
        together = stack.enter_context(view_writer(out / "video.mp4", FRAME_RATE))
        each = [stack.enter_context(view_writer(out / f"{name}.mp4", FRAME_RATE)) for name in (VIEWS if per_view else ())]
        for frame in frames:
            together(six_view_picture(frame, scale, labels=True))
            for view, add in enumerate(each):
                add(frame[view])


def save_latents(path: pathlib.Path, video: Rollout, start: Start, length: int) -> None:
    """Writes the latents of the first video [v, t, h, w, c], its anchors before and after correction, the rig, and the commanded poses (x, y, yaw)
    of its `length` frames."""
    arrays = {"latents": video.latents, "anchors": video.anchors, "corrected": video.corrected}
    arrays = {name: np.asarray(value[0], np.float16) for name, value in arrays.items() if value is not None}
    poses = start.trajectory.at(np.arange(1, length + 1) / FRAME_RATE)
    with atomic_path(path) as temporary:
        np.savez(temporary, views=np.array(VIEWS), poses=poses, intrinsics=start.intrinsics, extrinsics=start.extrinsics, **arrays)


def read_generated(folder) -> tuple[dict, dict]:
    """(generate.json, arrays of latents.npz) of a folder that `mila generate` made.

    Raises `UserError` where there is no finished video, and for files that are damaged or do not belong together.
    """
    folder = pathlib.Path(folder)
    try:
        about = json.loads((folder / "generate.json").read_text())
        with open(folder / "latents.npz", "rb") as file, np.load(file, allow_pickle=False) as z:
            arrays = {key: z[key] for key in z.files}
        about["frames"] = int(about["frames"])
        latents = arrays["latents"]
        if about.get("identity") is not None and "autoencoder" in about["identity"]:
            str(about["identity"]["autoencoder"][0])
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{folder} has no finished video of mila generate ({error}); run it, or again with another --out") from None
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(
            f"{folder}: generate.json and latents.npz are not as mila generate writes them ({type(error).__name__}: {error}); make them again"
        ) from None
    if latents.ndim != 5 or len(latents) != len(VIEWS):
        raise UserError(f"{folder}: latents.npz has latents {latents.shape}, not of {len(VIEWS)} views; make the video again")
    if not np.isfinite(latents).all():
        raise UserError(f"{folder}: latents.npz has latents that are no finite numbers; make the video again")
    return about, arrays


def check_latents(folder, about: dict, arrays: dict, codec, shape=None) -> None:
    """Raises `UserError` for a video whose latents are not one for each frame, or of another autoencoder than `codec`, or, with `shape` (h, w, c),
    of another size."""
    if arrays["latents"].shape[1] != about["frames"]:
        raise UserError(
            f"{folder}: latents.npz has {arrays['latents'].shape[1]} latents, generate.json tells of {about['frames']} frames; make the video again"
        )
    if "poses" in arrays and arrays["poses"].shape != (about["frames"], 3):
        raise UserError(f"{folder}: latents.npz has poses {arrays['poses'].shape} of {about['frames']} frames; make the video again")
    made = (about.get("identity") or {}).get("autoencoder", [codec.sha256])[0]
    if made != codec.sha256:
        raise UserError(f"{folder} was made with another autoencoder; set autoencoder.path to that one's file")
    found, wanted = arrays["latents"].shape[2:], (None, None, codec.config.latent_channels) if shape is None else tuple(shape)
    if any(b not in (None, a) for a, b in zip(found, wanted)):
        of = f"the autoencoder has {wanted[2]} channels" if shape is None else f"data.dir's are {wanted}"
        raise UserError(f"{folder} has latents of (rows, columns, channels) {found}, {of}; give videos of one size, and data and autoencoder of them")


def check_single_pictures(folder, about: dict, command: str) -> None:
    """Raises `UserError` for a video whose latents (`about`: its generate.json) are temporal, which `command` does not know."""
    if about.get("temporal", "none") != "none" or about.get("latents", about["frames"]) != about["frames"]:
        raise UserError(f"{folder} holds temporal latents (autoencoder.temporal); mila {command} is for those of single pictures")


def local_folder(path) -> pathlib.Path:
    """`path` as one of this machine. Raises `UserError` for an address (gs://…), which a Path would take for a folder named `gs:`."""
    if is_remote(path):
        raise UserError(f"--out={path} is an address; give a folder of this machine")
    return pathlib.Path(path)


def writable_folder(path) -> pathlib.Path:
    """The folder `path`, made if it is missing. Raises `UserError` for an address, and if nothing can be written there."""
    out = local_folder(path)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".write").touch()
        (out / ".write").unlink()
    except OSError as error:
        raise UserError(f"cannot write to {out} ({error.strerror}); choose another --out") from None
    return out


def otherwise_than_trained(model, config) -> list[str]:
    """A line on each setting of noise in a window that is not what the model was trained with: it is the config's that counts."""
    keys = ("tpd_family", "tpd_strength", "anchor_error", "anchor_level")
    pairs = [(key, config.window[key], model.config.window.get(key)) for key in keys]
    return [f"window.{key}={now}, the model was trained with {then}" for key, now, then in pairs if then not in (None, now)]


def find_start(model, config, codec, options, video=None):
    """The `Start` that the options ask for: from a scene of an encoded data set, or from a folder of images (`video`: with its `VideoCodec`).

    Everything is checked before the first image is encoded, which is what first compiles.
    """
    from data_pipeline.clips import read_scene
    from mila_jax.model.text import make_text_encoder

    try:
        (options.text or "").encode()
    except UnicodeEncodeError:
        raise UserError("--text is not UTF-8; give it in that encoding") from None

    def text_encoder():
        encoder = make_text_encoder(model.data["text_encoder"], model.data["text_shape"][0], config.text.get("path"), config.text.get("tokenizer"))
        trained, given = model.data.get("text_sha256"), getattr(encoder, "sha256", None)
        if encoder.width != model.data["text_shape"][1] or None not in (trained, given) and trained != given:
            raise UserError("the model was trained with other weights of the text encoder; set text.path to those")
        return encoder

    given, known = config.window.conditioning, options.waypoints != "none"
    if options.data:
        if not options.scene:
            raise UserError("--scene is not set; mila prepare's index.json lists the scenes of a data set")
        start, _ = from_scene(read_scene(options.data, options.scene), 1.0 if options.start is None else options.start, given)
        trajectory = choose_trajectory(options.waypoints, start.trajectory, options.seconds, options.speed)
        if options.text is not None:
            tokens, mask = text_encoder().encode([options.text])
            start = dataclasses.replace(start, text=tokens[0], text_mask=mask[0], description=options.text)
        return dataclasses.replace(start, trajectory=trajectory, waypoints_known=known)
    if options.scene:
        raise UserError("--scene goes with --data; --frames are of no recorded scene")
    if options.start is not None:
        raise UserError("--start goes with --data; --frames begin a video where they are")
    images = read_frames(options.frames, model.data["image_size"])
    wanted = given if video is None else video.chunks.frame_count(given)
    if video is not None:  # whole chunks; what is none: the last image alone
        wanted = min(wanted, images.shape[1] // video.chunks.frames * video.chunks.frames) or 1
    images = images[:, -wanted:]
    trajectory = choose_trajectory(options.waypoints, None, options.seconds, options.speed)
    start = from_images(images, codec, text_encoder(), trajectory, options.text or "", video)
    return dataclasses.replace(start, waypoints_known=known)


def identity(generator: Generator, job: Job, codec, start, seed: int) -> dict:
    """Everything that decides the windows of a video, as plain values."""
    plan, g = job.plan, generator.config.generate
    return {
        "weights": signature(generator.model, g), "autoencoder": [codec.sha256, generator.model.data.get("temporal_sha256")], "seed": seed, "frames": plan.frames, "start": start.digests(),
        "generate": {"strategy": plan.strategy, "guidance_text": g.guidance_text, "guidance_waypoints": g.guidance_waypoints},
        "window": {
            "frames": plan.window, "conditioning": plan.conditioning, "anchor_stride": plan.anchor_stride, "given": plan.given,
            **({"inner_anchors": True} if plan.refine and plan.refine.inner else {}),  # videos from before there were any are known by the rest
        },
        "sampler": dataclasses.asdict(generator.options),
    }  # fmt: skip


def _display_scale(image_size) -> float:
    """Small images are enlarged, so that a player shows them at a size that can be looked at."""
    return max(1.0, round(256 / image_size[1]))
