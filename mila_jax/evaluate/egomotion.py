"""How the car moved, read from six-view video alone: the trajectory that a generated video really shows.

A small network looks at four following frames of all six cameras, shrunk to 32×56 luma, and gives the car's three movements
between them. Each movement of a video is the mean over the windows that hold it; chained up, they are the trajectory, which is
compared with the commanded waypoints (ADE, FDE, yaw).

It knows the pictures that it was trained on: the shipped weights read simulated streets at 12 Hz, seen by the reference rig.
`python -m mila_jax.evaluate.egomotion_train` trains it on any nuScenes data set and states its error on the held-out scenes,
without which no difference of a generated video means anything. The validation of the shipped weights stands in their file.
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mila_jax.errors import UserError
from mila_jax.evaluate.quality import grey
from mila_jax.views import VIEWS

SHIPPED = pathlib.Path(__file__).parents[1] / "weights" / "egomotion_sim.safetensors"
WINDOW = 4  # frames
SIZE = (32, 56)  # pixels of the network's input
RATE = 12.0  # frames a second that it knows
SCALE = np.array([0.5, 0.05, 0.02], np.float32)  # metres, metres, radians a frame: brings the three outputs to one size


class MotionNetwork(nnx.Module):
    """Windows [b, v, 32, 56, 4] of luma (about -1..1) -> movements [b, 3, 3] in units of `SCALE`."""

    def __init__(self, channels=(24, 48, 64), width=64, *, rngs: nnx.Rngs):
        sizes = (7, 3, 3)
        previous, layers = WINDOW, []
        for size, out in zip(sizes, channels, strict=True):
            layers.append(nnx.Conv(previous, out, (size, size), strides=2, rngs=rngs))
            previous = out
        self.convolutions = nnx.List(layers)
        places = (SIZE[0] // 8) * (SIZE[1] // 8) * previous
        # Each camera looks another way, so each has its own reading of the shared features.
        self.views = nnx.Param(jax.random.normal(rngs.params(), (len(VIEWS), places, width)) / places**0.5)
        self.hidden = nnx.Linear(len(VIEWS) * width, 128, rngs=rngs)
        self.out = nnx.Linear(128, 3 * (WINDOW - 1), rngs=rngs)

    def __call__(self, x):
        batch, views = x.shape[:2]
        x = x.reshape((-1,) + x.shape[2:])
        for layer in self.convolutions:
            x = nnx.relu(layer(x))
        x = jnp.einsum("bvp,vpw->bvw", x.reshape(batch, views, -1), self.views[...])
        x = nnx.relu(self.hidden(nnx.relu(x).reshape(batch, -1)))
        return self.out(x).reshape(batch, WINDOW - 1, 3)


def shrink(frames):
    """uint8 [t, v, H, W, 3] -> luma [t, v, 32, 56], float32 0..255: means over equal areas (bilinear with anti-aliasing)."""
    luma = grey(frames).astype(np.float32)
    return np.asarray(_resize(luma, luma.shape[:2] + SIZE))


@functools.partial(jax.jit, static_argnums=1)
def _resize(luma, shape):
    return jax.image.resize(luma, shape, "bilinear", antialias=True)


def normalise(windows):
    """Luma windows [..., 32, 56, t] to mean 0 and deviation about 1 for each window of each view: exposure says nothing of motion."""
    mean = windows.mean((-3, -2, -1), keepdims=True)
    return (windows - mean) / (windows.std((-3, -2, -1), keepdims=True) + 8.0)


def chain(steps):
    """Movements [t, 3] (x forward, y left, yaw; each in the frame of the moment before) -> poses [t + 1, 3] from (0, 0, 0)."""
    poses = np.zeros((len(steps) + 1, 3))
    for i, (x, y, yaw) in enumerate(np.asarray(steps, np.float64)):
        px, py, heading = poses[i]
        c, s = np.cos(heading), np.sin(heading)
        poses[i + 1] = px + c * x - s * y, py + s * x + c * y, heading + yaw
    return poses


def steps_of(poses):
    """Inverse of `chain`: poses [t, 3] in one frame -> movements [t - 1, 3]."""
    poses = np.asarray(poses, np.float64)
    dx, dy = np.diff(poses[:, 0]), np.diff(poses[:, 1])
    c, s = np.cos(poses[:-1, 2]), np.sin(poses[:-1, 2])
    turn = np.diff(poses[:, 2])
    return np.stack([c * dx + s * dy, -s * dx + c * dy, (turn + np.pi) % (2 * np.pi) - np.pi], -1)


def trajectory_errors(found, commanded):
    """Found against commanded poses, both [t, 3] (x, y in metres, yaw in radians) from the same start, whose row is included.

    Returns ade_m (mean distance over the frames after the start), fde_m (at the last one), yaw_deg (mean absolute difference),
    and length_ratio, the length of the found path over that of the commanded one (NaN if the car stands).
    """
    found, commanded = np.asarray(found, np.float64), np.asarray(commanded, np.float64)
    if found.shape != commanded.shape or found.ndim != 2 or len(found) < 2:
        raise ValueError(f"expected two equal sets of poses [t, 3], t >= 2; got {found.shape} and {commanded.shape}")
    distance = np.hypot(*(found - commanded)[1:, :2].T)
    turn = (found - commanded)[1:, 2]
    turn = np.abs((turn + np.pi) % (2 * np.pi) - np.pi)
    lengths = [np.hypot(*np.diff(p[:, :2], axis=0).T).sum() for p in (found, commanded)]
    return {
        "ade_m": float(distance.mean()), "fde_m": float(distance[-1]), "yaw_deg": float(np.degrees(turn.mean())),
        "length_ratio": float(lengths[0] / lengths[1]) if lengths[1] > 0.5 else float("nan"),
    }  # fmt: skip


class EgomotionEstimator:
    """Trained network that reads trajectories from video."""

    def __init__(self, path=None, chunk: int = 32):
        """path: weights of `egomotion_train`, None for the shipped ones (simulated streets). `UserError` if they cannot be read."""
        from mila_jax.model.autoencoder_weights import file_sha256

        path = SHIPPED if path is None else pathlib.Path(path)
        self.network, self.about = load(path)
        self.sha256, self.chunk = file_sha256(path), chunk
        graph, self._state = nnx.split(self.network)
        self._run = jax.jit(lambda state, x: nnx.merge(graph, state)(normalise(x)))

    def steps(self, frames):
        """frames: uint8 [t, 6, H, W, 3] at 12 Hz, t >= 4 -> movements [t - 1, 3]: metres forward and left, radians, a frame."""
        frames = np.asarray(frames)
        if len(frames) < WINDOW:
            raise UserError(f"trajectory following needs at least {WINDOW} frames, got {len(frames)}; evaluate longer clips")
        luma = shrink(frames)
        windows = np.stack([luma[i : len(luma) - WINDOW + 1 + i] for i in range(WINDOW)], -1)
        total, count = np.zeros((len(frames) - 1, 3)), np.zeros((len(frames) - 1, 1))
        for first in range(0, len(windows), self.chunk):
            part = windows[first : first + self.chunk]
            filled = np.concatenate([part, np.repeat(part[-1:], self.chunk - len(part), 0)])
            moved = np.asarray(self._run(self._state, filled), np.float64)[: len(part)] * SCALE
            for i, window in enumerate(moved, first):
                total[i : i + WINDOW - 1] += window
                count[i : i + WINDOW - 1] += 1
        return total / count

    def trajectory(self, frames):
        """frames as for `steps` -> poses [t, 3] relative to the first frame: x forward, y left in metres, yaw in radians."""
        return chain(self.steps(frames))


def save(path, network, about: dict) -> None:
    """Writes float16 weights as safetensors; `about` (JSON) says what they were trained on and how far off they are."""
    from safetensors.numpy import save as to_bytes

    from mila_jax.evaluate.video import atomic_path

    state = nnx.to_pure_dict(nnx.state(network, nnx.Param))
    flat = {".".join(map(str, k)): np.asarray(v, np.float16) for k, v in _flatten(state)}
    with atomic_path(path) as temporary:
        temporary.write_bytes(to_bytes(flat, {"egomotion": json.dumps(about)}))


def load(path):
    """(network, about) of a file that `save` wrote. Raises `UserError` naming the file or tensor."""
    from safetensors import SafetensorError, safe_open

    network = MotionNetwork(rngs=nnx.Rngs(0))
    state = nnx.state(network, nnx.Param)
    wanted = {".".join(map(str, k)): v.shape for k, v in _flatten(nnx.to_pure_dict(state))}
    try:
        with safe_open(path, framework="np") as file:
            about = (file.metadata() or {}).get("egomotion")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give weights of mila_jax.evaluate.egomotion_train") from None
    if about is None:
        raise UserError(f"{path}: no weights of the ego-motion network; make them with python -m mila_jax.evaluate.egomotion_train")
    for name, shape in wanted.items():
        if name not in tensors or tensors[name].shape != shape:
            found = tensors[name].shape if name in tensors else "missing"
            raise UserError(f"{path}: tensor {name} is {found}, expected {shape}; train the ego-motion network again")
    pure = nnx.to_pure_dict(state)
    for name in wanted:
        place = pure
        *way, last = name.split(".")
        for key in way:
            place = place[int(key) if key.isdigit() and int(key) in place else key]
        place[last] = jnp.asarray(tensors[name], jnp.float32)
    nnx.replace_by_pure_dict(state, pure)
    nnx.update(network, state)
    return network, json.loads(about)


def _flatten(tree, prefix=()):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, prefix + (key,))
        else:
            yield prefix + (key,), value
