"""Our backbone beside the same network in plain PyTorch, on the CPU, in one run.

    bash scripts/benchmark_cpu.sh [options]        makes .venv-benchmark and runs this file there

Both get the same weights and inputs, in float32 and with the same number of threads, and have to agree before anything is timed.
Then forward passes and passes forward and backward (gradients of all parameters) alternate, ours and theirs, so that whatever else
the machine does meets both. Prints a table of medians and one line of JSON; ratios below 1 mean that ours is faster.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

FRAMES, ROWS, COLUMNS, TEXT = 8, 32, 56, 120
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3


def arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=6, help="pairs of a spatial and a temporal block")
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--plain", action="store_true", help="without what mila's commands set up (malloc for both, flags of XLA)")
    return parser.parse_args()


def use_threads(count: int) -> None:
    """Binds the process to `count` processors before any pool of threads is made: both libraries then make that many."""
    free = sorted(os.sched_getaffinity(0))
    if len(free) < count:
        sys.exit(f"error: --threads {count}, but this process may use only {len(free)} processors")
    os.sched_setaffinity(0, free[:count])
    os.environ["OMP_NUM_THREADS"] = str(count)


def inputs(config, seed=0):
    """Random latents [1, c, t, h, w], noise levels [1, t], frame rate [1] and text [1, l, text_width]."""
    import numpy as np

    r = np.random.default_rng(seed)
    latents = r.standard_normal((1, config.in_channels, FRAMES, ROWS, COLUMNS), np.float32)
    levels = r.uniform(0, 1000, (1, FRAMES)).astype(np.float32)
    return latents, levels, np.full((1,), 12.0, np.float32), r.standard_normal((1, TEXT, config.text_width), np.float32)


def ours(config, arrays):
    """(state dict of random weights, forward, forward and backward); both functions return NumPy arrays of published layout."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from mila_jax.model import stdit3_weights
    from mila_jax.model.conditions import Conditions

    graphdef, params = stdit3_weights.create(config)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    # Nothing may stay at the zeros it starts from, or parts of the network would not be compared.
    params = jax.tree.unflatten(tree, [x + 0.02 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)])
    latents, levels, fps, text = arrays
    t, none = FRAMES, jnp.zeros((1,), bool)
    conditions = Conditions(
        jnp.asarray(text), jnp.ones(text.shape[:2], bool), jnp.zeros((1, t, 3)), jnp.zeros((1, 1, t, 4)), jnp.zeros((1, 1, t, 7)),
        jnp.zeros((1, t)), jnp.asarray(fps), none, none,
    )  # fmt: skip
    x, levels = jnp.asarray(np.moveaxis(latents, 1, -1))[:, None], jnp.asarray(levels)[:, None]

    def network(params, x, levels, conditions):
        return nnx.merge(graphdef, params)(x, levels, conditions)

    forward = jax.jit(network)
    both = jax.jit(jax.value_and_grad(lambda *a: jnp.square(network(*a)).mean()))

    def outputs():
        return np.moveaxis(np.asarray(forward(params, x, levels, conditions)), -1, 2)[:, 0]

    def gradients():
        return stdit3_weights.save(both(params, x, levels, conditions)[1], config)

    given = params, x, levels, conditions
    run = (lambda: jax.block_until_ready(forward(*given))), (lambda: jax.block_until_ready(both(*given)))
    return stdit3_weights.save(params, config), outputs, gradients, run


def theirs(config, weights, arrays, threads):
    """(outputs, gradients, (forward, forward and backward)) of the PyTorch network with the given weights."""
    import stdit3_torch
    import torch

    torch.set_num_threads(threads)
    network = stdit3_torch.STDiT3(config, (FRAMES, ROWS, COLUMNS))
    network.load_state_dict({name: stdit3_torch.tensor(array) for name, array in weights.items()})
    x = [stdit3_torch.tensor(a) for a in arrays]

    def forward():
        with torch.inference_mode():
            return network(*x)

    def both():
        network.zero_grad(set_to_none=True)
        network(*x).square().mean().backward()

    def gradients():
        both()
        return {name: p.grad.numpy() for name, p in network.named_parameters()}

    return (lambda: forward().numpy()), gradients, (forward, both)


def differences(ours, theirs):
    """(largest difference of the outputs, largest of a gradient relative to that tensor's largest entry)."""
    import numpy as np

    output = float(np.abs(ours[0]() - theirs[0]()).max())
    mine, other = ours[1](), theirs[1]()
    return output, max(float(np.abs(mine[name] - g).max() / max(np.abs(g).max(), 1e-8)) for name, g in other.items())


def alternate(functions, repeats: int):
    """Medians of wall seconds of `functions` (name → function), called in turn `repeats` times after one call each."""
    times = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if repeat:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> int:
    """Exit code 1 when the two networks differ."""
    options = arguments()
    use_threads(options.threads)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from mila_jax import runtime

    if not options.plain:
        runtime.setup_cpu()
    from mila_jax.model.dit import DiTConfig

    config = DiTConfig(
        width=options.width, depth=options.depth, heads=options.heads, in_channels=4, out_channels=4, text_width=options.width, text_length=TEXT,
        image_size=(8 * ROWS, 8 * COLUMNS), pred_sigma=False, new_embeddings=False,
    )  # fmt: skip
    arrays = inputs(config)
    weights, *mine = ours(config, arrays)
    other = theirs(config, weights, arrays, options.threads)
    output, gradient = differences(mine, other)
    allowed = f"(at most {OUTPUT_TOLERANCE:.0e} and {GRADIENT_TOLERANCE:.0e})"
    print(f"largest difference: outputs {output:.1e}, gradients {gradient:.1e} of a tensor's largest entry {allowed}")
    if output > OUTPUT_TOLERANCE or gradient > GRADIENT_TOLERANCE:
        print("error: the two networks differ; times would mean nothing", file=sys.stderr)
        return 1
    forward = alternate({"ours": mine[2][0], "torch": other[2][0]}, options.repeats)
    both = alternate({"ours": mine[2][1], "torch": other[2][1]}, options.repeats)
    print(f"{'':20}{'ours':>10}{'PyTorch':>10}{'ratio':>8}")
    result = {"forward": forward, "forward_backward": both}
    for name, row in result.items():
        print(f"{name.replace('_', ' + '):20}{1e3 * row['ours']:>7.0f} ms{1e3 * row['torch']:>7.0f} ms{row['ours'] / row['torch']:>8.2f}")
    ratios = {f"{name}_ratio": round(row["ours"] / row["torch"], 3) for name, row in result.items()}
    sizes = {k: v for k, v in dataclasses.asdict(config).items() if k in ("width", "depth", "heads", "dtype")}
    run = {"threads": options.threads, "repeats": options.repeats, "output_difference": output, "gradient_difference": gradient}
    print(json.dumps(ratios | sizes | run))
    return 0


if __name__ == "__main__":
    sys.exit(main())
