"""The recorded scene that a generated video follows: what an export takes over from it.

A video that follows the drive that was recorded shows that scene's objects, as far as the model keeps to it: the recorded boxes are its
ground truth, as in the paper's table 7. Any other drive sees them from elsewhere and makes the others act otherwise, so it has none.
"""

import dataclasses

import numpy as np

from data_pipeline.nuscenes import reader
from data_pipeline.nuscenes.annotations import TABLES, BoxTrack, has_boxes, read_box_tracks
from data_pipeline.nuscenes.tables import stream
from mila_jax import geometry
from mila_jax.errors import UserError
from mila_jax.start import FRAME_RATE, HALF_FRAME

# How far the commanded path may be from the recorded one: below what boxes and poses are measured to.
LARGEST_GAP, LARGEST_TURN = 0.1, 0.01  # metres, radians


class NotFollowed(Exception):
    """Why a video has no boxes; the text is for the user."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A scene under a video of t frames.

    name, description, location: the scene's; frame_us int64 [t]: CAM_FRONT's time of each frame, microseconds; offset_us: of each camera and, as
    "sample", of annotated moments from CAM_FRONT; keyframes: frames nearest to an annotated moment; samples: its number in the scene; tracks: objects.
    """

    name: str
    description: str
    location: str
    frame_us: np.ndarray
    offset_us: dict[str, int]
    keyframes: np.ndarray
    samples: np.ndarray
    tracks: list[BoxTrack]
    path: reader.Track

    def ego(self, time_us) -> tuple[np.ndarray, np.ndarray]:
        """Translation [..., 3] and rotation [..., 4] of the car at times [...] in microseconds, between its recorded poses and on beyond the last."""
        return ego_at(self.path, time_us)


def ego_at(track: reader.Track, time_us) -> tuple[np.ndarray, np.ndarray]:
    """A camera track's ego poses at any times [...]: positions linear in between and going on as at the ends, where rotations stay."""
    times, time_us = track.timestamps_us, np.asarray(time_us, np.float64)
    i = np.clip(np.searchsorted(times, time_us) - 1, 0, len(times) - 2)
    share = (time_us - times[i]) / (times[i + 1] - times[i])
    positions, rotations = track.ego_translation, track.ego_rotation
    moved = positions[i] + share[..., None] * (positions[i + 1] - positions[i])
    return moved, geometry.interpolate_rotation(rotations[i], rotations[i + 1], np.clip(share, 0, 1))


def find_source(nusc: reader.NuScenes, about: dict, poses) -> Source:
    """The scene under a video, from its generate.json and commanded poses [t, 3].

    Raises `NotFollowed` with the reason where the video has no boxes, `UserError` where `nusc` does not hold the scene that the video names.
    """
    if not about.get("scene") or about.get("time_us") is None:
        raise NotFollowed("generate.json names no recorded scene (made from images, or by an earlier version)")
    scene = next((s for s in nusc.scenes if s.name == about["scene"]), None)
    if scene is None:
        raise UserError(
            f"data.nuscenes={nusc.root} has no scene {about['scene']!r}, which the video was generated from; give that data set and data.version"
        )
    front = scene.tracks[reader.REFERENCE]
    times = front.timestamps_us
    if about["time_us"] not in times:
        raise UserError(
            f"data.nuscenes={nusc.root}: scene {scene.name!r} has no frame at {about['time_us']} µs, where the video begins; it is another data set's"
        )
    frame_us = about["time_us"] + np.rint(np.arange(1, len(poses) + 1) / FRAME_RATE * 1e6).astype(np.int64)
    if frame_us[-1] > times[-1] + HALF_FRAME * 1e6:
        raise NotFollowed(f"it goes on for {(frame_us[-1] - times[-1]) / 1e6:.1f} s after the recorded scene ends")
    check_path(front, about["time_us"], frame_us, poses)
    folder = reader.version_folder(nusc.root, nusc.version, TABLES)
    if not has_boxes(folder):
        raise NotFollowed(f"{folder} has no annotations")
    moments = sorted((row for row in stream(folder, "sample") if row.scene_token == scene.token), key=lambda row: row.timestamp)
    tracks = read_box_tracks(folder, [row.token for row in moments], [row.timestamp for row in moments])
    of_front = dict(zip((front.index.sample_tokens[i] for i in front.sample[front.key]), times[front.key]))
    samples = [i for i, row in enumerate(moments) if row.token in of_front]
    fired = np.array([of_front[moments[i].token] for i in samples])
    offset_us = {name: round(reader.firing_offset(track, front)) for name, track in scene.tracks.items()}
    offset_us["sample"] = round(float(np.median([moments[i].timestamp - at for i, at in zip(samples, fired)]))) if samples else 0
    nearest = reader.nearest(frame_us, fired)
    near = np.abs(frame_us[nearest] - fired) <= HALF_FRAME * 1e6
    if not near.any():
        raise NotFollowed("it shows no annotated moment; make it longer")
    return Source(scene.name, scene.description, scene.location, frame_us, offset_us, nearest[near], np.array(samples)[near], tracks, front)


def check_path(front: reader.Track, begin_us: int, frame_us, poses) -> None:
    """Raises `NotFollowed` where the commanded poses [t, 3] (relative to the ego at `begin_us`) are not those recorded."""
    start, recorded = geometry.transform(*ego_at(front, begin_us)), geometry.transform(*ego_at(front, frame_us))
    local = geometry.inverse(start) @ recorded
    gap = np.linalg.norm(local[:, :2, 3] - poses[:, :2], axis=1).max()
    turn = np.abs((geometry.yaw_of(local[:, :3, :3]) - poses[:, 2] + np.pi) % (2 * np.pi) - np.pi).max()
    if gap > LARGEST_GAP or turn > LARGEST_TURN:
        raise NotFollowed(f"its waypoints are not the recorded drive ({gap:.1f} m and {turn:.2f} rad apart at most)")
