"""What a generated video starts from: first frames of six views, cameras, a trajectory and a text."""

import dataclasses
import pathlib

import numpy as np

from mila_jax.errors import UserError
from mila_jax.trajectory import MANOEUVRES, Trajectory, from_poses, manoeuvre, read_trajectory
from mila_jax.views import VIEWS

FRAME_RATE = 12.0
HALF_FRAME = 0.5 / FRAME_RATE


@dataclasses.dataclass(frozen=True)
class Start:
    """first_latents [v, g, h, w, c]: g given frames at 12 Hz, normalised; intrinsics [v, 4], extrinsics [v, 7]: one rig for the
    whole video; trajectory: time 0 = last given frame; text [l, e], text_mask [l]; description: the text itself."""

    first_latents: np.ndarray
    intrinsics: np.ndarray
    extrinsics: np.ndarray
    trajectory: Trajectory
    text: np.ndarray
    text_mask: np.ndarray
    description: str


def from_scene(scene: dict, start_seconds: float, given: int) -> tuple["Start", np.ndarray]:
    """Start at `start_seconds` into an encoded scene (`data_pipeline.clips.read_scene`), with `given` frames up to there.

    Returns the start and the numbers of the scene's instants after it. Raises `UserError` if the scene is too short.
    """
    times = scene["times"]
    last = int(np.argmin(np.abs(times - start_seconds)))
    if not given - 1 <= last < len(times) - 1:
        raise UserError(
            f"--start={start_seconds:g} lies outside scene {scene['name']!r}, which lasts {times[-1]:.1f} s; "
            f"choose between {(given - 1) / FRAME_RATE:.2f} and {times[-2]:.1f}"
        )
    # Given frames by time: an instant may be missing.
    wanted = times[last] - np.arange(given)[::-1] / FRAME_RATE
    chosen = [int(np.argmin(np.abs(times - t))) for t in wanted]
    front = VIEWS.index("CAM_FRONT")
    trajectory = from_poses(times, scene["ego_translation"][:, front], scene["ego_rotation"][:, front], last)
    start = Start(
        first_latents=np.asarray(scene["latents"], np.float32)[chosen].swapaxes(0, 1),
        intrinsics=np.asarray(scene["intrinsics"][last], np.float32),
        extrinsics=np.concatenate([scene["cam2ego_translation"][last], scene["cam2ego_rotation"][last]], -1).astype(np.float32),
        trajectory=trajectory, text=scene["text"], text_mask=scene["text_mask"], description=scene["description"],
    )  # fmt: skip
    return start, np.arange(last + 1, len(times))


def read_frames(folder, image_size) -> np.ndarray:
    """First frames from a folder → uint8 [v, g, H, W, 3].

    Files are CAM_FRONT/*.jpg or CAM_FRONT*.jpg (png too) for each of the six cameras, ordered by name, 1/12 s apart, the same
    number for each. Raises `UserError` naming the folder or file.
    """
    from data_pipeline.nuscenes.reader import load_image

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
    if 0 in counts.values() or len(set(counts.values())) > 1:
        raise UserError(f"{folder} must hold equally many images for each camera, it holds {counts}; see mila generate --help")
    height, width = image_size
    return np.stack([np.stack([load_image(f, height, width) for f in files]) for files in found])


def from_folder(folder, codec, text_encoder, image_size, given: int, text: str) -> "Start":
    """Start from a folder of images (see `read_frames`) with the reference rig; the last `given` frames are used."""
    from data_pipeline.simulator.rig import load_rig

    images = read_frames(folder, image_size)[:, -given:]
    v, g = images.shape[:2]
    latents = codec.encode(images.reshape((v * g,) + images.shape[2:]))
    latents = (latents - codec.shift) / codec.scale
    rig = load_rig()
    tokens, mask = text_encoder.encode([text])
    return Start(
        first_latents=latents.reshape((v, g) + latents.shape[1:]), intrinsics=np.asarray(rig.intrinsics, np.float32),
        extrinsics=np.concatenate([rig.translation, rig.quaternion], -1).astype(np.float32),
        trajectory=manoeuvre("straight", 1.0), text=tokens[0], text_mask=mask[0], description=text,
    )  # fmt: skip


LONGEST = 600  # seconds; a typing error should not ask for a day of video


def frame_count(seconds: float, least: int = 1) -> int:
    """Frames at 12 Hz in `seconds`. Raises `UserError` for what is no length, or gives fewer than `least` frames."""
    if not least / FRAME_RATE - 1e-9 <= seconds <= LONGEST:  # False for NaN too
        raise UserError(f"--seconds={seconds:g} must lie between {least / FRAME_RATE:.2g} and {LONGEST}")
    return round(seconds * FRAME_RATE)


def covering(trajectory: Trajectory, seconds: float, source: str) -> Trajectory:
    """The trajectory itself. Raises `UserError` naming its `source` if it ends before the video does."""
    if trajectory.times[-1] < seconds - HALF_FRAME:
        raise UserError(f"{source} ends at {trajectory.times[-1]:g} s, before the video of {seconds:g} s; lower --seconds or give longer --waypoints")
    return trajectory


def choose_trajectory(name: str | None, start: Start, seconds: float, speed: float, from_data: bool) -> Trajectory:
    """The trajectory that `--waypoints` names; `from_data`: the start has a recorded one.

    Raises `UserError` for an unknown name and for a file that ends before the video.
    """
    if name in (None, "scene"):
        if not from_data:
            raise UserError(f"--waypoints must be given with --frames: a .csv or .json file, or one of {', '.join(MANOEUVRES)}")
        return covering(start.trajectory, seconds, "the scene's recorded drive")
    if name.endswith((".csv", ".json")):
        return covering(read_trajectory(name), seconds, name)
    return manoeuvre(name, seconds + 10, speed)
