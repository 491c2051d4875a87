"""Colours of objects and sky, and light, in JAX: smooth, low-frequency, the same from every camera but for reflections."""

import jax.numpy as jnp

from data_pipeline.simulator.ground import band, linear, pulses, step
from data_pipeline.simulator.shapes import BODY, BUILDING, CABIN, FOLIAGE, LIGHT, PANEL


def _mix(a, b, share):
    return a + (b - a) * share


def _cell_noise(i, j, seed):
    """Repeatable 0..1 numbers for grid cells [p]; sums of cosines stay exact enough in float32 for small cell numbers."""
    value = jnp.sin(i * 12.9898 + j * 78.233 + seed * 437.585) * 143.7585
    return value - jnp.floor(value)


def facade(u, v, height, colour, trim, seed, foot_u, foot_v, night):
    """A building's wall. u, v: [p] metres along and up; returns albedo [3, p] and emitted light [3, p]."""
    wide = 3.4 + 2.2 * seed
    tall = 3.5
    upper = step(v - 4.2, foot_v) * step(height - 0.8 - v, foot_v)
    glass = pulses(u + 0.25 * wide, wide, 0.56 * wide, foot_u) * pulses(v - 4.6, tall, 0.58 * tall, foot_v) * upper
    ground_floor = pulses(u, 2 * wide, 1.7 * wide, foot_u) * step(v - 0.5, foot_v) * step(3.2 - v, foot_v)
    fascia = step(v - 3.3, foot_v) * step(4.2 - v, foot_v)
    cornice = step(v - height + 0.7, foot_v)
    wall = colour * (0.92 + 0.10 * jnp.clip(v / 20.0, 0, 1))
    wall = _mix(wall, trim, jnp.maximum(fascia, cornice) * 0.8)
    pane = linear(0.36, 0.42, 0.48) * (0.8 + 0.25 * jnp.clip(v / 15.0, 0, 1))
    albedo = _mix(wall, pane, 0.75 * jnp.maximum(glass, ground_floor))
    cell_u, cell_v = jnp.floor((u + 0.25 * wide) / wide), jnp.floor((v - 4.6) / tall)
    lit = step(_cell_noise(cell_u, cell_v, seed) - 0.58, 0.08)
    # Far away a cell is smaller than a pixel: its average stands in.
    lit = lit + (0.42 - lit) * jnp.clip(foot_u / wide * 1.5 - 0.3, 0, 1)
    shop = step(_cell_noise(jnp.floor(u / (2 * wide)), 0 * u, seed + 0.37) - 0.35, 0.1)
    glow = (glass * lit) * linear(0.80, 0.66, 0.38) + (ground_floor * shop) * linear(0.86, 0.72, 0.48)
    return albedo, glow * night


def car_body(x, y, z, half, length, colour, normal_x, normal_z, night, foot):
    """Paint, wheels and lights of a vehicle body. x, y: own frame; z: above the ground. Albedo and emitted light [3, p]."""
    end = step(jnp.abs(normal_x) - 0.5, 0.2)
    flank = (1 - end) * step(0.5 - normal_z, 0.2)
    wheel_x = jnp.abs(x) - 0.31 * length
    radius = jnp.sqrt(wheel_x**2 + (z - 0.33) ** 2)
    tyre = flank * step(0.36 - radius, foot)
    hub = flank * step(0.19 - radius, foot)
    skirt = jnp.maximum(flank, end) * step(0.36 - z, foot + 0.05)
    body = colour * (0.75 + 0.3 * jnp.clip(z / 0.9, 0, 1))
    albedo = _mix(body, linear(0.15, 0.15, 0.16), 0.8 * skirt)
    albedo = _mix(albedo, linear(0.10, 0.10, 0.11), tyre)
    albedo = _mix(albedo, linear(0.55, 0.56, 0.58), hub)
    lamp = end * step(jnp.abs(y) - 0.5 * half[1], foot) * step(0.17 - jnp.abs(z - 0.66), foot)
    front = x > 0
    tint = jnp.where(front, linear(0.95, 0.95, 0.88), linear(0.80, 0.08, 0.06))
    albedo = _mix(albedo, tint, lamp)
    power = jnp.where(front, 1.6, 1.0) * (0.12 + 0.88 * night)
    return albedo, tint * (lamp * power)


def car_cabin(x, y, z, half, waist, taper, glass, paint, normal_x, normal_z, foot):
    """Windows between pillars under a roof. x, y: own frame; z and waist, where it begins: above the ground. Albedo [3, p].

    Glass is lighter towards the roof, as where it mirrors the sky, but the same from all sides: neighbouring cameras have to agree.
    """
    share = (z - waist) / (2 * half[2])
    along = x / jnp.maximum(half[0] - taper * (z - waist - half[2]), 0.1)  # 1 at either end, however the cabin narrows
    end = step(jnp.abs(normal_x) - 0.35, 0.2)
    soft, low = foot / half[0], foot / (2 * half[2])  # a pixel's footprint in the units of `along` and `share`
    posts = step(jnp.abs(along) - 0.84, soft) + band(along + 0.12, 0.07, soft)
    pillars = end * step(jnp.abs(y) / half[1] - 0.86, foot / half[1]) + (1 - end) * posts
    rails = step(share - 0.84, low) + step(0.08 - share, low)
    frame = jnp.clip(pillars + rails + step(normal_z - 0.85, 0.1), 0, 1)
    return _mix(_mix(glass, linear(0.50, 0.58, 0.64), 0.15 + 0.55 * jnp.clip(share, 0, 1)), paint, frame)


def panels(x, z, half, top, colour, style, normal_x, normal_z, foot):
    """Bus sides (style 2) and lorry cabs (style 1): a band of glass. Albedo [3, p]."""
    share = z / top
    low = jnp.where(style > 1.5, 0.42, 0.55)
    window = step(share - low, foot / 2) * step(0.86 - share, foot / 2) * step(0.5 - normal_z, 0.2)
    pillars = jnp.where(style > 1.5, 1 - pulses(x + 50.0, 2.2, 0.25, foot) * step(0.5 - jnp.abs(normal_x), 0.2), 1.0)
    rear = jnp.where((style < 1.5) & (normal_x < -0.5), 0.0, 1.0)
    return _mix(colour, linear(0.18, 0.22, 0.27), window * pillars * rear)


def sky(direction, look):
    """Sky with a soft skyline. direction: three [p] components of unit rays. Linear [3, p]."""
    dx, dy, dz = direction
    up = jnp.clip(dz, 0.0, 1.0)
    blend = jnp.exp(-4.5 * up)
    colour = _mix(look["zenith"], look["horizon"], blend)
    q = 1.0 / (up + 0.22)
    cloud = jnp.sin(1.7 * dx * q + 0.6 + 0.9 * jnp.sin(1.3 * dy * q)) * jnp.sin(1.5 * dy * q + 1.1 * jnp.sin(0.9 * dx * q))
    colour = _mix(colour, look["cloud"], look["cloudiness"] * jnp.clip(0.5 + 0.8 * cloud, 0, 1) * jnp.clip(up * 6, 0, 1))
    azimuth = jnp.arctan2(dy, dx)
    ridge = 0.045 + 0.018 * jnp.sin(5 * azimuth + look["skyline"]) + 0.012 * jnp.sin(13 * azimuth + 2 * look["skyline"])
    return _mix(colour, look["ridge"], step(ridge - dz, 0.02) * 0.75)


def objects(hit, look, foot_scale):
    """Albedo and emitted light of the box or ellipsoid a ray hit.

    hit: dict of [p] or [k, p] arrays: local x, y, z (z above the ground), normal in own frame, half, taper, colour, second, kind,
    extra, distance, facing. foot_scale: pixel angle in radians. Returns albedo [3, p], emission [3, p].
    """
    kind, extra, second = hit["kind"], hit["extra"], hit["second"]
    nx, ny, nz = hit["normal"]
    x, y, z, half = hit["x"], hit["y"], hit["z"], hit["half"]
    foot = foot_scale * hit["distance"] + 0.01
    night = look["night"]
    foot_u = foot / jnp.maximum(hit["facing"], 0.12)
    side = jnp.abs(nx) > jnp.abs(ny)
    u = jnp.where(side, y + half[1], x + half[0])
    height = 2 * half[2]
    walls, glow = facade(u, z, height, hit["colour"], second, extra, foot_u, foot, night)
    roof = nz > 0.5
    walls = jnp.where(roof, linear(0.42, 0.41, 0.40), walls)
    glow = jnp.where(roof, 0.0, glow)
    body, lamps = car_body(x, y, z, half, extra, hit["colour"], nx, nz, night, foot)
    cabin = car_cabin(x, y, z, half, extra, hit["taper"], hit["colour"], second, nx, nz, foot)
    panel = panels(x, z, half, 2 * half[2] + 0.35, hit["colour"], extra, nx, nz, foot)
    mottled = 1 + 0.16 * jnp.sin(2.1 * x + 5 * extra) * jnp.sin(2.3 * y) + 0.10 * jnp.sin(2.7 * z + 9 * extra)
    leaves = hit["colour"] * mottled
    albedo, emission = hit["colour"], jnp.zeros_like(walls)
    for code, value, light in (
        (BUILDING, walls, glow),
        (BODY, body, lamps),
        (CABIN, cabin, None),
        (PANEL, panel, None),
        (FOLIAGE, leaves, None),
    ):
        chosen = kind == code
        albedo = jnp.where(chosen, value, albedo)
        if light is not None:
            emission = jnp.where(chosen, light, emission)
    # Lamps: street lamps (extra 0) glow on their underside at night, signal lamps (extra 1) always shine in their colour.
    street_lamp = second * 1.3 * night
    signal = hit["colour"] * 1.2
    burning = jnp.where((extra > 0.5), signal, street_lamp)
    emission = jnp.where((kind == LIGHT), burning, emission)
    return albedo, emission
