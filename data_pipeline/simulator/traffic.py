"""Other road users: their kinds, paths and motion, free of overlaps with the ego and with each other."""

import dataclasses
from collections.abc import Callable

import numpy as np

CAR, TRUCK, BUS = "vehicle.car", "vehicle.truck", "vehicle.bus.rigid"
MOTORCYCLE, BICYCLE, ADULT = "vehicle.motorcycle", "vehicle.bicycle", "human.pedestrian.adult"
CHILD, CONE, BARRIER = "human.pedestrian.child", "movable_object.trafficcone", "movable_object.barrier"

# width, length, height in metres, and how much they vary
SIZES = {
    CAR: ((1.88, 4.5, 1.58), 0.07),
    TRUCK: ((2.35, 6.9, 2.9), 0.08),
    BUS: ((2.6, 10.8, 3.2), 0.04),
    MOTORCYCLE: ((0.75, 2.1, 1.5), 0.05),
    BICYCLE: ((0.6, 1.75, 1.65), 0.05),
    ADULT: ((0.6, 0.6, 1.74), 0.06),
    CHILD: ((0.5, 0.5, 1.3), 0.08),
    CONE: ((0.4, 0.4, 0.85), 0.05),
    BARRIER: ((0.5, 2.2, 1.0), 0.05),
}


@dataclasses.dataclass(frozen=True)
class Actor:
    """One annotated object.

    category: a nuScenes category. size: (w, l, h) metres. index: 1-based id, as in the instance map. motion: times [n] s to
    (x, y, yaw, speed) [n, 4], x and y being the centre of the box on the ground. colour: sRGB 0..1. variant: 0..1, picks shapes.
    """

    category: str
    size: tuple[float, float, float]
    index: int
    motion: Callable[[np.ndarray], np.ndarray]
    colour: tuple[float, float, float]
    variant: float
    parked: bool = False

    def pose(self, times):
        """Box centre [n, 3] in the world (metres) and yaw [n] (radians) at times [n] seconds."""
        state = self.motion(np.asarray(times, np.float64))
        return np.concatenate([state[:, :2], np.full((len(state), 1), self.size[2] / 2)], 1), state[:, 2]

    def attribute(self, times) -> list[str]:
        """The nuScenes attribute name at each of times [n]; an empty string for objects that have none."""
        times = np.asarray(times, np.float64)
        if self.category.startswith("movable_object"):
            return [""] * len(times)
        moving = self.motion(times)[:, 3] > 0.25
        if self.category in (MOTORCYCLE, BICYCLE):
            return ["cycle.with_rider" if not self.parked else "cycle.without_rider"] * len(times)
        if self.category.startswith("human"):
            return ["pedestrian.moving" if m else "pedestrian.standing" for m in moving]
        rest = "vehicle.parked" if self.parked else "vehicle.stopped"
        return ["vehicle.moving" if m else rest for m in moving]


class Still:
    """Motion of an object that stays at (x, y) with heading yaw."""

    def __init__(self, x, y, yaw):
        self.state = np.array([x, y, yaw, 0.0])

    def __call__(self, times):
        return np.broadcast_to(self.state, (len(times), 4))


class Along:
    """Motion along a lane or path: `place(s [n]) -> points [n, 2], headings [n]`, with s and speed given at knots in time."""

    def __init__(self, place, times, s, speed, lateral=0.0):
        self.place, self.times, self.s, self.speed, self.lateral = place, times, s, speed, lateral

    def __call__(self, times):
        points, heading = self.place(np.interp(times, self.times, self.s))
        points = points + self.lateral * np.stack([-np.sin(heading), np.cos(heading)], -1)
        speed = np.abs(np.interp(times, self.times, self.speed))
        return np.concatenate([points, heading[:, None], speed[:, None]], 1)


def follow_lane(starts, wishes, lengths, stops, seconds, leader=None):
    """Vehicles of one lane by the intelligent driver model with red lights.

    starts: front-to-back ordered path lengths at time -1 s (largest first). wishes: desired speeds, m/s. lengths: metres.
    stops: list of (path length of the stop line, function time -> red). leader: optional array of path lengths, on the same time
    knots, of a vehicle ahead of all. Returns knots in time [k], s [k, n], speed [k, n].
    """
    dt = 0.1
    times = np.arange(-1.0, seconds + 1.0, dt)
    s, v = np.array(starts, float), np.array(wishes, float)
    # Those that start close to a red line are already waiting or slow.
    for line, red in stops:
        gap = line - s
        if red(times[0]):
            v = np.where((gap > -1) & (gap < 40), np.minimum(v, np.sqrt(np.maximum(2 * 1.4 * (gap - 2.5), 0.0))), v)
    all_s, all_v = [], []
    for k, now in enumerate(times):
        all_s.append(s.copy())
        all_v.append(v.copy())
        for i in range(len(s)):
            gap, closing = 200.0, 0.0
            if i:
                gap, closing = s[i - 1] - s[i] - (lengths[i] + lengths[i - 1]) / 2, v[i] - v[i - 1]
            elif leader is not None:
                gap, closing = leader[k] - s[i] - lengths[i] / 2 - 2.5, v[i]
            for line, red in stops:
                to_line = line - s[i] - lengths[i] / 2
                if red(now) and -0.5 < to_line < gap and v[i] ** 2 / (2 * max(to_line, 0.1)) < 4.5:
                    gap, closing = to_line + 1.2, v[i]
            want = 2.0 + max(0.0, 1.1 * v[i] + v[i] * closing / (2 * np.sqrt(1.5 * 2.0)))
            accel = 1.5 * (1 - (v[i] / wishes[i]) ** 4 - (want / max(gap, 0.3)) ** 2)
            v[i] = max(v[i] + dt * np.clip(accel, -5.0, 1.5), 0.0)
            s[i] += dt * v[i]
    return times, np.array(all_s), np.array(all_v)


def overlap(a, size_a, b, size_b, margin=0.0) -> np.ndarray:
    """Whether two ground rectangles overlap at each time (separating axes).

    a, b: [n, ≥3] centre x, y, yaw. sizes: (width, length, …). margin: metres added around b. Returns [n] bool.
    """
    hit = np.ones(len(a), bool)
    delta = b[:, :2] - a[:, :2]
    boxes = ((a[:, 2], size_a[1] / 2, size_a[0] / 2), (b[:, 2], size_b[1] / 2 + margin, size_b[0] / 2 + margin))
    for yaw, _, _ in boxes:
        for shift in (0.0, np.pi / 2):
            axis = np.stack([np.cos(yaw + shift), np.sin(yaw + shift)], -1)
            reach = 0.0
            for other, length, width in boxes:
                turn = yaw + shift - other
                reach = reach + length * np.abs(np.cos(turn)) + width * np.abs(np.sin(turn))
            hit &= np.abs(np.sum(delta * axis, -1)) < reach
    return hit
