"""The road network of one scene: a main street, a signalled crossing, and two further streets that make it a block."""

import dataclasses

import numpy as np

from data_pipeline.simulator.road import SIDEWALK, Street, build_street

ARCS = (6, 5, 3, 3)  # arcs of main street, cross street, second cross street, far parallel street: fixed, so one compile serves all
JUNCTIONS = 4  # places kept per street where another street crosses it


@dataclasses.dataclass(frozen=True)
class Network:
    """Streets and where they meet.

    streets: main, cross, second, far. junctions: per street a list of (s on it, other street's index). crossing: arc length of
    the signalled crossing on the main street (0 on the cross street). side: +1 right-hand traffic, -1 left-hand.
    """

    streets: tuple[Street, ...]
    junctions: tuple[tuple[tuple[float, int], ...], ...]
    crossing: float
    side: int

    def road_distance(self, points) -> np.ndarray:
        """Signed distance [n] from points [n, 2] to the nearest kerb; negative on a road."""
        return np.min([np.abs(s.locate(points)[1]) - s.half_width for s in self.streets], 0)

    def clear_of_junctions(self, street: int, s, margin: float) -> np.ndarray:
        """True [n] where arc lengths s [n] on a street are more than `margin` metres from every crossing road's kerb."""
        s = np.atleast_1d(s)
        ok = np.ones(s.shape, bool)
        for at, other in self.junctions[street]:
            ok &= np.abs(s - at) > self.streets[other].half_width + margin
        return ok


def _junctions(streets, i):
    """Arc lengths on street i where its centre line crosses another one's."""
    low, high = streets[i].extent
    s = np.arange(low, high, 2.0)
    points, _ = streets[i].at(s)
    found = []
    for j, other in enumerate(streets):
        if j == i:
            continue
        _, d = other.locate(points)
        for n in np.flatnonzero((d[:-1] * d[1:] <= 0) & (np.abs(d[:-1]) < 4)):
            found.append((float(s[n] + 2.0 * d[n] / (d[n] - d[n + 1] + 1e-9)), j))
    found.sort(key=lambda item: abs(item[0]))
    return tuple(found[:JUNCTIONS])


def make_network(rng, *, side: int, turn: int, lanes: int, approach: float, seconds: float, origin) -> Network:
    """Draws a network.

    rng: numpy Generator. side: +1 right-hand traffic. turn: +1/-1 when the ego will turn left/right into the cross street, else
    0. lanes: per direction on the main street. approach: metres from the start (s = 0 on the main street) to the crossing.
    seconds: scene length, so that the streets outlast the drive. origin: [2] map position of the start.
    """

    def bend(length, most):
        return float(rng.choice([-1, 1]) * rng.uniform(0.3, 1.0) * most / max(length, 1.0))

    def flag(p):
        return bool(rng.random() < p)

    gap = rng.uniform(105, 140)
    beyond = 260 + 14 * seconds
    pieces = [
        (215 + approach - 40, bend(215 + approach - 40, 0.7)),
        (72, 0.0),
        (gap - 64, bend(gap - 64, 0.3)),
        (56, 0.0),
        (0.5 * beyond, bend(0.5 * beyond, 0.6)),
        (0.5 * beyond, bend(0.5 * beyond, 0.6)),
    ]
    main = build_street(pieces, 215, origin, rng.uniform(-np.pi, np.pi), lanes, flag(0.6))
    (at,), (heading,) = main.at([approach])
    away = turn if turn else int(rng.choice([-1, 1]))
    # Build the cross street pointing to where the far street lies, then name its direction so that +s is to the left.
    far_gap = rng.uniform(115, 150)
    length = 180 + (14 * seconds if turn else 60)
    parts = [(150, bend(150, 0.25)), (80, 0.0), (far_gap - 70, bend(far_gap - 70, 0.2)), (60, 0.0), (length, bend(length, 0.5))]
    skew = rng.uniform(-0.08, 0.08)
    anchor = 190.0
    if away < 0:
        parts = [(part, k) for part, k in reversed(parts)]
        anchor = sum(part for part, _ in parts) - 190.0
    cross = build_street(parts, anchor, at, heading + np.pi / 2 + skew, int(rng.choice([1, 2])) if not turn else lanes, flag(0.6))

    def straight_through(street, s):
        (point,), (direction,) = street.at([s])
        sides = [(170, bend(170, 0.25)), (70, 0.0), (170, bend(170, 0.25))]
        return build_street(sides, 205, point, direction + np.pi / 2 + rng.uniform(-0.08, 0.08), 1, flag(0.5))

    second = straight_through(main, approach + gap)
    far = straight_through(cross, away * far_gap)
    streets = (main, cross, second, far)
    return Network(streets, tuple(_junctions(streets, i) for i in range(4)), float(approach), side)


def sidewalk_offset(street: Street, fraction: float) -> float:
    """Lateral distance from the centre line to a place on the sidewalk; fraction 0 at the kerb, 1 at its far edge."""
    return street.half_width + fraction * SIDEWALK
