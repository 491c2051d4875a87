"""One generated video as a scene of a nuScenes v1.0 data set: pictures, and the rows of its tables.

Cameras are those of the first frames. A video that follows a recorded drive (`Source`) keeps that scene's place in the world, so that its maps
fit, its times and the moments between its cameras' firing; keyframes are the frames nearest to annotated moments, with the recorded boxes moved
to where they are at the frame's own time. Lidar counts of boxes are the recorded ones, as readers leave out boxes without points. Any other video has ego
poses in a frame of its own, a keyframe every half second, and no boxes. LIDAR_TOP, which many readers want for its poses, has keyframe records
with files of no points.
"""

import json
import pathlib

import numpy as np
from PIL import Image

from data_pipeline.simulator import annotate, tables
from data_pipeline.simulator.scene import EPOCH, write_jpeg
from data_pipeline.simulator.tables import LIDAR, token
from mila_jax import geometry
from mila_jax.errors import UserError
from mila_jax.export_source import Source
from mila_jax.start import FRAME_RATE
from mila_jax.views import VIEWS

KEY_EVERY = 6  # frames from one keyframe to the next where nothing is recorded: 2 Hz


def write_scene(number: int, name: str, video: dict, source: Source | None, decoder, root: pathlib.Path, size) -> dict[str, list[dict]]:
    """Writes the pictures of a video and returns its rows of `tables.SCENE_TABLES`.

    number: of the scene in the export, from 1; video: folder, about, latents [v, t, h, w, c], poses [t, 3], intrinsics, extrinsics; source: the
    scene that it follows; size: (height, width) or None. Raises `UserError` for a box of a category or attribute that nuScenes does not have.
    """
    key = token("mila export", number, json.dumps(video["about"], sort_keys=True))
    count = video["latents"].shape[1]
    if source is None:
        times = (EPOCH + 86_400 * number) * 1_000_000 + np.rint(np.arange(1, count + 1) / FRAME_RATE * 1e6).astype(np.int64)
        keyframes, offsets, location, description = np.arange(0, count, KEY_EVERY), {}, tables.LOCATIONS[0], video["about"].get("text") or ""
    else:
        times, keyframes, offsets, description = source.frame_us, source.keyframes, source.offset_us, video["about"].get("text") or source.description
        location = source.location if source.location in tables.LOCATIONS else tables.LOCATIONS[0]  # readers want a map for each
    sample_us = times[keyframes] + offsets.get("sample", 0)
    samples = [token(key, "sample", k) for k in keyframes]
    rows = {table: [] for table in tables.SCENE_TABLES}
    log = f"mila-{number:04d}"
    rows["log"].append({"token": token(key, "log"), "logfile": log, "vehicle": "mila", "date_captured": "2018-07-24", "location": location})
    rows["scene"].append({
        "token": token(key, "scene"), "log_token": token(key, "log"), "nbr_samples": len(samples), "first_sample_token": samples[0],
        "last_sample_token": samples[-1], "name": name, "description": description,
    })  # fmt: skip
    rows["sample"] = [
        {"token": s, "timestamp": int(t), "prev": samples[i - 1] if i else "", "next": samples[i + 1] if i + 1 < len(samples) else "",
         "scene_token": token(key, "scene")}
        for i, (s, t) in enumerate(zip(samples, sample_us))
    ]  # fmt: skip
    sample_of = np.minimum(np.searchsorted(keyframes, np.arange(count)), len(samples) - 1)  # between keyframes the following one, as in nuScenes
    height, width = size or next(iter(decoder(video["latents"][:, :1]))).shape[1:3]
    rows["calibrated_sensor"] = _calibration(key, video, height, width)
    is_key = np.isin(np.arange(count), keyframes)
    for channel in tables.CHANNELS:
        lidar = channel == LIDAR
        kept = keyframes if lidar else np.arange(count)
        at = times[kept] + offsets.get("sample" if lidar else channel, 0)
        translation, rotation = _poses(video["poses"][kept]) if source is None else source.ego(at)
        tokens = [token(key, "data", channel, k) for k in kept]
        for i, k in enumerate(kept):
            rows["ego_pose"].append({
                "token": token(key, "pose", channel, k), "timestamp": int(at[i]), "rotation": rotation[i].tolist(), "translation": translation[i].tolist(),
            })  # fmt: skip
            rows["sample_data"].append({
                "token": tokens[i], "sample_token": samples[sample_of[k]], "ego_pose_token": token(key, "pose", channel, k),
                "calibrated_sensor_token": token(key, "calibrated", channel), "timestamp": int(at[i]), "fileformat": "pcd" if lidar else "jpg",
                "is_key_frame": bool(is_key[k]), "height": 0 if lidar else height, "width": 0 if lidar else width,
                "filename": _filename(log, channel, is_key[k], at[i]),
                "prev": tokens[i - 1] if i else "", "next": tokens[i + 1] if i + 1 < len(kept) else "",
            })  # fmt: skip
    if source is not None:
        rows["instance"], rows["sample_annotation"] = _boxes(key, source, samples, sample_us)
    for row in rows["sample_data"]:
        (root / row["filename"]).parent.mkdir(parents=True, exist_ok=True)
        if row["fileformat"] == "pcd":
            (root / row["filename"]).write_bytes(b"")
    for k, frame in enumerate(decoder(video["latents"])):
        for v, channel in enumerate(VIEWS):
            write_jpeg(root / _filename(log, channel, is_key[k], times[k] + offsets.get(channel, 0)), resized(frame[v], size), 95)
    return rows


def resized(image, size):
    """A picture uint8 [H, W, 3] at `size` (height, width); None: as it is."""
    return image if size is None else np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def _poses(poses) -> tuple[np.ndarray, np.ndarray]:
    """Translation [t, 3] and rotation [t, 4] of planar poses [t, 3]."""
    return np.stack([poses[:, 0], poses[:, 1], np.zeros(len(poses))], -1).astype(np.float64), geometry.yaw_quaternion(poses[:, 2])


def _filename(log: str, channel: str, is_key: bool, time: int) -> str:
    return f"{'samples' if is_key else 'sweeps'}/{channel}/{log}__{channel}__{time}.{'pcd.bin' if channel == LIDAR else 'jpg'}"


def _calibration(key: str, video, height: int, width: int) -> list[dict]:
    rows = []
    for v, channel in enumerate(VIEWS):
        fx, fy, cx, cy = (float(x) for x in video["intrinsics"][v] * np.array([width, height] * 2))
        rows.append({
            "token": token(key, "calibrated", channel), "sensor_token": token("sensor", channel), "translation": video["extrinsics"][v, :3].tolist(),
            "rotation": video["extrinsics"][v, 3:].tolist(), "camera_intrinsic": [[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]],
        })  # fmt: skip
    rows.append({
        "token": token(key, "calibrated", LIDAR), "sensor_token": token("sensor", LIDAR), "translation": list(annotate.LIDAR_TRANSLATION),
        "rotation": list(annotate.LIDAR_ROTATION), "camera_intrinsic": [],
    })  # fmt: skip
    return rows


def _boxes(key: str, source: Source, samples: list[str], sample_us) -> tuple[list[dict], list[dict]]:
    """Instance and sample_annotation rows of the objects that have a box at one of the keyframes."""
    instances, annotations = [], []
    for track in source.tracks:
        seen = [i for i, sample in enumerate(source.samples) if int(sample) in track.boxes]
        if not seen:
            continue
        _check_name(track.category, tables.CATEGORIES, "category")
        instance = token(key, "instance", track.token)
        tokens = [token(key, "annotation", track.token, i) for i in seen]
        for j, i in enumerate(seen):
            box = track.at(int(source.samples[i]), float(sample_us[i]))
            for name in box.attributes:
                _check_name(name, tables.ATTRIBUTES, "attribute")
            annotations.append({
                "token": tokens[j], "sample_token": samples[i], "instance_token": instance, "visibility_token": box.visibility,
                "attribute_tokens": [token("attribute", name) for name in box.attributes], "translation": box.translation.tolist(),
                "size": list(box.size), "rotation": box.rotation.tolist(), "prev": tokens[j - 1] if j else "",
                "next": tokens[j + 1] if j + 1 < len(tokens) else "", "num_lidar_pts": box.lidar_points, "num_radar_pts": box.radar_points,
            })  # fmt: skip
        instances.append({
            "token": instance, "category_token": token("category", track.category), "nbr_annotations": len(seen),
            "first_annotation_token": tokens[0], "last_annotation_token": tokens[-1],
        })  # fmt: skip
    return instances, annotations


def _check_name(name: str, known: tuple[str, ...], what: str) -> None:
    if name not in known:
        raise UserError(
            f"the recorded boxes have the {what} {name!r}, which nuScenes v1.0 does not have; take it out of {what}.json or leave out data.nuscenes"
        )
