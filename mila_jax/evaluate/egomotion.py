"""The car's motion read from six-view video by aligning pictures, and how well it follows the commanded one. Nothing is trained.

Pixels of the later picture are put on a bowl (flat ground and a wall around, `consistency.bowl_points`), moved by a candidate motion and looked
up in the earlier picture of the same camera. The motion is the one whose pictures differ least. How far things are is not known, so several
radii are tried and each neighbourhood takes the one that fits it, as in a plane sweep.

Headings are read well, speeds roughly: on 1.5 s of three val scenes of the simulated world (64×112, recorded pictures) a quarter of a second's
turn was off by 0.002 to 0.008 degrees, its speed by 0.8 to 1.3 m/s (at 4 to 7.5 m/s), mostly on roads without marks. Read following beside
the recorded video's.
"""

import numpy as np
from scipy import ndimage

from mila_jax.evaluate.consistency import bowl_points
from mila_jax.evaluate.quality import grey
from mila_jax.geometry import inverse, transform

RADII = (10.0, 25.0, 80.0)  # metres
GAP = 3  # frames from one picture to the next: at 12 Hz what one frame moves is less than a pixel of a small picture
STRIDE = 2  # every second pixel of either direction is compared
CAP = 25.0  # grey levels: other cars and hidden ground are no worse than this
SPEEDS, INERTIA = 46, 30.0  # speeds searched; grey levels for a change of 1 m a frame, the best of 0, 30, 300 on three training scenes
FASTEST, SHARPEST = 1.8, 0.08  # metres and radians a frame: what is searched, 21 m/s and 1 rad/s at 12 Hz


class EgoMotion:
    """Estimator for one rig of v cameras. intrinsics [v, 4] (fractions of width and height), extrinsics [v, 7] (camera → ego: metres, quaternion w
    first); rate: frames a second of the videos."""

    def __init__(self, intrinsics, extrinsics, rate: float = 12.0):
        self.slow = 12 / rate  # what is searched is told a frame, at 12 Hz
        self.intrinsics = np.asarray(intrinsics, np.float64)
        extrinsics = np.asarray(extrinsics, np.float64)
        self.camera2ego = transform(extrinsics[:, :3], extrinsics[:, 3:])
        self.ego2camera = inverse(self.camera2ego)
        self.points = None

    def _prepare(self, height: int, width: int) -> None:
        """self.points [v, radii, rows, columns, 3]: where the compared pixels lie in the ego frame."""
        self.size = height, width
        rows, columns = np.mgrid[STRIDE // 2 : height : STRIDE, STRIDE // 2 : width : STRIDE]
        self.rows, self.columns = rows[:, 0], columns[0]
        found = []
        for (fx, fy, cx, cy), camera in zip(self.intrinsics, self.camera2ego):
            rays = np.stack([((columns + 0.5) / width - cx) / fx, ((rows + 0.5) / height - cy) / fy, np.ones(rows.shape)], -1).reshape(-1, 3)
            rays = rays @ camera[:3, :3].T
            found.append(np.stack([bowl_points(camera[:3, 3], rays, radius).reshape(*rows.shape, 3) for radius in RADII]))
        self.points = np.stack(found)

    def _misfit(self, earlier, later, distance: float, yaw: float) -> float:
        """Mean difference in grey levels [v, H, W] if the car went `distance` metres along an arc that turns by `yaw` radians."""
        height, width = self.size
        c, s = np.cos(yaw), np.sin(yaw)
        moved = self.points @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1.0]]) + [distance * np.cos(yaw / 2), distance * np.sin(yaw / 2), 0]
        total = weight = 0.0
        for v, camera in enumerate(self.ego2camera):
            local = moved[v] @ camera[:3, :3].T + camera[:3, 3]
            depth = np.maximum(local[..., 2], 0.1)
            fx, fy, cx, cy = self.intrinsics[v]
            x = (fx * local[..., 0] / depth + cx) * width - 0.5
            y = (fy * local[..., 1] / depth + cy) * height - 0.5
            seen = (local[..., 2] > 0.1) & (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
            value = ndimage.map_coordinates(earlier[v], [y, x], order=1, mode="nearest", prefilter=False)
            off = np.minimum(np.abs(value - later[v][self.rows][:, self.columns]), CAP)
            off = np.where(seen.all(0), off, 0)
            best = ndimage.uniform_filter(off, (0, 5, 5)).min(0)
            total, weight = total + best.sum(), weight + seen.all(0).sum()
        return total / max(weight, 1)

    def _read(self, earlier, later, gap: int) -> tuple[float, np.ndarray]:
        """Radians turned between two instants uint8 [6, H, W, 3], and the misfit [SPEEDS] at each searched speed with that turn."""
        if self.points is None or self.size != earlier.shape[1:3]:
            self._prepare(*earlier.shape[1:3])
        earlier, later = (ndimage.gaussian_filter(grey(x), (0, 0.7, 0.7)) for x in (earlier, later))
        far, turn = gap * FASTEST * self.slow, gap * SHARPEST * self.slow
        # The turn moves every picture whole and is found well even at a wrong distance: both coarsely, then ever finer around the best.
        distances, yaws = np.linspace(0, far, 7), np.linspace(-turn, turn, 13)
        step = np.array([far / 8, turn / 8])
        for _ in range(5):
            costs = np.array([[self._misfit(earlier, later, d, a) for a in yaws] for d in distances])
            i, j = np.unravel_index(costs.argmin(), costs.shape)
            yaw = yaws[j]
            distances, yaws = (c + s * np.arange(-1, 2) for c, s in zip((distances[i], yaw), step))
            step = step / 2
        return float(yaw), np.array([self._misfit(earlier, later, d, yaw) for d in np.linspace(0, far, SPEEDS)])

    def __call__(self, frames) -> np.ndarray:
        """Movements [t − 1, 3] from frame to frame (metres forward and left, radians) of uint8 [t, v, H, W, 3], t ≥ 2; equal within `GAP` frames."""
        marks = sorted({*range(0, len(frames) - 1, GAP), len(frames) - 1})
        read = [self._read(frames[a], frames[b], b - a) for a, b in zip(marks, marks[1:])]
        speeds = self.slow * steady(np.stack([costs for _, costs in read]))
        out = []
        for a, b, (yaw, _), speed in zip(marks, marks[1:], read, speeds):
            turn = yaw / (b - a)
            out += [[speed * np.cos(turn / 2), speed * np.sin(turn / 2), turn]] * (b - a)
        return np.array(out)


def steady(costs) -> np.ndarray:
    """The course of speeds (metres a frame) with the least misfit [pairs, SPEEDS] plus `INERTIA` for changes of speed: markings that repeat fit
    at several speeds, and only the car's inertia tells which (Viterbi's algorithm)."""
    speeds = np.linspace(0, FASTEST, SPEEDS)
    change = INERTIA * np.square(speeds[:, None] - speeds)  # [before, after]
    total, back = costs[0], []
    for cost in costs[1:]:
        ways = total[:, None] + change
        back.append(ways.argmin(0))
        total = ways.min(0) + cost
    course = [int(total.argmin())]
    for link in reversed(back):
        course.append(int(link[course[-1]]))
    return speeds[course[::-1]]


def integrate(movements) -> np.ndarray:
    """Movements [t − 1, 3], each in the frame of the moment before → poses [t, 3], the first one zero (x, y metres, yaw radians)."""
    poses = [np.zeros(3)]
    for forward, left, turn in np.asarray(movements, np.float64):
        x, y, yaw = poses[-1]
        c, s = np.cos(yaw), np.sin(yaw)
        poses.append(np.array([x + c * forward - s * left, y + s * forward + c * left, yaw + turn]))
    return np.stack(poses)


def following(found, commanded) -> dict:
    """How far movements read from a video [t − 1, 3] lead from the commanded ones: ade_m and fde_m (mean and last distance of the integrated
    positions, metres), yaw_deg (mean absolute difference of headings, degrees), path_m (length of the commanded way)."""
    a, b = integrate(found), integrate(commanded)
    gap = np.hypot(*(a - b)[1:, :2].T)
    turn = (a[1:, 2] - b[1:, 2] + np.pi) % (2 * np.pi) - np.pi
    length = float(np.hypot(*np.asarray(commanded)[:, :2].T).sum())
    return {"ade_m": float(gap.mean()), "fde_m": float(gap[-1]), "yaw_deg": float(np.degrees(np.abs(turn).mean())), "path_m": length}
