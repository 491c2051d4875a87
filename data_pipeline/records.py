"""One record per instant: what is in it, and how it lies on disk.

ArrayRecord shards with TensorFlow Datasets metadata (no TensorFlow needed), so that `tfds.builder_from_directory` reads the
folder too:

    <dir>/<split>-<number>.array_record        one shard per scene
    <dir>/<split>-<number>.array_record.json   written last: the shard is complete, and this is its part of the index
    <dir>/dataset_info.json, features.json     TFDS metadata
    <dir>/index.json, text.npz                 scenes, timestamps, sizes, normalisation; text tokens per scene
"""

import dataclasses
import zipfile
from pathlib import Path

import msgspec
import numpy as np

from mila_jax.errors import UserError

FORMAT = 1
# One record per group gives random access; uncompressed, since half-precision latents shrink by 8 % and read 2.5x slower.
WRITER_OPTIONS = "group_size:1,uncompressed"
DATASET_NAME = "instants"
FILENAME_TEMPLATE = "{SPLIT}-{SHARD_INDEX}.{FILEFORMAT}"
AGAIN = "run `mila prepare` again"


def make_features(latent_shape):
    """TFDS features of a record; latent_shape (h, w, c). Latents are normalised; poses as in nuScenes (metres, w first)."""
    import tensorflow_datasets as tfds

    def tensor(dtype, *shape):
        return tfds.features.Tensor(shape=shape, dtype=dtype, encoding="bytes")

    return tfds.features.FeaturesDict(
        {
            "latents": tensor(np.float16, 6, *latent_shape),
            "timestamps": tensor(np.int64, 6),
            "intrinsics": tensor(np.float32, 6, 4),
            "cam2ego_translation": tensor(np.float32, 6, 3),
            "cam2ego_rotation": tensor(np.float32, 6, 4),
            "ego_translation": tensor(np.float64, 6, 3),
            "ego_rotation": tensor(np.float64, 6, 4),
            "scene": tfds.features.Scalar(np.int64),
            "instant": tfds.features.Scalar(np.int64),
        }
    )


def filename_template(directory, split: str):
    """Where TFDS finds the shards of `split`."""
    import tensorflow_datasets as tfds

    return tfds.core.ShardedFileTemplate(
        data_dir=str(directory), dataset_name=DATASET_NAME, split=split, filetype_suffix="array_record", template=FILENAME_TEMPLATE
    )


def shard_name(split: str, number: int) -> str:
    """File name of shard `number` of `split`, as FILENAME_TEMPLATE spells it."""
    return f"{split}-{number:05d}.array_record"


def write_atomically(path: Path, content: bytes) -> None:
    """`path` holds either its old content or all of the new one."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_bytes(content)
    partial.replace(path)


class SceneIndex(msgspec.Struct):
    """One scene in the index; also the content of a shard's own JSON file."""

    name: str
    description: str
    location: str
    split: str
    shard: str  # file name
    bytes: int  # of the shard file
    record_bytes: int  # of the serialised records
    timestamps_us: list[int]  # CAM_FRONT, one per record
    fingerprint: str  # of everything that went into the shard
    front_us: list[int] = []  # all CAM_FRONT records, also where another camera has none
    keyframes: list[int] = []  # which of those belong to annotated moments


class Index(msgspec.Struct):
    """index.json: what a reader must know before it opens a shard."""

    format: int
    latent_shape: tuple[int, int, int]
    image_size: tuple[int, int]
    latent_shift: list[float]
    latent_scale: list[float]
    meta: dict
    scenes: list[SceneIndex]


def read_index(directory) -> Index:
    """The index of an encoded data set. UserError: no such folder, not finished, or index.json broken or of another format."""
    path = Path(directory) / "index.json"
    if not path.exists():
        raise UserError(f"{path} is missing: {directory} holds no finished encoded data set; {AGAIN}")
    try:
        index = msgspec.json.decode(path.read_bytes(), type=Index)
    except (msgspec.DecodeError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}); {AGAIN}") from None
    if index.format != FORMAT:
        raise UserError(f"{path} has format {index.format}, this version reads {FORMAT}; {AGAIN}")
    return index


def read_text(directory, scenes: int):
    """Text tokens float32 [scenes, L, E] and mask bool [scenes, L] from text.npz; UserError when broken."""
    path = Path(directory) / "text.npz"
    try:
        with open(path, "rb") as handle, np.load(handle) as file:  # np.load by itself leaves a broken file open
            tokens, mask = file["tokens"], file["mask"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({error}); {AGAIN}") from None
    if len(tokens) != scenes or tokens.shape[:2] != mask.shape:
        raise UserError(f"{path} holds text of {len(tokens)} scenes, index.json lists {scenes}; {AGAIN}")
    return tokens.astype(np.float32), mask.astype(bool)


@dataclasses.dataclass(frozen=True)
class SplitReader:
    """Random access to the records of one split; record numbers run over `scenes` in order."""

    scenes: list[SceneIndex]
    numbers: list[int]  # of each scene in the index, which is its row in text.npz
    first: np.ndarray  # int64 [scenes + 1]: number of each scene's first record
    source: object  # the TFDS data source
    directory: Path

    def read(self, numbers) -> list[dict]:
        """Records as dictionaries of arrays; UserError naming the shard when one cannot be read."""
        try:
            return self.source.__getitems__([int(n) for n in numbers])
        except Exception as error:  # ArrayRecord and TFDS raise many types for a damaged file
            raise self.damaged(numbers, error) from error

    def damaged(self, numbers, error) -> UserError:
        """The error for a record that cannot be read: names the first shard that fails by itself."""
        for number in numbers:
            try:
                self.source.__getitems__([int(number)])
            except Exception as single:
                scene = self.scenes[int(np.searchsorted(self.first, number, "right")) - 1]
                reason = str(single).splitlines()[0][:120] if str(single) else type(single).__name__
                return UserError(f"{self.directory / scene.shard} is damaged ({reason}); delete it and {AGAIN}")
        return UserError(f"{self.directory}: records cannot be read ({type(error).__name__}); {AGAIN}")


def open_split(directory, split: str) -> tuple[Index, SplitReader]:
    """Opens the shards of `split`, checks each one's size and reads one record of each.

    Raises UserError naming the file: no such split, a missing, truncated or damaged shard.
    """
    import tensorflow_datasets as tfds

    directory = Path(directory)
    index = read_index(directory)
    numbers = [i for i, s in enumerate(index.scenes) if s.split == split]
    scenes = [index.scenes[i] for i in numbers]
    if not scenes:
        found = sorted({s.split for s in index.scenes})
        raise UserError(f"{directory} has no split {split!r}, only {', '.join(found)}")
    for scene in scenes:
        path = directory / scene.shard
        if not path.exists():
            raise UserError(f"{path} is missing; {AGAIN}")
        if path.stat().st_size != scene.bytes:
            raise UserError(f"{path} has {path.stat().st_size} bytes instead of {scene.bytes}: truncated; {AGAIN}")
    first = np.cumsum([0] + [len(s.timestamps_us) for s in scenes])
    try:
        source = tfds.builder_from_directory(str(directory)).as_data_source(split=split)
        count = len(source)
    except Exception as error:  # TFDS metadata or a shard's footer
        raise UserError(f"{directory} cannot be opened ({str(error).splitlines()[0][:160]}); {AGAIN}") from error
    if count != first[-1]:
        raise UserError(f"{directory}: split {split!r} has {count} records, index.json lists {first[-1]}; {AGAIN}")
    reader = SplitReader(scenes, numbers, first, source, directory)
    reader.read(first[:-1])
    return index, reader
