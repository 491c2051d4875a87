"""The nuScenes tables as typed rows: only the fields that are needed, decoded straight from JSON.

At full size sample_data and ego_pose have 2.6 million rows each, so those are never in memory as objects: `stream` maps the file,
finds where each row lies and decodes one row at a time.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path

import msgspec

from mila_jax.errors import UserError

Numbers3 = tuple[float, float, float]
Numbers4 = tuple[float, float, float, float]
SMALL = 1 << 20  # bytes up to which a file is read instead of mapped (an empty one cannot be mapped)


class Sensor(msgspec.Struct, gc=False):
    """A place on the car: `channel` is the camera's name."""

    token: str
    channel: str
    modality: str


class CalibratedSensor(msgspec.Struct, gc=False):
    """Where a sensor sits (metres, quaternion w first, sensor to ego) and a camera's matrix in pixels."""

    token: str
    sensor_token: str
    translation: Numbers3
    rotation: Numbers4
    camera_intrinsic: list[list[float]]


class EgoPose(msgspec.Struct, gc=False):
    """The car in the world at one record's time (metres, quaternion w first, ego to world)."""

    token: str
    translation: Numbers3
    rotation: Numbers4


class Log(msgspec.Struct, gc=False):
    """One drive; `location` is the map's name."""

    token: str
    location: str


class Scene(msgspec.Struct, gc=False):
    """About 20 s of a log."""

    token: str
    log_token: str
    first_sample_token: str
    name: str
    description: str


class Sample(msgspec.Struct, gc=False):
    """One annotated moment at about 2 Hz (timestamp in microseconds)."""

    token: str
    timestamp: int
    scene_token: str


class SampleData(msgspec.Struct, gc=False):
    """One file of one sensor (timestamp in microseconds; a sweep's sample is the following one)."""

    token: str
    sample_token: str
    ego_pose_token: str
    calibrated_sensor_token: str
    timestamp: int
    is_key_frame: bool
    height: int
    width: int
    filename: str


ROW_TYPES = {
    "sensor": Sensor,
    "calibrated_sensor": CalibratedSensor,
    "ego_pose": EgoPose,
    "log": Log,
    "scene": Scene,
    "sample": Sample,
    "sample_data": SampleData,
}


def table_path(folder, name: str) -> Path:
    """The file of table `name` in a version folder."""
    return Path(folder) / f"{name}.json"


def raw_rows(folder, name: str) -> list[msgspec.Raw]:
    """The rows of table `name`, not decoded. UserError: no such file, unreadable, not a JSON list."""
    path = table_path(folder, name)
    try:
        with open(path, "rb") as file:
            small = path.stat().st_size < SMALL
            content = file.read() if small else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return msgspec.json.decode(content, type=list[msgspec.Raw])
    except FileNotFoundError:
        raise UserError(f"{path} is missing: unpack all metadata of this nuScenes version into {folder}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except msgspec.ValidationError as error:
        raise UserError(f"{path}: {error}; the table is not in the nuScenes v1.0 format, unpack it again") from None
    except msgspec.DecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}); unpack it again") from None


def stream(folder, name: str, row_type=None) -> Iterator:
    """Yields the rows of table `name` as `row_type` (default: that table's). UserError as `raw_rows`, and naming a broken row."""
    raws = raw_rows(folder, name)
    decode = msgspec.json.Decoder(row_type or ROW_TYPES[name]).decode
    number, path = 0, table_path(folder, name)
    try:
        for number, raw in enumerate(raws):
            yield decode(raw)
    except msgspec.ValidationError as error:
        raise UserError(f"{path}: {error} in row [{number}]; the table is not in the nuScenes v1.0 format, unpack it again") from None
    except msgspec.DecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error} in row [{number}]); unpack it again") from None


def dangling(folder, table: str, row, key: str, target: str) -> UserError:
    """The error for a token, field `key` of `row` in `table`, that is not in table `target`."""
    return UserError(
        f"{table_path(folder, table)}: {key} {getattr(row, key)!r} of row {row.token!r} is not in table {target!r}; "
        "the tables do not belong together, unpack them again"
    )
