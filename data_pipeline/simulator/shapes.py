"""Road users and furniture as boxes and ellipsoids in their own frames: what the ray caster draws.

A part is one row of `PART` numbers: centre x, y, z and half sizes (metres, own frame, z from the ground), taper (how much the
half length shrinks per metre of height, which makes windscreens and gables), main colour, second colour (sRGB), kind, extra (of a BODY its
length, of a CABIN the height at which it begins, of a PANEL its style, of a BUILDING or FOLIAGE its seed, of a LIGHT whether it is a signal).
"""

import numpy as np

from data_pipeline.simulator import traffic

PART = 15
PLAIN, BUILDING, BODY, CABIN, FOLIAGE, LIGHT, PANEL = range(7)

GLASS = (0.13, 0.17, 0.21)
SKIN = (0.72, 0.52, 0.42)
DARK = (0.12, 0.12, 0.13)


def part(centre, half, colour, second=GLASS, *, kind=PLAIN, taper=0.0, extra=0.0):
    """One row [PART]."""
    return np.array([*centre, *half, taper, *colour, *second, kind, extra], np.float64)


def _car(w, h, length, colour, variant):
    x, y = length / 2, w / 2
    tall = variant > 0.75  # a van: the cabin reaches to the tail
    waist = 0.58 * h
    body = part((0, 0, (0.2 + waist) / 2), (x, y, (waist - 0.2) / 2), colour, kind=BODY, extra=length)
    height = (h - waist) / 2
    if tall:
        cabin = part((-0.1 * x, 0, waist + height), (0.78 * x, 0.93 * y, height), GLASS, colour, kind=CABIN, taper=0.35, extra=waist)
    else:
        cabin = part((-0.12 * x, 0, waist + height), (0.52 * x, 0.86 * y, height), GLASS, colour, kind=CABIN, taper=0.75, extra=waist)
    return [body, cabin]


def _truck(w, h, length, colour, variant):
    x, y = length / 2, w / 2
    cab = 0.27 * length
    white = (0.86, 0.86, 0.84) if variant < 0.6 else colour
    floor = 0.75
    return [
        part((0, 0, 0.6), (x, 0.9 * y, 0.28), DARK, kind=BODY, extra=length),
        part((x - cab / 2, 0, 0.4 + 0.36 * h), (cab / 2, 0.96 * y, 0.36 * h), colour, kind=PANEL, extra=1.0),
        part((-cab / 2 - 0.1, 0, (floor + h) / 2), (x - cab / 2 - 0.1, y, (h - floor) / 2), white, white),
    ]


def _bus(w, h, length, colour, variant):
    body = part((0, 0, (0.3 + h) / 2), (length / 2, w / 2, (h - 0.3) / 2), colour, kind=PANEL, extra=2.0)
    return [body, part((0, 0, 0.42), (0.499 * length, 0.501 * w, 0.2), DARK, kind=BODY, extra=length)]


def _cycle(w, h, length, colour, variant, rider):
    parts = [part((0, 0, 0.45), (length / 2, 0.16, 0.3), DARK, DARK)]
    if rider:
        parts += [
            part((-0.1, 0, 0.62 * h), (0.26, 0.24, 0.2 * h), colour, taper=0.3),
            part((0.0, 0, h - 0.15), (0.13, 0.13, 0.15), SKIN if variant < 0.5 else (0.85, 0.85, 0.8)),
        ]
    return parts


def _person(w, h, length, colour, variant):
    trousers = (0.16, 0.18, 0.26) if variant < 0.6 else (0.35, 0.3, 0.24)
    return [
        part((0, 0, 0.24 * h), (0.13, 0.17, 0.24 * h), trousers),
        part((0, 0, 0.66 * h), (0.15, 0.25, 0.18 * h), colour),
        part((0, 0, 0.92 * h), (0.11, 0.11, 0.08 * h), SKIN),
    ]


def actor_parts(actor: traffic.Actor) -> np.ndarray:
    """Parts [k, PART] of an actor in its own frame (x forward, y left, z up from the ground)."""
    w, length, h = actor.size
    args = (w, h, length, actor.colour, actor.variant)
    if actor.category == traffic.TRUCK:
        rows = _truck(*args)
    elif actor.category == traffic.BUS:
        rows = _bus(*args)
    elif actor.category in (traffic.MOTORCYCLE, traffic.BICYCLE):
        rows = _cycle(*args, rider=not actor.parked)
    elif actor.category.startswith("human"):
        rows = _person(*args)
    elif actor.category == traffic.CONE:
        rows = [part((0, 0, h / 2), (w / 2, w / 2 * 0.55, h / 2), actor.colour, taper=0.2)]
    elif actor.category == traffic.BARRIER:
        rows = [part((0, 0, h / 2), (length / 2, w / 2 * 0.5, h / 2), actor.colour)]
    else:
        rows = _car(*args)
    return np.stack(rows)
