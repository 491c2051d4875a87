"""Clips of any rate, length and conditioning length, assembled from per-instant records without encoding again.

A clip's frames are chosen by time. Its conditioning frames lie 1/12 s apart (by default) and the last of them is at time 0;
generated frame j lies at j/fps. For each wanted time the nearest instant is taken; a start at which one of them is farther than
half a frame away (a camera missed a frame there, or the scene is over) is no start.
"""

import collections
import dataclasses
import fractions
import math
import threading
from collections.abc import Sequence

import numpy as np

from data_pipeline import records
from data_pipeline.nuscenes.reader import nearest
from mila_jax import geometry
from mila_jax.chunks import Chunks, check_window, chunks_of
from mila_jax.errors import UserError
from mila_jax.views import view_index

CONDITIONING_FPS = 12
HALF_FRAME = 1 / 24
FRONT = view_index("CAM_FRONT")


@dataclasses.dataclass(frozen=True)
class ClipSpec:
    """A kind of clip: `frames` in all, of which the first `conditioning` are clean and the others lie 1/fps s apart.

    conditioning_fps: rate of the clean frames; below 12 where they are themselves anchors (a recurrent coarse stage).
    chunks: frames are latents of a temporal autoencoder; clips then begin with the first latent of a chunk, rates below 12 are whole chunks apart.
    """

    frames: int
    conditioning: int
    fps: float
    conditioning_fps: float = CONDITIONING_FPS
    chunks: Chunks | None = None

    def numbers(self) -> np.ndarray:
        """Numbers [frames] of the latents, counted from the first one of a chunk (only with `chunks`)."""
        last = self.conditioning - 1
        frame = np.arange(self.frames) - last
        return last + frame * np.where(frame > 0, self.chunks.stride(self.fps), self.chunks.stride(self.conditioning_fps))

    @property
    def told_fps(self) -> float:
        """What the network is told: fps itself, or the exact rate of the latents that it names."""
        return self.fps if self.chunks is None else self.chunks.rate(self.chunks.stride(self.fps))

    def offsets(self) -> np.ndarray:
        """Wanted times [frames] in seconds relative to the last conditioning frame."""
        if self.chunks is not None:
            return self.chunks.seconds(self.numbers(), self.conditioning - 1)
        frame = np.arange(self.frames) - (self.conditioning - 1)
        return np.where(frame > 0, frame / self.fps, frame / self.conditioning_fps)


def find_starts(times, spec: ClipSpec, tolerance: float = HALF_FRAME) -> tuple[np.ndarray, np.ndarray]:
    """Valid clips in one scene.

    times: [n] seconds of its instants, ascending. Returns the instants [s] of the last conditioning frames, and the instants
    [s, frames] of all frames.
    """
    times = np.asarray(times, np.float64)
    wanted = times[:, None] + spec.offsets()
    chosen = nearest(times, wanted)
    # A microsecond of slack: timestamps are whole microseconds.
    valid = (np.abs(times[chosen] - wanted) <= tolerance + 1e-6).all(1) & (np.diff(chosen, axis=1) > 0).all(1)
    if spec.chunks is not None:  # scenes hold whole chunks: a latent's place in its chunk is its number's
        valid &= (chosen % spec.chunks.latents == spec.numbers() % spec.chunks.latents).all(1)
    return np.flatnonzero(valid), chosen[valid]


def longest(times_of_scenes, spec: ClipSpec, tolerance: float = HALF_FRAME) -> int:
    """The most frames (at most spec.frames) for which any scene has a start with this conditioning length and rate; 0 if none."""
    best = 0
    for times in times_of_scenes:
        for frames in range(spec.frames, best, -1):
            shorter = dataclasses.replace(spec, frames=frames, conditioning=min(spec.conditioning, frames))
            if len(find_starts(times, shorter, tolerance)[0]):
                best = frames
                break
    return best


def interleave(weights: Sequence[float]) -> list[int]:
    """A repeating pattern of positions in `weights` in which each occurs in proportion, spread evenly; at most about 60 long.

    Shares are the nearest that about 60 places can say; what has a share at all gets 1 of about 60, however small it is.
    """
    total = sum(weights)
    # Not 0/1 for a small share: with nothing else to ask for more places, its one place could be half of a short pattern.
    shares = [max(fractions.Fraction(w / total).limit_denominator(60), fractions.Fraction(w > 0, 60)) for w in weights]
    length = min(60, int(np.lcm.reduce([s.denominator for s in shares])))
    counts = [max(1, round(s * length)) if w > 0 else 0 for s, w in zip(shares, weights)]
    # Occurrence k of n sits at (k + 1/2) / n of the pattern; sorting all of them spreads each evenly.
    places = [((k + 0.5) / n, i) for i, n in enumerate(counts) for k in range(n)]
    return [i for _, i in sorted(places)]


class ClipSource:
    """Random access to all clips of some specs in one split; thread-safe, deterministic, a Grain data source.

    Item i's spec follows a fixed pattern made from the weights, so every stretch of the list is mixed as the weights say; the list
    is just long enough to hold every valid start of every spec with a positive weight.
    """

    def __init__(
        self,
        dataset_dir,
        split: str,
        specs: Sequence[ClipSpec],
        weights: Sequence[float] | None = None,
        tolerance: float = HALF_FRAME,
        cache_bytes: int = 2**31,
        foreground: bool = False,
    ):
        """weights: one number per spec, equal when None. tolerance: seconds. cache_bytes: decoded records kept in memory. foreground: clips
        tell where vehicles are.

        Raises UserError for specs that do not fit each other or the data (with the longest possible), for a data set that
        is missing, unfinished or damaged, and for one that does not know where vehicles are if that is wanted.
        """
        self.index, self.reader = records.open_split(dataset_dir, split)
        self.foreground = foreground
        if foreground and not records.has_foreground(self.index.meta):
            raise UserError(
                f"{dataset_dir} does not tell where vehicles are, which train.foreground_weight needs; set it to 0, or `mila prepare` into another "
                "folder with --config.data.foreground=True"
            )
        self.specs = tuple(dataclasses.replace(spec, chunks=chunks_of(self.index.meta)) for spec in specs)
        self.weights = check_specs(self.specs, weights)
        # As stored, and of this split alone: texts of a large encoder take gigabytes.
        self.text, self.text_mask = records.read_text(dataset_dir, len(self.index.scenes), self.reader.numbers)
        self.latent_shape = tuple(self.index.latent_shape)
        self.clip_bytes = 6 * self.specs[0].frames * math.prod(self.latent_shape) * np.dtype(np.float16).itemsize
        times = [np.asarray(s.timestamps_us) * 1e-6 for s in self.reader.scenes]
        self.clips = [self.find_clips(times, spec, tolerance) for spec in self.specs]
        for spec, weight, (scenes, _) in zip(self.specs, self.weights, self.clips):
            if weight > 0 and not len(scenes):
                best = longest(times, spec, tolerance)
                raise UserError(
                    f"window.frames={spec.frames} at train.fps={spec.fps:g} with window.conditioning={spec.conditioning} is longer than any "
                    f"unbroken stretch of split {split!r} in {dataset_dir}; the longest possible is window.frames={best}"
                )
        self.pattern = interleave(self.weights)
        self.rank = [self.pattern[:p].count(s) for p, s in enumerate(self.pattern)]
        self.per_cycle = [self.pattern.count(s) for s in range(len(self.specs))]
        self.cycles = max(-(-len(c[0]) // n) for c, n in zip(self.clips, self.per_cycle) if n)
        self.cache = RecordCache(self.reader, cache_bytes)

    def find_clips(self, times, spec: ClipSpec, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
        """All clips of a spec: scene numbers [s] within the split, and record numbers [s, frames]."""
        found = [find_starts(t, spec, tolerance)[1] for t in times]
        scenes = np.repeat(np.arange(len(times)), [len(f) for f in found])
        return scenes, np.concatenate([f + first for f, first in zip(found, self.reader.first)])

    def __len__(self) -> int:
        return self.cycles * len(self.pattern)

    def __repr__(self) -> str:
        """Names the content: Grain writes it into iterator checkpoints to notice another source."""
        return f"ClipSource({self.reader.directory.name!r}, {self.specs}, weights={self.weights}, clips={len(self)})"

    def __getitem__(self, item: int) -> dict[str, np.ndarray]:
        """Clip `item` as float32 arrays, but for latents, which stay float16: a host widens them slower than it reads them.

        latents [v, t, h, w, c] normalised; intrinsics [v, t, 4] fractions (fx, fy, cx, cy); extrinsics [v, t, 7] camera to ego,
        translation in metres and quaternion; waypoints [t, 3] (x, y metres, yaw radians) and frame_times [t] seconds, both
        relative to the last conditioning frame and of CAM_FRONT's record; fps []; conditioning int32 []: the number of
        clean frames; text [l, e], text_mask bool [l]; if wanted, foreground uint8 [v, t, h, w]: how much of each place vehicles cover, of 255.
        """
        return {name: values[0] for name, values in self.batch([item]).items()}

    def batch(self, items) -> dict[str, np.ndarray]:
        """Clips `items` as one batch: the arrays of __getitem__ with a first axis b."""
        found = [self.locate(int(item)) for item in items]
        numbers = [self.clips[s][1][row].tolist() for s, row in found]
        latents = np.empty((len(found), 6, self.specs[0].frames, *self.latent_shape), np.float16)
        raw = self.reader.read_arrays(numbers, latents, self.cache.get)
        texts = self.text_of([int(self.clips[s][0][row]) for s, row in found])
        out = {"latents": latents} | make_batch([self.specs[s] for s, _ in found], raw) | dict(zip(("text", "text_mask"), texts))
        return out | {"foreground": np.ascontiguousarray(raw["foreground"].swapaxes(1, 2))} if self.foreground else out

    def locate(self, item: int) -> tuple[int, int]:
        """(number of the spec, row in its list of clips) of an item."""
        if not 0 <= item < len(self):
            raise IndexError(f"clip {item} of {len(self)}")
        cycle, place = divmod(item, len(self.pattern))
        s = self.pattern[place]
        return s, (cycle * self.per_cycle[s] + self.rank[place]) % len(self.clips[s][0])

    def text_of(self, scenes) -> tuple[np.ndarray, np.ndarray]:
        """Text tokens float32 [..., l, e] and masks [..., l] of scene numbers `scenes` [...] within the split."""
        return self.text[scenes].astype(np.float32), self.text_mask[scenes]


def check_specs(specs: Sequence[ClipSpec], weights) -> tuple[float, ...]:
    """The weights as floats; UserError naming the key when specs or weights make no sense."""
    if not specs:
        raise UserError("train.fps is empty: at least one kind of clip is needed")
    for spec in specs:
        if spec.frames != specs[0].frames:
            raise UserError("window.frames must be the same for all kinds of clips: one batch holds them all")
        if not 1 <= spec.conditioning < spec.frames:
            raise UserError(f"window.conditioning={spec.conditioning} must lie between 1 and window.frames={spec.frames} - 1")
        if not spec.fps > 0 or spec.fps > CONDITIONING_FPS:
            raise UserError(f"train.fps={spec.fps:g} must be above 0 and at most {CONDITIONING_FPS}, the rate of the data")
        check_window(spec.chunks, spec.frames, spec.conditioning)
        if not 0 < spec.conditioning_fps <= CONDITIONING_FPS:
            raise UserError(f"conditioning_fps={spec.conditioning_fps:g} must be above 0 and at most {CONDITIONING_FPS}")
    weights = [1.0] * len(specs) if weights is None else [float(w) for w in weights]
    if len(weights) != len(specs) or min(weights) < 0 or sum(weights) <= 0:
        raise UserError(f"train.fps_weights={weights}: one number >= 0 for each of the {len(specs)} kinds of clips, not all 0")
    return tuple(weights)


class RecordCache:
    """Keeps the serialised records used last in memory, up to a number of bytes."""

    def __init__(self, reader: records.SplitReader, limit: int):
        self.reader, self.limit, self.bytes = reader, limit, 0
        self.kept: collections.OrderedDict[int, bytes] = collections.OrderedDict()
        self.lock = threading.Lock()

    def get(self, numbers: list[int]):
        """Records by number, one after the other."""
        if not self.limit:
            return self.reader.stream(numbers)
        with self.lock:
            found = {n: self.kept[n] for n in numbers if n in self.kept}
            for n in found:
                self.kept.move_to_end(n)
        missing = [n for n in numbers if n not in found]
        if missing:
            read = dict(zip(missing, self.reader.read(missing)))
            found |= read
            with self.lock:
                for n, record in read.items():
                    if n not in self.kept:
                        self.kept[n] = record
                        self.bytes += len(record)
                while self.bytes > self.limit and self.kept:
                    self.bytes -= len(self.kept.popitem(last=False)[1])
        return [found[n] for n in numbers]


def make_batch(specs: Sequence[ClipSpec], raw: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What clips of equal length hold beside latents and text; raw: fields [b, t, …] of their records.

    All clips at once: per clip, NumPy's calls on such small arrays would take longer than reading the records.
    """
    last = np.array([spec.conditioning - 1 for spec in specs])
    front_us = raw["timestamps"][..., FRONT]
    extrinsics = np.concatenate([raw["cam2ego_translation"], raw["cam2ego_rotation"]], -1)
    waypoints = geometry.relative_waypoints(raw["ego_translation"][:, :, FRONT], raw["ego_rotation"][:, :, FRONT], last)
    return {
        "intrinsics": np.ascontiguousarray(raw["intrinsics"].swapaxes(1, 2), np.float32),
        "extrinsics": np.ascontiguousarray(extrinsics.swapaxes(1, 2), np.float32),
        "waypoints": waypoints.astype(np.float32),
        "frame_times": ((front_us - front_us[np.arange(len(specs)), last][:, None]) * 1e-6).astype(np.float32),
        "fps": np.array([spec.told_fps for spec in specs], np.float32),
        "conditioning": (last + 1).astype(np.int32),
    }


def read_scene(dataset_dir, scene_name: str) -> dict:
    """All n instants of one scene.

    latents float16 [n, 6, h, w, c] normalised, times float64 [n] seconds of CAM_FRONT since the first instant, timestamps int64
    [n, 6] microseconds, intrinsics [n, 6, 4], cam2ego_translation [n, 6, 3], cam2ego_rotation [n, 6, 4], ego_translation [n, 6, 3],
    ego_rotation [n, 6, 4], foreground uint8 [n, 6, h, w] in data sets that have it, text [l, e], text_mask [l], name, description, location,
    split; chunks: how latents in chunks lie, or None. UserError when there is no such scene.
    """
    index = records.read_index(dataset_dir)
    names = [s.name for s in index.scenes]
    if scene_name not in names:
        raise UserError(f"{dataset_dir} has no scene {scene_name!r}; it has {', '.join(names[:8])}{', …' if len(names) > 8 else ''}")
    row = names.index(scene_name)
    scene = index.scenes[row]
    _, reader = records.open_split(dataset_dir, scene.split)
    first = reader.first[reader.numbers.index(row)]
    numbers = range(first, first + len(scene.timestamps_us))
    latents = np.empty((len(numbers), 6, *index.latent_shape), np.float16)
    found = reader.read_arrays([numbers], latents[None].swapaxes(1, 2))
    out = {name: values[0] for name, values in found.items()} | {"latents": latents}
    tokens, mask = records.read_text(dataset_dir, len(index.scenes), [row])
    stamps = np.asarray(scene.timestamps_us, np.int64)
    out |= {"times": (stamps - stamps[0]) * 1e-6, "text": tokens[0].astype(np.float32), "text_mask": mask[0]}
    out["chunks"] = chunks_of(index.meta)
    return out | {"name": scene.name, "description": scene.description, "location": scene.location, "split": scene.split}
