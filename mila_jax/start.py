"""What a generated video starts from: first frames of six views, cameras, a trajectory and a text."""

import contextlib
import dataclasses
import hashlib
import pathlib

import numpy as np
from PIL import Image

from mila_jax.config import SEEDS
from mila_jax.errors import UserError
from mila_jax.trajectory import (
    FASTEST, MANOEUVRES, Trajectory, check_driveable, coasting, from_poses, manoeuvre, read_trajectory, speed_at_start, with_past,
)  # fmt: skip
from mila_jax.views import VIEWS

FRAME_RATE = 12.0
HALF_FRAME = 0.5 / FRAME_RATE


@dataclasses.dataclass(frozen=True)
class Start:
    """first_latents [v, g, h, w, c]: g given frames at 12 Hz (or latents in chunks, from the first of one on), normalised; intrinsics [v, 4], extrinsics [v, 7]: one rig for the
    whole video; trajectory: time 0 = last given frame; text [l, e], text_mask [l]; description: the text itself; waypoints_known:
    False tells the network of no waypoints (the trajectory then is a guess, which only the motion prior uses)."""

    first_latents: np.ndarray
    intrinsics: np.ndarray
    extrinsics: np.ndarray
    trajectory: Trajectory
    text: np.ndarray
    text_mask: np.ndarray
    description: str
    waypoints_known: bool = True
    scene: str | None = None  # name of the recorded scene that it starts in
    time_us: int | None = None  # of CAM_FRONT's last given frame in it, microseconds

    def digests(self) -> dict[str, str]:
        """Hashes of what is in it, to tell whether two videos start from the same and in what they differ."""

        def digest(*parts, more=None):
            found = hashlib.sha256(repr((more, [np.shape(part) for part in parts])).encode())
            for part in parts:
                found.update(np.ascontiguousarray(part).tobytes())
            return found.hexdigest()

        return {
            "first frames": digest(self.first_latents), "cameras": digest(self.intrinsics, self.extrinsics),
            "waypoints": digest(self.trajectory.times, self.trajectory.poses, more=self.waypoints_known),
            "text": digest(self.text, self.text_mask, more=self.description),
        }  # fmt: skip


def from_scene(scene: dict, start_seconds: float, given: int) -> tuple["Start", np.ndarray]:
    """Start at `start_seconds` into an encoded scene (`data_pipeline.clips.read_scene`), with `given` frames up to there.

    Returns the start and the numbers of the scene's instants after it. Raises `UserError` if the scene is too short.
    """
    times = scene["times"]
    if (chunks := scene.get("chunks")) is not None:
        last, chosen = _in_chunks(scene, start_seconds, given, chunks)
    else:
        last, chosen = _by_time(scene, start_seconds, given)
    front = VIEWS.index("CAM_FRONT")
    trajectory = from_poses(times, scene["ego_translation"][:, front], scene["ego_rotation"][:, front], last)
    start = Start(
        first_latents=np.asarray(scene["latents"], np.float32)[chosen].swapaxes(0, 1),
        intrinsics=np.asarray(scene["intrinsics"][last], np.float32),
        extrinsics=np.concatenate([scene["cam2ego_translation"][last], scene["cam2ego_rotation"][last]], -1).astype(np.float32),
        trajectory=trajectory, text=scene["text"], text_mask=scene["text_mask"], description=scene["description"],
        scene=scene.get("name"), time_us=int(scene["timestamps"][last, front]) if "timestamps" in scene else None,
    )  # fmt: skip
    return start, np.arange(last + 1, len(times))


def instants_at(scene: dict, after: np.ndarray, frames) -> np.ndarray:
    """Instants [n] of the scene at `frames` [n] (1 = a twelfth of a second after the last given one): by time, since an instant may be missing.

    after: as `from_scene` returns it. Latents in chunks have no missing ones: by number.
    """
    frames = np.asarray(frames)
    if scene.get("chunks") is not None:
        return after[frames - 1]
    wanted = scene["times"][after[0] - 1] + frames / FRAME_RATE
    later = np.clip(np.searchsorted(scene["times"], wanted), 1, len(scene["times"]) - 1)
    nearer = wanted - scene["times"][later - 1] < scene["times"][later] - wanted
    return np.maximum(later - nearer, after[0])


def _in_chunks(scene: dict, start_seconds: float, given: int, chunks) -> tuple[int, np.ndarray]:
    """(last instant, instants [given]) of latents that begin with the first of a chunk, ending as near to `start_seconds` as they can."""
    from data_pipeline.clips import ClipSpec, find_starts

    times = scene["times"]
    starts, rows = find_starts(times, ClipSpec(given, given, FRAME_RATE, chunks=chunks))
    within = starts < len(times) - 1
    if not within.any():
        raise UserError(f"scene {scene['name']!r} has no {given} latents in whole chunks with anything after them; choose another scene")
    best = int(np.argmin(np.abs(times[starts[within]] - start_seconds)))
    last = int(starts[within][best])
    if not abs(times[last] - start_seconds) <= chunks.frames / FRAME_RATE:  # not a number, too
        raise UserError(
            f"--start={start_seconds:g}: no chunk of scene {scene['name']!r} ends near it; choose between {times[starts[within][0]]:.2f} and {times[starts[within][-1]]:.2f}"
        )
    return last, rows[within][best]


def _by_time(scene: dict, start_seconds: float, given: int) -> tuple[int, list[int]]:
    """(last instant, instants [given]) of frames at 12 Hz up to `start_seconds`."""
    times = scene["times"]
    last = int(np.argmin(np.abs(times - start_seconds)))
    within = times[0] - HALF_FRAME <= start_seconds <= times[-1]  # False for NaN too
    if not (within and given - 1 <= last < len(times) - 1):
        raise UserError(
            f"--start={start_seconds:g} lies outside scene {scene['name']!r}, which lasts {times[-1]:.1f} s; "
            f"choose between {(given - 1) / FRAME_RATE:.2f} and {times[-2]:.1f}"
        )
    # Given frames by time: an instant may be missing.
    wanted = times[last] - np.arange(given)[::-1] / FRAME_RATE
    return last, [int(np.argmin(np.abs(times - t))) for t in wanted]


ASPECT = 0.03  # relative difference of height/width that resizing may squeeze (1600×900 fits 64×112)


def read_frames(folder, image_size) -> np.ndarray:
    """First frames from a folder → uint8 [v, g, H, W, 3].

    Files are CAM_FRONT/*.jpg or CAM_FRONT*.jpg (png too) for each of the six cameras, ordered by name, 1/12 s apart, the same
    number for each, all of one size with the model's proportions. Raises `UserError` naming the folder, camera or file.
    """
    from data_pipeline.nuscenes.reader import decode_image

    def read(path):
        with _named(path):
            return decode_image(path, height, width)

    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; --frames wants one with images for {', '.join(VIEWS)}")
    found = []
    for view in VIEWS:
        inside = folder / view
        # CAM_FRONT* would match CAM_FRONT_LEFT too: the character after the name must not go on with another camera's name.
        others = tuple(v for v in VIEWS if v != view and v.startswith(view))
        files = inside.iterdir() if inside.is_dir() else (f for f in folder.iterdir() if f.name.startswith(view) and not f.name.startswith(others))
        found.append(sorted(f for f in files if f.suffix.lower() in (".jpg", ".jpeg", ".png")))
    counts = {view: len(files) for view, files in zip(VIEWS, found)}
    missing = [view for view, count in counts.items() if not count]
    if missing:
        raise UserError(f"--frames={folder} has no images of {', '.join(missing)}; it wants {missing[0]}/*.jpg or {missing[0]}*.jpg for each camera")
    if len(set(counts.values())) > 1:
        raise UserError(f"--frames={folder} must hold equally many images for each camera, it holds {counts}")
    height, width = image_size
    sizes = [_image_size(f) for files in found for f in files]
    for file, size in zip((f for files in found for f in files), sizes):
        if size != sizes[0]:
            raise UserError(
                f"--frames: {file} is {size[0]}×{size[1]} pixels, the others are {sizes[0][0]}×{sizes[0][1]}; give first frames of one size"
            )
    if abs(sizes[0][1] / sizes[0][0] / (height / width) - 1) > ASPECT:
        raise UserError(f"--frames: images of {sizes[0][0]}×{sizes[0][1]} pixels have other proportions than the model's {width}×{height}; crop them")
    return np.stack([np.stack([read(f) for f in files]) for files in found])


def _image_size(path) -> tuple[int, int]:
    """(width, height) of an image file; `UserError` if it is none."""
    with _named(path), Image.open(path) as image:
        return image.size


@contextlib.contextmanager
def _named(path):
    """Turns what a first frame that is gone or damaged raises into one `UserError` that names the file."""
    try:
        yield
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"--frames: {path} is not a readable image ({error}); replace the file") from None


def from_images(images, codec, text_encoder, trajectory: Trajectory, text: str, video=None) -> "Start":
    """Start from images uint8 [v, g, H, W, 3] of the reference rig (see `read_frames`), g given frames.

    video: a `VideoCodec` on top of `codec`; g then are whole chunks, or one.
    """
    from data_pipeline.simulator.rig import load_rig

    v, g = images.shape[:2]
    latents = codec.encode(images.reshape((v * g,) + images.shape[2:]))
    latents = ((latents - codec.shift) / codec.scale).reshape((v, g) + latents.shape[1:])
    if video is not None:
        latents = video.encode(latents) if g % video.chunks.frames == 0 else video.encode_one(latents)
    rig = load_rig()
    tokens, mask = text_encoder.encode([text])
    return Start(
        first_latents=latents, intrinsics=np.asarray(rig.intrinsics, np.float32),
        extrinsics=np.concatenate([rig.translation, rig.quaternion], -1).astype(np.float32),
        trajectory=trajectory, text=tokens[0], text_mask=mask[0], description=text,
    )  # fmt: skip


LONGEST = 600  # seconds; a typing error should not ask for a day of video


def frame_count(seconds: float, least: int = 1) -> int:
    """Frames at 12 Hz in `seconds`. Raises `UserError` for what is no length, or gives fewer than `least` frames."""
    if not least / FRAME_RATE - 1e-9 <= seconds <= LONGEST:  # False for NaN too
        raise UserError(f"--seconds={seconds:g} must lie between {least / FRAME_RATE:.2g} and {LONGEST}")
    return round(seconds * FRAME_RATE)


def check_seed(seed: int) -> int:
    """The seed itself. Raises `UserError` for one that a random key cannot hold."""
    if not 0 <= seed < SEEDS:
        raise UserError(f"--seed={seed} must lie between 0 and {SEEDS - 1}")
    return seed


def covering(trajectory: Trajectory, seconds: float, source: str) -> Trajectory:
    """The trajectory itself. Raises `UserError` naming its `source` if it begins after time 0 or ends before the video does."""
    first, last = trajectory.times[[0, -1]]
    if first > HALF_FRAME:
        raise UserError(f"{source} begins at t = {first:g} s; waypoints must reach back to t = 0, the last given frame")
    if last < seconds - HALF_FRAME:
        raise UserError(f"{source} ends at {last:g} s, before the video of --seconds={seconds:g}; lower --seconds or give longer --waypoints")
    return trajectory


SPEED = 8.0  # m/s, where nothing is recorded and nothing else is said
STANDING = 0.2  # m/s, below which a car stands


def choose_trajectory(name: str | None, recorded: Trajectory | None, seconds: float, speed: float | None) -> Trajectory:
    """The trajectory that `--waypoints` names. recorded: the scene's, None where nothing is recorded (`--frames`).

    none: straight on at the speed so far. speed: m/s that a manoeuvre begins with, None for the recorded one, or `SPEED`. Up to time 0 the car drove as
    is recorded, whatever it does then. Raises `UserError` for an unknown name, for a speed that nothing asks for, for none where the recorded car
    stands, for a file that does not reach from 0 to the end of the video, and for one that no car can drive.
    """
    if speed is not None:
        if not 0 <= speed <= FASTEST:
            raise UserError(f"--speed={speed:g} must lie between 0 and {FASTEST:g} m/s")
        if name in (None, "scene") or name.endswith((".csv", ".json")) or name == "none" and recorded is not None:
            raise UserError(f"--speed goes with --waypoints={', '.join(MANOEUVRES)}; --waypoints={name or 'scene'} has a speed of its own")
    elif recorded is None:
        speed = SPEED
    else:
        speed = max(0.0, speed_at_start(recorded))
        if speed < STANDING and name in MANOEUVRES and name != "stop":
            raise UserError(
                f"the recorded car stands at --start, and --waypoints={name} goes on at its speed; give --speed, such as --speed={SPEED:g}"
            )
    if name in (None, "scene"):
        if recorded is None:
            raise UserError(f"--waypoints must be given with --frames: a .csv or .json file, none, or one of {', '.join(MANOEUVRES)}")
        return covering(check_driveable(recorded, "the scene's recorded drive"), seconds, "the scene's recorded drive")
    if name == "none":
        return manoeuvre("straight", seconds + 10, speed) if recorded is None else coasting(recorded)
    if name.endswith((".csv", ".json")):
        chosen = covering(check_driveable(read_trajectory(name), f"--waypoints={name}"), seconds, f"--waypoints={name}")
        # A file may count from elsewhere; the recorded past ends at its time 0.
        chosen = Trajectory(chosen.times, chosen.waypoints(chosen.times, 0.0))
    else:
        chosen = manoeuvre(name, seconds + 10, speed)
    return chosen if recorded is None else with_past(recorded, chosen)
