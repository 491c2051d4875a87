"""nuScenes scenes as six camera tracks, and as instants: moments at which all six cameras have a frame.

Records are ordered by time per camera. The prev/next chains say the same, and a sweep's sample_token names the sample after it,
so it is used for nothing but finding the scene. Each camera record carries its own ego pose.
"""

import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.nuscenes import splits
from data_pipeline.nuscenes.tables import Tables
from mila_jax.errors import UserError
from mila_jax.views import VIEWS, view_index

REFERENCE = "CAM_FRONT"
HALF_FRAME_US = 1_000_000 / 24


@dataclasses.dataclass(frozen=True)
class Track:
    """All n records of one camera in one scene, by time."""

    timestamps_us: np.ndarray  # int64 [n]
    key: np.ndarray  # bool [n]
    samples: list[str]  # sample token of each record
    files: list[str]  # relative to the data set's root
    intrinsics: np.ndarray  # float64 [n, 4]: fx, fy, cx, cy as fractions of width and height
    cam2ego_translation: np.ndarray  # float64 [n, 3] metres
    cam2ego_rotation: np.ndarray  # float64 [n, 4] w first
    ego_translation: np.ndarray  # float64 [n, 3] metres
    ego_rotation: np.ndarray  # float64 [n, 4] w first


@dataclasses.dataclass(frozen=True)
class Scene:
    """One scene: text, split ("train", "val" or "test") and a track per camera name."""

    name: str
    token: str
    description: str
    location: str
    split: str
    tracks: dict[str, Track]


@dataclasses.dataclass(frozen=True)
class NuScenes:
    """A data set on disk: its root folder, version and scenes in the order of the scene table."""

    root: Path
    version: str
    scenes: list[Scene]


@dataclasses.dataclass(frozen=True)
class Instant:
    """One moment with all six cameras, VIEWS order; `timestamp_us` is CAM_FRONT's, every record has its own pose."""

    timestamp_us: int
    files: tuple[str, ...]
    timestamps_us: np.ndarray  # int64 [6]
    intrinsics: np.ndarray  # float64 [6, 4] fractions
    cam2ego_translation: np.ndarray  # float64 [6, 3]
    cam2ego_rotation: np.ndarray  # float64 [6, 4]
    ego_translation: np.ndarray  # float64 [6, 3]
    ego_rotation: np.ndarray  # float64 [6, 4]


def open_nuscenes(root, version: str) -> NuScenes:
    """Reads the tables of `root`/`version` (the images are not touched).

    Raises UserError naming the folder, file, field or token: no such root or version, a missing table, invalid JSON, a row
    with a missing field, a token that points nowhere, a scene without one of the cameras or without a split.
    """
    root = Path(root)
    folder = root / version
    if not root.is_dir():
        raise UserError(f"{root} is no folder: give the nuScenes root, the folder that holds samples/, sweeps/ and {version}/")
    if not folder.is_dir():
        found = sorted(p.parent.name for p in root.glob("*/sample_data.json"))
        raise UserError(f"{folder} is missing; versions in {root}: {', '.join(found) or 'none'}")
    tables = Tables(folder)
    records: dict[str, dict[str, list]] = {row.token: {name: [] for name in VIEWS} for row in tables.rows["scene"]}
    for row in tables.rows["sample_data"]:
        calibration = tables.follow(row, "calibrated_sensor", "calibrated_sensor_token")
        channel = tables.follow(calibration, "sensor", "sensor_token").channel
        if channel not in VIEWS:
            continue
        sample = tables.follow(row, "sample", "sample_token")
        records[tables.follow(sample, "scene", "scene_token").token][channel].append(row)
    split_of = splits.split_of_scenes(folder, version, [row.name for row in tables.rows["scene"]])
    scenes = []
    for row in tables.rows["scene"]:
        for channel, found in records[row.token].items():
            if not found:
                raise UserError(f"{folder}/sample_data.json: scene {row.name!r} has no record of {channel}; all six cameras are needed")
        tracks = {channel: make_track(tables, found) for channel, found in records[row.token].items()}
        location = tables.follow(row, "log", "log_token").location
        scenes.append(Scene(row.name, row.token, row.description, location, split_of[row.name], tracks))
    return NuScenes(root, version, scenes)


def make_track(tables: Tables, rows: list) -> Track:
    """Sorts one camera's sample_data rows by time and gathers calibration and poses."""
    rows = sorted(rows, key=lambda r: r.timestamp)
    calibrations = [tables.follow(r, "calibrated_sensor", "calibrated_sensor_token") for r in rows]
    poses = [tables.follow(r, "ego_pose", "ego_pose_token") for r in rows]
    return Track(
        timestamps_us=np.array([r.timestamp for r in rows], np.int64),
        key=np.array([r.is_key_frame for r in rows]),
        samples=[r.sample_token for r in rows],
        files=[r.filename for r in rows],
        intrinsics=np.array([fractions(tables, r, c) for r, c in zip(rows, calibrations)]),
        cam2ego_translation=np.array([c.translation for c in calibrations]),
        cam2ego_rotation=np.array([c.rotation for c in calibrations]),
        ego_translation=np.array([p.translation for p in poses]),
        ego_rotation=np.array([p.rotation for p in poses]),
    )


def fractions(tables: Tables, row, calibration) -> tuple[float, float, float, float]:
    """fx, fy, cx, cy of a camera matrix as fractions of the record's width and height."""
    k = calibration.camera_intrinsic
    if len(k) != 3 or any(len(line) != 3 for line in k) or row.width < 1 or row.height < 1:
        raise UserError(
            f"{tables.folder}/sample_data.json: camera record {row.token!r} has no image size, or its calibrated_sensor "
            f"{calibration.token!r} no 3x3 camera_intrinsic"
        )
    return k[0][0] / row.width, k[1][1] / row.height, k[0][2] / row.width, k[1][2] / row.height


def firing_offset(track: Track, reference: Track) -> float:
    """Microseconds from the reference camera's firing to this one's: the median over the samples that both have."""
    time_of = {s: t for s, t, k in zip(reference.samples, reference.timestamps_us, reference.key) if k}
    offsets = [t - time_of[s] for s, t, k in zip(track.samples, track.timestamps_us, track.key) if k and s in time_of]
    return float(np.median(offsets)) if offsets else 0.0


def instants(scene: Scene) -> list[Instant]:
    """The scene's instants by time, at about 12 Hz.

    For each CAM_FRONT record, each other camera's record nearest to the time at which it should have fired: the cameras of one
    turn fire up to 35 ms after CAM_FRONT while frames can be 50 ms apart, so the nearest record to CAM_FRONT's own time could
    be the one before, and the same image would appear in two instants. Farther than half a frame (1/24 s) is missing; instants
    with a missing camera are left out.
    """
    reference = scene.tracks[REFERENCE]
    times = reference.timestamps_us
    chosen = np.zeros((len(times), len(VIEWS)), np.int64)
    complete = np.ones(len(times), bool)
    for v, name in enumerate(VIEWS):
        track = scene.tracks[name]
        expected = times + firing_offset(track, reference)
        chosen[:, v] = nearest(track.timestamps_us, expected)
        complete &= np.abs(track.timestamps_us[chosen[:, v]] - expected) <= HALF_FRAME_US
    return [make_instant(scene, chosen[i]) for i in np.flatnonzero(complete)]


def nearest(sorted_times, wanted):
    """Index into `sorted_times` [n] of the entry nearest to each of `wanted` [...]; the earlier one of two equally near."""
    after = np.clip(np.searchsorted(sorted_times, wanted), 1, max(len(sorted_times) - 1, 1))
    before = after - 1
    after = np.minimum(after, len(sorted_times) - 1)
    return np.where(np.abs(sorted_times[after] - wanted) < np.abs(wanted - sorted_times[before]), after, before)


def make_instant(scene: Scene, chosen) -> Instant:
    """Gathers record `chosen[v]` of each camera v."""
    picks = [(scene.tracks[name], i) for name, i in zip(VIEWS, chosen)]

    def gather(field):
        return np.stack([getattr(track, field)[i] for track, i in picks])

    fields = ("timestamps_us", "intrinsics", "cam2ego_translation", "cam2ego_rotation", "ego_translation", "ego_rotation")
    values = {field: gather(field) for field in fields}
    front = int(values["timestamps_us"][view_index(REFERENCE)])
    return Instant(timestamp_us=front, files=tuple(track.files[i] for track, i in picks), **values)


def load_image(path, height: int, width: int) -> np.ndarray:
    """Decodes a JPEG to uint8 [height, width, 3].

    Images of another size are shrunk first in the JPEG's own blocks (`draft`, several times faster than a full decode) and then
    resized bicubically. Raises UserError naming the file when it is missing or broken.
    """
    try:
        with Image.open(path) as image:
            if image.size != (width, height):
                # Not below twice the target: the block-wise shrink aliases more than the bicubic step after it.
                image.draft("RGB", (width * 2, height * 2))
            image = image.convert("RGB")
            if image.size != (width, height):
                image = image.resize((width, height), Image.Resampling.BICUBIC)
            return np.asarray(image)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: unpack all image archives of this nuScenes version") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} is not a readable JPEG ({error}); replace the file") from None
