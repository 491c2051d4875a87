"""Ego trajectories: from a scene, a file or a named manoeuvre to waypoints at any time."""

import csv
import dataclasses
import json
import pathlib

import numpy as np

from mila_jax.errors import UserError
from mila_jax.geometry import relative_waypoints

MANOEUVRES = ("straight", "left", "right", "stop")
COLUMNS = ("t", "x", "y", "yaw")
FASTEST = 60.0  # m/s
QUICKEST_TURN = 2.0  # rad/s; cars turn at most half as fast
LARGEST = 1e9  # of any number in a file; time stamps in microseconds are beyond it
LONGEST = 3600.0  # seconds; longer drives are taken for milliseconds
WIDEST_GAP = 1.0  # seconds; evenly wide steps may be wider, what lies between is a straight line


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """times [n] seconds, ascending, 0 = last given frame; poses [n, 3]: x forward, y left (metres), yaw (radians) in the ego frame
    of time 0."""

    times: np.ndarray
    poses: np.ndarray

    def at(self, times) -> np.ndarray:
        """Poses at any times [...] → [..., 3]: linear in between; beyond the ends on the circle of the last, or first, step, at its speed."""
        times = np.asarray(times, np.float64)
        place, yaw = self.poses[:, 0] + 1j * self.poses[:, 1], np.unwrap(self.poses[:, 2])
        if len(self.times) == 1:
            return np.broadcast_to(self.poses[0], times.shape + (3,)).copy()
        i = np.clip(np.searchsorted(self.times, times) - 1, 0, len(self.times) - 2)
        share = (times - self.times[i]) / (self.times[i + 1] - self.times[i])
        step, turn = place[i + 1] - place[i], yaw[i + 1] - yaw[i]
        # Steps beyond the end that is nearest: a circle's chords, each turned by as much as the car. From the step as the car saw it at its beginning.
        beyond = np.where(share > 1, share - 1, np.minimum(share, 0))
        end = i + (share > 1)
        chord = step * np.exp(-1j * yaw[i]) / _chord(turn) * _chord(beyond * turn) * beyond * np.exp(1j * yaw[end])
        found = np.where(beyond == 0, place[i] + share * step, place[end] + chord)
        return np.stack([found.real, found.imag, yaw[i] + share * turn], -1)

    def waypoints(self, times, reference) -> np.ndarray:
        """Poses at `times` [..., t] relative to the ego at `reference` [...] seconds → [..., t, 3] (waypoints)."""
        pose, origin = self.at(times), self.at(reference)[..., None, :]
        dx, dy = pose[..., 0] - origin[..., 0], pose[..., 1] - origin[..., 1]
        cos, sin = np.cos(origin[..., 2]), np.sin(origin[..., 2])
        turn = pose[..., 2] - origin[..., 2]
        turn = (turn + np.pi) % (2 * np.pi) - np.pi
        return np.stack([cos * dx + sin * dy, -sin * dx + cos * dy, turn], -1).astype(np.float32)


def _chord(turn):
    """From a unit of driving on a circle, headed along the real axis at first, while the car turns by `turn` [...]: complex displacement."""
    small = np.abs(turn) < 1e-6
    safe = np.where(small, 1.0, turn)
    return np.where(small, 1 + 0.5j * turn, (np.exp(1j * safe) - 1) / (1j * safe))


def from_poses(times, translation, rotation, reference: int) -> Trajectory:
    """Trajectory of recorded ego poses: times [n] s, translation [n, 3], rotation [n, 4] (w first); `reference` is time 0."""
    times = np.asarray(times, np.float64)
    return Trajectory(times - times[reference], relative_waypoints(translation, rotation, reference))


def manoeuvre(name: str, seconds: float, speed: float = 8.0) -> Trajectory:
    """A named manoeuvre starting at `speed` m/s: straight; left or right (a quarter turn of radius 12 m after one second,
    at that speed or 5 m/s if it is higher); stop (braking at 2 m/s², then standing). Raises `UserError` for another name."""
    if name not in MANOEUVRES:
        raise UserError(f"unknown manoeuvre {name!r}; use one of {', '.join(MANOEUVRES)}, or a .csv or .json file")
    dt = 1 / 48
    times = np.arange(-1.0, seconds + 1, dt)
    t = np.maximum(times, 0)
    if name == "stop":
        v = np.maximum(speed - 2.0 * t, 0)
    elif name == "straight":
        v = np.full_like(t, speed)
    else:
        v = speed + (min(speed, 5.0) - speed) * np.clip(t, 0, 1)
    curvature = np.zeros_like(t)
    if name in ("left", "right"):
        driven = np.cumsum(v * (t >= 1)) * dt
        curvature = np.where((t >= 1) & (driven < 12 * np.pi / 2), 1 / 12, 0) * (1 if name == "left" else -1)
    yaw = np.cumsum(v * curvature) * dt
    x, y = np.cumsum(v * np.cos(yaw)) * dt, np.cumsum(v * np.sin(yaw)) * dt
    zero = int(np.argmin(np.abs(times)))
    return Trajectory(times - times[zero], np.stack([x - x[zero], y - y[zero], yaw - yaw[zero]], -1))


def coasting(trajectory: Trajectory) -> Trajectory:
    """What a trajectory tells up to time 0 and no further: from there on straight ahead, at the speed of its last step."""
    ahead = Trajectory(np.array([0.0, 1.0]), trajectory.at(0.0) + np.array([[0.0], [speed_at_start(trajectory)]]) * _heading(trajectory))
    return with_past(trajectory, ahead)


def _heading(trajectory: Trajectory) -> np.ndarray:
    yaw = trajectory.at(0.0)[2]
    return np.array([np.cos(yaw), np.sin(yaw), 0.0])


def speed_at_start(trajectory: Trajectory) -> float:
    """Speed in m/s over the last twelfth of a second before time 0, negative for a car that backs."""
    step = np.subtract(*trajectory.at([0.0, -1 / 12]))
    return float(step @ _heading(trajectory)) * 12


def with_past(recorded: Trajectory, ahead: Trajectory) -> Trajectory:
    """The recorded poses up to time 0, where both are at the same place, and those of `ahead` after it."""
    before, after = recorded.times < 0, ahead.times > 0
    times = np.concatenate([recorded.times[before], [0.0], ahead.times[after]])
    return Trajectory(times, np.concatenate([recorded.poses[before], recorded.at([0.0]), ahead.poses[after]]))


def check_driveable(trajectory: Trajectory, source: str) -> Trajectory:
    """The trajectory itself. Raises `UserError` naming `source`, time and column for gaps, and for motion that betrays wrong units."""
    times, poses = trajectory.times, trajectory.poses
    steps = np.diff(times)
    if not len(steps):
        return trajectory
    if times[-1] - times[0] > LONGEST:
        raise UserError(f"{source} has a t from {times[0]:g} to {times[-1]:g} s, over an hour; t is in seconds")
    gaps = np.flatnonzero(steps > max(WIDEST_GAP, 2.5 * np.median(steps)))
    if len(gaps):
        at = gaps[0]
        raise UserError(
            f"{source} has a gap in t from {times[at]:g} to {times[at + 1]:g} s, elsewhere it has a pose every {np.median(steps):.3g} s; fill it"
        )
    speed = np.linalg.norm(np.diff(poses[:, :2], axis=0), axis=1) / steps
    fast = np.flatnonzero(speed > FASTEST)
    if len(fast):
        at = fast[0]
        raise UserError(
            f"{source} has x, y that move at {speed[at]:.0f} m/s from t = {times[at]:g} to {times[at + 1]:g} s (at most {FASTEST:g}); "
            "t is in seconds, x and y are in metres"
        )
    jumps = np.abs(np.diff(poses[:, 2]))
    if jumps.max() > np.pi and np.abs(poses[:, 2]).max() > 2 * np.pi:  # neither kept within a turn nor counted on beyond it
        at = int(jumps.argmax())
        raise UserError(f"{source} has a yaw that goes from {poses[at, 2]:g} to {poses[at + 1, 2]:g} at t = {times[at + 1]:g} s; yaw is in radians")
    turning = np.abs(np.diff(np.unwrap(poses[:, 2]))) / steps
    quick = np.flatnonzero(turning > QUICKEST_TURN)
    if len(quick):
        at = quick[0]
        raise UserError(f"{source} has a yaw that turns by {turning[at]:.1f} rad/s from t = {times[at]:g} to {times[at + 1]:g} s; yaw is in radians")
    return trajectory


def read_trajectory(path) -> Trajectory:
    """Waypoints from a file: CSV with a header naming t, x, y, yaw, or JSON, a list of objects with these keys.

    Seconds, metres, radians, relative to the ego at the last given frame (t = 0). Raises `UserError` with the file and line.
    """
    path = pathlib.Path(path)
    try:
        if path.suffix == ".json":
            rows = json.loads(path.read_text())
        else:
            with path.open(newline="", encoding="utf-8-sig") as f:  # spreadsheets put a byte order mark first
                rows = list(csv.DictReader(f, skipinitialspace=True))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; waypoints are a .csv or .json file, a manoeuvre ({', '.join(MANOEUVRES)}) or scene") from None
    except (OSError, ValueError, csv.Error, RecursionError) as error:  # ValueError: no UTF-8, no JSON, or an integer of thousands of digits
        raise UserError(f"{path} cannot be read as waypoints ({error})") from None
    values = []
    if not isinstance(rows, list):
        raise UserError(f"{path} must be a list of objects with the keys {', '.join(COLUMNS)}")
    for number, row in enumerate(rows, 1):
        try:
            values.append([float(row[c]) for c in COLUMNS])
        except (KeyError, TypeError, ValueError, OverflowError):  # the last one for an integer of hundreds of digits
            raise UserError(f"{path}, row {number}: needs numbers for {', '.join(COLUMNS)} (seconds, metres, metres, radians)") from None
    if len(values) < 2:
        raise UserError(f"{path} needs at least two rows of {', '.join(COLUMNS)}, it has {len(values)}")
    values = np.array(values)
    strange = np.argwhere(~(np.abs(values) < LARGEST))  # not a number, too
    if len(strange):
        row, column = strange[0]
        raise UserError(
            f"{path}, row {row + 1}: {COLUMNS[column]} is {values[row, column]:g}, which is no place or time of a drive; give a finite number"
        )
    falling = np.flatnonzero(np.diff(values[:, 0]) <= 0)
    if len(falling):
        row = falling[0] + 1
        raise UserError(
            f"{path}, row {row + 1}: t = {values[row, 0]:g} s comes after {values[row - 1, 0]:g} s; t must rise from row to row, sort them"
        )
    return Trajectory(values[:, 0], values[:, 1:])
