"""The command `mila export`: generated videos for other people's tools.

`nuscenes`: a nuScenes v1.0 data set, so that detectors and planners (BEVFormer, VAD: the paper's table 7) run on generated video. Cameras are
those of the first frames, ego poses the commanded ones in a frame of the video's own, keyframes every half second. There are no boxes, so
the annotation tables are empty; LIDAR_TOP, which many readers want for its poses, has keyframe records with files of no points.

`act-bench`: the flat folder that turingmotors/ACT-Bench scores (act_bench/compute_score.py): one mp4 of the front camera for each sample, its
name ending in _ and the number of the sample, 44 frames at 10 Hz after the given ones.
"""

import json
import pathlib
import re

import numpy as np
from PIL import Image

from data_pipeline.simulator import annotate, tables
from data_pipeline.simulator.scene import EPOCH, write_jpeg
from data_pipeline.simulator.tables import LIDAR, token
from mila_jax import geometry
from mila_jax.decode import open_decoder
from mila_jax.errors import UserError
from mila_jax.evaluate.video import write_view
from mila_jax.generate_command import read_generated, writable_folder
from mila_jax.prepare import open_codec
from mila_jax.start import FRAME_RATE
from mila_jax.views import VIEWS, view_index

FORMATS = ("nuscenes", "act-bench")
VERSION = "v1.0-mila"
KEY_EVERY = 6  # frames from one keyframe to the next: 2 Hz
ACT_FRAMES, ACT_RATE = 44, 10.0
FRONT = view_index("CAM_FRONT")


def export_command(config, folders, out, *, format_: str, size: tuple[int, int] | None = None) -> pathlib.Path:
    """`mila export`: folders that `mila generate` made → a data set in `out`; returns its folder.

    size: (height, width) in pixels to which pictures are brought, None: as generated. Raises `UserError` for a folder without a finished video,
    one made before cameras were stored with it, and for ACT-Bench one whose name has no sample number or whose video is too short.
    """
    if format_ not in FORMATS:
        raise UserError(f"--format={format_} is unknown; use one of {', '.join(FORMATS)}")
    videos = [_read(pathlib.Path(folder)) for folder in folders]
    if format_ == "act-bench":
        for video in videos:
            _check_act(video)
    out = writable_folder(out)
    decoder = open_decoder(open_codec(config), config)
    if format_ == "act-bench":
        for video in videos:
            _act(video, decoder, out, size)
        return out
    if (out / VERSION / "scene.json").exists():
        raise UserError(f"{out} holds an exported data set already; choose another --out")
    partials = [_nuscenes(number, video, decoder, out, size) for number, video in enumerate(videos, 1)]
    tables.assemble(out, VERSION, partials)
    tables.write_json(out / VERSION / "splits.json", {"train": [], "val": [row["name"] for partial in partials for row in partial["scene"]]})
    return out


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) of an option such as 900x1600. Raises `UserError`."""
    match = re.fullmatch(r"(\d{2,5})[x×](\d{2,5})", text)
    if not match:
        raise UserError(f"--size={text} must be HEIGHTxWIDTH in pixels, such as 900x1600")
    return int(match[1]), int(match[2])


def _read(folder: pathlib.Path) -> dict:
    """What is known of a video: folder, about (generate.json), latents [v, t, h, w, c], poses [t, 3], intrinsics [v, 4], extrinsics [v, 7]."""
    about, arrays = read_generated(folder)
    missing = {"latents", "poses", "intrinsics", "extrinsics"} - set(arrays)
    if missing:
        raise UserError(f"{folder}/latents.npz lacks {', '.join(sorted(missing))}; generate the video again with this version")
    return {"folder": folder, "about": about, **arrays}


def _resized(image, size):
    return image if size is None else np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def _check_act(video) -> None:
    if not re.search(r"_(\d+)$", video["folder"].resolve().name):
        raise UserError(f"{video['folder']}: its name must end in _ and the number of the ACT-Bench sample, as in left_0123")
    needed = _act_frames()[-1] + 1
    if video["latents"].shape[1] < needed:
        raise UserError(f"{video['folder']} holds {video['latents'].shape[1]} frames; ACT-Bench scores {ACT_FRAMES} at 10 Hz, {needed} at 12 Hz: --seconds=4.4")


def _act_frames() -> np.ndarray:
    """The generated frames (0 = the first) nearest to ACT-Bench's times, which are counted from the first."""
    return np.rint(np.arange(ACT_FRAMES) * FRAME_RATE / ACT_RATE).astype(int)


def _act(video, decoder, out, size) -> None:
    chosen = video["latents"][:, _act_frames()]
    frames = (_resized(frame[FRONT], size) for frame in decoder(chosen))
    write_view(out / f"{video['folder'].resolve().name}.mp4", frames, ACT_RATE)


def _nuscenes(number: int, video, decoder, root: pathlib.Path, size) -> dict:
    """Writes the pictures of one scene; returns its rows of `tables.SCENE_TABLES`."""
    key = token("mila export", number, json.dumps(video["about"], sort_keys=True))
    poses, count = video["poses"], video["latents"].shape[1]
    times = (EPOCH + 86_400 * number) * 1_000_000 + np.rint(np.arange(1, count + 1) / FRAME_RATE * 1e6).astype(np.int64)
    keyframes = np.arange(0, count, KEY_EVERY)
    samples = [token(key, "sample", k) for k in keyframes]
    rows = {name: [] for name in tables.SCENE_TABLES}
    log = f"mila-{number:04d}"
    rows["log"].append({"token": token(key, "log"), "logfile": log, "vehicle": "mila", "date_captured": "2018-07-24", "location": tables.LOCATIONS[0]})
    rows["scene"].append({
        "token": token(key, "scene"), "log_token": token(key, "log"), "nbr_samples": len(samples), "first_sample_token": samples[0],
        "last_sample_token": samples[-1], "name": f"scene-{number:04d}", "description": video["about"].get("text") or "",
    })  # fmt: skip
    rows["sample"] = [
        {"token": s, "timestamp": int(times[k]), "prev": samples[i - 1] if i else "", "next": samples[i + 1] if i + 1 < len(samples) else "",
         "scene_token": token(key, "scene")}
        for i, (s, k) in enumerate(zip(samples, keyframes))
    ]  # fmt: skip
    sample_of = np.minimum(np.searchsorted(keyframes, np.arange(count)), len(samples) - 1)  # between keyframes the following one, as in nuScenes
    height, width = size or next(iter(decoder(video["latents"][:, :1]))).shape[1:3]
    rows["calibrated_sensor"] = _calibration(key, video, height, width)
    for channel in tables.CHANNELS:
        kept = keyframes if channel == LIDAR else np.arange(count)
        tokens = [token(key, "data", channel, k) for k in kept]
        for i, k in enumerate(kept):
            is_key = k % KEY_EVERY == 0
            rows["ego_pose"].append({
                "token": token(key, "pose", channel, k), "timestamp": int(times[k]), "rotation": geometry.yaw_quaternion(poses[k, 2]).tolist(),
                "translation": [float(poses[k, 0]), float(poses[k, 1]), 0.0],
            })  # fmt: skip
            rows["sample_data"].append({
                "token": tokens[i], "sample_token": samples[sample_of[k]], "ego_pose_token": token(key, "pose", channel, k),
                "calibrated_sensor_token": token(key, "calibrated", channel), "timestamp": int(times[k]), "fileformat": "pcd" if channel == LIDAR else "jpg",
                "is_key_frame": bool(is_key), "height": 0 if channel == LIDAR else height, "width": 0 if channel == LIDAR else width,
                "filename": _filename(log, channel, is_key, times[k]),
                "prev": tokens[i - 1] if i else "", "next": tokens[i + 1] if i + 1 < len(kept) else "",
            })  # fmt: skip
    for row in rows["sample_data"]:
        (root / row["filename"]).parent.mkdir(parents=True, exist_ok=True)
        if row["fileformat"] == "pcd":
            (root / row["filename"]).write_bytes(b"")
    for k, frame in enumerate(decoder(video["latents"])):
        for v, channel in enumerate(VIEWS):
            write_jpeg(root / _filename(log, channel, k % KEY_EVERY == 0, times[k]), _resized(frame[v], size), 95)
    return rows


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
