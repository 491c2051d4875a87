"""Streets: chains of circular arcs with lanes, and how to find a point's place along and across them.

A street is a tangent-continuous chain of arcs of constant curvature. Arc length `s` runs along its centre line, the lateral
offset `d` is positive to the left of it. The same closed form serves NumPy (traffic, scenery) and JAX (the renderer).
"""

import dataclasses

import numpy as np

LANE = 3.4  # metres
PARKING = 2.3
SIDEWALK = 3.2
LIGHT_SPACING = 28.0  # street lamps stand at multiples of this arc length


def arc_coordinates(x, y, arc, xp):
    """Arc length, signed lateral offset and overshoot of points relative to one arc.

    x, y: points, metres. arc: (mid x, mid y, cos, sin of the heading at the middle, curvature 1/m, half length, s at the
    middle). xp: numpy or jax.numpy. Returns (s, d, over): `over` is how far a point lies beyond the arc's ends (0 within).
    The forms stay finite for curvature 0; the arc tangent is a Padé approximant, 0.2 % off at the ends of a ±40° arc.
    """
    mx, my, c, n, k, half, s_mid = (arc[i] for i in range(7))
    px, py = x - mx, y - my
    u, v = px * c + py * n, py * c - px * n
    kx, ky = k * u, 1 - k * v
    root = xp.sqrt(kx * kx + ky * ky)
    d = (2 * v - k * (u * u + v * v)) / (1 + root)
    safe = xp.maximum(ky, 0.2)
    z2 = (kx / safe) ** 2
    along = u / safe * (15 + 4 * z2) / (15 + 9 * z2)
    over = xp.maximum(xp.abs(along) - half, 0.0)
    return s_mid + xp.clip(along, -half, half), d, over


@dataclasses.dataclass(frozen=True)
class Street:
    """One street. arcs: [m, 7] as in `arc_coordinates`, ordered along s; lanes: per direction; parking: kerb-side strips."""

    arcs: np.ndarray
    lanes: int
    parking: bool

    @property
    def half_width(self) -> float:
        """Centre line to kerb, metres."""
        return self.lanes * LANE + (PARKING if self.parking else 0.6)

    @property
    def extent(self) -> tuple[float, float]:
        """First and last arc length."""
        return float(self.arcs[0, 6] - self.arcs[0, 5]), float(self.arcs[-1, 6] + self.arcs[-1, 5])

    def at(self, s, d=0.0):
        """Points [n, 2] and headings [n] at arc lengths s [n] with lateral offset d; beyond the ends the last arc goes on."""
        s = np.atleast_1d(np.asarray(s, np.float64))
        which = np.clip(np.searchsorted(self.arcs[:, 6] - self.arcs[:, 5], s, side="right") - 1, 0, len(self.arcs) - 1)
        mx, my, c, n, k, _, s_mid = self.arcs[which].T
        local = s - s_mid
        angle = k * local
        # sinc-like forms keep straight pieces exact.
        u = local * np.sinc(angle / np.pi)
        v = local * np.sin(angle / 2) * np.sinc(angle / 2 / np.pi)
        heading = np.arctan2(n, c) + angle
        x = mx + u * c - v * n - d * np.sin(heading)
        y = my + u * n + v * c + d * np.cos(heading)
        return np.stack([x, y], -1), heading

    def locate(self, points):
        """(s, d) [n] of points [n, 2]; beyond an end |d| is the distance to that end, so it is always >= the true distance's
        lateral part."""
        x, y = np.asarray(points, np.float64).T
        best = None
        for arc in self.arcs:
            s, d, over = arc_coordinates(x, y, arc, np)
            metric = d * d + over * over
            signed = np.where(d < 0, -1.0, 1.0) * np.sqrt(metric)
            if best is None:
                best = [metric, s, signed]
            else:
                nearer = metric < best[0]
                best = [np.where(nearer, new, old) for new, old in zip((metric, s, signed), best, strict=True)]
        return best[1], best[2]

    def lane(self, direction: int, index: float, side: int, s):
        """Lane centre: points [n, 2] and driving headings [n].

        direction: +1 along s, -1 against it. index: 0 is next to the centre line. side: +1 right-hand traffic, -1 left-hand.
        """
        points, heading = self.at(s, -side * direction * (index + 0.5) * LANE)
        return points, heading if direction > 0 else heading + np.pi


def build_street(pieces, anchor_s, anchor, heading, lanes, parking) -> Street:
    """A street from pieces [(length, curvature), …]; `anchor` [2] and `heading` are its pose at arc length `anchor_s`.

    Arc length starts at 0 at the first piece and is shifted so that the anchor has s = 0.
    """
    x = y = angle = s = 0.0
    arcs = []
    for length, k in pieces:
        half = length / 2
        mid = [x, y]
        for part in range(2):
            turn = k * half
            u, v = half * np.sinc(turn / np.pi), half * np.sin(turn / 2) * np.sinc(turn / 2 / np.pi)
            x, y, angle = x + u * np.cos(angle) - v * np.sin(angle), y + u * np.sin(angle) + v * np.cos(angle), angle + turn
            if part == 0:
                mid = [x, y, angle]
        arcs.append([mid[0], mid[1], np.cos(mid[2]), np.sin(mid[2]), k, half, s + half - anchor_s])
        s += length
    raw = Street(np.array(arcs), lanes, parking)
    (origin,), (at,) = raw.at([0.0])
    turn = heading - at
    c, n = np.cos(turn), np.sin(turn)
    out = raw.arcs.copy()
    out[:, :2] = (raw.arcs[:, :2] - origin) @ np.array([[c, n], [-n, c]]) + np.asarray(anchor)
    out[:, 2], out[:, 3] = c * raw.arcs[:, 2] - n * raw.arcs[:, 3], n * raw.arcs[:, 2] + c * raw.arcs[:, 3]
    return Street(out, lanes, parking)
