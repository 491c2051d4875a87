"""Trains the ego-motion network on a nuScenes data set and measures it on the held-out scenes.

    python -m mila_jax.evaluate.egomotion_train --data=NUSCENES --version=v1.0-sim --out=egomotion.safetensors

The shipped weights: the 96 scenes of scripts/pretrain.sh, the defaults below.
"""

import argparse
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from flax import nnx

from mila_jax.errors import UserError
from mila_jax.evaluate import egomotion
from mila_jax.evaluate.egomotion import SCALE, SIZE, WINDOW
from mila_jax.geometry import relative_waypoints
from mila_jax.views import view_index

FRONT = view_index("CAM_FRONT")
STRIDES = (1, 2)  # frames between those of a window: slow and fast drives from the same pictures


def read_scene_luma(nusc, scene):
    """luma float16 [n, 6, 32, 56] and poses [n, 3] (relative to the first) of one scene's instants."""
    from data_pipeline.nuscenes.reader import instants, load_image

    moments = instants(scene)
    height, width = SIZE[0] * 2, SIZE[1] * 2
    frames = np.stack([np.stack([load_image(nusc.root / f, height, width) for f in m.files]) for m in moments])
    translation = np.stack([m.ego_translation[FRONT] for m in moments])
    rotation = np.stack([m.ego_rotation[FRONT] for m in moments])
    times = np.array([m.timestamp_us for m in moments]) * 1e-6
    return egomotion.shrink(frames).astype(np.float16), relative_waypoints(translation, rotation, 0), times


def windows_of(scenes):
    """All windows: (scene, first frame, stride) int [n, 3] without gaps in time, and their movements [n, 3, 3] in units of `SCALE`."""
    rows, moves = [], []
    for number, (luma, poses, times) in enumerate(scenes):
        for stride in STRIDES:
            reach = stride * (WINDOW - 1)
            for first in range(len(luma) - reach):
                chosen = first + stride * np.arange(WINDOW)
                if abs(times[chosen[-1]] - times[first] - reach / egomotion.RATE) < 0.5 / egomotion.RATE:
                    rows.append((number, first, stride))
                    moves.append(egomotion.steps_of(poses[chosen]) / SCALE)
    return np.array(rows), np.array(moves, np.float32)


def gather(scenes, rows):
    """Luma windows float32 [b, 6, 32, 56, 4]."""
    return np.stack([np.moveaxis(scenes[s][0][f : f + d * (WINDOW - 1) + 1 : d], 0, -1) for s, f, d in rows]).astype(np.float32)


def augment(key, x, moves):
    """Random time reversal, freezing, blur, noise, and gain and shadow of single views: [b, v, h, w, t] and [b, 3, 3] -> the same.

    Generated pictures are softer and noisier than recorded ones, and a frozen video has to read as standing still.
    """
    keys = jax.random.split(key, 7)
    b, v = x.shape[:2]
    back = jax.random.bernoulli(keys[0], 0.3, (b,))
    # Driven backwards in time, each movement is undone: the inverse of (x, y, yaw), to first order of a movement's small yaw.
    yaw = moves[..., 2] * SCALE[2]
    c, s = jnp.cos(yaw), jnp.sin(yaw)
    mx, my = moves[..., 0] * SCALE[0], moves[..., 1] * SCALE[1]
    undone = jnp.stack([-(c * mx + s * my) / SCALE[0], -(-s * mx + c * my) / SCALE[1], -moves[..., 2]], -1)[:, ::-1]
    x = jnp.where(back[:, None, None, None, None], x[..., ::-1], x)
    moves = jnp.where(back[:, None, None], undone, moves)
    frozen = jax.random.bernoulli(keys[1], 0.04, (b,))
    x = jnp.where(frozen[:, None, None, None, None], x[..., :1], x)
    moves = jnp.where(frozen[:, None, None], 0.0, moves)
    soft = x
    for axis in (2, 3):
        soft = 0.25 * jnp.roll(soft, 1, axis) + 0.5 * soft + 0.25 * jnp.roll(soft, -1, axis)
    share = jax.random.uniform(keys[2], (b, 1, 1, 1, 1)) * jax.random.bernoulli(keys[3], 0.6, (b, 1, 1, 1, 1))
    x = x + share * (soft - x)
    x = x * jnp.exp(0.25 * jax.random.normal(keys[4], (b, v, 1, 1, 1)))
    noise = jax.random.uniform(keys[5], (b, 1, 1, 1, 1)) * 6.0
    return x + noise * jax.random.normal(keys[6], x.shape), moves


def measure(estimator, scenes, seconds=2.0):
    """Errors over all stretches of `seconds` (half overlapping) of scenes (frames-free: luma [n, 6, 32, 56], poses, times)."""
    frames = round(seconds * egomotion.RATE) + 1
    rows, still = [], []
    for luma, poses, _ in scenes:
        steps = estimator.steps(np.repeat(np.clip(luma, 0, 255).round().astype(np.uint8)[..., None], 3, -1))
        true = egomotion.steps_of(poses)
        for first in range(0, len(steps) - frames + 2, frames // 2):
            part = slice(first, first + frames - 1)
            found, wanted = egomotion.chain(steps[part]), egomotion.chain(true[part])
            rows.append(egomotion.trajectory_errors(found, wanted))
            still.append(egomotion.trajectory_errors(np.zeros_like(wanted), wanted))
    out = {key: float(np.nanmean([r[key] for r in rows])) for key in rows[0]}
    return out | {"stretches": len(rows), "seconds": seconds, "ade_m_of_standing_still": float(np.mean([r["ade_m"] for r in still]))}


def train(scenes, steps=4000, batch=64, learning_rate=1.5e-3, seed=0, progress=True):
    """A network trained on scenes of `read_scene_luma`."""
    rows, moves = windows_of(scenes)
    network = egomotion.MotionNetwork(rngs=nnx.Rngs(seed))
    graph, state = nnx.split(network)
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(100, steps // 4), steps, learning_rate / 50)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=1e-3))

    @jax.jit
    def step(state, memory, key, x, moves):
        x, moves = augment(key, x, moves)

        def loss(state):
            error = nnx.merge(graph, state)(egomotion.normalise(x)) - moves
            return optax.huber_loss(error, delta=0.5).mean()

        value, gradient = jax.value_and_grad(loss)(state)
        updates, memory = optimizer.update(gradient, memory, state)
        return optax.apply_updates(state, updates), memory, value

    memory = optimizer.init(state)
    rng = np.random.default_rng(seed)
    bar = tqdm.trange(steps, desc="ego motion", disable=not progress)
    for number in bar:
        chosen = rng.integers(0, len(rows), batch)
        key = jax.random.fold_in(jax.random.key(seed), number)
        state, memory, value = step(state, memory, key, gather(scenes, rows[chosen]), moves[chosen])
        if number % 200 == 0 or number == steps - 1:
            bar.set_postfix(loss=f"{float(value):.4f}")
    nnx.update(network, state)
    return network


def main(argv=None):
    """Entry point; returns the exit code."""
    from data_pipeline.nuscenes.reader import open_nuscenes

    parser = argparse.ArgumentParser(prog="python -m mila_jax.evaluate.egomotion_train", description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, metavar="DIR", help="nuScenes data set; trains on its train scenes, measures on its val scenes")
    parser.add_argument("--version", default="v1.0-sim")
    parser.add_argument("--out", required=True, metavar="FILE", help=".safetensors to write")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    try:
        nusc = open_nuscenes(options.data, options.version)
        by_split = {"train": [], "val": []}
        for scene in tqdm.tqdm([s for s in nusc.scenes if s.split in by_split], desc="read"):
            by_split[scene.split].append(read_scene_luma(nusc, scene))
        if not by_split["train"] or not by_split["val"]:
            raise UserError(f"{options.data} needs train and val scenes to train and to measure the ego-motion network")
        network = train(by_split["train"], options.steps, options.batch, seed=options.seed)
        about = {"version": options.version, "train_scenes": len(by_split["train"]), "steps": options.steps, "seed": options.seed}
        egomotion.save(options.out, network, about)
        about["validation"] = measure(egomotion.EgomotionEstimator(options.out), by_split["val"])
        egomotion.save(options.out, network, about)
        print(about)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
