"""`mila demo`: the whole job on simulated streets, ending in one self-contained page.

simulate → prepare → train → generate → report; each part reuses what an earlier run finished.
"""

import contextlib
import dataclasses
import json
import pathlib
import shutil
import time

import numpy as np

from data_pipeline.clips import read_scene
from data_pipeline.records import read_index, write_atomically
from mila_jax.config import load_config
from mila_jax.errors import UserError
from mila_jax.evaluate.report import Report
from mila_jax.evaluate.video import contact_sheet, six_view_picture, write_six_views
from mila_jax.generate import Generator, check_fits, decode_frames, sampler_options, window_settings
from mila_jax.model.weights import SHIPPED, load_model
from mila_jax.prepare import open_codec, prepare, simulate_from_config
from mila_jax.scores import agreement, compare, held_out_images, reconstruction
from mila_jax.start import FRAME_RATE, frame_count, from_scene
from mila_jax.train.loop import train
from mila_jax.train.metrics import read_metrics

PARTS = ("nuscenes", "encoded", "train", "video")
MARK = "timings.json"  # a folder with this file was made by a demo
MARGIN = 3.0  # seconds that the scenes are longer than the video: its first frames, and what a late instant may lack
SCALE = 2.0  # enlargement of the small images in videos and sheets


@dataclasses.dataclass
class Clock:
    """Seconds of each phase, kept in a file, so that a report made from reused parts still tells what they took."""

    path: pathlib.Path

    def read(self) -> dict:
        """Phase → seconds."""
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    @contextlib.contextmanager
    def phase(self, name: str, progress: bool):
        """Times the block; a phase that only found finished work keeps the time of the run that did it."""
        if progress:
            print(f"── {name}", flush=True)
        began = time.monotonic()
        yield
        seconds = time.monotonic() - began
        known = self.read()
        known[name] = round(max(seconds, known.get(name, 0.0)), 1)
        write_atomically(self.path, json.dumps(known, indent=1).encode())


def demo(config, out, *, fresh: bool = False, from_scratch: bool = False, seconds: float = 10.0, progress: bool = True) -> pathlib.Path:
    """Runs the demo in folder `out` and returns the path of its report.html.

    `config`: configs/demo.py or one like it; its folders are set here. `fresh`: start over. `from_scratch`: train from random
    weights instead of the shipped ones. `seconds`: length of the generated video.
    """
    out = pathlib.Path(out)
    frames = frame_count(seconds, least=4)
    _claim(out, fresh)
    config = config.copy_and_resolve_references()
    config.simulate.seconds = max(config.simulate.seconds, seconds + MARGIN)
    config.data.nuscenes, config.data.dir, config.train.dir = (str(out / part) for part in PARTS[:3])
    if not from_scratch and not config.train.init_from:
        if not SHIPPED.exists():
            raise UserError(f"{SHIPPED} is missing from this installation; run with --from-scratch, or install again")
        config.train.init_from = str(SHIPPED)
    clock = Clock(out / MARK)
    with clock.phase("simulate", progress):
        simulate_from_config(config, config.data.nuscenes, progress=progress)
    with clock.phase("encode", progress):
        prepare(config, progress=progress)
    with clock.phase("train", progress):
        outcome = train(config, progress=progress)
        if outcome.code:  # told to leave: saved, and no video of half a training
            raise KeyboardInterrupt
    config = window_settings(load_model(outcome.model), config)
    with clock.phase("generate", progress):
        start, scene, after, generated = _generate(config, outcome.model, out / "video", frames, progress)
    with clock.phase("report", progress):
        path = out / "report.html"
        _report(config, outcome, out, clock, start, scene, after, generated, progress).write(path)
    return path


def _claim(out: pathlib.Path, fresh: bool) -> None:
    """Makes `out` a demo's folder (MARK says so) and empties it if `fresh`; nothing that a demo did not make is ever touched."""
    ours = (out / MARK).exists()
    found = [part for part in PARTS if (out / part).exists()]
    if found and not ours:
        raise UserError(f"{out} holds {', '.join(found)}, which no demo made; choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        if fresh or not ours:
            write_atomically(out / MARK, b"{}")
        for part in found if fresh else ():
            shutil.rmtree(out / part)
    except OSError as error:
        raise UserError(f"cannot write to {out} ({error.strerror}); choose another --out") from None


def _generate(config, weights, folder, frames, progress):
    """The video of the held-out scene (reused if weights, settings and length are the same) and what it is compared with."""
    folder.mkdir(parents=True, exist_ok=True)
    codec = open_codec(config)
    model = load_model(weights)
    check_fits(model, codec, config.data.dir)
    name = next((s.name for s in read_index(config.data.dir).scenes if s.split == "val"), None)
    if name is None:
        raise UserError("the video is generated on a scene that is held out; set simulate.val_scenes to at least 1")
    scene = read_scene(config.data.dir, name)
    start, after = from_scene(scene, 1.0, config.window.conditioning)
    identity = {
        "weights": model.sha256, "autoencoder": codec.sha256, "frames": frames, "seed": config.seed, "scene": name, "description": scene["description"],
        "first": float(np.abs(start.first_latents).sum()), "generate": config.generate.to_dict(), "window": config.window.to_dict(),
    }  # fmt: skip
    identity = json.loads(json.dumps(identity, default=str))
    record = folder / "video.json"
    complete = record.exists() and all((folder / n).exists() for n in ("latents.npz", "generated.mp4", "recorded.mp4"))
    if not (complete and json.loads(record.read_text()) == identity):
        record.unlink(missing_ok=True)  # until all files are of the new video, none counts
        if progress:
            print(f"generate: {frames} frames of six views in one compiled rollout", flush=True)
        result, _ = Generator(model, config)([start], frames, config.seed)
        np.savez(folder / "latents.npz", latents=np.asarray(result.latents[0], np.float16))
        latents = np.asarray(result.latents[0])
        write_six_views(folder / "generated.mp4", decode_frames(codec, latents, progress=progress), FRAME_RATE, scale=SCALE)
        recorded = decode_frames(codec, scene["latents"][after[:frames]].swapaxes(0, 1))
        write_six_views(folder / "recorded.mp4", recorded, FRAME_RATE, scale=SCALE)
        write_atomically(record, json.dumps(identity, indent=1).encode())
    with np.load(folder / "latents.npz") as z:
        generated = np.stack(list(decode_frames(codec, z["latents"].astype(np.float32))))
    return start, scene, after, generated


def _report(config, outcome, out, clock, start, scene, after, generated, progress) -> Report:
    codec = open_codec(config)
    video = out / "video"
    recorded = np.stack(list(decode_frames(codec, scene["latents"][after[: len(generated)]].swapaxes(0, 1))))
    given = np.stack(list(decode_frames(codec, start.first_latents)))
    report = Report("MiLA on simulated streets")
    origin = "random weights" if config.train.init_from is None else "the shipped checkpoint (mila_jax/weights/MODEL_CARD.md)"
    report.add_text(
        f"A six-view video of {len(generated) / FRAME_RATE:.1f} s at 12 Hz, generated from {given.shape[0]} first frames, the waypoints and the "
        f"cameras of a held-out simulated scene ({scene['name']}: “{scene['description']}”). Training started from {origin} and went on for "
        f"{outcome.step} steps on {sum(s.split == 'train' for s in read_index(config.data.dir).scenes)} new scenes. "
        f"Strategy: {config.generate.strategy}, {config.generate.steps} steps a window."
    )
    report.add_video(video / "generated.mp4", "Generated. Front row over back row, as the car sees them.")
    report.add_video(video / "recorded.mp4", "The simulated scene itself (through the autoencoder), for comparison.")
    report.add_heading("First frames, and generated beside recorded")
    report.add_image(six_view_picture(given[-1], SCALE, labels=True), "The last given frame.")
    length = min(len(generated), len(recorded))
    at = np.unique(np.clip(np.linspace(6, length - 1, 5).astype(int), 0, length - 1))
    contact_sheet(video / "generated.png", generated[at], (at + 1) / FRAME_RATE, 1.5, "generated")
    contact_sheet(video / "recorded.png", recorded[at], (at + 1) / FRAME_RATE, 1.5, "recorded")
    report.add_image(video / "generated.png", "Generated, at several times.")
    report.add_image(video / "recorded.png", "Recorded, at the same times.")
    report.add_heading("Scores")
    report.add_table(compare(generated[:length], recorded[:length], progress=progress), caption="Fréchet distances (lower is better; not an FID; few pictures)")
    rows = agreement({"generated": generated[:length], "recorded": recorded[:length]}, start)
    report.add_table(rows, caption="Agreement of neighbouring views where they overlap, beside a wrong pairing of cameras")
    images = held_out_images(config.data.nuscenes, config.data.version, config.data.image_size)
    psnr, back = reconstruction(codec, images)
    pairs = np.concatenate([np.concatenate(list(x[:6]), 1) for x in (images, back)], 0)
    report.add_image(pairs, f"Autoencoder: images above, reconstructions below; PSNR {psnr:.1f} dB on {len(images)} held-out images.")
    report.add_heading("Training")
    metrics = read_metrics(config.train.dir)
    report.add_curve({"loss": [(m["step"], m["loss"]) for m in metrics if "loss" in m]}, "Training loss (velocity, masked mean)")
    levels = [m for m in metrics if "eval/loss" in m]
    if levels:
        points = [(float(k.rsplit("_", 1)[1]), v) for k, v in levels[-1].items() if k.startswith("eval/loss_at_")]
        report.add_curve({f"step {levels[-1]['step']}": points}, "Held-out loss by noise level (0 clean, 1 noise)")
    report.add_heading("Time and settings")
    known = clock.read()
    report.add_table([[k, v] for k, v in known.items()] + [["sum", sum(known.values())]], ["phase", "seconds"], "Wall time (the report's own phase not included)")
    report.add_text(f"Sampler: {sampler_options(load_model(outcome.model), config)}")
    report.add_code(json.dumps(json.loads(config.to_json()), indent=1), "Configuration")
    return report
