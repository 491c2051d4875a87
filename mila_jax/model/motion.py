"""Carrying latents along the car's own motion: what frame j of all six cameras shows, as a camera at frame i would see it.

The world is taken to be a corridor: flat ground (z = 0 of the ego frame), a wall on either side, and a dome around everything.
A ray of the camera at frame i meets the corridor at a point; the waypoints tell where the car was at frame j; the point is looked
up, bilinearly, in that camera of frame j that sees it best, so a house ahead is later found by the side camera. What stands
nearer or farther than the corridor lands some pixels off; that is for the network to mend.
"""

from typing import NamedTuple

import jax.numpy as jnp

from mila_jax.model.layers import rotation_matrix

# Precision of all products here and in `precondition`. Left alone, a TPU rounds what goes into a product of float32 arrays to bfloat16, and a GPU to
# TF32: geometry off by a hundredth, and covariances whose inverses cancel to four digits are off by everything.
EXACT = "highest"


class Corridor(NamedTuple):
    """wall: metres from the car's path to the walls; dome: metres, its radius; moves: speed of all of it, in the car's own (1 drives along, -1 comes
    towards)."""

    wall: float
    dome: float
    moves: float = 0.0

    def way(self, waypoints):
        """The car's way relative to the corridor, from `Conditions.waypoints`; exact on straight roads."""
        return waypoints * (1 - self.moves)


# The first is the one that the prior is fitted to. The others are other guesses at how far things are, as in a plane sweep: a parked car is 2 to 5 m
# away, not 20, and where the carried frames of one guess agree with each other the network can tell that it is the right one. Those that move
# are of traffic: beside or ahead of us in our direction, oncoming, and oncoming in the next lane. Later ones come last: earlier weights know the
# first six.
CORRIDORS = (
    Corridor(20.0, 60.0), Corridor(4.5, 60.0), Corridor(9.0, 60.0), Corridor(40.0, 200.0),
    Corridor(4.5, 60.0, moves=1.0), Corridor(4.5, 60.0, moves=-1.0),
    Corridor(2.0, 60.0), Corridor(2.2, 60.0, moves=-1.0), Corridor(3.0, 60.0),
)  # fmt: skip


def camera_rays(intrinsics, extrinsics, height: int, width: int):
    """Viewing rays of an image grid in the ego frame: directions [..., height, width, 3], not normalised.

    intrinsics [..., 4], extrinsics [..., 7] as in `Conditions`; rays go through the middles of the grid's cells.
    """
    x = ((jnp.arange(width) + 0.5) / width - intrinsics[..., 2, None]) / intrinsics[..., 0, None]
    y = ((jnp.arange(height) + 0.5) / height - intrinsics[..., 3, None]) / intrinsics[..., 1, None]
    shape = jnp.broadcast_shapes(x[..., None, :].shape, y[..., :, None].shape)
    x, y = jnp.broadcast_to(x[..., None, :], shape), jnp.broadcast_to(y[..., :, None], shape)
    rays = jnp.stack([x, y, jnp.ones(shape)], -1)
    return jnp.einsum("...ij,...hwj->...hwi", rotation_matrix(extrinsics[..., 3:]), rays, precision=EXACT)


def corridor_points(origin, directions, corridor: Corridor = CORRIDORS[0]):
    """Where rays from origin [..., 3] along directions [..., 3] meet the corridor, in metres of the same (ego) frame."""
    directions = directions / jnp.linalg.norm(directions, axis=-1, keepdims=True)

    def distance(gap, speed):
        """To a plane `gap` metres away, for rays that approach it by `speed` a metre."""
        return jnp.where(speed > 1e-6, gap / jnp.maximum(speed, 1e-6), jnp.inf)

    side = jnp.where(directions[..., 1] > 0, corridor.wall - origin[..., 1], corridor.wall + origin[..., 1])
    walls = distance(side, jnp.abs(directions[..., 1]))
    ground = distance(origin[..., 2], -directions[..., 2])
    reach = jnp.minimum(jnp.minimum(walls, ground), corridor.dome)
    return origin + reach[..., None] * directions


def turn(points, yaw):
    """points [..., 3] turned by yaw [...] radians about z."""
    x, y, z = jnp.moveaxis(points, -1, 0)
    c, s = jnp.cos(yaw), jnp.sin(yaw)
    return jnp.stack([c * x - s * y, s * x + c * y, jnp.broadcast_to(z, (c * x).shape)], -1)


def look_up(points, own, intrinsics, extrinsics):
    """The camera that sees each point best, and where: camera [...] int32, place [..., 2] fractions (x, y) within its image.

    points [..., 3] in the ego frame of the cameras, own [...]: the view to prefer as long as it sees the point; intrinsics [..., v, 4],
    extrinsics [..., v, 7] (broadcast against points without their last axis). Points outside every image go to the nearest edge.
    """
    local = jnp.einsum("...vji,...vj->...vi", rotation_matrix(extrinsics[..., 3:]), points[..., None, :] - extrinsics[..., :3], precision=EXACT)
    depth = jnp.maximum(local[..., 2], 1e-3)
    place = intrinsics[..., :2] * local[..., :2] / depth[..., None] + intrinsics[..., 2:]  # [..., v, 2]
    # Distance from the image's middle: 1 at its edge. Behind a camera nothing is seen.
    off = jnp.where(local[..., 2] > 0.1, jnp.abs(2 * place - 1).max(-1), jnp.inf)
    mine = jnp.arange(off.shape[-1]) == own[..., None]
    # A point under the car may be before no camera at all; it stays with its own.
    camera = jnp.argmin(jnp.where(mine, jnp.where(off <= 1, -1.0, jnp.minimum(off, 1e9)), off), -1)
    best = jnp.take_along_axis(place, camera[..., None, None], -2)[..., 0, :]
    return camera, jnp.clip(jnp.nan_to_num(best), 0, 1)


class Places(NamedTuple):
    """Where the points that frame i sees lie in frame j, each [b, v, t (i), t (j), h, w]: number of the upper left of four neighbours among all rows
    of `latents.reshape(-1, c)`, and how far the point is towards the right and the lower ones, 0..1."""

    corner: jnp.ndarray
    across: jnp.ndarray
    down: jnp.ndarray


def find(height: int, width: int, waypoints, intrinsics, extrinsics, corridor: Corridor = CORRIDORS[0]) -> Places:
    """Where each frame's points lie in every frame, for latents of height × width.

    waypoints [b, t, 3], intrinsics [b, v, t, 4], extrinsics [b, v, t, 7] as in `Conditions`.
    """
    b, v, t = intrinsics.shape[:3]
    h, w = height, width
    waypoints = corridor.way(waypoints)
    rays = camera_rays(intrinsics, extrinsics, h, w)  # [b, v, i, h, w, 3]
    points = corridor_points(extrinsics[..., None, None, :3], rays, corridor)
    yaw = waypoints[..., 2]
    here = jnp.concatenate([waypoints[..., :2], jnp.zeros_like(waypoints[..., :1])], -1)
    world = turn(points, yaw[:, None, :, None, None]) + here[:, None, :, None, None]
    there = turn(world[:, :, :, None] - here[:, None, None, :, None, None], -yaw[:, None, None, :, None, None])  # [b, v, i, j, h, w, 3]
    rig = [jnp.moveaxis(x, 1, 2)[:, None, None, :, None, None] for x in (intrinsics, extrinsics)]  # [b, 1, 1, j, 1, 1, v, …]
    own = jnp.broadcast_to(jnp.arange(v)[None, :, None, None, None, None], there.shape[:-1])
    camera, place = look_up(there, own, *rig)
    x = jnp.clip(place[..., 0] * w - 0.5, 0, w - 1)
    y = jnp.clip(place[..., 1] * h - 0.5, 0, h - 1)
    left, top = jnp.minimum(jnp.floor(x), max(w - 2, 0)).astype(jnp.int32), jnp.minimum(jnp.floor(y), max(h - 2, 0)).astype(jnp.int32)
    sample, frame = jnp.arange(b)[:, None, None, None, None, None], jnp.arange(t)[None, None, None, :, None, None]
    return Places((((sample * v + camera) * t + frame) * h + top) * w + left, x - left, y - top)


def fetch(latents, places: Places):
    """Latents [b, v, t, h, w, c] at `places` [...], between four neighbours → [..., c]."""
    h, w, c = latents.shape[-3:]
    table = latents.reshape(-1, c)
    across, down = places.across[..., None], places.down[..., None]
    right, below = min(1, w - 1), min(1, h - 1) * w

    def row(offset):
        return jnp.take(table, places.corner + offset, axis=0, mode="clip")

    upper = row(0) * (1 - across) + row(right) * across
    lower = row(below) * (1 - across) + row(below + right) * across
    return upper * (1 - down) + lower * down


def carry(latents, places: Places):
    """Latents of each frame j as the cameras at each frame i would see them.

    latents [b, v, t, h, w, c]; places: of all frames in all frames. Returns [b, v, t (i), t (j), h, w, c]; entries with i = j are the
    latents themselves.
    """
    same = jnp.eye(latents.shape[2], dtype=bool)[:, :, None, None, None]
    return jnp.where(same, latents[:, :, :, None], fetch(latents, places))
