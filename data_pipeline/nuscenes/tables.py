"""The nuScenes tables as typed rows: only the fields that are needed, decoded straight from JSON.

Typed decoding matters at full size: the real sample_data table has about 2.6 million rows, which cost a generic decoder
several times the time and memory.
"""

from pathlib import Path

import msgspec

from mila_jax.errors import UserError

Numbers3 = tuple[float, float, float]
Numbers4 = tuple[float, float, float, float]


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


def read_table(folder: Path, name: str) -> list:
    """Rows of table `name` in the version folder. UserError: no such file, invalid JSON, a row with a wrong or missing field."""
    path = Path(folder) / f"{name}.json"
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[ROW_TYPES[name]])
    except FileNotFoundError:
        raise UserError(f"{path} is missing: unpack all metadata of this nuScenes version into {folder}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except msgspec.ValidationError as error:
        raise UserError(f"{path}: {error}; the table is not in the nuScenes v1.0 format, unpack it again") from None
    except msgspec.DecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}); unpack it again") from None


class Tables:
    """The tables of one version folder with their rows by token; a token that points nowhere is a UserError."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.rows = {name: read_table(self.folder, name) for name in ROW_TYPES}
        self.by_token = {name: {row.token: row for row in rows} for name, rows in self.rows.items() if name != "sample_data"}

    def follow(self, row, table: str, key: str):
        """The row of `table` that the field `key` of `row` names."""
        token = getattr(row, key)
        try:
            return self.by_token[table][token]
        except KeyError:
            origin = next(name for name, kind in ROW_TYPES.items() if isinstance(row, kind))
            raise UserError(
                f"{self.folder / origin}.json: {key} {token!r} of row {row.token!r} is not in table {table!r}; "
                "the tables do not belong together, unpack them again"
            ) from None
