"""Rigid motions as nuScenes writes them, in NumPy and float64.

Axes: ego x forward, y left, z up (metres); camera x right, y down, z along the optical axis. Quaternions are w first.
A transform named `a2b` takes points in frame a to frame b.
"""

import numpy as np


def rotation_matrix(quaternion):
    """Quaternions [..., 4] (w first, any length but zero) to rotation matrices [..., 3, 3]."""
    q = np.asarray(quaternion, np.float64)
    w, x, y, z = np.moveaxis(q / np.linalg.norm(q, axis=-1, keepdims=True), -1, 0)
    out = np.empty((*q.shape[:-1], 3, 3))
    out[..., 0, 0], out[..., 0, 1], out[..., 0, 2] = 1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)
    out[..., 1, 0], out[..., 1, 1], out[..., 1, 2] = 2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)
    out[..., 2, 0], out[..., 2, 1], out[..., 2, 2] = 2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)
    return out


def quaternion(matrix):
    """Rotation matrices [..., 3, 3] to unit quaternions [..., 4], w first and w >= 0."""
    m = np.asarray(matrix, np.float64)
    xx, yy, zz = m[..., 0, 0], m[..., 1, 1], m[..., 2, 2]
    # Four times the outer product q qᵀ; its row with the largest diagonal gives q without cancellation.
    outer = np.stack(
        [
            np.stack([1 + xx + yy + zz, m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] - m[..., 0, 1]], -1),
            np.stack([m[..., 2, 1] - m[..., 1, 2], 1 + xx - yy - zz, m[..., 0, 1] + m[..., 1, 0], m[..., 0, 2] + m[..., 2, 0]], -1),
            np.stack([m[..., 0, 2] - m[..., 2, 0], m[..., 0, 1] + m[..., 1, 0], 1 - xx + yy - zz, m[..., 1, 2] + m[..., 2, 1]], -1),
            np.stack([m[..., 1, 0] - m[..., 0, 1], m[..., 0, 2] + m[..., 2, 0], m[..., 1, 2] + m[..., 2, 1], 1 - xx - yy + zz], -1),
        ],
        -2,
    )
    best = np.argmax(np.diagonal(outer, axis1=-2, axis2=-1), -1)
    q = np.take_along_axis(outer, best[..., None, None], -2)[..., 0, :]
    q = q / np.linalg.norm(q, axis=-1, keepdims=True)
    return np.where(q[..., :1] < 0, -q, q)


def yaw_quaternion(yaw):
    """Heading `yaw` [...] in radians (counter-clockwise about z) to quaternions [..., 4]."""
    half = np.asarray(yaw, np.float64) / 2
    return np.stack([np.cos(half), np.zeros_like(half), np.zeros_like(half), np.sin(half)], -1)


def interpolate_rotation(first, second, share):
    """Quaternions [..., 4] at `share` [...] (0 … 1) of the way from `first` to `second`: the shorter way, at one speed (slerp)."""
    a, b = (np.asarray(q, np.float64) / np.linalg.norm(q, axis=-1, keepdims=True) for q in (first, second))
    b = np.where((a * b).sum(-1, keepdims=True) < 0, -b, b)
    share = np.asarray(share, np.float64)[..., None]
    angle = np.arccos(np.clip((a * b).sum(-1, keepdims=True), -1.0, 1.0))
    sine = np.sin(angle)
    small = sine < 1e-9  # the two are one: any weights do
    sine = np.where(small, 1.0, sine)
    out = np.where(small, 1 - share, np.sin((1 - share) * angle) / sine) * a + np.where(small, share, np.sin(share * angle) / sine) * b
    return out / np.linalg.norm(out, axis=-1, keepdims=True)


def yaw_of(rotation):
    """Heading in radians of rotation matrices [..., 3, 3]: the direction of their x axis in the ground plane."""
    rotation = np.asarray(rotation)
    return np.arctan2(rotation[..., 1, 0], rotation[..., 0, 0])


def transform(translation, quaternion_wxyz):
    """Translations [..., 3] and quaternions [..., 4] to homogeneous matrices [..., 4, 4]."""
    rotation = rotation_matrix(quaternion_wxyz)
    out = np.zeros(rotation.shape[:-2] + (4, 4))
    out[..., :3, :3] = rotation
    out[..., :3, 3] = translation
    out[..., 3, 3] = 1
    return out


def inverse(matrix):
    """Inverse of rigid transforms [..., 4, 4]."""
    rotation_t = np.swapaxes(matrix[..., :3, :3], -1, -2)
    out = np.zeros_like(matrix)
    out[..., :3, :3] = rotation_t
    out[..., :3, 3] = -np.einsum("...ij,...j->...i", rotation_t, matrix[..., :3, 3])
    out[..., 3, 3] = 1
    return out


def project(points, world2camera, intrinsics):
    """Pinhole projection.

    points: [n, 3] in the world. world2camera: [4, 4]. intrinsics: (fx, fy, cx, cy) as fractions of the image's width and
    height. Returns pixel fractions [n, 2] (0..1 inside the image, x right, y down) and depth [n] along the optical axis in
    metres; points with depth <= 0 lie behind the camera and their fractions mean nothing.
    """
    p = points @ world2camera[:3, :3].T + world2camera[:3, 3]
    depth = p[:, 2]
    safe = np.where(np.abs(depth) < 1e-9, 1e-9, depth)
    fx, fy, cx, cy = intrinsics
    return np.stack([fx * p[:, 0] / safe + cx, fy * p[:, 1] / safe + cy], -1), depth


def relative_waypoints(translation, quaternion_wxyz, reference):
    """Ego poses in the world to waypoints (x forward, y left, yaw).

    translation: [..., t, 3] metres, quaternion_wxyz: [..., t, 4], reference: [...] index of the last conditioning frame.
    Returns [..., t, 3]: x forward, y left in metres and yaw in radians (-π..π), relative to the ego at `reference`.
    """
    poses = transform(translation, quaternion_wxyz)
    origin = np.take_along_axis(poses, np.asarray(reference)[..., None, None, None], -3)
    local = inverse(origin) @ poses
    return np.stack([local[..., 0, 3], local[..., 1, 3], yaw_of(local[..., :3, :3])], -1)
