"""The ray caster in JAX: nearest box, ellipsoid or ground along each ray of one camera, then one shading pass.

Rays start at the origin (positions are relative to the camera) and have unit length along the optical axis, so the ray parameter
is the depth. The loops carry only (depth, index); attributes are gathered once afterwards.
"""

import jax
import jax.numpy as jnp
from jax import lax

from data_pipeline.simulator.ground import ground, linear
from data_pipeline.simulator.shading import objects, sky

UNROLL = 8  # objects per loop turn, as an array axis (XLA's CPU code is then vectorised); counts are rounded up to it
FAR = 1e4
NOTHING = 255  # index of a ray that met no object; also the mask of the index bits
# Columns of the box table: centre 0:3, half 3:6, taper 6, colour 7:10, second 10:13, kind 13, extra 14, cos 15, sin 16, id 17.
COLUMNS = 18


def _safe(value):
    return jnp.where(jnp.abs(value) < 1e-6, 1e-6, value)


def _box(d, row):
    """Entry depth [p] of rays d into a box whose half length shrinks with height, FAR when missed."""
    dx, dy, dz = d
    c, s = row[15], row[16]
    lx, ly = dx * c + dy * s, dy * c - dx * s
    ox, oy, oz = -(row[0] * c + row[1] * s), -(row[1] * c - row[0] * s), -row[2]
    hx, hy, hz, k = row[3], row[4], row[5], row[6]
    iy, iz = 1 / _safe(ly), 1 / _safe(dz)
    my, mz = jnp.abs(iy) * hy, jnp.abs(iz) * hz
    near = jnp.maximum(-oy * iy - my, -oz * iz - mz)
    far = jnp.minimum(-oy * iy + my, -oz * iz + mz)
    for sign in (1.0, -1.0):
        slope = _safe(sign * lx + k * dz)
        t = (hx - sign * ox - k * oz) / slope
        near = jnp.where(slope < 0, jnp.maximum(near, t), near)
        far = jnp.where(slope > 0, jnp.minimum(far, t), far)
    return jnp.where((near < far) & (near > 0.05), near, FAR)


def _ellipsoid(d, row):
    """Entry depth [p] of rays into an upright ellipsoid, FAR when missed."""
    ih, iv = 1 / row[3], 1 / row[5]
    ax, ay, az = d[0] * ih, d[1] * ih, d[2] * iv
    ox, oy, oz = -row[0] * ih, -row[1] * ih, -row[2] * iv
    a = ax * ax + ay * ay + az * az
    b = ax * ox + ay * oy + az * oz
    c = ox * ox + oy * oy + oz * oz - 1
    disc = b * b - a * c
    t = (-b - jnp.sqrt(jnp.maximum(disc, 0.0))) / a
    return jnp.where((disc > 0) & (t > 0.05), t, FAR)


def _nearest(d, rows, count, entry, keys, base):
    """Runs through `count` rows of a table and keeps the nearest hit per ray; indices start at `base`.

    keys: [p] int32, a depth's float bits with the last eight replaced by the index: positive floats sort like their bits, so one
    integer minimum carries depth and index together (the depth, good to 3e-5, is computed again afterwards).
    """

    def turn(i, keys):
        block = lax.dynamic_slice_in_dim(rows, i * UNROLL, UNROLL).T[:, :, None]
        bits = lax.bitcast_convert_type(entry(d, block), jnp.int32)
        index = base + i * UNROLL + jnp.arange(UNROLL, dtype=jnp.int32)[:, None]
        return jnp.minimum(keys, ((bits & ~NOTHING) | index).min(0))

    return lax.fori_loop(0, (count + UNROLL - 1) // UNROLL, turn, keys)


def _sunlit(x, y, casters, count, look):
    """Share of light [p] left on the ground after the shadows of boxes; casters: [m, 8] centre x, y, cos, sin, half x, y,
    height, darkness."""

    def turn(i, light):
        row = lax.dynamic_slice_in_dim(casters, i * UNROLL, UNROLL).T[:, :, None]
        c, s = row[2], row[3]
        px, py = x - row[0], y - row[1]
        ox, oy = px * c + py * s, py * c - px * s
        lx, ly = look["sun"][0] * c + look["sun"][1] * s, look["sun"][1] * c - look["sun"][0] * s
        norm = lax.rsqrt(lx * lx + ly * ly)
        ix, iy = 1 / _safe(lx * norm), 1 / _safe(ly * norm)
        soft = 0.35 + 0.03 * row[6]
        mx, my = jnp.abs(ix) * (row[4] + 0.4 * soft), jnp.abs(iy) * (row[5] + 0.4 * soft)
        near = jnp.maximum(jnp.maximum(-ox * ix - mx, -oy * iy - my), -0.2)
        far = jnp.minimum(jnp.minimum(-ox * ix + mx, -oy * iy + my), look["reach"] * row[6])
        share = 1 - row[7] * look["shadow"] * jnp.clip((far - near) / (2 * soft), 0.0, 1.0)
        return light * share.prod(0)

    return lax.fori_loop(0, (count + UNROLL - 1) // UNROLL, turn, jnp.ones_like(x))


def trace(camera, rays, scene, look):
    """Traces one camera at one instant.

    camera: dict with rotation [3, 3] (camera to world), position [3] (relative to the scene's origin), ego [4] (headlamps'
    x, y relative to the camera, heading cos, sin), boxes [nb, COLUMNS], box_count, rounds [nr, COLUMNS], round_count, casters
    [nc, 8], caster_count, pixel (angle of a sample, radians), rays [p, 2] (x, y of the ray at depth 1).
    scene: dict with arcs, streets, boston, side. look: see `look.make_look`.
    Returns linear colour [3, p], depth [p] in metres (inf for sky) and id [p] of the object hit (0 for none).
    """
    look = {name: value[:, None] if value.ndim else value for name, value in look.items()}
    r = camera["rotation"]
    d = tuple(r[i, 0] * rays[0] + r[i, 1] * rays[1] + r[i, 2] for i in range(3))
    height = camera["position"][2]
    t_ground = jnp.where(d[2] < -1e-4, height / jnp.maximum(-d[2], 1e-4), FAR)
    t_ground = jnp.where(t_ground < 900.0, t_ground, FAR)
    boxes = camera["boxes"].shape[0]
    keys = (lax.bitcast_convert_type(t_ground, jnp.int32) & ~NOTHING) | NOTHING
    keys = _nearest(d, camera["boxes"], camera["box_count"], _box, keys, 0)
    keys = _nearest(d, camera["rounds"], camera["round_count"], _ellipsoid, keys, boxes)
    k = keys & NOTHING
    # A box that is missed answers FAR, and would win against a sky that is as far.
    is_object = (k != NOTHING) & (keys < lax.bitcast_convert_type(jnp.float32(FAR), jnp.int32) & ~NOTHING)
    is_round = k >= boxes
    table = jnp.concatenate([camera["boxes"], camera["rounds"]]).T
    row = table[:, jnp.where(is_object, k, 0)]
    exact = jnp.where(is_round, _ellipsoid(d, row), _box(d, row))
    # A grazing ray may miss on the second, differently rounded evaluation; its packed depth serves then.
    packed = lax.bitcast_convert_type(keys & ~NOTHING, jnp.float32)
    t = jnp.where(is_object, jnp.where(exact < FAR, exact, packed), t_ground)
    is_sky = ~is_object & (t >= FAR)

    norm = jnp.sqrt(d[0] ** 2 + d[1] ** 2 + d[2] ** 2)
    distance = jnp.minimum(t, 2000.0) * norm
    px, py, pz = (d[i] * jnp.minimum(t, 2000.0) for i in range(3))
    c, s = row[15], row[16]
    ox, oy, oz = px - row[0], py - row[1], pz - row[2]
    x, y = ox * c + oy * s, oy * c - ox * s
    half, taper = row[3:6], row[6]
    lean = lax.rsqrt(1 + taper * taper)
    ex, ey, ez = jnp.abs(half[0] - taper * oz - jnp.abs(x)) * lean, jnp.abs(half[1] - jnp.abs(y)), jnp.abs(half[2] - jnp.abs(oz))
    on_x, on_y = (ex <= ey) & (ex <= ez), (ey < ex) & (ey <= ez)
    nx = jnp.where(on_x, jnp.sign(x) * lean, 0.0)
    ny = jnp.where(on_y, jnp.sign(y), 0.0)
    nz = jnp.where(on_x, taper * lean, jnp.where(on_y, 0.0, jnp.sign(oz)))
    rx, ry, rz = x / half[0] ** 2, y / half[0] ** 2, oz / half[2] ** 2
    rn = lax.rsqrt(rx * rx + ry * ry + rz * rz + 1e-9)
    nx, ny, nz = (jnp.where(is_round, a * rn, b) for a, b in ((rx, nx), (ry, ny), (rz, nz)))
    wx, wy = nx * c - ny * s, nx * s + ny * c
    facing = jnp.abs(wx * d[0] + wy * d[1] + nz * d[2]) / norm
    hit = {
        "x": x, "y": y, "z": pz + height, "normal": (nx, ny, nz), "half": half, "taper": taper, "colour": row[7:10], "second": row[10:13],
        "kind": row[13].astype(jnp.int32), "extra": row[14], "distance": distance, "facing": facing,
    }  # fmt: skip
    nothing = jnp.zeros((3,) + t.shape, jnp.float32)
    # Branches save work, and XLA computes what enters them once instead of once per colour channel.
    albedo, emission = lax.cond(is_object.any(), lambda given: objects(given, look, camera["pixel"]), lambda given: (nothing, nothing), hit)

    flat = jnp.sqrt(d[0] ** 2 + d[1] ** 2)
    across = camera["pixel"] * jnp.where(is_object, 30.0, distance) + 0.01
    along = across * norm / jnp.maximum(jnp.abs(d[2]), 0.02)
    direction = (d[0] / flat, d[1] / flat)
    ex0, ey0 = camera["position"][0], camera["position"][1]
    ground_place = (px + ex0, py + ey0, along, across, direction)
    soil, road, lamps = lax.cond(
        (is_sky | is_object).all() & (look["night"] < 0.5),
        lambda given: (nothing, nothing[0], nothing[0]),
        lambda given: ground(*given, scene["arcs"], scene["streets"], scene["boston"], scene["side"]),
        ground_place,
    )
    open_sky = _sunlit(px, py, camera["casters"], camera["caster_count"], look)

    g = ~is_object
    wx, wy, nz = jnp.where(g, 0.0, wx), jnp.where(g, 0.0, wy), jnp.where(g, 1.0, nz)
    wet = look["wet"]
    soil = soil * (1 - wet * 0.38 * road)
    albedo = jnp.where(g, soil, albedo)
    emission = jnp.where(g, 0.0, emission)
    lit = jnp.where(g, open_sky, 1.0)
    sun = jnp.clip(wx * look["sun"][0] + wy * look["sun"][1] + nz * look["sun"][2], 0.0, 1.0) * lit
    low = jnp.clip((pz + height) / 2.5, 0.0, 1.0)
    above = (0.66 + 0.34 * nz) * jnp.where(g, 0.45 + 0.55 * lit, 0.75 + 0.25 * low)
    light = sun * look["sun_light"] + above * look["ambient"]
    # Night: pools of warm lamp light (walls take what lies at their foot), and the ego's own headlamps.
    warm = lamps * jnp.where(g, 0.6 + 0.4 * lit, jnp.exp(-((jnp.maximum(pz + height - 3.0, 0.0) / 6.0) ** 2))) * look["night"]
    light = light + warm * linear(0.72, 0.60, 0.42)
    e = camera["ego"]
    hx, hy = px - e[0], py - e[1]
    forward, lateral = hx * e[2] + hy * e[3], hy * e[2] - hx * e[3]
    cone = jnp.clip(1.15 - jnp.abs(lateral) / (0.42 * jnp.maximum(forward, 0.0) + 1.6), 0.0, 1.0) * jnp.clip(forward / 2.5, 0.0, 1.0)
    cone = cone * jnp.exp(-jnp.maximum(forward, 0.0) / 20.0) * jnp.exp(-jnp.maximum(pz + height - 1.0, 0.0) / 1.6) * look["night"]
    light = light + cone * linear(0.95, 0.92, 0.84) * 0.75
    colour = albedo * light + emission

    unit = (d[0] / norm, d[1] / norm, d[2] / norm)
    heaven = lax.cond(is_sky.any(), lambda given: sky(given, look), lambda given: nothing, unit)
    shine = jnp.where(g, wet * road * (0.05 + 0.45 * (1 - jnp.clip(-d[2] / norm, 0, 1)) ** 6), 0.0)
    mirror = look["horizon"] * 0.9 + warm * linear(0.5, 0.42, 0.3)
    colour = colour + (mirror - colour) * shine
    haze = 1 - jnp.exp(-distance * look["fog"])
    colour = colour + (look["horizon"] - colour) * haze
    colour = jnp.clip(jnp.where(is_sky, heaven, colour), 0.0, 1.0)
    identity = jnp.where(is_object, row[17], 0.0).astype(jnp.int32)
    return colour, jnp.where(is_sky, jnp.inf, t), identity


def render_cameras(cameras, scene, look, *, height, width, samples):
    """Renders many cameras one after another (`lax.map`), so that compile time and memory do not grow with their number.

    cameras: as in `trace`, every array with a leading axis [n], plus intrinsics [n, 4] in fractions. Samples lie on a grid of
    `samples` per pixel that contains the pixel centre; an even count shares the samples on pixel borders (trapezoid weights).
    Returns image uint8 [n, H, W, 3], depth f32 [n, H, W], id int32 [n, H, W] at pixel centres.
    """
    even = samples % 2 == 0

    def grid(count):
        return jnp.arange(count * samples + 1) / samples if even else (jnp.arange(count * samples) + 0.5) / samples

    def pool(image, axis, count):
        shape = image.shape
        inner = lax.slice_in_dim(image, 0, count * samples, axis=axis)
        out = inner.reshape(shape[:axis] + (count, samples) + shape[axis + 1 :]).sum(axis + 1)
        if even:
            first = lax.slice_in_dim(image, 0, count * samples, stride=samples, axis=axis)
            last = lax.slice_in_dim(image, samples, count * samples + 1, stride=samples, axis=axis)
            out = out + 0.5 * (last - first)
        return out / samples

    def centre(values):
        half = samples // 2
        return values[half::samples, half::samples][:height, :width]

    def one(camera):
        fx, fy, cx, cy = (camera["intrinsics"][i] for i in range(4))
        u, v = grid(width) / width, grid(height) / height
        rays = jnp.meshgrid((u - cx) / fx, (v - cy) / fy)
        shape = rays[0].shape
        colour, depth, identity = trace(camera, [ray.reshape(-1) for ray in rays], scene, look)
        colour = jnp.moveaxis(pool(pool(colour.reshape(3, *shape), 1, height), 2, width), 0, -1)
        image = jnp.round(255 * colour ** (1 / 2.2)).astype(jnp.uint8)
        return image, centre(depth.reshape(shape)), centre(identity.reshape(shape))

    return lax.map(one, cameras)


render_cameras = jax.jit(render_cameras, static_argnames=("height", "width", "samples"))
