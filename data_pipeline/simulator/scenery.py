"""What stands still beside the streets: buildings, trees, street lamps, traffic lights, hedges and walls."""

import dataclasses

import numpy as np

from data_pipeline.simulator.network import Network, sidewalk_offset
from data_pipeline.simulator.road import LIGHT_SPACING, SIDEWALK
from data_pipeline.simulator.shapes import BUILDING, DARK, FOLIAGE, LIGHT, PART, part

FACADES = {
    "boston": [(0.58, 0.33, 0.26), (0.66, 0.45, 0.36), (0.74, 0.68, 0.58), (0.56, 0.58, 0.62), (0.45, 0.52, 0.58), (0.80, 0.76, 0.70)],
    "singapore": [(0.86, 0.84, 0.78), (0.82, 0.72, 0.58), (0.70, 0.78, 0.78), (0.62, 0.68, 0.74), (0.85, 0.66, 0.55), (0.55, 0.66, 0.60)],
}
LEAVES = {"boston": [(0.30, 0.42, 0.16), (0.42, 0.46, 0.17)], "singapore": [(0.16, 0.40, 0.15), (0.24, 0.46, 0.18)]}


@dataclasses.dataclass(frozen=True)
class Scenery:
    """Static parts. boxes: [n, PART + 2] rows of `shapes.part` in world metres, then cos and sin of the yaw. rounds: [m, PART]
    ellipsoids with equal horizontal half sizes. signals: [k] rows of boxes that are traffic-light lamps, whose colour depends on
    time; `signal_main` [k] tells whether a lamp shows the main street's light, `signal_lamp` which lamp it is (0 red … 2 green).
    """

    boxes: np.ndarray
    rounds: np.ndarray
    signals: np.ndarray
    signal_main: np.ndarray
    signal_lamp: np.ndarray


class _Yard:
    """Collects parts while keeping buildings off the roads and off each other."""

    def __init__(self, rng, network: Network, city: str):
        self.rng, self.network, self.city = rng, network, city
        self.boxes, self.rounds, self.signals = [], [], []
        self.footprints: list[tuple[np.ndarray, float]] = []

    def box(self, row, yaw):
        self.boxes.append(np.concatenate([row, [np.cos(yaw), np.sin(yaw)]]))

    def free(self, centre, half, yaw, margin):
        """Whether a rectangle keeps `margin` metres from every kerb and does not meet an earlier building."""
        c, n = np.cos(yaw), np.sin(yaw)
        u, v = np.meshgrid(np.linspace(-1, 1, 5) * half[0], np.linspace(-1, 1, 5) * half[1])
        points = centre + np.stack([u * c - v * n, u * n + v * c], -1).reshape(-1, 2)
        if self.network.road_distance(points).min() < margin:
            return False
        for other, size in self.footprints:
            local = points - other[:2]
            x, y = local[:, 0] * other[2] + local[:, 1] * other[3], -local[:, 0] * other[3] + local[:, 1] * other[2]
            if np.any((np.abs(x) < size[0] + 0.5) & (np.abs(y) < size[1] + 0.5)):
                return False
        self.footprints.append((np.array([*centre, c, n]), half))
        return True

    def buildings(self, street, low, high):
        """Rows of buildings on both sides of a street; gaps become lots with trees."""
        rng, road = self.rng, self.network.streets[street]
        palette = np.array(FACADES[self.city])
        base = rng.uniform(8, 18)
        for left in (-1, 1):
            s = low
            while s < high:
                length, depth = rng.uniform(14, 30), rng.uniform(10, 18)
                height = float(np.clip(base * rng.lognormal(0, 0.45), 5, 48))
                back = rng.choice([0.5, 3.0, 7.0], p=[0.5, 0.3, 0.2])
                (p,), (h,) = road.at([s + length / 2], left * (sidewalk_offset(road, 1.0) + back + depth / 2))
                if rng.random() < 0.86 and self.free(p, (length / 2, depth / 2), h, SIDEWALK + 0.3):
                    colour = np.clip(palette[rng.integers(len(palette))] * rng.uniform(0.88, 1.1), 0, 0.95)
                    trim = np.clip(colour * rng.choice([0.6, 1.25]), 0, 0.95)
                    half = (length / 2, depth / 2, height / 2)
                    self.box(part((*p, height / 2), half, colour, trim, kind=BUILDING, extra=rng.random()), h)
                    if height < 11 and self.city == "boston" and rng.random() < 0.5:
                        roof = 1.6
                        row = part((*p, height + roof), (depth / 4, length / 2, roof), (0.33, 0.27, 0.26), taper=depth / 4 / roof)
                        self.box(row, h + np.pi / 2)
                s += length + rng.choice([0.6, 4.0, 12.0], p=[0.6, 0.25, 0.15])

    def tree(self, p, scale):
        rng = self.rng
        leaves = np.array(LEAVES[self.city])
        colour = leaves[0] + (leaves[1] - leaves[0]) * rng.random()
        trunk, crown = 1.5 * scale + 1.0, 1.55 * scale
        self.box(part((*p, trunk / 2), (0.16 * scale, 0.16 * scale, trunk / 2), (0.30, 0.23, 0.18)), 0.0)
        self.rounds.append(part((*p, trunk + 0.72 * crown), (crown, crown, 1.05 * crown), colour, kind=FOLIAGE, extra=rng.random()))

    def kerbside(self, street, low, high):
        """Trees and street lamps along the sidewalks, hedges behind them."""
        rng, road, network = self.rng, self.network.streets[street], self.network
        leafy = rng.uniform(0.25, 0.9)
        for left in (-1, 1):
            for s in np.arange(low, high, LIGHT_SPACING / 2):
                at = s + 7.0
                (p,), _ = road.at([at], left * sidewalk_offset(road, 0.22))
                if rng.random() < leafy and network.clear_of_junctions(street, at, 9.0)[0] and network.road_distance(p[None])[0] > 0.5:
                    self.tree(p, rng.uniform(1.0, 1.7))
            for s in np.arange(np.ceil(low / LIGHT_SPACING) * LIGHT_SPACING, high, LIGHT_SPACING):
                if (round(s / LIGHT_SPACING) + (left > 0)) % 2:
                    continue
                (p,), (h,) = road.at([s], left * sidewalk_offset(road, 0.1))
                if network.road_distance(p[None])[0] < 0.2:
                    continue
                self.box(part((*p, 3.6), (0.09, 0.09, 3.6), (0.42, 0.44, 0.45)), h)
                (q,), _ = road.at([s], left * (sidewalk_offset(road, 0.1) - 1.0))
                self.box(part((*q, 7.2), (0.14, 1.15, 0.09), (0.42, 0.44, 0.45), (1.0, 0.85, 0.55), kind=LIGHT, extra=0.0), h)
            for s in np.arange(low + 8, high, 26.0):
                (p,), (h,) = road.at([s], left * (sidewalk_offset(road, 1.0) + 1.0))
                if rng.random() < 0.4 and self.free(p, (5.5, 0.5), h, SIDEWALK + 0.2):
                    green = rng.random() < 0.6
                    colour = (0.20, 0.34, 0.14) if green else (0.62, 0.58, 0.52)
                    self.box(part((*p, 0.6), (5.5, 0.4, 0.6), colour), h)

    def lights(self):
        """Signals at the far corners of the crossing, one head per approach, facing it."""
        network = self.network
        for street, other, at in ((0, 1, network.crossing), (1, 0, 0.0)):
            road, cross = network.streets[street], network.streets[other]
            for direction in (-1, 1):
                s = at + direction * (cross.half_width + 1.2)
                lateral = -network.side * direction * (road.half_width + 0.5)
                (p,), (h,) = road.at([s], lateral)
                self.box(part((*p, 2.6), (0.1, 0.1, 2.6), (0.25, 0.27, 0.27)), h)
                inwards = lateral - np.sign(lateral) * 2.4
                (q,), _ = road.at([s], lateral - np.sign(lateral) * 1.3)
                self.box(part((*q, 5.15), (0.08, 1.3, 0.07), (0.25, 0.27, 0.27)), h)
                (q,), _ = road.at([s], inwards)
                self.box(part((*q, 4.9), (0.18, 0.32, 0.85), DARK, DARK), h)
                (q,), _ = road.at([s - direction * 0.16], inwards)
                for lamp in range(3):
                    self.signals.append((len(self.boxes), street == 0, lamp))
                    self.box(part((*q, 5.45 - 0.55 * lamp), (0.1, 0.24, 0.24), DARK, DARK, kind=LIGHT, extra=1.0), h)


def make_scenery(rng, network: Network, city: str, ranges) -> Scenery:
    """Draws the scenery.

    rng: numpy Generator. city: 'boston' or 'singapore' (palettes). ranges: per street the arc lengths (low, high) that can be seen.
    """
    yard = _Yard(rng, network, city)
    yard.lights()
    for street, (low, high) in enumerate(ranges):
        yard.buildings(street, low, high)
    for street, (low, high) in enumerate(ranges):
        yard.kerbside(street, low, high)
    signals = np.array(yard.signals)
    return Scenery(np.stack(yard.boxes), np.stack(yard.rounds) if yard.rounds else np.zeros((0, PART)),
                   signals[:, 0].astype(int), signals[:, 1].astype(bool), signals[:, 2].astype(int))  # fmt: skip
