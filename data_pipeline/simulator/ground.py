"""The ground in JAX: roads, markings, sidewalks and what lies beyond, as a smooth function of position and pixel footprint.

Every marking is a box-filtered pulse, so a line thinner than a pixel fades instead of flickering.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax

from data_pipeline.simulator.network import ARCS
from data_pipeline.simulator.road import LANE, LIGHT_SPACING, SIDEWALK, arc_coordinates

STREET = 4 + 2 * 4  # half width, lanes, parking, unused, then (arc length, other half width) of four junctions


def linear(r, g, b):
    """sRGB-like 0..1 to linear light, [3, 1]: colours keep their channels first, so that pixels stay the fast axis."""
    return (np.array([[r], [g], [b]], np.float32) ** 2.2).astype(np.float32)


def step(x, width):
    """Box-filtered unit step at 0: 0 below -width/2, 1 above width/2."""
    return jnp.clip(x / width + 0.5, 0.0, 1.0)


def band(x, half, width):
    """Share of a box of `width` around x that lies in [-half, half]."""
    return jnp.clip(jnp.minimum(x + width / 2, half) - jnp.maximum(x - width / 2, -half), 0.0, None) / width


def pulses(x, period, on, width):
    """Share of a box of `width` around x covered by pulses of length `on` starting at multiples of `period`."""

    def integral(v):
        n = jnp.floor(v / period)
        return n * on + jnp.minimum(v - n * period, on)

    return (integral(x + width / 2) - integral(x - width / 2)) / width


def street_frames(x, y, arcs):
    """Place of points relative to each street.

    x, y: [p] metres. arcs: [sum(ARCS), 7] as in `road.arc_coordinates`. Returns a list per street of (s, d, cos, sin) [p]: arc
    length, signed lateral distance and the direction of the nearest arc's axis at the foot point.
    """
    columns = arcs.T[:, :, None]
    s, d, over = arc_coordinates(x, y, columns, jnp)
    metric = d * d + over * over
    angle = columns[4] * (s - columns[6])
    # First order in the angle along the arc, then normalised: good to a few degrees, enough to orient a pixel's footprint.
    fields = (s, jnp.where(d < 0, -1.0, 1.0) * jnp.sqrt(metric), columns[2] - columns[3] * angle, columns[3] + columns[2] * angle)
    frames, first = [], 0
    for count in ARCS:
        part = slice(first, first + count)
        index = jnp.argmin(metric[part], 0)[None]
        s_i, d_i, c_i, n_i = (jnp.take_along_axis(field[part], index, 0)[0] for field in fields)
        norm = lax.rsqrt(c_i * c_i + n_i * n_i)
        frames.append((s_i, d_i, c_i * norm, n_i * norm))
        first += count
    return frames


def _markings(s, d, fs, fd, street, boston, side):
    """White and yellow coverage [p] of one street's paint. s, d: place, fs, fd: footprints along and across, metres."""
    half, lanes = street[0], street[1]
    far, q_signed = jnp.full_like(s, 1e6), jnp.full_like(s, 1e6)
    for j in range(4):
        delta = s - street[4 + 2 * j]
        q = jnp.abs(delta) - street[5 + 2 * j]
        near = q < far
        far = jnp.where(near, q, far)
        q_signed = jnp.where(near, delta, q_signed)
    away = step(far - 5.2, fs)  # lines end at the stop line
    lateral = jnp.abs(d)
    centre = (band(lateral - 0.2, 0.09, fd)) * away
    dashes = jnp.where(lanes > 1.5, band(lateral - LANE, 0.09, fd), 0.0) * pulses(s, 9.0, 3.6, fs) * away
    edge = band(lateral - lanes * LANE - 0.05, 0.09, fd) * away
    zebra = band(far - 2.5, 1.6, fs) * pulses(d + 100.2, 1.3, 0.65, fd) * step(half - 0.3 - lateral, fd)
    # The approach to a junction: driving along +s (right-hand traffic: d < 0) with the junction ahead.
    approach = step(d * jnp.sign(q_signed) * side, fd)
    stop = band(far - 5.35, 0.25, fs) * approach * step(lanes * LANE - lateral, fd)
    in_lane = jnp.abs(lateral - LANE * (jnp.floor(jnp.clip(lateral / LANE, 0.0, lanes - 1 + 0.01)) + 0.5))
    shaft = band(far - 13.6, 1.3, fs) * band(in_lane, 0.09, fd)
    head_at = far - 10.9  # 0 at the tip, 1.4 at the base
    head = band(head_at - 0.7, 0.7, fs) * step(jnp.clip(head_at, 0, 1.4) * 0.36 - in_lane, fd)
    arrow = (shaft + head) * approach
    white = dashes + zebra + stop + arrow + jnp.where(boston, edge, centre)
    yellow = jnp.where(boston, centre, edge)
    return jnp.clip(white, 0, 1), jnp.clip(yellow, 0, 1)


def ground(x, y, along, across, direction, arcs, streets, boston, side):
    """Colour of the ground.

    x, y: [p] world position. along, across: [p] pixel footprint in metres along and across the horizontal viewing direction
    `direction` ([p], [p]). arcs: [17, 7]; streets: [4, STREET]; boston: bool (yellow centre lines); side: ±1.
    Returns linear albedo [3, p], how road-like the spot is [p] (for wetness) and the glow of street lamps [p].
    """
    kerb = jnp.full_like(x, 1e3)
    frames = street_frames(x, y, arcs)
    edges = [jnp.abs(f[1]) - streets[i, 0] for i, f in enumerate(frames)]
    radius = 4.5
    for a in edges:
        # Union with a fillet, so kerbs turn the corner on an arc.
        round_ = jnp.sqrt(jnp.maximum(radius - a, 0.0) ** 2 + jnp.maximum(radius - kerb, 0.0) ** 2)
        kerb = jnp.maximum(radius, jnp.minimum(a, kerb)) - round_
    # A spot carries the paint of the street it lies on, and none where two streets cross.
    best, second = edges[0], jnp.full_like(x, 1e3)
    frame, street = frames[0], [streets[0, n] for n in range(STREET)]
    for i in range(1, len(frames)):
        nearer = edges[i] < best
        second = jnp.where(nearer, best, jnp.minimum(second, edges[i]))
        best = jnp.where(nearer, edges[i], best)
        frame = tuple(jnp.where(nearer, a, b) for a, b in zip(frames[i], frame, strict=True))
        street = [jnp.where(nearer, streets[i, n], street[n]) for n in range(STREET)]
    s, d, c, n = frame
    lead = jnp.abs(direction[0] * c + direction[1] * n)
    turn = jnp.sqrt(jnp.maximum(1 - lead * lead, 0.0))
    fs = jnp.sqrt((along * lead) ** 2 + (across * turn) ** 2) + 0.02
    fd = jnp.sqrt((along * turn) ** 2 + (across * lead) ** 2) + 0.02
    white, yellow = _markings(s, d, fs, fd, street, boston, side)
    mine = step(-best, fd) * step(second, across + 0.1)
    white, yellow = white * mine, yellow * mine
    # Lanes are a little darker where tyres run.
    worn = mine * (0.5 + 0.5 * jnp.cos(2 * jnp.pi * d / LANE)) * jnp.clip(1 - fd / 1.5, 0, 1)
    pool = 0.5 + 0.5 * jnp.cos(s * (2 * jnp.pi / LIGHT_SPACING) + jnp.where(d > 0, jnp.pi, 0.0))
    lamps = (0.35 + 0.65 * pool) * jnp.exp(-((jnp.maximum(jnp.abs(best) - 1.0, 0.0) / 7.0) ** 2))
    fade = jnp.clip(1.2 - across / 1.2, 0.0, 1.0)
    cloudy = jnp.sin(x * 0.11 + 1.3 * jnp.sin(y * 0.07)) * jnp.sin(y * 0.13 + 1.1 * jnp.sin(x * 0.05)) * fade
    foot = along * 0.5 + across
    on_road = step(-kerb, foot)
    on_kerb = band(kerb - 0.2, 0.2, foot)
    on_walk = step(SIDEWALK - kerb, foot) * (1 - on_road)
    asphalt = linear(0.44, 0.44, 0.45) * (1 + 0.10 * cloudy + 0.07 * worn)
    walk = linear(0.63, 0.61, 0.57) * (1 + 0.06 * cloudy)
    paved = step(cloudy + 0.15, 0.5)
    grass = jnp.where(boston, linear(0.42, 0.46, 0.27), linear(0.34, 0.47, 0.22)) * (1 + 0.15 * cloudy)
    lot = grass + (linear(0.55, 0.53, 0.50) - grass) * paved * 0.7
    colour = lot + (walk - lot) * on_walk
    colour = colour + (asphalt - colour) * on_road
    colour = colour + (linear(0.74, 0.73, 0.70) - colour) * on_kerb
    colour = colour + (linear(0.86, 0.68, 0.16) - colour) * yellow * 0.95
    colour = colour + (linear(0.93, 0.93, 0.90) - colour) * white * 0.95
    return colour, jnp.maximum(on_road, 0.6 * on_walk), lamps
