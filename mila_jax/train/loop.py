"""The training loop: data → step → metrics → checkpoint, over and over, until it is done or told to leave.

The host never waits for a step's result: metrics are fetched one interval late, checkpoints are written in the background. The order of
operations in `_steps` matters; see the comments.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import sys
import time

import jax
import tqdm
from etils import epath

from data_pipeline.records import write_atomically
from mila_jax.errors import UserError
from mila_jax.parallel import distributed
from mila_jax.train.checkpoint import Checkpoints, SaveFailed, laid_out
from mila_jax.train.evaluation import Evaluation
from mila_jax.train.goodput import Goodput, describe as describe_goodput
from mila_jax.train.metrics import MetricWriter, no_writer, read_metrics
from mila_jax.train.preemption import Notice
from mila_jax.train.speed import Speed
from mila_jax.train.stages import describe
from mila_jax.train.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class Outcome:
    """step: steps done in all; finished: False if it left before train.steps; model: path of the exported EMA weights; code: the exit code
    that a command should end with (0, or 75 after a notice to leave, 130 after Ctrl-C: saved, the same command goes on)."""

    step: int
    finished: bool
    model: pathlib.Path
    code: int = 0


def train(config, *, progress: bool = True, stop_after: int | None = None, devices=None) -> Outcome:
    """Trains until `train.steps` (or `train.minutes`), resuming by itself from the newest checkpoint in `train.dir`.

    With several processes (`parallel.distributed.start` first) each calls this with the same config. `stop_after`: leave after so many
    steps of this call (tests). Raises `UserError` before anything is compiled for a config or data that cannot work, when too many steps in
    a row had to be skipped, and when checkpoints cannot be written.
    """
    began = time.time()
    if progress or jax.process_count() > 1:
        print(distributed.place(), flush=True)
    # Before anything else that they do together: with different settings they would wait for each other in different places.
    distributed.check_same({"config": config.to_json(), "code": distributed.code_version()})
    trainer = Trainer(config, devices=devices)
    distributed.check_same({"data": json.dumps(trainer.data, sort_keys=True)})
    identity = _identity(config, trainer.data)
    check_shared(trainer.checkpoints)
    with contextlib.ExitStack() as open_things:  # closed on an error too, so that saves under way are finished
        open_things.enter_context(jax.set_mesh(trainer.mesh))
        checkpoints = open_things.enter_context(contextlib.closing(Checkpoints(trainer.checkpoints, config.train.keep, config.train.keep_every)))
        distributed.check_same({f"checkpoints in {checkpoints.folder}": str(checkpoints.steps())})  # from which each sees where to go on
        distributed.on_first("go on in train.dir", lambda: _check_same_run(trainer.folder, checkpoints.config(), config, json.loads(identity)))
        done = trainer.exported()
        if done is not None and done == checkpoints.latest() and done >= config.train.steps:
            return Outcome(done, True, trainer.model_path)
        run = _Run(trainer, checkpoints, identity, began, progress)
        return run.train(stop_after, open_things)


class _Run:
    """One start of a run, from its state to its export."""

    def __init__(self, trainer: Trainer, checkpoints: Checkpoints, identity: str, began: float, progress: bool):
        self.trainer, self.checkpoints, self.progress = trainer, checkpoints, progress and distributed.first()
        self.config, self.settings, self.identity = trainer.config, trainer.config.train, identity
        self.goodput = Goodput(trainer.folder, began)

    def train(self, stop_after, open_things) -> Outcome:
        """Everything from the first state on."""
        trainer, settings = self.trainer, self.settings
        if self.progress:
            print(describe(trainer.parameters, trainer.trainable), flush=True)
        start = self.checkpoints.latest() or 0
        if start:
            with self.goodput.clock("restore"):
                state = self.checkpoints.restore(laid_out(self.abstract(), trainer.shardings))
                start = int(jax.device_get(state.step))
                self.checkpoints.set_aside_after(start)
        else:
            state = trainer.initial_state()
        writer = open_things.enter_context(contextlib.closing(self._writer(start)))
        last = settings.steps if stop_after is None else min(settings.steps, start + stop_after)
        if start or last == start:
            self._claim()
        bar = tqdm.tqdm(total=settings.steps, initial=start, desc="train", unit="step", disable=not self.progress)
        open_things.enter_context(contextlib.closing(bar))
        notice = Notice()
        open_things.enter_context(notice.listening())
        state, step, why = self._steps(state, start, last, notice, writer, bar)
        return self._leave(state, start, step, why, notice, writer)

    def _claim(self) -> None:
        """From here on the folder belongs to this run. Not before the first step: a mistake that only the compiler finds, or too little memory,
        must not keep the corrected run out."""
        distributed.on_first("write config.json", lambda: write_atomically(self.trainer.folder / "config.json", self.identity.encode()))

    def abstract(self):
        """The state as shapes."""
        from mila_jax.train.state import abstract_state

        return abstract_state(self.trainer.dit, self.trainer.tx, self.trainer.trainable)

    def _writer(self, start: int):
        made = []
        settings = dict(wandb_project=self.settings.wandb, config=json.loads(self.identity))
        distributed.on_first("open the metrics", lambda: made.append(MetricWriter(self.trainer.folder, start, **settings)))
        return made[0] if made else no_writer()

    def _steps(self, state, start: int, last: int, notice: Notice, writer, bar):
        """(state, last step made, why it stopped: "done", "minutes" or "notice")."""
        trainer, settings, clock = self.trainer, self.settings, self.goodput.clock
        evaluation = Evaluation(trainer) if settings.eval_every else None
        batches = trainer.batches(trainer.train_source, start)
        log = _Log(self, writer, bar, start)
        deadline = time.monotonic() + 60 * settings.minutes if settings.minutes else None
        step, metrics = start, None
        self.goodput.begin(start, int(jax.device_get(state.health.skipped)))
        with _profile(trainer.folder, settings.profile, start) as profile, contextlib.ExitStack() as guard:
            for step in range(start + 1, last + 1):
                if notice.reached(step - start):
                    log.flush()
                    return jax.block_until_ready(state), step - 1, "notice"
                with clock("data"):
                    batch = next(batches)
                profile.at(step, state)
                if step == start + 1:
                    with clock("compile"):  # and run once: constants move to the devices here, which later on would be a mistake
                        state, metrics = jax.block_until_ready(trainer.step(state, batch, trainer.key))
                    if not start:
                        self._claim()
                    guard.enter_context(jax.transfer_guard("disallow"))
                else:
                    with jax.profiler.StepTraceAnnotation("train", step_num=step):
                        state, metrics = trainer.step(state, batch, trainer.key)
                bar.update()
                if step % settings.log_every == 0 or step == last:
                    log.later(step, metrics)
                evaluates, saves = evaluation is not None and step % settings.eval_every == 0, step % settings.checkpoint_every == 0 and step < last
                if evaluates or saves:
                    jax.block_until_ready(metrics)  # both wait for the device anyway; here it counts as steps
                if saves:  # before anything that an evaluation may run into
                    with clock("checkpoint"), jax.transfer_guard("allow"):
                        self._save(state, step, metrics)
                if evaluates:
                    with clock("evaluation"), jax.transfer_guard("allow"):
                        self._evaluate(evaluation, state, step, writer)
                if deadline is not None and step % settings.log_every == 0 and distributed.agree(float(time.monotonic() > deadline)):
                    log.flush()
                    return state, step, "minutes"
        log.flush()
        jax.block_until_ready(metrics)
        return state, step, "done"

    def _evaluate(self, evaluation: Evaluation, state, step: int, writer) -> None:
        writer.write(step, evaluation.losses(state.ema))
        if not self.settings.eval_picture:
            return
        try:
            picture = evaluation.picture(state.ema)
        except UserError as error:  # no reason to end a run; all processes have it
            self.settings = self.settings.copy_and_resolve_references()
            self.settings.eval_picture = False
            print(f"no pictures: {error}", file=sys.stderr, flush=True)
            return
        if picture is not None:
            writer.picture(step, "eval/clip", picture)

    def _save(self, state, step: int, metrics) -> None:
        """A periodic save. Between skipped steps there is none, so that the kept checkpoints stay those from before the trouble."""
        self.check_skips(step, jax.device_get(metrics))
        if metrics is not None and int(jax.device_get(metrics["skipped_in_row"])):
            return
        try:
            self.checkpoints.save(state, step, json.loads(self.identity))
        except SaveFailed as error:
            self._failed(step, error)

    def _failed(self, step: int, error: SaveFailed) -> None:
        failures, limit = self.checkpoints.failures, self.settings.save_failures
        folder = self.checkpoints.folder
        if failures < limit:
            print(
                f"warning: a checkpoint could not be written to {folder} ({error}); training goes on at step {step}, failure {failures} of {limit}",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            return
        good = self.checkpoints.finished()
        raise UserError(
            f"{limit} checkpoints in a row could not be written to {folder} ({error}); free space there or set train.dir to another place; "
            f"{'the last good one is of step ' + str(good) if good else 'there is none yet'}"
        )

    def check_skips(self, step: int, metrics) -> None:
        """Raises `UserError` when too many steps in a row changed nothing. `metrics`: of `step`, on the host, or None."""
        in_row = int(metrics["skipped_in_row"]) if metrics is not None else 0
        if in_row < self.settings.skip_limit:
            return
        good = self.checkpoints.finished()
        kept = f"the last checkpoint, of step {good}, is good" if good else "there is no checkpoint yet"
        raise UserError(
            f"the loss of steps {step - in_row + 1} to {step} was no number or more than train.explode={self.settings.explode:g} times its average; "
            f"{kept}: lower train.learning_rate, or look at the data of these steps, and run again"
        )

    def _leave(self, state, start: int, step: int, why: str, notice: Notice, writer) -> Outcome:
        """Saves, exports and says where the time went."""
        saved = False
        with self.goodput.clock("checkpoint"):
            try:
                self.checkpoints.save(state, step, json.loads(self.identity))
                self.checkpoints.wait()
                saved = True
            except SaveFailed as error:
                # It may be that of the save before, and this one is well under way.
                saved = self.checkpoints.finished() == step
                which = f"a checkpoint before step {step}" if saved else f"the checkpoint of step {step}"
                print(f"warning: {which} could not be written ({error})", file=sys.stderr, flush=True)
        skipped = int(jax.device_get(state.health.skipped))
        total = distributed.first() and self.goodput.write(step, skipped)
        if total and self.progress:
            print(describe_goodput(total), flush=True)

        def copy():
            writer.close()  # this too may talk to a server
            self.trainer.run_folder.finish()

        try:
            distributed.on_first("copy the files of this run", copy)  # the others wait: who leaves far ahead of the rest ends them
        except (UserError, OSError) as error:
            print(f"warning: {error}", file=sys.stderr, flush=True)
        if why == "notice":
            print(f"told to leave: {'saved' if saved else 'could not save'} step {step}; run again to go on", file=sys.stderr, flush=True)
            return Outcome(step, False, self.trainer.model_path, notice.code if saved else 1)
        card = {
            "steps": step, "samples": step * self.settings.batch, "skipped": skipped, "train_seconds": round(total["wall"] if total else 0),
            "data": epath.Path(self.config.data.dir).name,
        }  # fmt: skip
        self.trainer.export(state, card)
        distributed.on_first("copy the weights", self.trainer.run_folder.finish)
        if not saved:
            raise UserError(f"the last checkpoint could not be written to {self.checkpoints.folder}; the weights are in {self.trainer.model_path}")
        return Outcome(step, step >= self.settings.steps, self.trainer.model_path)


class _Log:
    """Fetches metrics one interval late and writes them."""

    def __init__(self, run: _Run, writer, bar, start: int):
        self.run, self.writer, self.bar = run, writer, bar
        self.speed = Speed.of(run.trainer)
        before = [m.get("seconds", 0.0) for m in read_metrics(run.trainer.folder)] if distributed.first() else []
        self.before, self.began = max(before, default=0.0), time.monotonic()
        self.mark = None  # (step, seconds in which steps were made) of the last log
        self.pending = None
        self.start = start

    def later(self, step: int, metrics) -> None:
        """These will be written at the next call; now those of the call before are, which are there by now."""
        self.flush()
        record = self.run.goodput.record(step)
        steps = record["steps"]
        seconds = None
        if self.mark is not None and step > self.mark[0]:
            seconds = max(steps - self.mark[1], 1e-9) / (step - self.mark[0])
        self.mark = step, steps
        self.pending = step, metrics, self.before + time.monotonic() - self.began, seconds

    def flush(self) -> None:
        """Writes what is pending."""
        if self.pending is None:
            return
        step, metrics, elapsed, seconds = self.pending
        self.pending = None
        values = {k: v.item() for k, v in jax.device_get(metrics).items()}
        self.run.check_skips(step, values)
        scalars = values | {"seconds": round(elapsed, 2)}
        if seconds is not None:
            scalars |= self.speed.metrics(seconds)
        if distributed.first():
            scalars["goodput"] = self.run.goodput.write(step, values["skipped"])["goodput"]
        self.writer.write(step, scalars)
        if distributed.first():  # what lies in the others' folders of the same address is nobody's
            self.run.trainer.run_folder.push()
        self.bar.set_postfix(loss=f"{values['loss']:.4f}")


class _profile(contextlib.AbstractContextManager):
    """Records the steps of `train.profile` = (first, count) for TensorBoard's profiler; count 0: none. A start's first step, which compiles, is
    not among them: of a window that it falls into, as many steps are recorded after it. A start after the window records nothing."""

    def __init__(self, folder, window, start: int):
        first, count = window
        over = max(first, 2) + count  # the first step after the window of a run that was not interrupted
        self.folder, self.first, self.last = folder, max(first, start + 2), max(first, start + 2) + count
        self.running, self.wanted = False, count > 0 and start + 1 < over

    def at(self, step: int, state) -> None:
        """To be called before each step. Steps are started ahead of the device: `state`, the last one's, is waited for at both ends."""
        if self.wanted and not self.running and step == self.first:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self.folder / "profile"))
            self.running = True
        elif self.running and step == self.last:
            jax.block_until_ready(state)
            self._stop()

    def _stop(self):
        jax.profiler.stop_trace()
        self.running, self.wanted = False, False

    def __exit__(self, *error):
        if self.running:
            self._stop()


def _identity(config, data: dict) -> str:
    """What config.json holds: all settings, and what the data said of itself."""
    return json.dumps(json.loads(config.to_json()) | {"data_description": json.loads(json.dumps(data))}, indent=1)


def check_shared(folder) -> None:
    """Raises `UserError` on all processes when one of them does not see what process 0 writes to the folder of checkpoints."""
    if jax.process_count() == 1:
        return
    token = distributed.share(os.urandom(8) if distributed.first() else None).hex()
    path = folder / f"shared-{token}"

    def write():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(token)
        except OSError as error:
            raise UserError(f"cannot write checkpoints to {folder} ({error.strerror or error}); set train.checkpoints to a writable folder") from None

    distributed.on_first("write a checkpoint", write)
    seen = distributed.everyone(float(path.exists()))
    distributed.on_first("write a checkpoint", path.unlink)
    blind = [str(i + 1) for i, sees in enumerate(seen) if not sees]
    if blind:
        raise UserError(
            f"process {', '.join(blind)} does not see what process 1 writes to {folder}; set train.checkpoints to storage that all machines share"
        )


def _check_same_run(folder, beside_checkpoint: dict | None, config, now: dict) -> None:
    """A folder belongs to one run: refuses another model, window, seed, start, trained parameters or other latents. Where a new machine has no
    config.json, the one beside the newest checkpoint counts."""
    path = folder / "config.json"
    if not path.exists() and not beside_checkpoint:
        return
    try:
        before = json.loads(path.read_text()) if path.exists() else beside_checkpoint
        ours = isinstance(before, dict) and {"model", "window", "seed", "train"} <= before.keys() and "init_from" in before["train"]
    except ValueError:
        ours = False
    if not ours:
        raise UserError(f"{path} is not of a run of `mila train`; choose another train.dir")
    absent = {
        "model.evidence": False,
        "model.mixture": False,
        "model.detail": 0,
        "window.inner_anchors": False,
    }  # settings that older runs do not name, and what they were
    different = [
        name for part in ("model", "window", "data_description") for key in now[part]
        if before.get(part, {}).get(key, absent.get(name := f"{part}.{key}")) != now[part][key]
    ]  # fmt: skip
    different += [f"data_description.{key}" for key in before.get("data_description", {}) if key not in now["data_description"]]
    different += [] if before["seed"] == now["seed"] else ["seed"]
    start, start_before = (pathlib.Path(c["train"]["init_from"] or "").name for c in (now, before))  # the folder may have moved
    different += [] if start == start_before else ["train.init_from"]
    different += [f"train.{key}" for key in ("trainable", "moments") if key in before["train"] and before["train"][key] != now["train"][key]]
    different += [] if before["train"].get("optimizer", "adamw") == now["train"].get("optimizer", "adamw") else ["train.optimizer"]
    if different:
        raise UserError(f"{folder} holds a run with another {', '.join(different)}; choose another train.dir (mila demo: --fresh)")
