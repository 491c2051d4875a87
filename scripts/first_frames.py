"""How well a network knows, before it draws anything, where vehicles go in the frames after recorded ones.

    .venv/bin/python scripts/first_frames.py --data=DIR [--weights=FILE …] [--rates=12,12 2,12 2,2]

DIR: a data set prepared with --config.data.foreground=True; its held-out scenes are taken. Of windows that start from recorded frames all
other frames are pure noise, and the network's estimate of the clean latents (variance 1) is compared with them: apart for places under
vehicles, in frames of a view that they cover more than a fifth of, and for places in frames of a view that have none. What is sampled
from there on can look sharper, but knows no more. Each rate is "fps,fps of the given frames". The windows are those with the most
close vehicles in their first new frame, at most one starting in half a second of a scene: the same for every file, others for every rate.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

CLOSE = 0.2  # of a view, from which vehicles count as close
COVERED = 0.5  # of a latent place, from which it counts as a vehicle's


def rates(text: str) -> tuple[float, float]:
    """(fps, fps of the given frames) of "fps,fps"."""
    fps, given = map(float, text.split(","))
    return fps, given


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", nargs="+", default=[None], help="default: the shipped ones")
    parser.add_argument("--rates", nargs="+", type=rates, default=[(12.0, 12.0), (2.0, 12.0), (2.0, 2.0)], metavar="FPS,FPS")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--conditioning", type=int, default=4)
    parser.add_argument("--frames", type=int, default=10)
    return parser.parse_args()


def most_covered(source, count: int):
    """Items of the `count` windows with the most close vehicles in their first new frame, half a second apart within a scene."""
    import numpy as np

    scenes, first = source.clips[0][0], source.specs[0].conditioning
    shares = []
    for item in range(len(scenes)):
        covered = source[item]["foreground"][:, first] / 255.0 >= COVERED
        of_view = covered.mean((-2, -1))
        shares.append(of_view[of_view > CLOSE].sum())
    chosen = []
    for item in np.argsort(shares)[::-1]:
        if all(scenes[item] != scenes[other] or abs(item - other) >= 6 for other in chosen):
            chosen.append(int(item))
    return chosen[:count]


def errors(model, source, items, batch: int = 4):
    """Mean square errors [frames, 2] of the new frames: under close vehicles, and where a view has none; NaN where the windows show no such place."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from mila_jax.flow.rectified_flow import data_estimate
    from mila_jax.model.conditions import from_clip

    first = source.specs[0].conditioning

    @jax.jit
    def estimate(clip, key):
        latents = clip["latents"].astype(jnp.float32)
        level = jnp.broadcast_to((jnp.arange(latents.shape[2]) >= first).astype(jnp.float32), latents.shape[:3])
        noisy = jnp.where(level[..., None, None, None] > 0, jax.random.normal(key, latents.shape), latents)
        return jnp.square(data_estimate(noisy, model.velocity(noisy, level, from_clip(clip)), level) - latents).mean(-1)[:, :, first:]

    sums = np.zeros((source.specs[0].frames - first, 2, 2))
    for start in range(0, len(items), batch):
        given = items[start : start + batch]
        clip = source.batch(given + given[-1:] * (batch - len(given)))
        error = np.asarray(estimate(clip, jax.random.key(start)))[: len(given)]
        covered = clip["foreground"][: len(given), :, first:] / 255.0
        vehicles = covered >= COVERED
        close = vehicles.mean((-2, -1), keepdims=True) > CLOSE
        without = np.broadcast_to(covered.max((-2, -1), keepdims=True) == 0, covered.shape)
        for kind, where in enumerate((vehicles & close, without)):
            sums[:, kind, 0] += np.where(where, error, 0).sum((0, 1, 3, 4))
            sums[:, kind, 1] += where.sum((0, 1, 3, 4))
    return np.where(sums[..., 1] > 0, sums[..., 0] / np.maximum(sums[..., 1], 1), np.nan)


def main() -> int:
    """Prints one line for each file and rate."""
    options = arguments()
    from mila_jax import runtime

    runtime.setup()
    from data_pipeline.clips import ClipSource, ClipSpec
    from mila_jax.choose_model import weights_file
    from mila_jax.errors import UserError
    from mila_jax.generate import check_data
    from mila_jax.model.weights import SHIPPED, load_model

    try:
        sources = {}
        for fps, given in options.rates:
            source = ClipSource(options.data, "val", [ClipSpec(options.frames, options.conditioning, fps, given)], foreground=True)
            sources[f"{fps:g} Hz from {given:g} Hz"] = source, most_covered(source, options.windows)
        for name in options.weights:
            model = load_model(weights_file(name or SHIPPED))
            check_data(model, options.data)
            for rate, (source, items) in sources.items():
                close, rest = errors(model, source, items).T
                line = "   ".join(f"{kind} " + " ".join(f"{x:.3f}" for x in of[:3]) for kind, of in (("vehicles", close), ("the rest", rest)))
                print(f"{name or 'shipped'}: {rate}, {len(items)} windows, first three new frames: {line}", flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
