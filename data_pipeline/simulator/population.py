"""Fills a network with road users around the ego's drive, and drops every one that would touch another or the ego."""

import numpy as np

from data_pipeline.simulator.network import Network, sidewalk_offset
from data_pipeline.simulator.road import LANE, PARKING
from data_pipeline.simulator.route import EGO_CENTRE, EGO_SIZE, STOP_GAP, Drive
from data_pipeline.simulator.traffic import (
    ADULT,
    BARRIER,
    BICYCLE,
    BUS,
    CAR,
    CHILD,
    CONE,
    MOTORCYCLE,
    SIZES,
    TRUCK,
    Actor,
    Along,
    Still,
    follow_lane,
    overlap,
)

PAINT = np.array(
    [
        (0.92, 0.92, 0.92),
        (0.75, 0.76, 0.78),
        (0.42, 0.44, 0.47),
        (0.13, 0.13, 0.15),
        (0.72, 0.10, 0.09),
        (0.13, 0.25, 0.58),
        (0.10, 0.42, 0.45),
        (0.93, 0.72, 0.12),
        (0.34, 0.16, 0.12),
    ]
)
FLEET = np.array([(0.90, 0.90, 0.88), (0.70, 0.14, 0.12), (0.15, 0.34, 0.62), (0.16, 0.50, 0.36), (0.88, 0.66, 0.16), (0.60, 0.62, 0.64)])
PAINT_ODDS = np.array([0.2, 0.14, 0.12, 0.12, 0.14, 0.12, 0.06, 0.06, 0.04])
CLOTHES = np.array([(0.75, 0.2, 0.2), (0.2, 0.3, 0.6), (0.85, 0.85, 0.8), (0.2, 0.2, 0.22), (0.85, 0.6, 0.2), (0.25, 0.5, 0.35)])
LEAD_SECONDS = 1.0  # a leading or following car drives the ego's own track this much earlier or later …
LEAD_METRES = 9.5  # … and this much further ahead or behind, so distances grow with speed and never close


def ego_boxes(drive: Drive, times):
    """Centre x, y and yaw [n, 3] of the ego's own box at times [n]."""
    state = drive.pose(times)
    shift = EGO_CENTRE * np.stack([np.cos(state[:, 2]), np.sin(state[:, 2])], -1)
    return np.concatenate([state[:, :2] + shift, state[:, 2:3]], 1)


class Population:
    """Collects actors; `add` keeps a candidate only when it stays clear of the ego and of those already kept."""

    def __init__(self, rng, network: Network, drive: Drive, seconds: float):
        self.rng, self.network, self.drive, self.seconds = rng, network, drive, seconds
        self.times = np.arange(-1.0, seconds + 1.0, 0.1)
        self.ego = ego_boxes(drive, self.times)
        self.actors: list[Actor] = []
        self.tracks: list[np.ndarray] = []

    def draw(self, category):
        """Size (w, l, h) and colour for a new actor."""
        base, spread = SIZES[category]
        size = tuple(float(x) for x in np.round(np.array(base) * (1 + spread * self.rng.uniform(-1, 1, 3)), 3))
        palette = CLOTHES if category in (ADULT, CHILD, BICYCLE, MOTORCYCLE) else PAINT
        odds = None if palette is CLOTHES else PAINT_ODDS
        if category in (BUS, TRUCK):
            # Big black sides would hide their own windows.
            palette, odds = FLEET, None
        colour = palette[self.rng.choice(len(palette), p=odds)]
        if category in (CONE, BARRIER):
            colour = np.array([0.95, 0.42, 0.1])
        return size, tuple(float(c) for c in colour)

    def add(self, category, motion, *, size=None, colour=None, parked=False, margin=0.6) -> bool:
        drawn_size, drawn_colour = self.draw(category)
        actor = Actor(category, size or drawn_size, len(self.actors) + 1, motion, colour or drawn_colour,
                      float(self.rng.random()), parked)  # fmt: skip
        track = motion(self.times)
        if np.any(overlap(self.ego, EGO_SIZE, track, actor.size, margin)):
            return False
        for other, known in zip(self.actors, self.tracks, strict=True):
            reach = actor.size[1] + other.size[1]
            near = np.abs(known[:, :2] - track[:, :2]).max(1) < reach
            if near.any() and np.any(overlap(known[near], other.size, track[near], actor.size, 0.25)):
                return False
        self.actors.append(actor)
        self.tracks.append(track)
        return True

    def escorts(self, lead: bool, tail: bool):
        """Cars that drive the ego's own path ahead of it and behind it."""
        for wanted, sign in ((lead, 1), (tail, -1)):
            if wanted:
                # The ego's reference is its rear axle, 1.3 m behind its middle.
                s = self.drive.at(self.times + sign * LEAD_SECONDS) + sign * LEAD_METRES + EGO_CENTRE
                place = self.drive.path.at
                self.add(CAR if sign < 0 or self.rng.random() < 0.75 else TRUCK, Along(place, self.times, s, np.gradient(s, 0.1)))

    def lane(self, street: int, direction: int, index: int, low: float, high: float, spacing, stops, cruise):
        """Moving vehicles on one lane between arc lengths low and high (at the start), spaced by uniform(*spacing) metres."""
        rng, road, side = self.rng, self.network.streets[street], self.network.side
        starts, kinds = [], []
        front = max(direction * low, direction * high) - rng.uniform(0, spacing[0])
        back = min(direction * low, direction * high)
        while front > back:
            kind = rng.choice([CAR, TRUCK, BUS, MOTORCYCLE, BICYCLE], p=[0.66, 0.12, 0.09, 0.08, 0.05])
            if kind == BICYCLE and index != road.lanes - 1:
                kind = CAR
            starts.append(front)
            kinds.append(str(kind))
            front -= rng.uniform(*spacing) + SIZES[kinds[-1]][0][1]
        if not starts:
            return
        drawn = [self.draw(kind) for kind in kinds]
        wishes = [rng.uniform(3.5, 5) if kind == BICYCLE else cruise * rng.uniform(0.85, 1.1) for kind in kinds]
        knots, s, v = follow_lane(starts, wishes, [size[1] for size, _ in drawn], stops, self.seconds)
        extent = road.extent
        for i, kind in enumerate(kinds):
            if min(direction * s[0, i], direction * s[-1, i]) < extent[0] or max(direction * s[0, i], direction * s[-1, i]) > extent[1]:
                continue

            def place(path, direction=direction):
                return road.lane(direction, index, side, direction * path)

            kerbwards = -side * (LANE * 0.28) if kind in (BICYCLE, MOTORCYCLE) else 0.0
            self.add(kind, Along(place, knots, s[:, i], v[:, i], kerbwards), size=drawn[i][0], colour=drawn[i][1], margin=0.9)

    def parked(self, street: int, low: float, high: float, fill: float):
        """Parked vehicles in the kerb-side strips between arc lengths low and high."""
        road, rng = self.network.streets[street], self.rng
        if not road.parking:
            return
        for left in (-1, 1):
            s = low + rng.uniform(0, 6)
            while s < high:
                kind = str(rng.choice([CAR, TRUCK, MOTORCYCLE], p=[0.9, 0.05, 0.05]))
                length = SIZES[kind][0][1]
                if rng.random() < fill and self.network.clear_of_junctions(street, s, 11.0)[0]:
                    (p,), (h,) = road.at([s], left * (road.lanes * LANE + 0.5 * PARKING + rng.uniform(-0.1, 0.1)))
                    h = h if left == -self.network.side else h + np.pi
                    self.add(kind, Still(p[0], p[1], h + rng.normal(0, 0.015)), parked=True, margin=0.3)
                s += length + rng.uniform(1.3, 3.0)

    def waiting(self, street: int, probability: float):
        """A vehicle giving way at each stop line of an unsignalled side street."""
        road, side = self.network.streets[street], self.network.side
        for at, other in self.network.junctions[street]:
            for direction in (-1, 1):
                if self.rng.random() < probability and other in (0, 1):
                    s = at - direction * (self.network.streets[other].half_width + STOP_GAP + 3.2 + self.rng.uniform(0, 1))
                    (p,), (h,) = road.lane(direction, road.lanes - 1, side, [s])
                    self.add(CAR, Still(p[0], p[1], h))

    def walkers(self, street: int, low: float, high: float, count: int, walking: float):
        """Pedestrians along the sidewalks, a share `walking` of them moving."""
        road, rng = self.network.streets[street], self.rng
        for _ in range(count):
            side = rng.choice([-1, 1])
            s0, d = rng.uniform(min(low, high), max(low, high)), side * sidewalk_offset(road, rng.uniform(0.25, 0.85))
            speed = float(rng.choice([-1, 1]) * rng.uniform(0.9, 1.6)) if rng.random() < walking else 0.0
            ends = s0 + speed * np.array([-1.0, self.seconds + 1])
            if not self.network.clear_of_junctions(street, np.linspace(*ends, 12), 1.0).all():
                continue

            def place(s, d=d, turn=0.0 if speed >= 0 else np.pi):
                points, heading = road.at(s, d)
                return points, heading + turn

            knots = np.array([-1.0, self.seconds + 1])
            self.add(ADULT if rng.random() < 0.9 else CHILD, Along(place, knots, ends, np.full(2, speed)))

    def crossers(self, street: int, at: float, windows, count: int):
        """Pedestrians on the zebra crossing around arc length `at`; each starts inside one of `windows` [(from, to) seconds]."""
        road, rng = self.network.streets[street], self.rng
        for _ in range(count):
            begin, end = windows[rng.integers(len(windows))]
            reach, speed, way = road.half_width + 1.2, rng.uniform(1.1, 1.6), int(rng.choice([-1, 1]))
            need = 2 * reach / speed
            if end - begin < need:
                continue
            begin = rng.uniform(begin, end - need)
            (p,), (h,) = road.at([at + rng.uniform(-1.1, 1.1)])
            left = np.array([-np.sin(h), np.cos(h)])

            def place(d, p=p, left=left, yaw=h + way * np.pi / 2, way=way):
                return p + way * d[:, None] * left, np.full(d.shape, yaw)

            knots = np.array([begin - 1e-3, begin, begin + need, begin + need + 1e-3])
            self.add(ADULT, Along(place, knots, np.array([-reach, -reach, reach, reach]), np.array([0, speed, speed, 0.0])))

    def works(self, street: int, s: float, left: int):
        """A row of cones and a barrier at the kerb, as around a small road work."""
        road = self.network.streets[street]
        for n in range(6):
            (p,), (h,) = road.at([s + 2.6 * n], left * (road.half_width - 0.5))
            if self.network.clear_of_junctions(street, s + 2.6 * n, 6.0)[0]:
                self.add(BARRIER if n in (2, 3) else CONE, Still(p[0], p[1], h), margin=0.2)
