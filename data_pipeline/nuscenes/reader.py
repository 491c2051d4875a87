"""nuScenes scenes as six camera tracks, and as instants: moments at which all six cameras have a frame.

Records are ordered by time per camera. The prev/next chains say the same, and a sweep's sample_token names the sample after it,
so it is used for nothing but finding the scene. Each camera record carries its own ego pose.
"""

import dataclasses
import functools
import hashlib
import io
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipeline.nuscenes import splits
from data_pipeline.nuscenes.index import RecordIndex, cache_folder, open_index
from data_pipeline.nuscenes.tables import ROW_TYPES
from data_pipeline.storage import Folder, is_remote, join, read_file
from mila_jax.errors import UserError
from mila_jax.views import VIEWS

REFERENCE = "CAM_FRONT"
HALF_FRAME_US = 1_000_000 / 24
RECORD_FIELDS = ("timestamps_us", "intrinsics", "cam2ego_translation", "cam2ego_rotation", "ego_translation", "ego_rotation")


@dataclasses.dataclass(frozen=True)
class Track:
    """All n records of one camera in one scene, by time: a window on the index."""

    index: RecordIndex
    number: int  # 6 * scene + view

    @functools.cached_property
    def _range(self) -> slice:
        return slice(int(self.index.first[self.number]), int(self.index.first[self.number + 1]))

    @property
    def timestamps_us(self) -> np.ndarray:
        """int64 [n]."""
        return self.index.timestamps_us[self._range]

    @property
    def key(self) -> np.ndarray:
        """bool [n]: the records that belong to an annotated moment."""
        return self.index.key[self._range]

    @property
    def sample(self) -> np.ndarray:
        """int32 [n]: row of the sample table (a sweep names the sample after it)."""
        return self.index.sample[self._range]

    @functools.cached_property
    def files(self) -> list[str]:
        """File names relative to the data set's root."""
        return self.index.files(self.number)

    @property
    def intrinsics(self) -> np.ndarray:
        """float64 [n, 4]: fx, fy, cx, cy as fractions of width and height."""
        return self.index.intrinsics[self.index.rig[self._range]]

    @property
    def cam2ego_translation(self) -> np.ndarray:
        """float64 [n, 3] metres."""
        return self.index.cam2ego_translation[self.index.rig[self._range]]

    @property
    def cam2ego_rotation(self) -> np.ndarray:
        """float64 [n, 4], w first."""
        return self.index.cam2ego_rotation[self.index.rig[self._range]]

    @property
    def ego_translation(self) -> np.ndarray:
        """float64 [n, 3] metres."""
        return self.index.ego_translation[self._range]

    @property
    def ego_rotation(self) -> np.ndarray:
        """float64 [n, 4], w first."""
        return self.index.ego_rotation[self._range]


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
    """A data set: its root (a folder, or an address in a bucket), version and scenes in the order of the scene table."""

    root: Path | str
    version: str
    scenes: list[Scene]


@dataclasses.dataclass(frozen=True)
class Instant:
    """One moment with all six cameras, VIEWS order; `timestamp_us` is CAM_FRONT's, every record has its own pose."""

    timestamp_us: int
    front: int  # number of CAM_FRONT's record in its track
    key: bool  # that record belongs to an annotated moment
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
    if is_remote(root):
        folder = fetch_tables(root, version)
    else:
        root = Path(root)
        folder = root / version
        if not root.is_dir():
            raise UserError(f"{root} is no folder: give the nuScenes root, the folder that holds samples/, sweeps/ and {version}/")
        if not folder.is_dir():
            found = sorted(p.parent.name for p in root.glob("*/sample_data.json"))
            raise UserError(f"{folder} is missing; versions in {root}: {', '.join(found) or 'none'}")
    index = open_index(folder)
    split_of = splits.split_of_scenes(folder, version, [scene["name"] for scene in index.scenes])
    scenes = []
    for number, about in enumerate(index.scenes):
        tracks = {name: Track(index, 6 * number + view) for view, name in enumerate(VIEWS)}
        scenes.append(Scene(**about, split=split_of[about["name"]], tracks=tracks))
    return NuScenes(root, version, scenes)


def version_folder(root, version: str, tables=()) -> Path:
    """The folder of a version's tables on this machine; from a bucket `tables` are copied into the cache."""
    return fetch_tables(root, version, tables) if is_remote(root) else Path(root) / version


def fetch_tables(root: str, version: str, tables=tuple(ROW_TYPES)) -> Path:
    """Copies a version's tables (and its splits.json) from a bucket into the cache, where they are up to date afterwards; that folder."""
    remote = Folder(join(root, version))
    home = cache_folder() / "nuscenes" / hashlib.sha256(str(root).encode()).hexdigest()[:32] / version
    local = Folder(home)
    local.make()
    for name in [f"{table}.json" for table in tables] + ["splits.json"]:
        try:
            state = remote.state(name).encode()
        except FileNotFoundError:
            local.remove(name)
            continue  # said by whoever needs it
        if not local.exists(name) or not local.exists(f"{name}.state") or local.read(f"{name}.state") != state:
            local.remove(f"{name}.state")
            local.write(name, remote.read(name))
            local.write(f"{name}.state", state)
    return home


def firing_offset(track: Track, reference: Track) -> float:
    """Microseconds from the reference camera's firing to this one's: the median over the samples that both have."""
    _, mine, theirs = np.intersect1d(track.sample[track.key], reference.sample[reference.key], return_indices=True)
    offsets = track.timestamps_us[track.key][mine] - reference.timestamps_us[reference.key][theirs]
    return float(np.median(offsets)) if len(offsets) else 0.0


def complete_moments(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """For each of CAM_FRONT's n records the record of every camera, int64 [n, 6], and whether all six have one, bool [n].

    For each CAM_FRONT record, each other camera's record nearest to the time at which it should have fired: the cameras of one
    turn fire up to 35 ms after CAM_FRONT while frames can be 50 ms apart, so the nearest record to CAM_FRONT's own time could
    be the one before, and the same image would appear in two instants. Farther than half a frame (1/24 s) is missing.
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
    return chosen, complete


def instants(scene: Scene) -> list[Instant]:
    """The scene's instants by time, at about 12 Hz: CAM_FRONT's records at which no camera is missing (`complete_moments`)."""
    reference = scene.tracks[REFERENCE]
    times = reference.timestamps_us
    chosen, complete = complete_moments(scene)
    moments = np.flatnonzero(complete)
    chosen = chosen[moments]
    tracks = [scene.tracks[name] for name in VIEWS]
    values = {field: np.stack([getattr(t, field)[chosen[:, v]] for v, t in enumerate(tracks)], 1) for field in RECORD_FIELDS}
    return [
        Instant(
            timestamp_us=int(times[front]),
            front=int(front),
            key=bool(reference.key[front]),
            files=tuple(t.files[n] for t, n in zip(tracks, chosen[i])),
            **{field: value[i] for field, value in values.items()},
        )
        for i, front in enumerate(moments)
    ]


def nearest(sorted_times, wanted):
    """Index into `sorted_times` [n] of the entry nearest to each of `wanted` [...]; the earlier one of two equally near."""
    after = np.clip(np.searchsorted(sorted_times, wanted), 1, max(len(sorted_times) - 1, 1))
    before = after - 1
    after = np.minimum(after, len(sorted_times) - 1)
    return np.where(np.abs(sorted_times[after] - wanted) < np.abs(wanted - sorted_times[before]), after, before)


def decode_image(path, height: int, width: int) -> np.ndarray:
    """Decodes an image to uint8 [height, width, 3]. Raises what PIL and files raise: OSError, SyntaxError, ValueError.

    Images of another size are shrunk first in a JPEG's own blocks (`draft`, several times faster than a full decode) and then
    resized bicubically.
    """
    with Image.open(io.BytesIO(read_file(path)) if is_remote(path) else path) as image:
        if image.size != (width, height):
            # Not below twice the target: the block-wise shrink aliases more than the bicubic step after it.
            image.draft("RGB", (width * 2, height * 2))
        image = image.convert("RGB")
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        return np.asarray(image)


def load_image(path, height: int, width: int) -> np.ndarray:
    """An image of a nuScenes data set, uint8 [height, width, 3] (see `decode_image`). `UserError` naming the file when it is missing or broken."""
    try:
        return decode_image(path, height, width)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: unpack all image archives of this nuScenes version") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} is not a readable image ({error}); replace the file") from None
