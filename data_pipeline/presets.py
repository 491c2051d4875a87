"""Clip presets: which clips of the validation split published scores are computed on, one rule each, in one table.

A score depends on its clip list as much as on the model (MiLA from 4 frames: FVD 36.8 on 5,369 clips, 89.3 on 600), and the lists
themselves were never published: the rules below are reconstructed from the papers' counts and public code. On the real validation
split the first three give 5,369 and 600 clips, as reported.

A clip begins at a keyframe. Its frames are CAM_FRONT's consecutive records from there (`fps` None), or the records nearest to
start + i / fps. A clip one of whose frames lacks a camera that the preset shows is dropped, and counted as such.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from mila_jax.errors import UserError

RATE = 12  # frames a second of the cameras


@dataclasses.dataclass(frozen=True)
class ClipPreset:
    """A rule that turns scenes into clips, and what of them is scored."""

    name: str
    views: str  # "front": CAM_FRONT alone; "six": all cameras
    frames: int  # of a clip, which must all exist
    conditioning: int  # the first of them are given
    starts: str  # "keyframes": all; "spaced": not nearer than `spacing` frames; "scene": the first that is possible
    fps: float | None = None  # None: consecutive records
    keyframes: int = 1  # keyframes that must be left in the scene, the start included
    spacing: int = 0
    samples: int = 1  # videos generated of each clip, from different noise
    window: int = 0  # frames generated at a time by the published model; 0: not said
    fid_from: int = 0  # first frame of a clip whose picture is scored
    fvd_from: int = 0  # first frame of a clip that belongs to the scored video
    fvd_resize: str = "tf1"  # how frames come to FVD's network (`mila_jax.evaluate.resize`); the original way where nothing is said
    split: str = "val"
    published: int | None = None  # clips of the real validation split
    source: str = ""

    def offsets(self) -> np.ndarray:
        """Wanted times [frames] in seconds after the start; only for presets by time."""
        return np.arange(self.frames) / self.fps

    @property
    def rule(self) -> str:
        """The rule in one line."""
        where = {
            "keyframes": "every keyframe",
            "spaced": f"keyframes at least {self.spacing} frames apart",
            "scene": "the first possible keyframe of each scene",
        }[self.starts]
        left = f", {self.keyframes} keyframes left" if self.keyframes > 1 else ""
        rate = "consecutive frames" if self.fps is None else f"frames at {self.fps:g} Hz"
        times = f", {self.samples} samples each" if self.samples > 1 else ""
        return f"{where} with {self.frames} {rate} left{left}; {self.views} views; {self.conditioning} given{times}"


PRESETS = {
    preset.name: preset
    for preset in (
        ClipPreset("mila-5369", "six", 25, 1, "keyframes", window=28, fid_from=1, published=5369,
                   source="MiLA, arXiv 2503.15875, table 1: first 25 of 28 frames at 12 Hz"),
        ClipPreset("mila-5369-4f", "six", 25, 4, "keyframes", window=28, fid_from=4, published=5369,
                   source="MiLA, table 1, from 4 frames: first 25 of 28 frames at 12 Hz, read as those 4 and the 21 after them"),
        ClipPreset("mila-600", "six", 25, 4, "spaced", spacing=59, window=28, fid_from=4, published=600,
                   source="MiLA, table 1 and ablations, from 4 frames: 600 clips, read as 4 of each scene, 59 frames apart"),
        ClipPreset("vista-5369", "front", 25, 1, "keyframes", keyframes=5, window=25, fid_from=1, published=5369,
                   source="Vista (OpenDriveLab/Vista, issues 9 and 37): FVD with the given frame, FID on the 24 generated ones"),
        ClipPreset("long-150", "six", 148, 4, "scene", window=28, fid_from=4, fvd_from=4, published=150,
                   source="MiLA, long videos: 150 clips, scored in windows of seconds; read as 12 s after 4 given frames"),
        ClipPreset("opendwm-150x16@10", "six", 19, 3, "scene", fps=10, window=19, fid_from=3, fvd_from=3, fvd_resize="squash", published=150,
                   source="OpenDWM (SenseTime-FVG/OpenDWM): 3 reference frames, 16 scored at 10 Hz, one clip a scene; squashed to FVD's size"),
        ClipPreset("wcoda-150x4x16", "six", 16, 1, "scene", samples=4, window=16, fid_from=0, published=600,
                   source="W-CODA 2024 track 2, as MagicDrive-V2 scores: 150 scenes, 4 samples, 16 frames"),
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SceneFrames:
    """What a rule needs to know of a scene: CAM_FRONT's n records by time."""

    name: str
    split: str
    times_us: np.ndarray  # int64 [n]
    key: np.ndarray  # bool [n]
    complete: np.ndarray  # bool [n]: the other five cameras have a frame then, too
    tokens: Sequence[str] | None = None  # sample token of each record
    only_complete: bool = False  # where a camera has none, no other one's frame is to be had either


@dataclasses.dataclass(frozen=True)
class Clip:
    """One clip: numbers of CAM_FRONT's records in their scene (0 = the first), and which sample of it."""

    scene: str
    start: int
    timestamp_us: int
    frames: tuple[int, ...]
    sample: int = 0
    sample_token: str | None = None


def get_preset(name: str) -> ClipPreset:
    """The preset of that name; `UserError` with the known names otherwise."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]


def list_clips(preset: ClipPreset, scenes: Iterable[SceneFrames]) -> tuple[list[Clip], dict[str, int]]:
    """All clips of a preset in the order of the scenes, and how many starts were dropped for which reason."""
    clips: list[Clip] = []
    dropped: collections.Counter[str] = collections.Counter()
    for scene in scenes:
        if scene.split != preset.split:
            continue
        last = None
        for start in np.flatnonzero(scene.key):
            if preset.starts == "spaced" and last is not None and start - last < preset.spacing:
                dropped[f"nearer than {preset.spacing} frames to the clip before"] += 1
                continue
            frames, reason = clip_frames(preset, scene, int(start))
            if reason:
                dropped[reason] += 1
                continue
            last = start
            token = scene.tokens[start] if scene.tokens is not None else None
            clips += [Clip(scene.name, int(start), int(scene.times_us[start]), frames, s, token) for s in range(preset.samples)]
            if preset.starts == "scene":
                break
        if last is None:
            dropped["scenes without any clip"] += 1
    return clips, dict(dropped)


def clip_frames(preset: ClipPreset, scene: SceneFrames, start: int) -> tuple[tuple[int, ...], str]:
    """The records of a clip from `start`, and why there is none ("" if there is)."""
    left = len(scene.times_us) - start
    if preset.fps is None:
        if left < preset.frames:
            return (), f"fewer than {preset.frames} frames left in the scene"
        chosen = np.arange(start, start + preset.frames)
    else:
        from data_pipeline.nuscenes.reader import nearest

        wanted = scene.times_us[start] + np.rint(preset.offsets() * 1e6).astype(np.int64)
        half = 5e5 / preset.fps
        if wanted[-1] - scene.times_us[-1] > half:
            return (), f"less than {(preset.frames - 1) / preset.fps:g} s left in the scene"
        chosen = nearest(scene.times_us, wanted)
        if (np.abs(scene.times_us[chosen] - wanted) > half).any() or (np.diff(chosen) <= 0).any():
            return (), "CAM_FRONT has no frame within half a frame of a wanted time"
    if scene.key[start:].sum() < preset.keyframes:
        return (), f"fewer than {preset.keyframes} keyframes left in the scene"
    if (preset.views == "six" or scene.only_complete) and not scene.complete[chosen].all():
        return (), "another camera has no frame at one of its moments"
    return tuple(chosen.tolist()), ""


def clip_list_hash(clips: Sequence[Clip]) -> str:
    """SHA-256 of a clip list, to print beside a score: scenes, frame numbers and samples, in order."""
    digest = hashlib.sha256()
    for clip in clips:
        digest.update(f"{clip.scene} {clip.sample} {' '.join(map(str, clip.frames))}\n".encode())
    return digest.hexdigest()


def scenes_of_tables(nusc, split: str | None = None) -> list[SceneFrames]:
    """The scenes of an opened nuScenes data set (`open_nuscenes`), of one split or all."""
    from data_pipeline.nuscenes.reader import complete_moments

    out = []
    for scene in nusc.scenes:
        if split in (None, scene.split):
            front = scene.tracks["CAM_FRONT"]
            complete = complete_moments(scene)[1]
            tokens = [front.index.sample_tokens[i] for i in front.sample]
            out.append(SceneFrames(scene.name, scene.split, front.timestamps_us, front.key, complete, tokens))
    return out


def scenes_of_encoded(directory) -> list[SceneFrames]:
    """The scenes of an encoded data set. `UserError` when it was encoded before keyframes were kept."""
    from data_pipeline.records import read_index

    out = []
    for scene in read_index(directory).scenes:
        if not scene.front_us:
            raise UserError(f"{directory} does not say which frames are keyframes; run `mila prepare` again (finished shards are kept)")
        times = np.asarray(scene.front_us, np.int64)
        key = np.zeros(len(times), bool)
        key[scene.keyframes] = True
        out.append(SceneFrames(scene.name, scene.split, times, key, np.isin(times, scene.timestamps_us), only_complete=True))
    return out


def scenes_of_gaps(gaps: Sequence[Sequence[int]], split: str = "val") -> list[SceneFrames]:
    """Scenes of which only the numbers of frames from each keyframe to the next are known, evenly 1/12 s apart."""
    out = []
    for number, gap in enumerate(gaps):
        starts = np.concatenate([[0], np.cumsum(gap)])
        n = int(starts[-1]) + 1
        key = np.zeros(n, bool)
        key[starts] = True
        out.append(SceneFrames(f"scene-{number:04d}", split, np.rint(np.arange(n) / RATE * 1e6).astype(np.int64), key, np.ones(n, bool)))
    return out
