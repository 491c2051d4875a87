"""The boxes of one scene, from a data set's annotation tables, by object and at any time between annotated moments.

The tables are large (1.2 million boxes in v1.0-trainval) and wanted for few scenes: they are streamed, and the rows of other scenes are dropped.
"""

import dataclasses
from pathlib import Path

import msgspec
import numpy as np

from data_pipeline.nuscenes.tables import Numbers3, Numbers4, dangling, stream, table_path
from mila_jax import geometry
from mila_jax.errors import UserError

TABLES = ("category", "attribute", "instance", "sample_annotation")


class Named(msgspec.Struct, gc=False):
    """A category or an attribute."""

    token: str
    name: str


class Instance(msgspec.Struct, gc=False):
    """One object in one scene."""

    token: str
    category_token: str


class SampleAnnotation(msgspec.Struct, gc=False):
    """An object's box at one sample: metres, quaternion w first, in the world; size is width, length, height."""

    token: str
    sample_token: str
    instance_token: str
    attribute_tokens: list[str]
    translation: Numbers3
    size: Numbers3
    rotation: Numbers4
    num_lidar_pts: int
    num_radar_pts: int
    visibility_token: str | None = None


@dataclasses.dataclass(frozen=True)
class Box:
    """An object at one moment. attributes: names; visibility: nuScenes' level "1" to "4", "" where it is not told."""

    translation: np.ndarray  # float64 [3]
    rotation: np.ndarray  # float64 [4], w first
    size: Numbers3
    attributes: tuple[str, ...]
    visibility: str
    lidar_points: int
    radar_points: int


@dataclasses.dataclass(frozen=True)
class BoxTrack:
    """An object's boxes: by number of the sample in its scene, with the sample's time in microseconds."""

    token: str
    category: str
    boxes: dict[int, Box]
    times_us: dict[int, int]

    def at(self, sample: int, time_us: float) -> Box:
        """The box of a sample, moved along the straight line from or to that of the next sample to where it is at `time_us`.

        Beyond the object's first and last box, and where the neighbouring sample lacks it, the box stays as it was annotated.
        """
        box, own = self.boxes[sample], self.times_us[sample]
        other = sample + (1 if time_us > own else -1)
        if other not in self.boxes or time_us == own:
            return box
        share = (time_us - own) / (self.times_us[other] - own)
        to = self.boxes[other]
        moved = box.translation + share * (to.translation - box.translation)
        return dataclasses.replace(box, translation=moved, rotation=geometry.interpolate_rotation(box.rotation, to.rotation, share))


def has_boxes(folder) -> bool:
    """Whether a version folder has the annotation tables at all, and any box in them (v1.0-test's are empty)."""
    paths = [Path(table_path(folder, name)) for name in TABLES]
    return all(path.exists() for path in paths) and paths[-1].stat().st_size > len("[]\n")


def read_box_tracks(folder, sample_tokens, sample_times_us) -> list[BoxTrack]:
    """The objects with boxes at these samples of one scene, in the order of their first boxes in the table.

    folder: of a version's tables; sample_tokens: in the order of time; sample_times_us: microseconds of each. Raises `UserError` naming the
    table: missing, broken, or with a token that points nowhere.
    """
    number = {token: i for i, token in enumerate(sample_tokens)}
    rows = [row for row in stream(folder, "sample_annotation", SampleAnnotation) if row.sample_token in number]
    wanted = {row.instance_token for row in rows}
    instances = {row.token: row for row in stream(folder, "instance", Instance) if row.token in wanted}
    categories, attributes = ({row.token: row.name for row in stream(folder, name, Named)} for name in ("category", "attribute"))
    tracks: dict[str, BoxTrack] = {}
    for row in rows:
        if row.instance_token not in tracks:
            instance = instances.get(row.instance_token)
            if instance is None:
                raise dangling(folder, "sample_annotation", row, "instance_token", "instance")
            if instance.category_token not in categories:
                raise dangling(folder, "instance", instance, "category_token", "category")
            tracks[row.instance_token] = BoxTrack(row.instance_token, categories[instance.category_token], {}, {})
        if lost := set(row.attribute_tokens) - set(attributes):
            raise UserError(
                f"{table_path(folder, 'sample_annotation')}: attribute_tokens of row {row.token!r} name {min(lost)!r}, which is not in table "
                "'attribute'; the tables do not belong together, unpack them again"
            )
        track, sample = tracks[row.instance_token], number[row.sample_token]
        track.times_us[sample] = int(sample_times_us[sample])
        track.boxes[sample] = Box(
            np.array(row.translation), np.array(row.rotation), row.size, tuple(attributes[a] for a in row.attribute_tokens),
            row.visibility_token or "", row.num_lidar_pts, row.num_radar_pts,
        )  # fmt: skip
    return list(tracks.values())
