"""The training loop: data → step → metrics → checkpoint. The order of operations in `train` matters; see the comments."""

import contextlib
import dataclasses
import functools
import json
import pathlib
import sys
import time

import grain
import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from flax import nnx

from data_pipeline.clips import ClipSource, ClipSpec, read_scene
from data_pipeline.loader import make_loader
from data_pipeline.records import read_index, write_atomically
from mila_jax.errors import UserError
from mila_jax.model.precondition import Prior, measure_prior
from mila_jax.model.stdit3_weights import create
from mila_jax.model.weights import load_model, merge_parameters, model_config, save_model
from mila_jax.parallel.logical import rules_from_config, use_rules, with_rules
from mila_jax.parallel.mesh import batch_sharding, check_divides, make_mesh
from mila_jax.prepare import describe_data
from mila_jax.train import step as step_module
from mila_jax.train.checkpoint import Checkpoints, abstract_state
from mila_jax.train.metrics import MetricWriter, read_metrics
from mila_jax.train.optimizer import make_optimizer
from mila_jax.train.state import abstract_model, create_state, state_shardings

EVALUATION_LEVELS = np.linspace(0.05, 0.95, 10)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """step: steps done in all; finished: False if the time limit came first; model: path of the exported EMA weights."""

    step: int
    finished: bool
    model: pathlib.Path


def clip_specs(config) -> tuple[list[ClipSpec], list[float]]:
    """The kinds of training windows and their shares.

    For each frame rate a window of N conditioning frames at 12 Hz; for the rates of anchors also windows whose conditioning
    frames are themselves anchors (later windows of a recurrent coarse stage); and 12 Hz windows from a single first frame.
    """
    window, train = config.window, config.train
    specs, shares = [], []
    if len(train.fps) != len(train.fps_weights):
        raise UserError(f"train.fps={tuple(train.fps)} and train.fps_weights={tuple(train.fps_weights)} must have equally many entries")
    for fps, share in zip(train.fps, train.fps_weights):
        if fps < step_module.DATA_RATE:
            specs += [ClipSpec(window.frames, window.conditioning, fps), ClipSpec(window.frames, window.conditioning, fps, fps)]
            shares += [share / 2, share / 2]
        else:
            specs.append(ClipSpec(window.frames, window.conditioning, fps))
            shares.append(share if window.conditioning == 1 else 0.9 * share)
            if window.conditioning > 1:
                specs.append(ClipSpec(window.frames, 1, fps))
                shares.append(0.1 * share)
    return specs, shares


def measure_training_prior(data_dir) -> Prior:
    """Statistics of the training latents along the car's motion, for the preconditioning (at most 16 scenes)."""
    names = [s.name for s in read_index(data_dir).scenes if s.split == "train"][:16]
    return measure_prior(read_scene(data_dir, name) for name in names)


class Trainer:
    """Everything that a run builds before its first step: sizes, mesh, state, jitted step, data. `config` must name data.dir, train.dir."""

    def __init__(self, config, *, devices=None):
        for key in ("data.dir", "train.dir"):
            section, name = key.split(".")
            if config[section][name] is None:
                raise UserError(f"{key} is not set; give --config.{key}=FOLDER")
        for key in ("steps", "batch", "log_every", "checkpoint_every"):
            if config.train[key] < 1:
                raise UserError(f"train.{key}={config.train[key]} must be at least 1")
        self.config, self.folder = config, pathlib.Path(config.train.dir)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / "writable", b"")
            (self.folder / "writable").unlink()
        except OSError as error:
            raise UserError(f"cannot write to {self.folder} ({error.strerror}); set train.dir to a writable folder") from None
        self.objective = step_module.Objective.from_config(config)
        specs, shares = clip_specs(config)
        self.train_source = ClipSource(config.data.dir, "train", specs, shares)
        self.data = describe_data(config.data.dir)
        self.dit = model_config(config, self.data)
        self.mesh, self.rules = make_mesh(config.mesh, devices), rules_from_config(config)
        tokens = -(-self.data["latent_shape"][0] // self.dit.patch[1]) * -(-self.data["latent_shape"][1] // self.dit.patch[2])
        with use_rules(**self.rules):
            check_divides(self.mesh, config.train.batch, self.dit.heads, self.dit.width, config.window.frames, tokens)
            self.batch_sharding = batch_sharding(self.mesh)
        self.tx = make_optimizer(config.train)
        self.prior = self._prior()
        self.graphdef, _ = abstract_model(self.dit)
        with use_rules(**self.rules):
            self.shardings = state_shardings(self.mesh, self.dit, self.tx)
        static = dict(graphdef=self.graphdef, config=self.dit, prior=self.prior, objective=self.objective)
        self.step = step_module.jit_train_step(self.shardings, self.batch_sharding, rules=self.rules, tx=self.tx, **static)
        self._loss = jax.jit(with_rules(self.rules, functools.partial(step_module.loss, **static)))
        self.key = jax.random.key(config.seed)

    def _prior(self) -> Prior | None:
        """Measured once per run and kept, so that a resumed run is the same function whatever became of the data."""
        if self.config.model.precondition == "none":
            return None
        path = self.folder / "prior.json"
        if not (path.exists() and (self.folder / "config.json").exists()):
            start = self.config.train.init_from
            prior = load_model(start).prior if start else measure_training_prior(self.config.data.dir)
            if prior is None:
                raise UserError(f"{start} was trained with model.precondition=none; set model.precondition=none to go on from it")
            rounded = {name: np.asarray(value, np.float64).round(6).tolist() for name, value in prior._asdict().items()}
            write_atomically(path, json.dumps(rounded).encode())
        return Prior(**{name: np.asarray(value, np.float32) for name, value in json.loads(path.read_text()).items()})

    def initial_state(self):
        """A fresh state: from `train.init_from` if set, else drawn from the seed."""
        params = None
        if self.config.train.init_from:
            start = load_model(self.config.train.init_from)
            self._check_start(start.data)
            given = {".".join(map(str, k)): v[...] for k, v in nnx.to_flat_state(start.params)}
            params = merge_parameters(create(self.dit)[1], given, source=self.config.train.init_from)
        with use_rules(**self.rules):
            return create_state(self.mesh, self.dit, self.tx, self.config.seed, params)

    def _check_start(self, described: dict) -> None:
        """Weights go on only with the latents that they know; another text encoder is learned anew, and said."""
        path, name = self.config.train.init_from, "text_encoder"
        if described.get("autoencoder_sha256") != self.data.get("autoencoder_sha256"):
            raise UserError(f"{path} was trained on latents of another autoencoder than {self.config.data.dir}; prepare the data with that one")
        if described.get(name) != self.data.get(name):
            print(f"{path} knows text by {described.get(name)!r}, the data by {self.data.get(name)!r}: text is learned anew", file=sys.stderr)

    def batches(self, source, first_step: int):
        """Endless batches on the mesh from step `first_step` on; the batch of a step is the same on any number of hosts."""
        loader = make_loader(
            source, batch_size=self.config.train.batch, seed=self.config.seed, process_index=jax.process_index(), process_count=jax.process_count()
        )
        iterator = iter(loader)
        if first_step:
            grain.experimental.set_next_index(iterator, first_step)
        for batch in iterator:
            yield self.to_mesh(batch)

    def to_mesh(self, batch):
        """Host arrays (this host's rows) → arrays on the mesh."""
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(self.batch_sharding, np.asarray(x)), batch)

    def evaluate(self, params, source) -> dict:
        """Mean loss at ten fixed noise levels on the first `train.eval_batches` batches of `source`."""
        batches = self.batches(source, 0)
        totals = np.zeros((len(EVALUATION_LEVELS), 2))
        for number in range(self.config.train.eval_batches):
            batch = next(batches)
            for i, level in enumerate(EVALUATION_LEVELS):
                value = self._loss(params, batch, jax.random.fold_in(self.key, number), level=jnp.float32(level))
                totals[i] += float(value.sum), float(value.count)
        per_level = totals[:, 0] / totals[:, 1]
        return {"eval/loss": float(per_level.mean())} | {f"eval/loss_at_{l:.2f}": float(x) for l, x in zip(EVALUATION_LEVELS, per_level)}

    def export(self, state, card: dict) -> pathlib.Path:
        """Writes the EMA weights as `model.safetensors` in the run's folder."""
        save_model(self.model_path, state.ema, self.config, self.data, self.prior, card)
        return self.model_path

    @property
    def model_path(self) -> pathlib.Path:
        """Where `export` writes."""
        return self.folder / "model.safetensors"

    def exported(self) -> int | None:
        """The step of the weights that lie there, None if there are none."""
        return load_model(self.model_path).card["steps"] if self.model_path.exists() else None


def train(config, *, progress: bool = True, stop_after: int | None = None, devices=None) -> Outcome:
    """Trains until `train.steps` (or `train.minutes`), resuming by itself from the newest checkpoint in `train.dir`.

    `stop_after`: leave after so many steps of this call (tests). Raises `UserError` before anything is compiled for a config
    or data that cannot work, and when the loss is not a number (no such state is ever saved).
    """
    trainer = Trainer(config, devices=devices)
    identity = _check_same_run(trainer.folder, config, trainer.data)
    with contextlib.ExitStack() as open_things:  # closed on an error too, so that saves under way are finished
        open_things.enter_context(jax.set_mesh(trainer.mesh))
        checkpoints = open_things.enter_context(contextlib.closing(Checkpoints(trainer.folder, config.train.keep)))
        done = trainer.exported()
        if done is not None and done == checkpoints.latest() and done >= config.train.steps:
            return Outcome(done, True, trainer.model_path)
        state = trainer.initial_state()
        write_atomically(trainer.folder / "config.json", identity.encode())  # from here on the folder belongs to this run
        start = checkpoints.latest() or 0
        if start:
            state = checkpoints.restore(abstract_state(jax.eval_shape(lambda s: s, state), trainer.shardings))
        writer = open_things.enter_context(contextlib.closing(MetricWriter(trainer.folder, start)))
        validation = _validation_source(config) if config.train.eval_every else None
        batches = trainer.batches(trainer.train_source, start)
        began, seconds_before = time.monotonic(), max((m.get("seconds", 0.0) for m in read_metrics(trainer.folder)), default=0.0)
        last = config.train.steps if stop_after is None else min(config.train.steps, start + stop_after)
        pending, finished, step = None, True, start
        bar = open_things.enter_context(tqdm.tqdm(total=config.train.steps, initial=start, desc="train", unit="step", disable=not progress))
        for step in range(start + 1, last + 1):
            state, metrics = trainer.step(state, next(batches), trainer.key)
            bar.update()
            if step % config.train.log_every == 0 or step == last:
                # Metrics of the previous interval: reading this step's would wait for the device.
                _log(writer, bar, pending)
                pending = (step, metrics, seconds_before + time.monotonic() - began)
            if validation is not None and step % config.train.eval_every == 0:
                writer.write(step, trainer.evaluate(state.ema, validation))
            if step % config.train.checkpoint_every == 0:
                _check_finite(step, metrics)
                checkpoints.save(state, step)
            if config.train.minutes and time.monotonic() - began > 60 * config.train.minutes:
                finished = False
                break
        _log(writer, bar, pending)
        if step > start:
            _check_finite(step, metrics)
        checkpoints.save(state, step)
        seconds = seconds_before + time.monotonic() - began
        card = {"steps": step, "samples": step * config.train.batch, "train_seconds": round(seconds), "data": str(pathlib.Path(config.data.dir).name)}
        model = trainer.export(state, card)
    return Outcome(step, finished and step >= config.train.steps, model)


def _log(writer, bar, pending) -> None:
    if pending is None:
        return
    step, metrics, seconds = pending
    _check_finite(step, metrics)
    values = {k: float(v) for k, v in metrics.items()}
    writer.write(step, values | {"seconds": round(seconds, 2)})
    bar.set_postfix(loss=f"{values['loss']:.4f}")


def _check_finite(step: int, metrics) -> None:
    """Before a state is saved: one that is not a number would be resumed for ever."""
    loss = float(metrics["loss"])
    if not np.isfinite(loss):
        raise UserError(f"the loss at step {step} is {loss}; the last checkpoint is good, lower train.learning_rate and run again")


def _validation_source(config):
    specs, shares = clip_specs(config)
    return ClipSource(config.data.dir, "val", specs, shares)


def _check_same_run(folder, config, data: dict) -> str:
    """A folder belongs to one run: refuses another model, window, seed, start or other latents. Returns what config.json shall hold."""
    path = folder / "config.json"
    now = json.loads(config.to_json()) | {"data_description": json.loads(json.dumps(data))}
    if path.exists():
        before = json.loads(path.read_text())
        different = [f"{part}.{key}" for part in ("model", "window", "data_description") for key in now[part] if before.get(part, {}).get(key) != now[part][key]]
        different += [] if before["seed"] == now["seed"] else ["seed"]
        start, start_before = (pathlib.Path(c["train"]["init_from"] or "").name for c in (now, before))  # the folder may have moved
        different += [] if start == start_before else ["train.init_from"]
        if different:
            raise UserError(f"{folder} holds a run with another {', '.join(different)}; choose another train.dir (mila demo: --fresh)")
    return json.dumps(now, indent=1)
