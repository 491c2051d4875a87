"""`mila demo`: the whole job on simulated streets, ending in one self-contained page.

simulate → prepare → generate → report, with the shipped weights; with `train`, simulate → prepare → train → generate → report. Each part
reuses what an earlier run finished.
"""

import contextlib
import dataclasses
import json
import pathlib
import shutil
import time
import types

import jax
import numpy as np

from data_pipeline.clips import read_scene
from data_pipeline.records import read_index, write_atomically
from data_pipeline.simulator.write import simulated_seconds
from mila_jax.choose_model import find_guide, find_weights, load_chosen, signature
from mila_jax.errors import UserError
from mila_jax.evaluate import drift
from mila_jax.evaluate.consistency import overlaps
from mila_jax.evaluate.efficientnet import FeatureExtractor
from mila_jax.evaluate.report import Report
from mila_jax.decode import deciding, deciding_window, open_decoder
from mila_jax.evaluate.video import contact_sheet, six_view_picture, write_six_views
from mila_jax.generate import check_fits, sampler_options, window_settings
from mila_jax.generate_command import generate_command, local_folder
from mila_jax.parallel.mesh import axis_sizes
from mila_jax.prepare import open_codec, prepare, simulate_from_config
from mila_jax.scores import FEATURE_SIZE, agreement, compare, held_out_images, reconstruction
from mila_jax.start import FRAME_RATE, frame_count, from_scene, instants_at
from mila_jax.train.loop import train
from mila_jax.train.metrics import read_metrics

PARTS = ("nuscenes", "encoded", "train", "video")
MARK = "timings.json"  # a folder with this file was made by a demo
MARGIN = 3.0  # seconds that the scenes are longer than the video: its first frames, and what a late instant may lack
SCALE = 2.0  # enlargement of the small images in videos and sheets
START = 1.0  # second of the scene at which the video begins
SHOWN = (1 / 12, 1 / 4, 1 / 2, 3 / 4, 1.0)  # of the video's length: 5, 15, 30, 45 and 60 s of a minute
SCORED = 240  # instants that scores of whole videos are taken of


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


def demo(config, out, *, fresh: bool = False, train_first: bool = False, seconds: float = 60.0, progress: bool = True) -> pathlib.Path:
    """Runs the demo in folder `out` and returns the path of its report.html.

    `config`: configs/demo.py or one like it; its folders are set here. `fresh`: start over. `train_first`: train a model from random weights
    (or from `train.init_from`) on the simulated scenes instead of using `generate.weights`. `seconds`: length of the generated video.
    """
    out, frames = local_folder(out), frame_count(seconds, least=4)
    config = config.copy_and_resolve_references()
    files = [] if train_first else [find_weights(config)]
    if not train_first or config.generate.guide:
        files.append(find_guide(config))
    for file in files:
        if file is not None and not file.exists():
            raise UserError(f"{file} does not exist; set generate.weights and generate.guide, run with --train, or install again")
    _claim(out, fresh)
    config.simulate.seconds = max(config.simulate.seconds, seconds + MARGIN)
    if not train_first:
        config.simulate.scenes = config.simulate.val_scenes = 1
    config.data.nuscenes, config.data.dir, config.train.dir = (str(out / part) for part in PARTS[:3])
    found = simulated_seconds(config.data.nuscenes, config.data.version)
    if found is not None and found > config.simulate.seconds:  # scenes of a longer demo hold this one, too
        config.simulate.seconds = found
    clock = Clock(out / MARK)
    with clock.phase("simulate", progress):
        simulate_from_config(config, config.data.nuscenes, progress=progress)
    with clock.phase("encode", progress):
        prepare(config, progress=progress)
    outcome = None
    if train_first:
        mesh = axis_sizes(config.mesh, jax.device_count())
        shares = mesh["data"] * mesh["fsdp"]
        config.train.batch = -(-config.train.batch // shares) * shares  # a few windows more where there are more devices
        with clock.phase("train", progress):
            outcome = train(config, progress=progress)
            if outcome.code:  # told to leave: saved, and no video of half a training
                raise KeyboardInterrupt
        config.generate.weights = str(outcome.model)
    model = load_chosen(config)
    config = window_settings(model, config)
    with clock.phase("generate", progress):
        start, scene, after = _generate(config, model, out / "video", seconds, frames, progress)
    with clock.phase("report", progress):
        path = out / "report.html"
        _report(config, model, outcome, out, clock, start, scene, instants_at(scene, after, np.arange(1, frames + 1)), progress).write(path)
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


def _generate(config, model, folder, seconds, frames, progress):
    """Makes the video of the held-out scene (kept if weights, settings and length are the same): its start, the scene, its later frames."""
    folder.mkdir(parents=True, exist_ok=True)
    codec = open_codec(config)
    check_fits(model, codec, config.data.dir)
    name = next((s.name for s in read_index(config.data.dir).scenes if s.split == "val"), None)
    if name is None:
        raise UserError("the video is generated on a scene that is held out; set simulate.val_scenes to at least 1")
    scene = read_scene(config.data.dir, name)
    start, after = from_scene(scene, START, config.window.conditioning)
    identity = {
        "weights": signature(model, config.generate), "autoencoder": codec.sha256, "frames": frames, "seed": config.seed, "scene": name, "description": scene["description"],
        "first": float(np.abs(start.first_latents).sum()), "generate": deciding(config.generate), "window": deciding_window(config.window),
    }  # fmt: skip
    identity = json.loads(json.dumps(identity, default=str))
    record = folder / "video.json"
    complete = record.exists() and all((folder / n).exists() for n in ("latents.npz", "video.mp4"))
    if not (complete and json.loads(record.read_text()) == identity):
        for path in (record, folder / "generate.json", folder / "recorded.mp4"):  # until all files are of the new video, none counts
            path.unlink(missing_ok=True)
        options = types.SimpleNamespace(
            data=config.data.dir, scene=name, start=START, seconds=seconds, out=folder, seed=config.seed, text=None, frames=None, waypoints=None,
            speed=None, explain=False, per_view=False,
        )  # fmt: skip
        generate_command(config, options, replace=True, progress=progress)  # what is unfinished of other settings is not wanted, either
        write_atomically(record, json.dumps(identity, indent=1).encode())
    if not (folder / "recorded.mp4").exists():
        shown = instants_at(scene, after, np.arange(1, frames + 1))
        recorded = open_decoder(codec, config)(scene["latents"][shown].swapaxes(0, 1))
        write_six_views(folder / "recorded.part.mp4", recorded, FRAME_RATE, scale=SCALE)
        (folder / "recorded.part.mp4").replace(folder / "recorded.mp4")
    return start, scene, after


def _report(config, model, outcome, out, clock, start, scene, after, progress) -> Report:
    codec, video = open_codec(config), out / "video"
    decoder = open_decoder(codec, config)
    with np.load(video / "latents.npz") as z:
        generated, anchors = z["latents"].astype(np.float32), {key: z[key] for key in ("anchors", "corrected") if key in z.files}
    if anchors:
        anchors["numbers"] = drift.anchor_frames(json.loads((video / "generate.json").read_text()), anchors["anchors"].shape[1])
    recorded = scene["latents"][after].swapaxes(0, 1)
    length = min(generated.shape[1], recorded.shape[1])
    given = np.stack(list(decoder(start.first_latents)))
    report = Report("MiLA on simulated streets")
    if outcome is None:
        origin = f"Weights: {find_weights(config).name}, which has never seen a street of this seed (mila_jax/weights/MODEL_CARD.md)."
    else:
        scenes = sum(s.split == "train" for s in read_index(config.data.dir).scenes)
        origin = f"Weights: trained for {outcome.step} steps on {scenes} scenes, from {config.train.init_from or 'random weights'}."
    guidance = "" if model.guide is None else f", guided by a weaker model (scale {config.generate.guidance_model:g})"
    report.add_text(
        f"A six-view video of {generated.shape[1] / FRAME_RATE:.1f} s at 12 Hz, generated from {given.shape[0]} first frames, the waypoints and the "
        f"cameras of a held-out simulated scene ({scene['name']}: “{scene['description']}”). {origin} "
        f"Strategy: {config.generate.strategy}, {config.generate.steps} steps a window{guidance}."
    )
    report.add_video(video / "video.mp4", "Generated. Front row over back row, as the car sees them.")
    report.add_video(video / "recorded.mp4", "The simulated scene itself (through the autoencoder), for comparison.")
    report.add_heading("First frames, and generated beside recorded")
    report.add_image(six_view_picture(given[-1], SCALE, labels=True), "The last given frame.")
    at = np.unique(np.clip(np.asarray(SHOWN) * length - 1, 0, length - 1).astype(int))
    for name, latents in (("generated", generated), ("recorded", recorded)):
        contact_sheet(video / f"{name}.png", np.stack(list(decoder(latents[:, at]))), (at + 1) / FRAME_RATE, 1.5, name)
        report.add_image(video / f"{name}.png", f"{name.capitalize()}, at several times.")
    report.add_heading("Scores")
    extractor = FeatureExtractor(FEATURE_SIZE)
    some = np.linspace(0, length - 1, min(length, SCORED)).astype(int)
    fake, true = (np.stack(list(decoder(latents[:, some]))) for latents in (generated, recorded))
    rows = compare(fake, true, extractor=extractor, progress=progress)
    report.add_table(rows, caption=f"Fréchet distances of {len(some)} instants (lower is better; not an FID; few pictures)")
    rows = agreement({"generated": fake, "recorded": true}, start)
    report.add_table(rows, caption="Agreement of neighbouring views where they overlap, beside a wrong pairing of cameras")
    if length >= 2 * drift.RATE:
        _add_drift(report, decoder, extractor, start, generated[:, :length], recorded[:, :length], anchors)
    images = held_out_images(config.data.nuscenes, config.data.version, config.data.image_size)
    psnr, back = reconstruction(codec, images)
    pairs = np.concatenate([np.concatenate(list(x[:6]), 1) for x in (images, back)], 0)
    report.add_image(pairs, f"Autoencoder: images above, reconstructions below; PSNR {psnr:.1f} dB on {len(images)} held-out images.")
    if outcome is not None:
        _add_training(report, read_metrics(config.train.dir))
    report.add_heading("Time and settings")
    known = clock.read()
    report.add_table(
        [[k, v] for k, v in known.items()] + [["sum", sum(known.values())]], ["phase", "seconds"], "Wall time (the report's own phase not included)"
    )
    report.add_text(f"Sampler: {sampler_options(model, config)}")
    report.add_code(json.dumps(json.loads(config.to_json()), indent=1), "Configuration")
    return report


def _add_drift(report, decoder, extractor, start, generated, recorded, anchors: dict) -> None:
    """Curves over the seconds of the video, beside the recorded one's. anchors: arguments of `drift.anchor_residual`, or empty."""
    report.add_heading("Drift")
    height, width = next(iter(decoder(generated[:, :1]))).shape[1:3]
    strips = overlaps(start.intrinsics, start.extrinsics[:, :3], start.extrinsics[:, 3:], height, width)
    fake, true = (drift.measure(decoder(latents), extractor=extractor, strips=strips) for latents in (generated, recorded))
    residuals = {"anchors": drift.anchor_residual(**anchors)} if anchors else None
    drift.add_to_report(report, {"generated": drift.curves([fake], [true])}, residuals)


def _add_training(report, metrics) -> None:
    report.add_heading("Training")
    report.add_curve({"loss": [(m["step"], m["loss"]) for m in metrics if "loss" in m]}, "Training loss (velocity, masked mean)")
    levels = [m for m in metrics if "eval/loss" in m]
    if levels:
        points = [(float(k.rsplit("_", 1)[1]), v) for k, v in levels[-1].items() if k.startswith("eval/loss_at_")]
        report.add_curve({f"step {levels[-1]['step']}": points}, "Held-out loss by noise level (0 clean, 1 noise)")
