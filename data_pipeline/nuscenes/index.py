"""The camera records of a nuScenes version as arrays, and their copy on disk.

Reading the tables of v1.0-trainval takes half a minute; the arrays made of them are kept in one file and opened in a fraction of a
second. The copy names the size and modification time of every table that it was made from, and is made again when one differs. It
is safetensors: nothing in it is executed.
"""

import array
import contextlib
import dataclasses
import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from data_pipeline.nuscenes.tables import ROW_TYPES, dangling, stream, table_path
from mila_jax.errors import UserError
from mila_jax.views import VIEWS

FORMAT = "mila_jax.nuscenes_index/1"
# Tables below this size are read anew each time: faster than a reader would notice, and no files pile up.
WORTH_KEEPING = 16 << 20


@dataclasses.dataclass(frozen=True)
class RecordIndex:
    """All n camera records, sorted by scene (order of the scene table), camera (VIEWS) and time.

    scenes: dicts with name, token, description, location. first: int64 [scenes * 6 + 1], where each camera's records of a scene begin.
    """

    scenes: list[dict]
    sample_tokens: list[str]
    first: np.ndarray
    timestamps_us: np.ndarray  # int64 [n]
    key: np.ndarray  # bool [n]
    sample: np.ndarray  # int32 [n]: into sample_tokens
    rig: np.ndarray  # int32 [n]: into the three arrays that follow
    intrinsics: np.ndarray  # float64 [m, 4]: fx, fy, cx, cy as fractions of width and height
    cam2ego_translation: np.ndarray  # float64 [m, 3]
    cam2ego_rotation: np.ndarray  # float64 [m, 4]
    ego_translation: np.ndarray  # float64 [n, 3]
    ego_rotation: np.ndarray  # float64 [n, 4]
    names: np.ndarray  # uint8: the file names of all records, each ended by a newline
    name_first: np.ndarray  # int64 [scenes * 6 + 1]: where each camera's file names begin in `names`

    def files(self, track: int) -> list[str]:
        """File names of the records of camera `track` % 6 of scene `track` // 6."""
        block = self.names[self.name_first[track] : self.name_first[track + 1]]
        return block.tobytes().decode().split("\n")[:-1]


ARRAYS = tuple(field.name for field in dataclasses.fields(RecordIndex) if field.name not in ("scenes", "sample_tokens"))


def cache_folder() -> Path:
    """Where index copies are kept: $MILA_CACHE, else mila_jax in the user's cache folder."""
    base = os.environ.get("MILA_CACHE")
    return Path(base) if base else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mila_jax"


def cache_path(folder) -> Path:
    """The file in which the index of a version folder is kept."""
    return cache_folder() / "nuscenes" / f"{hashlib.sha256(str(Path(folder).resolve()).encode()).hexdigest()[:32]}.safetensors"


def table_state(folder) -> dict[str, list[int]]:
    """Size and modification time (ns) of every table that the index depends on; UserError for a missing one."""
    state = {}
    for name in ROW_TYPES:
        try:
            stat = table_path(folder, name).stat()
        except FileNotFoundError:
            raise UserError(f"{table_path(folder, name)} is missing: unpack all metadata of this nuScenes version into {folder}") from None
        state[name] = [stat.st_size, stat.st_mtime_ns]
    return state


def open_index(folder, worth_keeping: int = WORTH_KEEPING) -> RecordIndex:
    """The index of a version folder, from its copy when the tables are unchanged.

    worth_keeping: bytes of tables from which a copy is written. Raises UserError naming the file, field or token: a missing table,
    invalid JSON, a row with a missing field, a token that points nowhere, a scene without one of the cameras.
    """
    state = table_state(folder)
    keep = sum(size for size, _ in state.values()) >= worth_keeping
    path = cache_path(folder)
    if keep and (found := read_copy(path, state)):
        return found
    index = build_index(folder)
    if keep and state == table_state(folder):  # tables that change while they are read are not worth remembering
        write_copy(path, index, state)
    return index


def read_copy(path: Path, state: dict) -> RecordIndex | None:
    """The kept index, or None when there is none, it is damaged, or it was made from other tables."""
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT or json.loads(header["tables"]) != state:
                return None
            arrays = {name: file.get_tensor(name) for name in ARRAYS}
            return RecordIndex(json.loads(header["scenes"]), header["samples"].split(), **arrays)
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def write_copy(path: Path, index: RecordIndex, state: dict) -> None:
    """Keeps the index, all of it or nothing; a folder that cannot be written is said on stderr and is no error."""
    header = {"format": FORMAT, "tables": json.dumps(state), "scenes": json.dumps(index.scenes), "samples": " ".join(index.sample_tokens)}
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: getattr(index, name) for name in ARRAYS}, partial, header)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        print(f"the index of the nuScenes tables cannot be kept in {path.parent} ({error}); set MILA_CACHE to a writable folder", file=sys.stderr)


def build_index(folder) -> RecordIndex:
    """Reads the tables; see `open_index`."""
    folder = Path(folder)
    logs = {row.token: row for row in stream(folder, "log")}
    scenes = list(stream(folder, "scene"))
    for row in scenes:
        if row.log_token not in logs:
            raise dangling(folder, "scene", row, "log_token", "log")
    number = {row.token: i for i, row in enumerate(scenes)}
    samples = list(stream(folder, "sample"))
    for row in samples:
        if row.scene_token not in number:
            raise dangling(folder, "sample", row, "scene_token", "scene")
    found = CameraRows(folder, number, samples)
    translation, rotation = read_poses(folder, found)
    order = np.lexsort((found.timestamps, found.track))
    counts = np.bincount(found.track, minlength=6 * len(scenes))
    if not counts.all():
        scene, view = divmod(int(np.flatnonzero(counts == 0)[0]), 6)
        raise UserError(
            f"{table_path(folder, 'sample_data')}: scene {scenes[scene].name!r} has no record of {VIEWS[view]}; all six cameras are needed"
        )
    first = np.concatenate([[0], np.cumsum(counts)])
    names = ["".join([found.files[i] + "\n" for i in order[a:b]]).encode() for a, b in zip(first, first[1:])]
    pose = found.pose[order]
    return RecordIndex(
        scenes=[{"name": s.name, "token": s.token, "description": s.description, "location": logs[s.log_token].location} for s in scenes],
        sample_tokens=[row.token for row in samples],
        first=first.astype(np.int64),
        timestamps_us=found.timestamps[order],
        key=found.key[order],
        sample=found.sample[order],
        rig=found.rig[order],
        intrinsics=np.array([r[0] for r in found.rigs], np.float64).reshape(-1, 4),
        cam2ego_translation=np.array([r[1] for r in found.rigs], np.float64).reshape(-1, 3),
        cam2ego_rotation=np.array([r[2] for r in found.rigs], np.float64).reshape(-1, 4),
        ego_translation=translation[pose],
        ego_rotation=rotation[pose],
        names=np.frombuffer(b"".join(names), np.uint8),
        name_first=np.concatenate([[0], np.cumsum([len(n) for n in names])]).astype(np.int64),
    )


class CameraRows:
    """What is needed of the camera rows of sample_data, in the table's order, as columns."""

    def __init__(self, folder, scene_number: dict[str, int], samples):
        sensors = {row.token: row for row in stream(folder, "sensor")}
        calibrations, view_of = {}, {}
        for row in stream(folder, "calibrated_sensor"):
            if row.sensor_token not in sensors:
                raise dangling(folder, "calibrated_sensor", row, "sensor_token", "sensor")
            channel = sensors[row.sensor_token].channel
            calibrations[row.token] = row
            view_of[row.token] = VIEWS.index(channel) if channel in VIEWS else -1
        sample_number = {row.token: i for i, row in enumerate(samples)}
        scene_of = [scene_number[row.scene_token] for row in samples]
        columns = {name: array.array(code) for name, code in dict(timestamps="q", key="b", sample="i", rig="i", track="i", pose="i").items()}
        rig_number: dict[tuple, int] = {}
        self.files: list[str] = []
        self.rigs: list[tuple] = []  # intrinsics, translation, rotation
        self.pose_number: dict[str, int] = {}
        for row in stream(folder, "sample_data"):
            view = view_of.get(row.calibrated_sensor_token)
            if view is None:
                raise dangling(folder, "sample_data", row, "calibrated_sensor_token", "calibrated_sensor")
            if view < 0:
                continue
            sample = sample_number.get(row.sample_token)
            if sample is None:
                raise dangling(folder, "sample_data", row, "sample_token", "sample")
            key = (row.calibrated_sensor_token, row.width, row.height)
            rig = rig_number.get(key)
            if rig is None:
                calibration = calibrations[row.calibrated_sensor_token]
                rig = rig_number[key] = len(self.rigs)
                self.rigs.append((fractions(folder, row, calibration), calibration.translation, calibration.rotation))
            columns["timestamps"].append(row.timestamp)
            columns["key"].append(row.is_key_frame)
            columns["sample"].append(sample)
            columns["rig"].append(rig)
            columns["track"].append(6 * scene_of[sample] + view)
            columns["pose"].append(self.pose_number.setdefault(row.ego_pose_token, len(self.pose_number)))
            self.files.append(row.filename)
        self.timestamps, self.sample, self.rig, self.track, self.pose = (
            np.array(columns[name]) for name in ("timestamps", "sample", "rig", "track", "pose")
        )
        self.key = np.array(columns["key"]).astype(bool)


def read_poses(folder, found: CameraRows) -> tuple[np.ndarray, np.ndarray]:
    """Translation [p, 3] and rotation [p, 4] of every ego pose that a camera row names; the others are passed over."""
    where, translations, rotations = array.array("i"), array.array("d"), array.array("d")
    for row in stream(folder, "ego_pose"):
        number = found.pose_number.get(row.token)
        if number is not None:
            where.append(number)
            translations.extend(row.translation)
            rotations.extend(row.rotation)
    place = np.array(where)
    translation, rotation = np.full((len(found.pose_number), 3), np.nan), np.full((len(found.pose_number), 4), np.nan)
    translation[place] = np.array(translations).reshape(-1, 3)
    rotation[place] = np.array(rotations).reshape(-1, 4)
    if len(np.unique(place)) < len(found.pose_number):
        lost = set(found.pose_number) - {row.token for row in stream(folder, "ego_pose")}
        row = next(row for row in stream(folder, "sample_data") if row.ego_pose_token in lost)
        raise dangling(folder, "sample_data", row, "ego_pose_token", "ego_pose")
    return translation, rotation


def fractions(folder, row, calibration) -> tuple[float, float, float, float]:
    """fx, fy, cx, cy of a camera matrix as fractions of the record's width and height."""
    k = calibration.camera_intrinsic
    if len(k) != 3 or any(len(line) != 3 for line in k) or row.width < 1 or row.height < 1:
        raise UserError(
            f"{table_path(folder, 'sample_data')}: camera record {row.token!r} has no image size, or its calibrated_sensor "
            f"{calibration.token!r} no 3x3 camera_intrinsic"
        )
    return k[0][0] / row.width, k[1][1] / row.height, k[0][2] / row.width, k[1][2] / row.height
