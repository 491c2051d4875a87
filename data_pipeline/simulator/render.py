"""Pictures, depth and instance maps of a world through a camera rig.

NumPy places the actors, culls what a camera cannot see and pads the tables to fixed sizes; `trace.render_cameras` does the rest in
one compiled program that serves every scene of an image size.
"""

import numpy as np

from data_pipeline.simulator import trace
from data_pipeline.simulator.look import make_look
from data_pipeline.simulator.network import ARCS, JUNCTIONS
from data_pipeline.simulator.shapes import BUILDING, PART, actor_parts
from mila_jax import geometry

BOXES, ROUNDS, CASTERS = 200, 48, 96  # table sizes per camera
CHUNK = 4  # instants per call of the compiled program
REACH = 240.0  # metres; beyond it haze and houses hide everything
HEADLAMP = 3.7  # metres ahead of the rear axle
SIGNAL = ((1.0, 0.10, 0.06), (1.0, 0.66, 0.08), (0.12, 0.95, 0.45))


def _pad(rows, size):
    """Rows [n, k] to [size, k]; the padding lies far away where no ray meets it."""
    out = np.zeros((size, rows.shape[1]), np.float32)
    out[:, :3], out[:, 3:6], out[:, 15:16] = (0.0, 0.0, -1e5), 1.0, 1.0
    out[: len(rows)] = rows
    return out


class Renderer:
    """Renders one world.

    world: `world.World`. rig: `rig.Rig`. height, width: pixels per view. supersample: samples per pixel and axis; even counts
    share border samples, so that 2 gives a 3 × 3 tent around the pixel centre.
    """

    def __init__(self, world, rig, height: int, width: int, supersample: int = 2):
        self.world, self.rig, self.size, self.samples = world, rig, (height, width), supersample
        self.cam2ego = rig.cam2ego()
        self.look = make_look(world)
        parts = [actor_parts(actor) for actor in world.actors]
        self.owner = np.concatenate([np.full(len(p), i) for i, p in enumerate(parts)]) if parts else np.zeros(0, int)
        self.parts = np.concatenate(parts) if parts else np.zeros((0, PART))
        self.parts[:, 7:13] = np.clip(self.parts[:, 7:13], 0, 1) ** 2.2
        self.boxes = self._static(world.scenery.boxes)
        count = len(world.scenery.rounds)
        self.rounds = self._static(np.concatenate([world.scenery.rounds, np.ones((count, 1)), np.zeros((count, 1))], 1))
        self.scene = self._scene()

    def _static(self, table):
        """Scenery rows [n, PART + 2] to table rows [n, COLUMNS] relative to the scene's origin, colours linear."""
        out = np.concatenate([table, np.zeros((len(table), 1))], 1)
        out[:, :2] -= self.world.origin
        out[:, 7:13] = np.clip(out[:, 7:13], 0, 1) ** 2.2
        return out

    def _scene(self):
        """Street tables relative to the scene's origin."""
        network = self.world.network
        arcs = [street.arcs - np.array([*self.world.origin, 0, 0, 0, 0, 0]) for street in network.streets]
        streets = np.full((len(ARCS), 4 + 2 * JUNCTIONS), 1e6)
        for i, street in enumerate(network.streets):
            streets[i, :4] = street.half_width, street.lanes, street.parking, 0
            for j, (at, other) in enumerate(network.junctions[i]):
                streets[i, 4 + 2 * j : 6 + 2 * j] = at, network.streets[other].half_width
            streets[i, 5 + 2 * len(network.junctions[i]) :: 2] = 1.0
        return {
            "arcs": np.concatenate(arcs).astype(np.float32),
            "streets": streets.astype(np.float32),
            "boston": np.array(network.side > 0),
            "side": np.float32(network.side),
        }

    def _placed(self, times):
        """Actor poses for camera times [m]: (x, y, cos, sin) [m, actors, 4] relative to the origin."""
        if not self.world.actors:
            return np.zeros((len(times), 0, 4))
        states = np.stack([actor.motion(times)[:, :3] for actor in self.world.actors], 1)
        place = states[..., :2] - self.world.origin
        return np.concatenate([place, np.cos(states[..., 2:]), np.sin(states[..., 2:])], -1)

    def _signals(self, boxes, time):
        """Colours the traffic-light lamps for a time, in place."""
        scenery = self.world.scenery
        for row, main, lamp in zip(scenery.signals, scenery.signal_main, scenery.signal_lamp, strict=True):
            on = self.world.signal(bool(main), time) == lamp
            boxes[row, 7:10] = np.array(SIGNAL[lamp]) ** 2.2 * (1.0 if on else 0.06)

    def _visible(self, rows, position, rotation, spread, size):
        """The rows a camera may see, relative to it, largest first; at most `size`."""
        rows = rows.copy()
        rows[:, :2] -= position[:2]
        rows[:, 2] -= position[2]
        radius = np.linalg.norm(rows[:, 3:6] + rows[:, 6:7] * rows[:, 5:6] * np.array([1, 0, 0]), axis=1)
        axis = rotation[:, 2]
        distance = np.linalg.norm(rows[:, :3], axis=1)
        forward = rows[:, :3] @ axis
        beside = np.sqrt(np.maximum(distance**2 - forward**2, 0))
        # Distance outside the viewing cone of half angle `spread`.
        outside = beside * np.cos(spread) - forward * np.sin(spread)
        keep = (outside < radius) & (distance - radius < REACH)
        rows, weight = rows[keep], (radius / np.maximum(distance, 1e-3))[keep]
        return rows[np.argsort(-weight, kind="stable")[:size]]

    def _camera(self, view, time, placed):
        """Inputs of `trace.trace` for one camera at one time."""
        (translation,), (orientation,) = self.world.ego_pose(np.array([time]))
        ego = geometry.transform(translation - np.array([*self.world.origin, 0]), orientation)
        pose = ego @ self.cam2ego[view]
        rotation, position = pose[:3, :3], pose[:3, 3]
        fx, fy, cx, cy = self.rig.intrinsics[view]
        spread = np.arctan(np.hypot(max(cx, 1 - cx) / fx, max(cy, 1 - cy) / fy)) + 0.02
        at = placed[self.owner]
        moving = np.concatenate([self.parts, at[:, 2:], (self.owner + 1)[:, None]], 1)
        moving[:, 0] = at[:, 0] + self.parts[:, 0] * at[:, 2] - self.parts[:, 1] * at[:, 3]
        moving[:, 1] = at[:, 1] + self.parts[:, 0] * at[:, 3] + self.parts[:, 1] * at[:, 2]
        still = self.boxes.copy()
        self._signals(still, time)
        boxes = self._visible(np.concatenate([still, moving]), position, rotation, spread, BOXES)
        rounds = self._visible(self.rounds, position, rotation, spread, ROUNDS)
        casters = self._casters(placed, position)
        head = ego[:2, 3] + HEADLAMP * ego[:2, 0] - position[:2]
        return {
            "rotation": rotation, "position": position, "intrinsics": self.rig.intrinsics[view],
            "ego": np.array([*head, ego[0, 0], ego[1, 0]]), "pixel": np.array(0.7 / (fx * self.size[1])),
            "boxes": _pad(boxes, BOXES), "box_count": np.int32(len(boxes)),
            "rounds": _pad(rounds, ROUNDS), "round_count": np.int32(len(rounds)), **casters,
        }  # fmt: skip

    def _casters(self, placed, position):
        """Shadow casters near a camera: vehicles, buildings and tree crowns as upright boxes."""
        sizes = np.array([actor.size for actor in self.world.actors]).reshape(-1, 3)
        cars = np.concatenate([placed, sizes[:, [1, 0]] / 2, sizes[:, 2:], np.ones((len(sizes), 1))], 1)
        houses = self.boxes[self.boxes[:, 13] == BUILDING]
        houses = np.concatenate([houses[:, [0, 1, 15, 16, 3, 4]], 2 * houses[:, 5:6], np.ones((len(houses), 1))], 1)
        trees = np.concatenate([self.rounds[:, [0, 1, 15, 16]], 0.35 * self.rounds[:, [3, 4]], self.rounds[:, 2:3],
                                np.full((len(self.rounds), 1), 0.6)], 1)  # fmt: skip
        rows = np.concatenate([cars, houses, trees])
        rows[:, :2] -= position[:2]
        reach = np.linalg.norm(rows[:, 4:6], axis=1) + rows[:, 6]
        far = np.linalg.norm(rows[:, :2], axis=1)
        keep = far - reach < 90
        rows = rows[keep][np.argsort((far - reach)[keep], kind="stable")[:CASTERS]]
        out = np.zeros((CASTERS, 8))
        out[:, 2], out[:, 4:6] = 1.0, 0.1
        out[: len(rows)] = rows
        return {"casters": out, "caster_count": np.int32(len(rows))}

    def render(self, times) -> dict[str, np.ndarray]:
        """Renders all six views.

        times: [n, 6] seconds since the start of the scene, one per camera in rig order. Returns image uint8 [n, 6, H, W, 3], depth
        float32 [n, 6, H, W] (metres along the optical axis, inf for sky) and instance int32 [n, 6, H, W] (0 or `Actor.index`).
        """
        times = np.asarray(times, np.float64)
        height, width = self.size
        batches = []
        for first in range(0, len(times), CHUNK):
            flat = times[first : first + CHUNK].reshape(-1)
            placed = self._placed(flat)
            cameras = [self._camera(i % 6, time, placed[i]) for i, time in enumerate(flat)]
            cameras += cameras[-1:] * (CHUNK * 6 - len(cameras))
            stacked = {key: np.stack([np.asarray(c[key]) for c in cameras]) for key in cameras[0]}
            stacked = {k: a if a.dtype == np.int32 else a.astype(np.float32) for k, a in stacked.items()}
            done = trace.render_cameras(stacked, self.scene, self.look, height=height, width=width, samples=self.samples)
            batches.append([np.asarray(x)[: len(flat)].reshape(-1, 6, *x.shape[1:]) for x in done])
        if not batches:
            return {"image": np.zeros((0, 6, height, width, 3), np.uint8), "depth": np.zeros((0, 6, height, width), np.float32),
                    "instance": np.zeros((0, 6, height, width), np.int32)}  # fmt: skip
        return dict(zip(("image", "depth", "instance"), (np.concatenate(b) for b in zip(*batches, strict=True)), strict=True))
