"""What a run shows of itself every `train.eval_every` steps: losses on held-out windows, and a small generated clip as a picture.

Both use the averaged weights. The windows, their noise and their levels are the same at every evaluation, so that curves compare.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from data_pipeline.clips import ClipSource
from mila_jax.errors import UserError
from mila_jax.evaluate.video import six_view_picture
from mila_jax.flow.sampler import noise_like, sample_window
from mila_jax.flow.schedules import window_schedule
from mila_jax.model.conditions import from_clip
from mila_jax.model.network import make_velocity
from mila_jax.parallel import distributed
from mila_jax.parallel.logical import with_rules
from mila_jax.parallel.mesh import replicated
from mila_jax.prepare import open_codec, open_video_codec
from mila_jax.train.tasks import task_name

LEVELS = np.linspace(0.05, 0.95, 10)


class Evaluation:
    """Held-out losses and pictures of a `Trainer`'s run.

    Raises `UserError` when the split "val" holds none of the windows that are trained on.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        dir_ = trainer.config.data.dir
        self.tasks = {task_name(spec): ClipSource(dir_, "val", [spec]) for spec in trainer.specs}
        self.key = jax.random.fold_in(trainer.key, 0xE7A1)  # apart from the keys of steps by being folded twice
        self._picture, self._codec, self._video = None, None, None

    def losses(self, params) -> dict:
        """Mean loss at ten fixed noise levels on the first `train.eval_batches` batches of each kind of window.

        `eval/TASK/loss` and `eval/TASK/loss_at_LEVEL` of each, and over all of them `eval/loss` and `eval/loss_at_LEVEL`.
        """
        out, everything = {}, []
        for name, source in self.tasks.items():
            per_level = self._of_task(params, source)
            everything.append(per_level)
            out |= _named(f"eval/{name}/", per_level)
        return out | _named("eval/", np.mean(everything, 0))

    def _of_task(self, params, source) -> np.ndarray:
        trainer, sums = self.trainer, []
        batches = trainer.batches(source, 0)
        for number in range(trainer.config.train.eval_batches):
            batch, key = next(batches), jax.random.fold_in(self.key, number)
            sums.append([trainer.loss(params, batch, key, level=jax.device_put(np.float32(level))) for level in LEVELS])
        totals = np.zeros((len(LEVELS), 2))
        for row in jax.device_get([[(v.sum, v.count) for v in row] for row in sums]):  # fetched once all are under way
            totals += np.asarray(row, np.float64)
        return totals[:, 0] / np.maximum(totals[:, 1], 1)

    def picture(self, params) -> np.ndarray | None:
        """The first held-out 12 Hz window: uint8 [rows, columns, 3], generated frames over recorded ones at three times, six views each.

        None on every process but the first. Raises `UserError` when the autoencoder that made the latents is not to be had.
        """
        if self._picture is None:
            self._prepare_picture()
        latents, truth = jax.device_get(self._picture(params, self._batch))
        if not distributed.first():
            return None
        first = int(self._conditioning)
        with jax.set_mesh(_own_mesh()):
            if self._video is not None:
                latents, truth, first = self._video.decode(latents), self._video.decode(truth), self._video.chunks.frame_count(first)
            frames = latents.shape[1]
            chosen = sorted({first, (first + frames - 1) // 2, frames - 1})
            rows = [[six_view_picture(self._codec.decode(video[:, t])) for t in chosen] for video in (latents, truth)]
        return np.concatenate([np.concatenate(row, 1) for row in rows], 0)

    def _open_codec(self) -> None:
        config, data = self.trainer.config, self.trainer.data
        try:
            with jax.set_mesh(_own_mesh()):
                self._codec = open_codec(config)
                self._video = open_video_codec(config, self._codec)
        except OSError as error:
            raise UserError(f"the autoencoder cannot be read ({error}); set autoencoder.path to a file, or train.eval_picture=False") from None
        if (self._video and self._video.sha256) != data.get("temporal_sha256"):
            raise UserError(
                f"{config.data.dir} was made with another temporal autoencoder; set autoencoder.temporal to it, or train.eval_picture=False"
            )
        if self._codec.sha256 != data.get("autoencoder_sha256"):
            raise UserError(f"{config.data.dir} was made with another autoencoder; set autoencoder.path to it, or train.eval_picture=False")

    def _prepare_picture(self) -> None:
        trainer = self.trainer
        distributed.on_first("open the autoencoder", self._open_codec)
        spec = max(trainer.specs, key=lambda s: s.fps)
        self._batch = next(trainer.batches(self.tasks[task_name(spec)], 0))
        self._conditioning = spec.conditioning
        window, generate = trainer.config.window, trainer.config.generate
        schedule = window_schedule(
            trainer.config.train.eval_steps, np.arange(spec.frames) < spec.conditioning, anchor=None, family=window.tpd_family,
            alpha=window.tpd_strength, sigma_a=window.anchor_level, a=window.anchor_error, shift=generate.shift or 1.0,
        )  # fmt: skip

        def sample(params, clip, key):
            latents = clip["latents"].astype(jnp.float32)
            clean = (jnp.arange(spec.frames) < spec.conditioning)[:, None, None, None]
            start = jnp.where(clean, latents, noise_like(key, latents.shape))
            velocity = make_velocity(trainer.graphdef, params, trainer.dit, trainer.prior)
            return sample_window(velocity, start, schedule, from_clip(clip))[0], latents[0]

        jitted = jax.jit(with_rules(trainer.rules, functools.partial(sample, key=self.key)), out_shardings=replicated(trainer.mesh))
        self._picture = jitted


def _own_mesh():
    """This process's devices, for what it computes alone."""
    return jax.sharding.Mesh(np.array(jax.local_devices()), ("images",))


def _named(prefix: str, per_level: np.ndarray) -> dict:
    return {f"{prefix}loss": float(per_level.mean())} | {f"{prefix}loss_at_{l:.2f}": float(x) for l, x in zip(LEVELS, per_level)}
