"""One simulated drive as nuScenes rows and files: sample times, poses, calibration, images, lidar, boxes."""

import concurrent.futures
import datetime
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.simulator import annotate, tables
from data_pipeline.simulator.tables import LIDAR, token
from data_pipeline.simulator.timing import make_schedule
from mila_jax import geometry
from mila_jax.views import VIEWS

RENDER_BYTES, BYTES_PER_PIXEL = 256 * 2**20, 11  # rendered at once; image 3, depth 4, instance 4
EPOCH = 1532402927  # 2018-07-24, when nuScenes was recorded; scenes are a day apart


def scene_name(index: int) -> str:
    """Name of the scene with the 1-based `index`."""
    return f"scene-{index:04d}"


def logfile_name(location: str, night: bool, index: int, key: str) -> tuple[str, int]:
    """nuScenes-style log name (vehicle, local start time, zone), and the scene's start in microseconds since 1970.

    `key` (hexadecimal) chooses minute, second and microsecond, so that the files of data sets made with other settings in the
    same folder have other names.
    """
    vehicle, hours = ("n015", 8) if location.startswith("singapore") else ("n008", -4)
    zone = datetime.timezone(datetime.timedelta(hours=hours))
    day = datetime.datetime.fromtimestamp(EPOCH, zone) + datetime.timedelta(days=index)
    digits = int(key, 16)
    start = day.replace(hour=20 if night else 11, minute=digits % 60, second=digits // 60 % 60)
    microseconds = int(start.timestamp()) * 1_000_000 + digits // 3600 % 1_000_000
    return f"{vehicle}-{start:%Y-%m-%d-%H-%M-%S%z}", microseconds


def write_scene(root: Path, config, index: int, world, rig, renderer) -> dict[str, list[dict]]:
    """Renders one scene, writes its images and lidar files and returns its rows (see `tables.SCENE_TABLES`)."""
    key = token(config.seed, float(config.seconds), config.height, config.width, config.jpeg_quality, index)
    rng = np.random.default_rng([config.seed, index, 12])
    schedule = make_schedule(config.seconds, rig.offset_seconds, rng)
    logfile, start = logfile_name(world.location, world.night, index, key)
    samples = [token(key, "sample", k) for k in np.flatnonzero(schedule.key)]
    rows = {name: [] for name in tables.SCENE_TABLES}
    rows["log"] = [
        {
            "token": token(key, "log"),
            "logfile": logfile,
            "vehicle": logfile[:4],
            "date_captured": logfile[5:15],
            "location": world.location,
        }
    ]
    rows["scene"] = [
        {
            "token": token(key, "scene"),
            "log_token": token(key, "log"),
            "nbr_samples": len(samples),
            "first_sample_token": samples[0],
            "last_sample_token": samples[-1],
            "name": scene_name(index),
            "description": world.description,
        }
    ]
    rows["sample"] = [
        {
            "token": samples[i],
            "timestamp": int(start + t),
            "prev": samples[i - 1] if i else "",
            "next": samples[i + 1] if i + 1 < len(samples) else "",
            "scene_token": token(key, "scene"),
        }
        for i, t in enumerate(schedule.lidar[schedule.key])
    ]
    rows["calibrated_sensor"] = calibration_rows(key, rig, config)
    files = {}
    for channel in range(len(tables.CHANNELS)):
        files[channel] = append_records(rows, key, channel, schedule, start, logfile, samples, world, config)
    keyframes = render(root, config, world, rig, renderer, schedule, files)
    seconds = schedule.lidar[schedule.key] * 1e-6
    rows["instance"], rows["sample_annotation"] = annotate.annotate(
        world.actors, seconds, world.ego_pose(seconds)[0], keyframes["instance"], keyframes["world2camera"], rig.intrinsics, samples, key
    )
    return rows


def render(root: Path, config, world, rig, renderer, schedule, files) -> dict:
    """Renders a scene and writes its JPEGs and lidar files.

    files: for each channel a dictionary from frame number to file name. Returns what the annotation of the k keyframes needs:
    instance [k, 6, H, W] and world2camera [k, 6, 4, 4].
    """
    camera2ego = geometry.transform(rig.translation, rig.quaternion)
    ego2lidar = geometry.inverse(geometry.transform(annotate.LIDAR_TRANSLATION, annotate.LIDAR_ROTATION))
    keyframes = {"instance": [], "world2camera": []}
    # A multiple of 8, since the renderer works in small fixed groups of frames.
    at_once = max(1, RENDER_BYTES // (6 * config.height * config.width * BYTES_PER_PIXEL) // 8) * 8
    for folder in {(root / name).parent for names in files.values() for name in names.values()}:
        folder.mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for first in range(0, len(schedule.key), at_once):
            chunk = slice(first, first + at_once)
            seconds = schedule.cameras[chunk] * 1e-6
            out = renderer.render(seconds)
            writes = [
                pool.submit(write_jpeg, root / files[v][first + i], out["image"][i, v], config.jpeg_quality)
                for i in range(len(seconds))
                for v in range(6)
                if first + i in files[v]
            ]
            for i in np.flatnonzero(schedule.key[chunk]):
                camera2world = np.stack([geometry.transform(*(a[0] for a in world.ego_pose(t[None]))) for t in seconds[i]]) @ camera2ego
                lidar_ego = world.ego_pose(schedule.lidar[first + i : first + i + 1] * 1e-6)
                world2lidar = ego2lidar @ geometry.inverse(geometry.transform(lidar_ego[0][0], lidar_ego[1][0]))
                points = annotate.lidar_points(out["depth"][i], world2lidar @ camera2world, rig.intrinsics)
                points.tofile(root / files[len(VIEWS)][first + i])
                keyframes["instance"].append(np.asarray(out["instance"][i]))
                keyframes["world2camera"].append(geometry.inverse(camera2world))
            for write in writes:
                write.result()
    return {name: np.stack(values) for name, values in keyframes.items()}


def write_jpeg(path: Path, image, quality: int) -> None:
    """Writes an image uint8 [H, W, 3] as JPEG; full chroma, since at small sizes halving it blurs lights and lines."""
    Image.fromarray(np.asarray(image)).save(path, quality=quality, subsampling=0)


def calibration_rows(key: str, rig, config) -> list[dict]:
    """calibrated_sensor rows of one scene: the rig's cameras in pixels of this data set's images, and the lidar."""
    rows = []
    for v, channel in enumerate(VIEWS):
        fx, fy, cx, cy = (float(x) for x in rig.intrinsics[v] * np.array([config.width, config.height] * 2))
        rows.append(
            {
                "token": token(key, "calibrated", channel),
                "sensor_token": token("sensor", channel),
                "translation": [float(x) for x in rig.translation[v]],
                "rotation": [float(x) for x in rig.quaternion[v]],
                "camera_intrinsic": [[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]],
            }
        )
    rows.append(
        {
            "token": token(key, "calibrated", LIDAR),
            "sensor_token": token("sensor", LIDAR),
            "translation": list(annotate.LIDAR_TRANSLATION),
            "rotation": list(annotate.LIDAR_ROTATION),
            "camera_intrinsic": [],
        }
    )
    return rows


def append_records(rows, key, channel_index, schedule, start, logfile, samples, world, config) -> dict[int, str]:
    """Appends the ego_pose and sample_data rows of one channel (the lidar after the six cameras) to `rows`.

    Returns the file name of each kept frame number.
    """
    channel = tables.CHANNELS[channel_index]
    lidar = channel == LIDAR
    kept = np.flatnonzero(schedule.key if lidar else ~schedule.dropped[:, channel_index])
    times = (schedule.lidar if lidar else schedule.cameras[:, channel_index])[kept]
    translation, rotation = world.ego_pose(times * 1e-6)
    # The sample a record belongs to: its own at a keyframe, the following one between keyframes.
    sample_of = np.searchsorted(np.flatnonzero(schedule.key), kept)
    tokens = [token(key, "data", channel, k) for k in kept]
    for i, k in enumerate(kept):
        stamp, is_key = int(start + times[i]), bool(schedule.key[k])
        folder, suffix = ("samples" if is_key else "sweeps"), ("pcd.bin" if lidar else "jpg")
        pose_token = token(key, "pose", channel, k)
        rows["ego_pose"].append(
            {
                "token": pose_token,
                "timestamp": stamp,
                "rotation": [float(x) for x in rotation[i]],
                "translation": [float(x) for x in translation[i]],
            }
        )
        rows["sample_data"].append(
            {
                "token": tokens[i],
                "sample_token": samples[sample_of[i]],
                "ego_pose_token": pose_token,
                "calibrated_sensor_token": token(key, "calibrated", channel),
                "timestamp": stamp,
                "fileformat": "pcd" if lidar else "jpg",
                "is_key_frame": is_key,
                "height": 0 if lidar else config.height,
                "width": 0 if lidar else config.width,
                "filename": f"{folder}/{channel}/{logfile}__{channel}__{stamp}.{suffix}",
                "prev": tokens[i - 1] if i else "",
                "next": tokens[i + 1] if i + 1 < len(kept) else "",
            }
        )
    return {int(k): row["filename"] for k, row in zip(kept, rows["sample_data"][-len(kept) :])}
