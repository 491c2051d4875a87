"""When the simulated sensors fire: the real data's irregular "12 Hz".

In nuScenes the lidar turns 20 times a second and each camera is triggered as the beam passes its axis; the 12 exposures of a
second are spread as evenly as possible over the 20 turns. So frames are 50 or 100 ms apart, the six cameras of one turn fire
over about 43 ms in ring order, keyframes lie 4 to 7 frames apart, and now and then a frame is missing.
"""

import dataclasses

import numpy as np

TURN_SECONDS = 0.05
FRAMES_PER_SECOND = 12
# The lidar sweep that names a sample ends this long after CAM_FRONT fires (read off one real keyframe).
LIDAR_AFTER_FRONT = 0.0355
GAPS, GAP_PROBABILITIES = (4, 5, 6, 7), (0.02, 0.1, 0.8, 0.08)
START_SECONDS = 0.05  # the cameras that fire before CAM_FRONT must not see negative times


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Firing times of one scene, microseconds since its start. Every frame but the dropped ones becomes a camera record."""

    cameras: np.ndarray  # int64 [n, 6], VIEWS order
    lidar: np.ndarray  # int64 [n]; used at keyframes only
    key: np.ndarray  # bool [n]
    dropped: np.ndarray  # bool [n, 6]; never a keyframe


def make_schedule(seconds: float, offsets, rng: np.random.Generator) -> Schedule:
    """Firing times within `seconds`.

    offsets: [6] seconds of each camera relative to CAM_FRONT. The first and the last frame are keyframes: as in the real data
    no frame follows the last keyframe. Raises ValueError when `seconds` has no room for two keyframes.
    """
    count = int((seconds - 2 * START_SECONDS) * FRAMES_PER_SECOND) + 1
    keys, position = [0], 0
    while True:
        position += int(rng.choice(GAPS, p=GAP_PROBABILITIES))
        if position >= count:
            break
        keys.append(position)
    if len(keys) < 2:
        raise ValueError(f"{seconds} s are too short for two keyframes; at least 1 s is needed")
    count = keys[-1] + 1
    turns = np.rint(np.arange(count) * (1 / FRAMES_PER_SECOND / TURN_SECONDS))
    front = START_SECONDS + turns * TURN_SECONDS + rng.uniform(-5e-4, 5e-4, count)
    cameras = front[:, None] + np.asarray(offsets) + rng.uniform(-3e-4, 3e-4, (count, 6))
    key = np.zeros(count, bool)
    key[keys] = True
    dropped = np.zeros((count, 6), bool)
    sweeps = np.flatnonzero(~key)
    # One or two lost frames in 20 s; few enough that long unbroken windows remain.
    for _ in range(int(rng.integers(1, 3) * seconds / 20 + rng.uniform(0, 0.999))):
        dropped[rng.choice(sweeps), rng.integers(6)] = True
    microseconds = lambda t: np.rint(t * 1e6).astype(np.int64)  # noqa: E731
    return Schedule(microseconds(cameras), microseconds(front + LIDAR_AFTER_FRONT), key, dropped)
