"""Boxes, visibility and lidar points of a simulated keyframe, from the actors and the rendered instance and depth maps."""

import numpy as np
from scipy.spatial import ConvexHull

from data_pipeline.simulator.tables import token, visibility_token
from mila_jax import geometry

RADIUS_METRES = 60.0
# A shape fills its box's outline to about this part, so an unhidden actor shows that many of the outline's pixels.
FILL = 0.75
# Angular steps of a 32-beam lidar that turns 20 times a second, radians: along the turn and between beams.
LIDAR_STEPS = (0.0058, 0.0233)
CORNERS = np.array([[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)])
LIDAR_TRANSLATION, LIDAR_ROTATION = (0.94, 0.0, 1.84), (float(np.sqrt(0.5)), 0.0, 0.0, -float(np.sqrt(0.5)))


def outline_pixels(corners, world2camera, intrinsics, height: int, width: int) -> float:
    """Area in pixels of a box's outline inside the image; 0 when a corner lies behind the camera or all lie outside.

    corners: [8, 3] metres in the world; intrinsics: (fx, fy, cx, cy) as fractions. Corners outside are moved to the border,
    which is exact for outlines cut by one side.
    """
    uv, depth = geometry.project(corners, world2camera, intrinsics)
    if (depth < 0.3).any():
        return 0.0
    uv = np.clip(uv, 0, 1) * (width, height)
    if np.ptp(uv, axis=0).min() < 1e-3:
        return 0.0
    # A sliver can still be degenerate for the hull; "QJ" joggles it instead of failing.
    return float(ConvexHull(uv, qhull_options="QJ").volume)


def box_corners(centre, size_wlh, yaw: float):
    """Corners [8, 3] of a box: size (width, length, height) in metres, its length along the heading `yaw` (radians)."""
    width, length, height = size_wlh
    return CORNERS * (length, width, height) @ geometry.rotation_matrix(geometry.yaw_quaternion(yaw)).T + centre


def annotate(actors, seconds, ego, instance, world2camera, intrinsics, sample_tokens, scene_key) -> tuple[list, list]:
    """Instance and sample_annotation rows of one scene.

    actors: the world's actors; seconds [k] keyframe times since the start; ego [k, 3] translations in metres; instance
    [k, 6, H, W] maps; world2camera [k, 6, 4, 4]; intrinsics [6, 4] fractions; sample_tokens [k]; scene_key: what tokens are
    derived from. Actors within 60 m of the ego are annotated; those seen in no image keep the lowest visibility.
    """
    instances, annotations = [], []
    height, width = instance.shape[2:]
    counts = [np.bincount(frame.ravel(), minlength=1 + max((a.index for a in actors), default=0)) for frame in instance]
    for actor in actors:
        centres, yaws = actor.pose(seconds)
        attributes = actor.attribute(seconds)
        distance = np.linalg.norm(np.asarray(centres)[:, :2] - ego[:, :2], axis=1)
        near = np.flatnonzero(distance < RADIUS_METRES)
        if not len(near):
            continue
        instance_token = token(scene_key, "instance", actor.index)
        tokens = [token(scene_key, "annotation", actor.index, k) for k in near]
        for i, k in enumerate(near):
            corners = box_corners(centres[k], actor.size, float(yaws[k]))
            outline = sum(outline_pixels(corners, world2camera[k, v], intrinsics[v], height, width) for v in range(6))
            seen = min(1.0, float(counts[k][actor.index]) / max(FILL * outline, 1.0))
            reach = max(float(distance[k]), 2.0)
            points = seen * (max(actor.size[:2]) / reach / LIDAR_STEPS[0]) * (actor.size[2] / reach / LIDAR_STEPS[1])
            annotations.append(
                {
                    "token": tokens[i],
                    "sample_token": sample_tokens[k],
                    "instance_token": instance_token,
                    "visibility_token": visibility_token(seen),
                    "attribute_tokens": [token("attribute", attributes[k])] if attributes[k] else [],
                    "translation": [float(x) for x in centres[k]],
                    "size": [float(x) for x in actor.size],
                    "rotation": [float(x) for x in geometry.yaw_quaternion(float(yaws[k]))],
                    "prev": tokens[i - 1] if i else "",
                    "next": tokens[i + 1] if i + 1 < len(near) else "",
                    "num_lidar_pts": max(1, round(points)),
                    "num_radar_pts": int(reach < 40 and actor.category.startswith("vehicle")),
                }
            )
        instances.append(
            {
                "token": instance_token,
                "category_token": token("category", actor.category),
                "nbr_annotations": len(near),
                "first_annotation_token": tokens[0],
                "last_annotation_token": tokens[-1],
            }
        )
    return instances, annotations


def lidar_points(depth, camera2lidar, intrinsics, step: int = 8):
    """A thin point cloud [n, 5] float32 (x, y, z, intensity, ring) in the lidar frame, from depth maps [6, H, W] in metres.

    camera2lidar: [6, 4, 4]; intrinsics: [6, 4] fractions. Every `step`-th pixel; sky (infinite depth) gives no point.
    """
    height, width = depth.shape[1:]
    rows, columns = np.mgrid[step // 2 : height : step, step // 2 : width : step]
    clouds = []
    for view in range(6):
        z = depth[view, rows, columns].astype(np.float64).ravel()
        kept = np.isfinite(z)
        z = z[kept]
        fx, fy, cx, cy = intrinsics[view]
        u, v = (columns.ravel()[kept] + 0.5) / width, (rows.ravel()[kept] + 0.5) / height
        points = np.stack([(u - cx) / fx * z, (v - cy) / fy * z, z], -1)
        points = points @ camera2lidar[view, :3, :3].T + camera2lidar[view, :3, 3]
        ring = rows.ravel()[kept] // step
        clouds.append(np.column_stack([points, np.full(len(z), 32.0), ring]))
    return np.concatenate(clouds).astype(np.float32)
