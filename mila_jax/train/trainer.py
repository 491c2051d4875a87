"""Everything that a run builds before its first step: sizes, mesh, state, jitted step, data."""

import dataclasses
import functools
import json
import sys

import grain
import jax
import numpy as np
from etils import epath
from flax import nnx

from data_pipeline.clips import ClipSource, read_scene
from data_pipeline.loader import make_loader
from data_pipeline.records import read_index, write_atomically
from mila_jax.chunks import chunks_of
from mila_jax.errors import UserError
from mila_jax.model.grow import can_grow, grow
from mila_jax.model.precondition import Prior, measure_prior
from mila_jax.model.stdit3_weights import abstract_model, create
from mila_jax.model.weights import load_model, merge_parameters, model_config, read_card, save_model
from mila_jax.parallel import distributed
from mila_jax.parallel.logical import rules_from_config, use_rules, with_rules
from mila_jax.parallel.mesh import batch_sharding, check_accumulation, check_divides, make_mesh, own_rows, replicated
from mila_jax.prepare import describe_data
from mila_jax.train import step as step_module
from mila_jax.train.folder import RunFolder
from mila_jax.train.optimizer import make_optimizer
from mila_jax.train.published import is_published, published_parameters
from mila_jax.train.stages import resolve
from mila_jax.train.state import create_state, state_shardings
from mila_jax.train.tasks import clip_specs


def measure_training_prior(data_dir) -> Prior:
    """Statistics of the training latents along the car's motion, for the preconditioning (at most 16 scenes)."""
    names = [s.name for s in read_index(data_dir).scenes if s.split == "train"][:16]
    return measure_prior(read_scene(data_dir, name) for name in names)


class Trainer:
    """What a config becomes. `config` must name data.dir and train.dir; `devices`: of the mesh, default all.

    Raises `UserError` before anything is compiled for a config or data that cannot work.
    """

    def __init__(self, config, *, devices=None):
        check_config(config)
        self.config, self.run_folder = config, RunFolder(config.train.dir)
        self.folder = self.run_folder.path
        distributed.on_first(f"write to {config.train.dir}", self._check_writable)
        self.objective = step_module.Objective.from_config(config)
        self.specs, shares = clip_specs(config)
        self.train_source = ClipSource(config.data.dir, "train", self.specs, shares, foreground=self.objective.foreground_weight > 0)
        self.data = describe_data(config.data.dir)
        self.dit = model_config(config, self.data)
        self.mesh, self.rules = make_mesh(config.mesh, devices), rules_from_config(config)
        with use_rules(**self.rules):
            check_divides(self.mesh, config.train.batch, self.dit.heads, self.dit.width, config.window.frames, self.tokens)
            check_accumulation(config.train, self.mesh)
            self.batch_sharding = batch_sharding(self.mesh)
        self.tx = make_optimizer(config.train)
        self.prior = self._prior()
        self.graphdef, self.parameters = abstract_model(self.dit)
        self.trainable = resolve(self.parameters, config.train.trainable, self.dit.depth)
        with use_rules(**self.rules):
            self.shardings = state_shardings(self.mesh, self.dit, self.tx, self.trainable)
        static = dict(graphdef=self.graphdef, config=self.dit, prior=self.prior, objective=self.objective)
        self.step = step_module.jit_train_step(
            self.shardings, self.batch_sharding, rules=self.rules, tx=self.tx, trainable=self.trainable, accumulate=config.train.accumulate,
            groups=self.mesh.shape["data"], **static,
        )  # fmt: skip
        # What is reported of held-out clips is the plain loss, so that runs compare.
        static["objective"] = dataclasses.replace(self.objective, foreground_weight=0.0)
        self.loss = jax.jit(with_rules(self.rules, functools.partial(step_module.loss, **static)))
        self.key = jax.jit(lambda: jax.random.key(config.seed), out_shardings=replicated(self.mesh))()

    @property
    def checkpoints(self):
        """The folder that holds `checkpoints/`, on this machine or in a bucket."""
        return epath.Path(self.config.train.checkpoints or self.config.train.dir)

    @property
    def tokens(self) -> int:
        """Tokens of one view of one frame."""
        height, width, _ = self.data["latent_shape"]
        return -(-height // self.dit.patch[1]) * -(-width // self.dit.patch[2])

    def _check_writable(self) -> None:
        try:
            self.run_folder.fetch()
            (self.folder / "writable").write_bytes(b"")
            (self.folder / "writable").unlink()
        except OSError as error:
            raise UserError(f"cannot write to {self.config.train.dir} ({error.strerror or error}); set train.dir to a writable folder") from None

    def _prior(self) -> Prior | None:
        """Measured once per run and kept, so that a resumed run is the same function whatever became of the data."""
        if self.config.model.precondition == "none":
            return None
        if chunks_of(self.data) is not None:
            raise UserError(
                f"model.precondition={self.config.model.precondition} is for one latent a frame; set it to none for {self.config.data.dir}"
            )
        text = distributed.from_first("measure the prior of the velocity", self._prior_text)
        return Prior(**{name: np.asarray(value, np.float32) for name, value in json.loads(text).items()})

    def _prior_text(self) -> bytes:
        path = self.folder / "prior.json"
        if not (path.exists() and (self.folder / "config.json").exists()):
            start = self.config.train.init_from
            prior = load_model(start).prior if start else measure_training_prior(self.config.data.dir)
            if prior is None:
                raise UserError(f"{start} was trained with model.precondition=none; set model.precondition=none to go on from it")
            rounded = {name: np.asarray(value, np.float64).round(6).tolist() for name, value in prior._asdict().items()}
            write_atomically(path, json.dumps(rounded).encode())
        return path.read_bytes()

    def initial_state(self):
        """A fresh state: from `train.init_from` if set (weights of `mila`, or published ones of STDiT3), else drawn from the seed."""
        params, source = None, self.config.train.init_from
        if source and is_published(source):
            params = published_parameters(source, self.dit, self.config.seed)
        elif source:
            start = load_model(source)
            self._check_start(start.data)
            given = {".".join(map(str, k)): v[...] for k, v in nnx.to_flat_state(start.params)}
            fresh = create(self.dit, self.config.seed)[1]
            seen = [(dit.sweep, dit.evidence, dit.mixture > 0, dit.detail) for dit in (start.dit, self.dit)]
            grows = can_grow(start.dit, self.dit)
            if seen[0] != seen[1] and not grows:
                raise UserError(
                    f"{source} has model.sweep={seen[0][0]}, model.evidence={seen[0][1]}, model.mixture={seen[0][2]}, model.detail={seen[0][3]}, which "
                    f"cannot go on with {', '.join(map(str, seen[1]))}: corridors, evidence, a mixture and detail can be added in this order, each where "
                    "those after it are not there yet, and nothing taken away"
                )
            params = merge_parameters(fresh, grow(given, start.dit, self.dit, fresh) if grows else given, source=source)
        if params is not None:
            params = jax.tree.map(np.asarray, params)  # on the host: each process puts its own part on its devices
        with use_rules(**self.rules):
            return create_state(self.mesh, self.dit, self.tx, self.config.seed, params, self.trainable)

    def _check_start(self, described: dict) -> None:
        """Weights go on only with the latents that they know; another text encoder is learned anew, and said."""
        path, name = self.config.train.init_from, "text_encoder"
        if described.get("autoencoder_sha256") != self.data.get("autoencoder_sha256"):
            raise UserError(f"{path} was trained on latents of another autoencoder than {self.config.data.dir}; prepare the data with that one")
        for key in ("temporal", "temporal_sha256"):
            if described.get(key) != self.data.get(key):
                raise UserError(
                    f"{path} was trained on latents with {key} {described.get(key)}, {self.config.data.dir} has {self.data.get(key)}; prepare the data "
                    "with that autoencoder.temporal"
                )
        if described.get(name) != self.data.get(name):
            print(f"{path} knows text by {described.get(name)!r}, the data by {self.data.get(name)!r}: text is learned anew", file=sys.stderr)

    def batches(self, source, first_step: int):
        """Endless batches on the mesh from step `first_step` on; the batch of a step is the same on any number of hosts."""
        rows = own_rows(self.batch_sharding, self.config.train.batch)
        iterator = iter(make_loader(source, batch_size=self.config.train.batch, seed=self.config.seed, rows=rows))
        if first_step:
            grain.experimental.set_next_index(iterator, first_step)
        for batch in iterator:
            yield self.to_mesh(batch, rows)

    def to_mesh(self, batch, rows):
        """Host arrays, the batch's `rows` → arrays on the mesh."""
        total, place = self.config.train.batch, {row: i for i, row in enumerate(rows)}

        def put(x):
            def part(index):
                wanted = range(total)[index[0]]
                return x[place[wanted[0]] : place[wanted[-1]] + 1]

            return jax.make_array_from_callback((total, *x.shape[1:]), self.batch_sharding, part)

        with jax.transfer_guard("allow"):  # the one way in
            return jax.tree.map(put, batch)

    def export(self, state, card: dict) -> None:
        """Writes the EMA weights as `model.safetensors` in the run's folder."""
        ema = state.ema
        if jax.process_count() > 1:
            whole = jax.tree.map(lambda s: jax.sharding.NamedSharding(self.mesh, jax.P()), self.shardings.ema)
            ema = jax.jit(lambda x: x, out_shardings=whole)(ema)
        distributed.on_first("write the weights", lambda: save_model(self.model_path, ema, self.config, self.data, self.prior, card))

    @property
    def model_path(self):
        """Where `export` writes."""
        return self.folder / "model.safetensors"

    def exported(self) -> int | None:
        """The step of the weights that lie there, None if there are none."""
        # Their header alone: process 0 is by itself here, and under the mesh of all it could compute nothing.
        text = distributed.from_first(
            "read the weights of this run", lambda: json.dumps(self.model_path.exists() and read_card(self.model_path)["steps"]).encode()
        )
        return json.loads(text) or None


def check_config(config) -> None:
    """Raises `UserError` for settings of the section `train` that cannot work."""
    for key in ("data.dir", "train.dir"):
        section, name = key.split(".")
        if config[section][name] is None:
            raise UserError(f"{key} is not set; give --config.{key}=FOLDER")
    for key in ("steps", "batch", "log_every", "checkpoint_every", "eval_batches", "keep", "accumulate", "skip_limit", "save_failures"):
        if config.train[key] < 1:
            raise UserError(f"train.{key}={config.train[key]} must be at least 1")
    for key in ("warmup", "eval_every", "keep_every", "minutes", "weight_decay", "context_level"):
        if not config.train.get(key, 0) >= 0:
            raise UserError(f"train.{key}={config.train[key]} must not be negative")
    for key in ("learning_rate", "clip", "epsilon"):
        if not config.train[key] > 0:
            raise UserError(f"train.{key}={config.train[key]} must be above 0")
    for key in ("tpd_rate", "context_rate", "text_drop", "waypoint_drop", "anchor_rate", "anchor_noisy", "beta2", "ema"):
        if not 0 <= config.train.get(key, 0) <= 1:
            raise UserError(f"train.{key}={config.train[key]} must lie between 0 and 1")
    if not config.train.explode > 1:
        raise UserError(f"train.explode={config.train.explode} must be above 1: times the average from which on a loss is not believed")
    profile = tuple(config.train.profile)
    if len(profile) != 2 or min(profile) < 0:
        raise UserError(f"train.profile={profile} must be (first step, number of steps), none negative")
