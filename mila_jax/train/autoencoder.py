"""Trains the small embedded autoencoder on frames held in memory, and writes the weights file that `make_codec` reads.

    python -m mila_jax.train.autoencoder --data NUSCENES_ROOT --version v1.0-sim --out DIR --steps 6000 [--minutes 20]

Loss: L1 + MSE + L1 of the error's image gradients + KL. For a share of the images, latents are shifted and enlarged before they are
decoded, and the decoder must give the equally shifted and enlarged image: latents that move as pixels do are what a generator of
driving video can carry along (equivariance as in Kouzelis et al. 2025, EQ-VAE). The decoder sees the posterior sample plus Gaussian noise of a random
strength relative to the latents' own standard deviation, so that it forgives the errors of a generator and the encoder cannot hide
detail at amplitudes that noise wipes out (being relative, it cannot be escaped by scaling the latents up).

The step number is the whole truth: batch, noise and learning rate derive from (seed, step), so a resumed run equals an
uninterrupted one bit for bit.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from data_pipeline.storage import is_remote
from mila_jax.errors import UserError
from mila_jax.model.autoencoder import AutoencoderConfig, abstract_autoencoder, make_autoencoder
from mila_jax.model.autoencoder_weights import file_sha256, from_pixels, load_autoencoder, save_autoencoder, to_pixels
from mila_jax.runtime import setup
from mila_jax.train.autoencoder_state import read_metrics, restore_state, save_state

EMBEDDED = AutoencoderConfig(block_out_channels=(64, 128), layers_per_block=1, latent_channels=8, norm_num_groups=8, pixel_unshuffle=4)


@dataclasses.dataclass(frozen=True)
class AutoencoderTraining:
    """What decides the trained weights, besides the frames, the seed and the number of steps."""

    model: AutoencoderConfig = EMBEDDED
    batch_size: int = 16
    learning_rate: float = 1e-3
    warmup: int = 200  # steps
    weight_decay: float = 1e-4
    clip: float = 1.0  # global gradient norm
    mse: float = 1.0
    edge: float = 0.5
    kl: float = 2e-4
    latent_noise: float = 0.3  # largest noise, in standard deviations of the latents
    equivariance: float = 0.5  # share of the images that are shifted and enlarged between encoder and decoder
    ema: float = 0.999


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes while training; `step` counts finished steps."""

    step: jax.Array
    params: nnx.State
    ema: nnx.State
    opt_state: optax.OptState


def make_optimizer(config: AutoencoderTraining, steps: int) -> optax.GradientTransformation:
    """AdamW with clipping, linear warm-up, and cosine decay to 2 % of the peak at `steps`."""
    peak, warmup = config.learning_rate, min(config.warmup, max(steps // 4, 1))
    schedule = optax.warmup_cosine_decay_schedule(peak / 100, peak, warmup, max(steps, warmup + 1), end_value=peak * 0.02)
    return optax.chain(optax.clip_by_global_norm(config.clip), optax.adamw(schedule, b1=0.9, b2=0.99, weight_decay=config.weight_decay))


def init_state(config: AutoencoderTraining, steps: int, seed: int, params=None) -> TrainState:
    """The state before the first step; the same seed gives the same bytes. `params`: weights to start from instead of random ones."""
    if params is None:
        params = make_autoencoder(config.model, seed)[1]
    ema = jax.tree.map(jnp.copy, params)  # a copy: the step donates its buffers
    return TrainState(jnp.zeros((), jnp.int32), params, ema, make_optimizer(config, steps).init(params))


def loss_and_metrics(params, graphdef, config: AutoencoderTraining, images: jax.Array, key: jax.Array):
    """Loss and its parts for images [n, H, W, 3] in [-1, 1]; every part is a mean over elements."""
    model = nnx.merge(graphdef, params)
    sample_key, noise_key, strength_key, move_key = jax.random.split(key, 4)
    mean, logvar = model.encode(images)
    latents = mean + jnp.exp(0.5 * logvar) * jax.random.normal(sample_key, mean.shape)
    spread = jax.lax.stop_gradient(mean.std(axis=(0, 1, 2)))  # [c]
    strength = jax.random.uniform(strength_key, (len(mean), 1, 1, 1), maxval=config.latent_noise)
    latents = latents + strength * spread * jax.random.normal(noise_key, mean.shape)
    move = draw_moves(move_key, len(mean), config)
    images, seen = moved(images, move)
    error = (model.decode(moved(latents, move)[0]) - images) * seen
    parts = {
        "l1": jnp.abs(error).mean(),
        "mse": jnp.square(error).mean(),
        "edge": jnp.abs(jnp.diff(error, axis=1)).mean() + jnp.abs(jnp.diff(error, axis=2)).mean(),
        "kl": 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar).mean(),
    }
    loss = parts["l1"] + config.mse * parts["mse"] + config.edge * parts["edge"] + config.kl * parts["kl"]
    return loss, {"loss": loss, **parts}


LONGEST_SHIFT = 0.12  # of the image's width and height
LARGEST_ZOOM = 1.4


def draw_moves(key, count: int, config: AutoencoderTraining):
    """Shifts [n, 2] (rows, columns; fractions of the image) and zooms [n]; (0, 0) and 1 for all but a share `config.equivariance`."""
    k_shift, k_zoom, k_kind = jax.random.split(key, 3)
    kind = jax.random.uniform(k_kind, (count,))
    shift = jax.random.uniform(k_shift, (count, 2), minval=-LONGEST_SHIFT, maxval=LONGEST_SHIFT)
    zoom = jax.random.uniform(k_zoom, (count,), minval=1.0, maxval=LARGEST_ZOOM)
    # Half of the moved images are only shifted: enlarging blurs, and the decoder shall not learn that what moves is blurred.
    zoom = jnp.where(kind < 0.5 * config.equivariance, zoom, 1.0)
    return jnp.where((kind < config.equivariance)[:, None], shift, 0.0), zoom


def moved(x, move):
    """x [n, H, W, c] shifted and enlarged about its middle, bilinearly; and a mask [n, H, W, 1] of what comes from inside the image."""
    shift, zoom = move

    def weights(size, offset):
        place = (jnp.arange(size) + 0.5) / size
        source = ((place - 0.5) / zoom[:, None] + 0.5 + offset[:, None]) * size - 0.5  # [n, size]
        inside = (source >= -0.5) & (source <= size - 0.5)
        source = jnp.clip(source, 0, size - 1)
        return jnp.maximum(1 - jnp.abs(source[..., None] - jnp.arange(size)), 0), inside

    rows, row_inside = weights(x.shape[1], shift[:, 0])
    columns, column_inside = weights(x.shape[2], shift[:, 1])
    inside = (row_inside[:, :, None] & column_inside[:, None])[..., None].astype(x.dtype)
    return jnp.einsum("nih,njw,nhwc->nijc", rows, columns, x), inside


def make_train_step(config: AutoencoderTraining, steps: int, seed: int) -> Callable:
    """The jitted step: (state, donated; images uint8 [n, H, W, 3]) -> (state, metrics)."""
    graphdef, _ = abstract_autoencoder(config.model)
    optimizer = make_optimizer(config, steps)

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, images: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        flip_key, loss_key = jax.random.split(key)
        flip = jax.random.bernoulli(flip_key, shape=(len(images), 1, 1, 1))
        images = jnp.where(flip, images[:, :, ::-1], images)
        grads, metrics = jax.grad(loss_and_metrics, has_aux=True)(state.params, graphdef, config, from_pixels(images), loss_key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = jnp.minimum(config.ema, (1 + state.step) / (10 + state.step))  # warm-up: forget the random start
        ema = optax.incremental_update(params, state.ema, 1 - decay)
        return TrainState(state.step + 1, params, ema, opt_state), metrics

    return train_step


def batch_at(frames: np.ndarray, batch_size: int, seed: int, step: int) -> np.ndarray:
    """The batch of `step`: uint8 [batch_size, H, W, 3], drawn with replacement by a counter-based generator."""
    generator = np.random.Generator(np.random.Philox(key=[seed, step]))
    return frames[generator.integers(len(frames), size=batch_size)]


def _chunks(frames: np.ndarray, size: int):
    """Equal chunks (the last is dropped unless it is the only one), so that jitted functions compile once."""
    size = min(size, len(frames))
    return (frames[start : start + size] for start in range(0, len(frames) - size + 1, size))


def psnr(reference: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of each uint8 image [n, H, W, 3] -> [n]."""
    mse = np.square(reference.astype(np.float32) - images).mean(axis=(1, 2, 3))
    return 10 * np.log10(255.0**2 / np.maximum(mse, 1e-3))


def reconstruction_psnr(model: AutoencoderConfig, params: nnx.State, frames: np.ndarray) -> float:
    """Mean PSNR in dB over uint8 frames [n, H, W, 3] of decode(posterior mean), rounded to pixels."""
    graphdef, _ = abstract_autoencoder(model)
    reconstruct = _reconstruct(graphdef)
    return float(np.concatenate([psnr(part, np.asarray(reconstruct(params, part))) for part in _chunks(frames, 16)]).mean())


@functools.lru_cache(maxsize=4)
def _reconstruct(graphdef: nnx.GraphDef) -> Callable:
    def reconstruct(params, images):
        module = nnx.merge(graphdef, params)
        return to_pixels(module.decode(module.encode(from_pixels(images))[0]))

    return jax.jit(reconstruct)


def latent_statistics(model: AutoencoderConfig, params: nnx.State, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per-channel (mean [c], standard deviation [c]) of the posterior means over at most 1,024 evenly spaced frames."""
    graphdef, _ = abstract_autoencoder(model)
    encode = jax.jit(lambda params, images: nnx.merge(graphdef, params).encode(from_pixels(images))[0])
    frames = frames[:: math.ceil(len(frames) / 1024)]
    latents = np.concatenate([np.asarray(encode(params, part)) for part in _chunks(frames, 16)])
    return latents.mean(axis=(0, 1, 2), dtype=np.float64), latents.std(axis=(0, 1, 2), dtype=np.float64)


def train_autoencoder(
    frames_train: np.ndarray,
    frames_val: np.ndarray,
    config: AutoencoderTraining,
    out_dir,
    steps: int,
    seed: int = 0,
    *,
    minutes: float | None = None,
    init_from=None,
    log_every: int = 50,
    save_every: int = 500,
    card: dict | None = None,
    progress: bool = True,
) -> Path:
    """Trains to `steps` (or for `minutes`), resuming from `out_dir`; returns the path of the weights file written.

    frames_*: uint8 [n, H, W, 3]. In `out_dir`: state.safetensors (resume), metrics.jsonl, autoencoder.safetensors (EMA weights,
    latent shift and scale; also written when the time is up first). `init_from`: weights file to start from instead of random ones. UserError when sizes do not divide, when there are no
    frames, or when `out_dir` holds a run with another config, seed, number of steps or frames, or is no folder of this machine.
    """
    if is_remote(out_dir):
        raise UserError(f"--out={out_dir} is an address; give a folder of this machine, and copy the weights from there")
    out_dir = Path(out_dir)
    if not len(frames_train) or not len(frames_val):
        raise UserError("autoencoder training needs at least one training and one held-out frame; write more scenes")
    config.model.latent_shape(*frames_train.shape[1:3])
    train_step = make_train_step(config, steps, seed)
    identity = {"config": dataclasses.asdict(config), "seed": seed, "steps": steps, "image_size": list(frames_train.shape[1:3])}
    identity["frames"] = f"{len(frames_train)} {hashlib.sha256(np.ascontiguousarray(frames_train)).hexdigest()}"  # batches are drawn from them
    params = None
    if init_from is not None:
        given, params, _, _ = load_autoencoder(init_from)
        if given != config.model:
            raise UserError(f"{init_from} has other sizes than the autoencoder to be trained; train it from random weights")
        identity["init_from"] = file_sha256(init_from)
    state = restore_state(out_dir, init_state(config, steps, seed, params), identity)
    start = int(state.step)
    history = [row for row in read_metrics(out_dir) if row["step"] <= start]
    began, step = time.monotonic(), start
    with open(out_dir / "metrics.jsonl", "w") as log, tqdm(total=steps, initial=start, desc="autoencoder", disable=not progress) as bar:
        log.writelines(json.dumps(row) + "\n" for row in history)
        while step < steps and (minutes is None or time.monotonic() - began < 60 * minutes):
            state, metrics = train_step(state, batch_at(frames_train, config.batch_size, seed, step))
            step += 1
            bar.update()
            if step % log_every and step % save_every and step != steps:
                continue
            row = {"step": step, **{name: round(float(value), 6) for name, value in metrics.items()}}
            if not math.isfinite(row["loss"]):
                raise UserError(f"autoencoder training diverged at step {step}; lower learning_rate {config.learning_rate}")
            row["images_per_s"] = round((step - start) * config.batch_size / (time.monotonic() - began), 2)
            if step % save_every == 0 or step == steps:
                row["psnr"] = round(reconstruction_psnr(config.model, state.ema, frames_val[:256]), 3)
                save_state(out_dir, state, identity)
                bar.set_postfix(psnr=row["psnr"])
            print(json.dumps(row), file=log, flush=True)
    if step % save_every and step != steps:  # the time was up between two saves
        save_state(out_dir, state, identity)
    return _write_weights(out_dir, config, state, frames_train, frames_val, {**(card or {}), "seed": seed, "steps": step})


def _write_weights(out_dir: Path, config: AutoencoderTraining, state: TrainState, frames_train, frames_val, card: dict) -> Path:
    shift, scale = latent_statistics(config.model, state.ema, frames_train)
    card = {
        **card,
        "images_seen": card["steps"] * config.batch_size,
        "train_frames": len(frames_train),
        "image_size": list(frames_train.shape[1:3]),
        "psnr_db_held_out": round(reconstruction_psnr(config.model, state.ema, frames_val), 3),
        "training": {name: value for name, value in dataclasses.asdict(config).items() if name != "model"},
    }
    path = out_dir / "autoencoder.safetensors"
    save_autoencoder(path, config.model, state.ema, shift, scale, card)
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(prog="python -m mila_jax.train.autoencoder", description=main.__doc__)
    parser.add_argument("--data", required=True, help="folder of a data set in nuScenes format")
    parser.add_argument("--version", default="v1.0-sim", help="table folder inside it")
    parser.add_argument("--out", required=True, help="folder for the run; an unfinished run in it goes on")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--minutes", type=float, help="stop (resumable) after this long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=AutoencoderTraining.batch_size)
    parser.add_argument("--init-from", help="weights file to start from")
    parser.add_argument("--learning-rate", type=float, default=AutoencoderTraining.learning_rate)
    parser.add_argument("--height", type=int, default=64)
    parser.add_argument("--width", type=int, default=112)
    parser.add_argument("--max-frames", type=int, default=12000, help="training frames held in memory, evenly spaced over the data")
    args = parser.parse_args(arguments)
    try:
        print(_train_from(args))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _train_from(args) -> Path:
    from mila_jax.train.autoencoder_frames import split_frames  # the data side, needed by the command only

    train, val = split_frames(args.data, args.version, args.height, args.width, args.max_frames)
    config = AutoencoderTraining(batch_size=args.batch_size, learning_rate=args.learning_rate)
    return train_autoencoder(
        train,
        val,
        config,
        args.out,
        args.steps,
        args.seed,
        minutes=args.minutes,
        init_from=args.init_from,
        card={"data": f"{Path(args.data).name} {args.version}"},
    )


if __name__ == "__main__":
    setup()
    main()
