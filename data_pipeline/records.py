"""One record per instant: what is in it, and how it lies on disk.

ArrayRecord shards with TensorFlow Datasets metadata (no TensorFlow needed), so that `tfds.builder_from_directory` reads the
folder too:

    <dir>/<split>-<number>.array_record        one shard per scene
    <dir>/<split>-<number>.array_record.json   written last: the shard is complete, and this is its part of the index
    <dir>/dataset_info.json, features.json     TFDS metadata
    <dir>/index.json, text.npz                 scenes, timestamps, sizes, normalisation; text tokens per scene
"""

import bisect
import collections
import concurrent.futures
import contextlib
import io
import math
import re
import threading
import zipfile
from pathlib import Path

import msgspec
import numpy as np

from data_pipeline.example import Layout, parse_example
from data_pipeline.storage import Folder, is_remote
from mila_jax.errors import UserError

FORMAT = 1
# One record per group gives random access; uncompressed, since half-precision latents shrink by 8 % and read 2.5x slower.
WRITER_OPTIONS = "group_size:1,uncompressed"
# Records in one buffer are read at once by the calling thread, others by array_record's pool of 64 threads, whose search for work costs three
# times the reading itself. From a bucket the pool pays: the records of a clip come side by side.
READER_OPTIONS = {"local": "readahead_buffer_size:1G", "remote": "readahead_buffer_size:0"}
# Shards of a split that are open at once, each with a file descriptor; a process may often have no more than 1,024. One on a disk opens in 0.1 ms;
# one in a bucket takes round trips.
OPEN_SHARDS = {"local": 64, "remote": 512}
PIECE = 2**19  # bytes read from a disk in one call
DATASET_NAME = "instants"
FILENAME_TEMPLATE = "{SPLIT}-{SHARD_INDEX}.{FILEFORMAT}"
AGAIN = "run `mila prepare` again"
SYSTEM_CALL = re.compile(r"\w+\(\) failed: ")  # begins what ArrayRecord says when the system, not the file's content, is at fault


def record_fields(latent_shape, foreground: bool = False) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Name → (dtype, shape) of what a record holds; latent_shape (h, w, c).

    Latents are normalised; poses as in nuScenes (metres, w first); `scene`, `instant`: numbers in the index; `foreground`, in data sets that
    have it: how much of each place vehicles cover (data_pipeline/foreground.py).
    """
    shapes = {
        "latents": (np.float16, (6, *latent_shape)),
        "timestamps": (np.int64, (6,)),
        "intrinsics": (np.float32, (6, 4)),
        "cam2ego_translation": (np.float32, (6, 3)),
        "cam2ego_rotation": (np.float32, (6, 4)),
        "ego_translation": (np.float64, (6, 3)),
        "ego_rotation": (np.float64, (6, 4)),
        "scene": (np.int64, ()),
        "instant": (np.int64, ()),
    }
    if foreground:
        shapes["foreground"] = (np.uint8, (6, *latent_shape[:2]))
    return {name: (np.dtype(dtype), shape) for name, (dtype, shape) in shapes.items()}


def has_foreground(meta: dict) -> bool:
    """Whether the records of a data set with this `meta` tell where vehicles are."""
    return "foreground" in meta


def make_features(latent_shape, foreground: bool = False):
    """TFDS features of a record; arguments as of `record_fields`."""
    import tensorflow_datasets as tfds

    def feature(dtype, shape):
        if not shape:
            return tfds.features.Scalar(dtype.type)
        return tfds.features.Tensor(shape=shape, dtype=dtype.type, encoding="bytes")

    return tfds.features.FeaturesDict({name: feature(*field) for name, field in record_fields(latent_shape, foreground).items()})


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
    token: str = ""  # nuScenes' of the scene; "" where an earlier version wrote the index


class Index(msgspec.Struct):
    """index.json: what a reader must know before it opens a shard."""

    format: int
    latent_shape: tuple[int, int, int]
    image_size: tuple[int, int]
    latent_shift: list[float]
    latent_scale: list[float]
    meta: dict
    scenes: list[SceneIndex]


def check_open_files(path, error: BaseException) -> None:
    """Raises a `UserError` if `error` is that no more files can be opened: it says nothing about the file at `path`."""
    if "Too many open files" in str(error):  # Python's, ArrayRecord's, and also how the text begins when the whole machine has too many
        raise UserError(f"{path} cannot be opened: too many files are open; raise their number (`ulimit -n 8192`) and start again") from error


def read_index(directory) -> Index:
    """The index of an encoded data set. UserError: no such folder, not finished, or index.json broken or of another format."""
    folder = Folder(directory)
    path = folder.at("index.json")
    try:
        index = msgspec.json.decode(folder.read("index.json"), type=Index)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} is missing: {directory} holds no finished encoded data set; {AGAIN}") from None
    except (msgspec.DecodeError, OSError) as error:
        check_open_files(path, error)
        raise UserError(f"{path} cannot be read ({error}); {AGAIN}") from None
    if index.format != FORMAT:
        raise UserError(f"{path} has format {index.format}, this version reads {FORMAT}; {AGAIN}")
    return index


def read_text(directory, scenes: int, rows=None):
    """Text tokens [n, L, E] and mask bool [n, L] from text.npz; UserError when broken, or not of `scenes` scenes.

    rows: numbers [n] of the wanted scenes in the index, None = all. Tokens are float16 where the file holds that, else float32.
    """
    folder = Folder(directory)
    path = folder.at("text.npz")
    try:
        opened = io.BytesIO(folder.read("text.npz")) if folder.remote else path.open("rb")
        with opened, np.load(opened) as file:
            tokens, mask = file["tokens"], file["mask"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        check_open_files(path, error)
        raise UserError(f"{path} cannot be read ({error}); {AGAIN}") from None
    if len(tokens) != scenes or tokens.shape[:2] != mask.shape:
        raise UserError(f"{path} holds text of {len(tokens)} scenes, index.json lists {scenes}; {AGAIN}")
    if rows is not None:
        tokens, mask = tokens[np.asarray(rows, int)], mask[np.asarray(rows, int)]
    return tokens if tokens.dtype == np.float16 else tokens.astype(np.float32), mask.astype(bool)


class SplitReader:
    """Random access to the records of one split; record numbers run over `scenes` in order. Thread-safe.

    Shards open when needed; those used last stay open, at most `OPEN_SHARDS` of them.
    """

    def __init__(self, directory, index: Index, split: str):
        self.directory = Folder(directory)
        self.numbers = [i for i, s in enumerate(index.scenes) if s.split == split]  # of each scene in the index: its row in text.npz
        self.scenes = [index.scenes[i] for i in self.numbers]
        self.first = np.cumsum([0] + [len(s.timestamps_us) for s in self.scenes])  # number of each scene's first record
        self.fields = record_fields(index.latent_shape, has_foreground(index.meta))
        self._bounds = self.first.tolist()
        self._piece = max(1, PIECE // sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.fields.values()))
        self._layouts: dict[int, Layout] = {}  # by a record's length
        self._readers: collections.OrderedDict = collections.OrderedDict()  # of scenes; the one used last is last
        self._lock = threading.Lock()

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_readers")}

    def __setstate__(self, state):
        self.__dict__.update(state, _lock=threading.Lock(), _readers=collections.OrderedDict())

    def read(self, numbers) -> list[bytes]:
        """Serialised records by number; UserError naming the shard when one cannot be read."""
        return list(self.stream([int(n) for n in numbers]))

    def stream(self, numbers: list[int]):
        """`read` bit by bit: what is used and dropped at once stays in the processor's cache, and in memory that the process has."""
        start, remote = 0, self.directory.remote
        while start < len(numbers):
            scene = bisect.bisect_right(self._bounds, numbers[start]) - 1
            first, last, end = self._bounds[scene], self._bounds[scene + 1], start + 1
            while end < len(numbers) and first <= numbers[end] < last and (remote or numbers[end] - numbers[start] == end - start < self._piece):
                end += 1
            with self._naming(scene):
                found = self._reader(scene).read([n - first for n in numbers[start:end]])
            yield from found
            start = end

    def read_arrays(self, clips, latents, read=None) -> dict[str, np.ndarray]:
        """Reads clips of n records each and takes them apart; a clip's latents are copied while the processor's cache still has them.

        clips: lists of record numbers [b][n]; latents: writable [b, 6, n, h, w, c], filled; read: in place of `self.stream`. Returns the
        other fields [b, n, *shape], but for `scene` and `instant`. UserError naming the shard for a record that is damaged.
        """
        count, place = latents.shape[2], 0
        places: dict[int, list[int]] = {}  # by length: numbers take one byte or two, so there are a few
        rests: dict[int, list[bytes]] = {}
        for clip, target in zip(clips, latents):
            for j, data in enumerate((read or self.stream)(clip)):
                size = len(data)
                if size not in rests:
                    self._learn(clip[j], data)
                    places[size], rests[size] = [], []
                layout = self._layouts[size]
                target[:, j] = layout.view(data)
                places[size].append(place)  # no tuples: so many would set off Python's garbage collector
                rests[size].append(layout.rest(data))
                place += 1
        out = {name: np.empty((place, *shape), dtype) for name, (dtype, shape) in self.fields.items() if shape and name != "latents"}
        for size, mine in places.items():
            found = self._layouts[size].parse(rests[size])
            if found is None:
                found = self._walk([(clips[p // count][p % count], latents[p // count, :, p % count]) for p in mine])
            for name, values in found.items():
                out[name][mine] = values
        return {name: values.reshape(-1, count, *values.shape[1:]) for name, values in out.items()}

    def _learn(self, number: int, data: bytes) -> None:
        """Sets the layout of records as long as `data`."""
        if len(data) not in self._layouts:
            with self._naming(bisect.bisect_right(self._bounds, number) - 1):
                self._layouts[len(data)] = Layout(data, self.fields, "latents")

    def _walk(self, wanted) -> dict[str, np.ndarray]:
        """`read_arrays` for (number, place of its latents) of records whose fields lie in different orders, or that are damaged."""
        rows = []
        for number, target in wanted:
            (data,) = self.read([number])
            with self._naming(bisect.bisect_right(self._bounds, number) - 1):
                rows.append(parse_example(data, self.fields))
            target[...] = rows[-1].pop("latents")
        return {name: np.stack([row[name] for row in rows]) for name in rows[0] if rows[0][name].ndim}

    @contextlib.contextmanager
    def _naming(self, scene: int):
        """Turns whatever a shard raises that is damaged, or that cannot be opened, into a UserError that names it."""
        try:
            yield
        except Exception as error:  # ArrayRecord raises many types for a damaged file
            with self._lock:
                self._readers.pop(scene, None)  # it opened its file once and for all, or did not
            path = self.directory.at(self.scenes[scene].shard)
            check_open_files(path, error)
            lines = str(error).strip().splitlines()
            reason = lines[0][:120] if lines else type(error).__name__
            # What a bucket's client says has no one form; of a file's content its format, Riegeli, speaks.
            client = self.directory.remote and isinstance(error, RuntimeError) and "Riegeli" not in str(error)
            if client or isinstance(error, OSError) or SYSTEM_CALL.match(reason):
                raise UserError(f"{path} cannot be read ({reason}); check that it is there and that you may read it") from error
            raise UserError(f"{path} is damaged ({reason}); delete it and {AGAIN}") from error

    def _reader(self, scene: int):
        """The open shard of a scene. Whoever still reads from one that has to make room keeps it open: it closes with its last reference."""
        from array_record.python.array_record_module import ArrayRecordReader

        where = "remote" if self.directory.remote else "local"
        with self._lock:
            if scene not in self._readers:
                path = str(self.directory.at(self.scenes[scene].shard))
                self._readers[scene] = ArrayRecordReader(path, options=READER_OPTIONS[where])
            self._readers.move_to_end(scene)
            while len(self._readers) > OPEN_SHARDS[where]:
                self._readers.popitem(last=False)
            return self._readers[scene]

    def release(self) -> None:
        """Closes the open shards of a disk: they open again in no time. Those of a bucket stay open."""
        if not self.directory.remote:
            with self._lock:
                self._readers.clear()


def open_split(directory, split: str) -> tuple[Index, SplitReader]:
    """Opens the shards of `split`, checks each one's size and reads one record of each.

    directory: a folder, or a gs:// address. Raises UserError naming the file: no such split, a missing, truncated or damaged shard.
    """
    if is_remote(directory) and not str(directory).startswith("gs://"):
        raise UserError(f"{directory}: shards are read from local folders and gs:// only; copy the data set to one of them")
    index = read_index(directory)
    reader = SplitReader(directory, index, split)
    if not reader.scenes:
        found = sorted({s.split for s in index.scenes})
        raise UserError(f"{directory} has no split {split!r}, only {', '.join(found)}")
    with concurrent.futures.ThreadPoolExecutor(16) as pool:  # one round trip to a bucket after the other would take minutes
        sizes = list(pool.map(lambda scene: _size(reader.directory, scene.shard), reader.scenes))
        for scene, size in zip(reader.scenes, sizes):
            path = reader.directory.at(scene.shard)
            if size is None:
                raise UserError(f"{path} is missing; {AGAIN}")
            if size != scene.bytes:
                raise UserError(f"{path} has {size} bytes instead of {scene.bytes}: truncated; {AGAIN}")
        scratch = np.empty((1, 6, 1, *index.latent_shape), np.float16)
        list(pool.map(lambda first: reader.read_arrays([[first]], scratch), reader.first[:-1].tolist()))
    reader.release()
    return index, reader


def _size(folder: Folder, name: str) -> int | None:
    try:
        return folder.size(name)
    except FileNotFoundError:
        return None
