"""The command `mila drift`: drift curves of generated videos beside recorded ones, as JSON and as a page."""

import hashlib
import itertools
import json
import pathlib

import numpy as np

from data_pipeline.clips import read_scene
from data_pipeline.records import read_index, write_atomically
from mila_jax.decode import open_decoder
from mila_jax.errors import UserError
from mila_jax.evaluate import drift
from mila_jax.evaluate.consistency import overlaps
from mila_jax.evaluate.egomotion import EgoMotion, following
from mila_jax.evaluate.efficientnet import FeatureExtractor
from mila_jax.evaluate.report import Report
from mila_jax.evaluate.frechet import NAME
from mila_jax.geometry import relative_waypoints
from mila_jax.generate_command import check_latents, check_single_pictures, read_generated, writable_folder
from mila_jax.prepare import open_codec
from mila_jax.preset_measures import reduced
from mila_jax.scores import FEATURE_SIZE
from mila_jax.views import view_index


def drift_command(config, folders, out, *, extractor=None, motion: bool = False, ego_motion=None) -> pathlib.Path:
    """`mila drift`: folders that `mila generate` made, against the val scenes of `data.dir`; writes drift.json and drift.html to `out`.

    Videos of one strategy are one curve; two strategies of the same drives are compared drive by drive, too. motion: read the car's motion, too, by
    `EgoMotion` of each video's rig or by `ego_motion` (see `evaluate.drift.measure`), from videos that tell their poses, whose trajectory is
    compared with the commanded one (`following`), and from recorded scenes, which tell the reader's own error; some two CPU seconds for each second
    of video. Larger pictures are reduced for it, and videos that nobody commanded a trajectory (`--waypoints=none`) are left out.
    Raises `UserError`, before anything is decoded, for a folder without a finished video or given twice, and for videos that are not of the data's
    size and autoencoder.
    """
    if config.data.dir is None:
        raise UserError("data.dir is not set; give --config.data.dir=FOLDER of an encoded data set, whose val scenes are compared with")
    index, codec = read_index(config.data.dir), open_codec(config)
    if "temporal" in index.meta:
        raise UserError(f"{config.data.dir} holds temporal latents (autoencoder.temporal); mila drift is for those of single pictures")
    if index.meta.get("autoencoder_sha256", codec.sha256) != codec.sha256:
        raise UserError(f"{config.data.dir} was encoded with another autoencoder; set autoencoder.path to that one's file")
    val = [scene for scene in index.scenes if scene.split == "val"]
    if not val:
        raise UserError(f"{config.data.dir} has no val scenes to compare with")
    short = [scene.name for scene in val if len(scene.timestamps_us) < drift.RATE]
    if short:
        raise UserError(f"{config.data.dir}: val scene {short[0]} has fewer than {drift.RATE} instants; drift needs at least a second of each")
    paths = [pathlib.Path(folder).resolve() for folder in folders]
    if twice := [str(folder) for folder, path in zip(folders, paths) if paths.count(path) > 1]:
        raise UserError(f"{twice[0]} is given {len(twice)} times; intervals need different videos, name it once")
    for folder in map(pathlib.Path, folders):
        _read(folder, codec, index.latent_shape)
    out = writable_folder(out)
    decoder = open_decoder(codec, config)
    extractor = extractor or FeatureExtractor(FEATURE_SIZE)
    recorded, strips, follow = [], None, {"recorded": []}
    for scene in val:
        scene = read_scene(config.data.dir, scene.name)
        frames = list(decoder(scene["latents"].swapaxes(0, 1)))
        strips = overlaps(*(scene[key][0] for key in ("intrinsics", "cam2ego_translation", "cam2ego_rotation")), *frames[0].shape[1:3])
        poses = waypoints_of(scene)
        estimator = _estimator(ego_motion, scene["intrinsics"][0], rig(scene)) if motion else None
        recorded.append(drift.measure(frames, extractor=extractor, strips=strips, ego_motion=estimator, poses=poses))
        if motion:
            follow["recorded"].append(_follow(recorded[-1], poses) | {"video": scene["name"]})
    groups, residuals = {}, {}
    for folder, label in zip(map(pathlib.Path, folders), labels(folders)):
        about, arrays = _read(folder, codec, index.latent_shape)
        estimator, own = None, strips
        if {"intrinsics", "extrinsics"} <= set(arrays):
            own = overlaps(arrays["intrinsics"], arrays["extrinsics"][:, :3], arrays["extrinsics"][:, 3:], *frames[0].shape[1:3])
        if motion and {"poses", "intrinsics", "extrinsics"} <= set(arrays) and about.get("waypoints") != "none":
            estimator = _estimator(ego_motion, arrays["intrinsics"], arrays["extrinsics"])
        measured = drift.measure(decoder(arrays["latents"]), extractor=extractor, strips=own, ego_motion=estimator, poses=arrays.get("poses"))
        groups.setdefault(about["strategy"], []).append((_drive(about, arrays), measured))
        if estimator is not None:
            follow.setdefault(about["strategy"], []).append(_follow(measured, arrays["poses"]) | {"video": label})
        if "anchors" in arrays:
            numbers = drift.anchor_frames(about, arrays["anchors"].shape[1])
            residuals[label] = drift.anchor_residual(arrays["anchors"], arrays["corrected"], numbers)
    # In one order of drives, so that draws of videos pair the strategies.
    groups = {name: sorted(videos, key=lambda x: x[0]) for name, videos in groups.items()}
    named = {name: drift.curves([measured for _, measured in videos], recorded) for name, videos in groups.items()}
    differences = {
        f"{b} − {a}": drift.difference(named[a], named[b])
        for a, b in itertools.combinations(sorted(groups), 2)
        if len(groups[a]) > 1 and [drive for drive, _ in groups[a]] == [drive for drive, _ in groups[b]]
    }
    kept = {"curves": named, "differences": differences, "anchor_residual": residuals, "following": follow}
    write_atomically(out / "drift.json", json.dumps(kept, indent=1).encode())
    report = Report("Drift")
    report.add_text(f"{len(folders)} generated videos beside {len(recorded)} recorded scenes (decoded from their latents).")
    for name, found in named.items():
        longest = max(len(measured["contrast"]) for _, measured in groups[name])
        if found["seconds"] < longest:
            report.add_text(f"{name}: the first {found['seconds']} s, which all {found['videos']} videos have; the longest has {longest}.")
    if len({found["videos"] for found in named.values()}) > 1:
        report.add_text(f"The strategies have different numbers of videos, and {NAME} is higher of fewer: do not compare those curves' heights.")
    if motion:
        report.add_text("Trajectory read from the video against the commanded one; the recorded rows are the reader's own error.")
        report.add_table([{"of": name} | row for name, rows in follow.items() for row in rows])
    if differences:
        report.add_text(
            "Means over the later half, second strategy less first, over the same drives, with paired 95 % intervals over drives "
            "(Student's t on bootstrap standard errors)."
        )
        report.add_table([{"of": pair, "number": name} | row for pair, rows in differences.items() for name, row in sorted(rows.items())])
    drift.add_to_report(report, named, residuals)
    return report.write(out / "drift.html")


def _estimator(given, intrinsics, extrinsics):
    """What reads the car's motion from pictures: `given`, or that of the rig on pictures of the size that it was checked at."""
    if given is not None:
        return given
    estimator = EgoMotion(intrinsics, extrinsics)
    return lambda frames: estimator(reduced(frames))


def _read(folder: pathlib.Path, codec, latent_shape) -> tuple[dict, dict]:
    """A video as of `read_generated`. Raises `UserError` for one that cannot be set beside data of `codec` and of (h, w, c)."""
    about, arrays = read_generated(folder)
    check_single_pictures(folder, about, "drift")
    check_latents(folder, about, arrays, codec, latent_shape)
    lacking = [key for key in ("strategy", *(("anchor_stride",) if "anchors" in arrays else ())) if key not in about]
    if lacking:
        raise UserError(f"{folder}: generate.json does not tell {', '.join(lacking)}; generate the video again with this version")
    if about["frames"] < drift.RATE:
        raise UserError(f"{folder} holds {about['frames']} frames; drift needs at least a second ({drift.RATE})")
    return about, arrays


def labels(folders) -> list[str]:
    """A name for each folder: its last part, or with the same one twice the whole path."""
    names = [pathlib.Path(folder).name for folder in folders]
    return [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders)]


def _drive(about, arrays) -> str:
    """What two videos must share to be compared drive by drive: first frames, poses, description, length and noise seed."""
    poses = np.asarray(arrays.get("poses", ()), np.float64).round(2)
    start = [about["scene"], about.get("time_us")] if about.get("scene") else about.get("identity", {}).get("start")
    return hashlib.sha256(json.dumps([about.get("text"), about["frames"], poses.tolist(), about.get("seed"), start]).encode()).hexdigest()


def rig(scene) -> np.ndarray:
    """[6, 7]: translations (metres) and quaternions camera → ego of a scene of `read_scene`, at its first instant."""
    return np.concatenate([scene["cam2ego_translation"][0], scene["cam2ego_rotation"][0]], -1)


def waypoints_of(scene) -> np.ndarray:
    """Poses [t, 3] of the front camera's records, relative to the first."""
    front = view_index("CAM_FRONT")
    return relative_waypoints(scene["ego_translation"][:, front], scene["ego_rotation"][:, front], 0)


def _follow(measured, poses) -> dict:
    found = measured["movements"]
    return following(found, drift.movements(np.asarray(poses)[: len(found) + 1]))
