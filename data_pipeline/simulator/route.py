"""The ego's drive: a lane path through the network, a speed plan, and a kinematic bicycle that follows them.

State is the rear axle (nuScenes' ego frame): x' = v cos ψ, y' = v sin ψ, ψ' = v tan δ / L, the kinematic bicycle model with
steering angle δ from pure pursuit; speed follows the plan with bounded acceleration and jerk.
"""

import dataclasses

import numpy as np

from data_pipeline.simulator.network import Network
from data_pipeline.simulator.road import LANE

WHEELBASE = 2.588  # metres, the nuScenes car
EGO_SIZE = (1.73, 4.084)  # width, length
EGO_CENTRE = 1.29  # rear axle to the middle of the car, metres
STEP = 0.02  # seconds
LEAD_IN = 4.0  # seconds simulated before and after the scene, so that poses just outside it exist
COMFORT = 1.8  # m/s², planned acceleration and braking
LATERAL = 2.2  # m/s², planned
SPACING = 0.25  # metres between path points
STOP_GAP = 5.2  # metres from the crossing road's kerb to the stop line


@dataclasses.dataclass(frozen=True)
class Path:
    """A dense polyline: points [n, 2] every `SPACING` metres, heading [n], start: arc length of its first point."""

    points: np.ndarray
    heading: np.ndarray
    start: float

    def at(self, s):
        """Points [n, 2] and headings [n] at path lengths s [n], clamped to the path."""
        place = (np.atleast_1d(s) - self.start) / SPACING
        index = np.arange(len(self.heading))
        return (
            np.stack([np.interp(place, index, self.points[:, i]) for i in range(2)], -1),
            np.interp(place, index, self.heading),
        )


def _resample(points, start):
    """Path through points [n, 2] with even spacing; its first point has path length `start`."""
    steps = np.linalg.norm(np.diff(points, axis=0), axis=1)
    keep = np.concatenate([[True], steps > 1e-6])
    points = points[keep]
    along = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
    even = np.arange(0, along[-1], SPACING)
    points = np.stack([np.interp(even, along, points[:, i]) for i in range(2)], -1)
    delta = np.gradient(points, axis=0)
    return Path(points, np.unwrap(np.arctan2(delta[:, 1], delta[:, 0])), start)


def ego_path(network: Network, turn: int, lane: int, change: tuple[float, int] | None) -> Path:
    """The lane path from 150 m behind the start, path length 0 at the start.

    turn: +1 left, -1 right, 0 straight on. lane: index at the start. change: (arc length, target lane) of a lane change.
    """
    main, cross, side = network.streets[0], network.streets[1], network.side
    back = 150.0
    if not turn:
        s = np.arange(-back, main.extent[1], 0.5)
        lanes = np.full(s.shape, float(lane))
        if change:
            blend = np.clip((s - change[0]) / 38.0, 0, 1)
            lanes += (change[1] - lane) * blend**3 * (10 - 15 * blend + 6 * blend**2)
        points, heading = main.at(s)
        d = -side * (lanes + 0.5) * LANE
        points = points + d[:, None] * np.stack([-np.sin(heading), np.cos(heading)], -1)
    else:
        near = turn == -side  # the turn that does not cross oncoming traffic
        # The near turn runs parallel to the rounded kerb (fillet radius 4.5 m in the picture).
        radius = 4.4 + min(street.half_width - (street.lanes - 0.5) * LANE for street in (main, cross)) if near else 12.0
        s = network.crossing
        (p,), (h,) = main.lane(1, lane, side, [s])
        (q,), (g,) = cross.lane(turn, lane, side, [0.0])
        a, b = np.array([np.cos(h), np.sin(h)]), np.array([np.cos(g), np.sin(g)])
        u, v = np.linalg.solve(np.stack([a, -b], -1), q - p)
        offset = turn * v  # from driving direction to arc length on the cross street
        meet = p + u * a
        angle = np.arctan2(a[0] * b[1] - a[1] * b[0], a @ b)
        tangent = radius * np.tan(abs(angle) / 2)
        centre = meet - tangent * a + radius * np.sign(angle) * np.array([-a[1], a[0]])
        sweep = h - np.sign(angle) * np.pi / 2 + np.linspace(0, angle, 60)
        arc = centre + radius * np.stack([np.cos(sweep), np.sin(sweep)], -1)
        far = abs(cross.extent[0 if turn < 0 else 1])
        before, _ = main.lane(1, lane, side, np.arange(-back, s + u - tangent, 0.5))
        after, _ = cross.lane(turn, lane, side, turn * np.arange(turn * offset + tangent, far, 0.5))
        points = np.concatenate([before, arc, after])
    (start,), _ = main.lane(1, lane, side, [0.0])
    path = _resample(points, 0.0)
    return Path(path.points, path.heading, -SPACING * float(np.argmin(np.linalg.norm(path.points - start, axis=1))))


def _speed_limits(path: Path, cruise: float) -> np.ndarray:
    """Highest comfortable speed [n] along the path: curvature, then braking distance backwards."""
    curvature = np.abs(np.gradient(path.heading) / SPACING)
    window = np.ones(21) / 21
    curvature = np.convolve(np.pad(curvature, 10, mode="edge"), window, mode="valid")
    # Nobody holds a speed exactly: the cruise speed wanders by a tenth along the way.
    wander = 1 + 0.1 * np.sin(np.arange(len(curvature)) * SPACING / 13.0)
    limit = np.minimum(cruise * wander, np.sqrt(LATERAL / np.maximum(curvature, 1e-6)))
    limit[-120:] = 0
    for i in range(len(limit) - 2, -1, -1):
        limit[i] = min(limit[i], np.sqrt(limit[i + 1] ** 2 + 2 * COMFORT * SPACING))
    return limit


@dataclasses.dataclass(frozen=True)
class Drive:
    """The ego's trajectory. times [n] s; states [n, 4]: x, y, unwrapped yaw, speed; progress [n]: path length, metres."""

    times: np.ndarray
    states: np.ndarray
    progress: np.ndarray
    path: Path

    def pose(self, times):
        """x, y, yaw, speed [n, 4] at times [n], interpolated; the ends are held."""
        return np.stack([np.interp(times, self.times, self.states[:, i]) for i in range(4)], -1)

    def at(self, times):
        """Path length [n] at times [n]."""
        return np.interp(times, self.times, self.progress)


def drive(path: Path, *, cruise: float, seconds: float, stop: tuple[float, float] | None) -> Drive:
    """Runs the bicycle along a path.

    cruise: m/s. stop: (path length where the rear axle shall stand, time to go on again in s) or None.
    Returns poses from LEAD_IN before the scene to LEAD_IN after it.
    """
    limits = _speed_limits(path, cruise)
    count = int(round((seconds + 2 * LEAD_IN) / STEP)) + 1
    times = -LEAD_IN + STEP * np.arange(count)
    v = min(cruise, limits[int((0 - path.start) / SPACING)])
    s = -LEAD_IN * v
    (p,), (yaw,) = path.at([s])
    x, y, accel, steer = float(p[0]), float(p[1]), 0.0, 0.0
    px, py = path.points.T
    index = int((s - path.start) / SPACING)
    last = len(px) - 1
    states, progress = np.zeros((count, 4)), np.zeros(count)
    for n, now in enumerate(times):
        while index < last and (px[index + 1] - x) ** 2 + (py[index + 1] - y) ** 2 < (px[index] - x) ** 2 + (py[index] - y) ** 2:
            index += 1
        c, d = np.cos(path.heading[index]), np.sin(path.heading[index])
        s = path.start + SPACING * index + (x - px[index]) * c + (y - py[index]) * d
        states[n], progress[n] = (x, y, yaw, v), s
        target = limits[min(index + int(0.3 * v / SPACING), last)]
        if stop and now < stop[1]:
            target = min(target, np.sqrt(2 * 1.5 * max(stop[0] - s - 0.15 * v, 0.0)))
        wish = np.clip((target - v) / 0.5, -2.7, COMFORT)
        accel += np.clip(wish - accel, -5.0 * STEP, 5.0 * STEP)
        if v < 0.3 and target < 0.3:
            # Coming to rest: let the speed run out instead of hunting around zero.
            accel = -v / 0.4
        ahead = min(index + int((2.2 + 0.32 * v) / SPACING), last)
        gx, gy = px[ahead] - x, py[ahead] - y
        lateral = -gx * np.sin(yaw) + gy * np.cos(yaw)
        wanted = np.arctan(WHEELBASE * 2 * lateral / max(gx * gx + gy * gy, 1.0))
        steer += np.clip(wanted - steer, -0.6 * STEP, 0.6 * STEP) if v > 0.05 else 0.0
        x, y = x + STEP * v * np.cos(yaw), y + STEP * v * np.sin(yaw)
        yaw += STEP * v * np.tan(steer) / WHEELBASE
        v = max(v + STEP * accel, 0.0)
    return Drive(times, states, progress, path)
