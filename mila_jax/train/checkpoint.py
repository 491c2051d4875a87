"""Checkpoints: orbax with separate items, so that a demo can load `ema` alone, on any mesh and any number of machines.

Items: params, ema, opt_state; meta (step, health); data (the number of the next batch, which is all that a data pipeline of ours has for a
state); config. Saving is asynchronous. A checkpoint counts once its folder has its final name, which it gets last of all: whatever kills
the program, there is the newest finished one to go on from.
"""

import contextlib
import shutil
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from mila_jax.errors import UserError
from mila_jax.parallel import distributed
from mila_jax.train.state import Health, TrainState

ITEMS = ("params", "ema", "opt_state")
PAUSES = (2, 10, 30)  # seconds before one of several processes reads again what it could not read, as the others mostly could


class SaveFailed(Exception):
    """A checkpoint could not be written; str() is the reason in one line. The training state is whole and training can go on."""


class _Manager(ocp.CheckpointManager):
    """Orbax asks JAX for preemption notices itself, also from the thread that finishes a save, with the number of a step that is past. JAX would
    take that for where this process stands, and settle on a step to leave at that nobody comes to any more. Here the loop asks, and no one else."""

    def reached_preemption(self, step: int) -> bool:
        """Never."""
        del step
        return False


class Checkpoints:
    """Saves and restores `TrainState`s in `folder`/checkpoints.

    folder: local or any path that etils knows (gs://…), the same for all processes. keep: the last so many are kept, and for ever those
    whose step divides by `keep_every` (0: none).
    """

    def __init__(self, folder, keep: int = 2, keep_every: int = 0):
        self.folder = epath.Path(folder) / "checkpoints"
        if "://" not in str(self.folder):
            self.folder = epath.Path(self.folder.resolve())  # orbax wants it absolute
        self._keep, self._keep_every = keep, keep_every
        self.failures, self._under_way = 0, False  # failures: saves in a row that came to nothing
        self._manager = self._open()

    def _open(self):
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write checkpoints to {self.folder} ({error.strerror}); set train.dir to a writable folder") from None
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep, keep_period=self._keep_every or None, create=True, cleanup_tmp_directories=True
        )
        return _Manager(self.folder, item_names=(*ITEMS, "meta", "data", "config"), options=options)

    def config(self) -> dict | None:
        """The config beside the newest checkpoint that has a readable one, None if there is none. For one process alone as well."""
        for step in self.steps()[::-1]:
            with contextlib.suppress(ValueError, KeyError, TypeError, OSError):
                return self._read_json(step, "config")
        return None

    def latest(self) -> int | None:
        """Step of the newest finished checkpoint."""
        return self._manager.latest_step()

    def finished(self) -> int | None:
        """Step of the newest checkpoint on disk, once the one that is being written is there too, or has come to nothing."""
        with contextlib.suppress(SaveFailed):
            self.wait()
        self._manager.reload()
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Steps of all finished checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def set_aside_after(self, step: int) -> None:
        """Renames checkpoints of later steps, which could not be read, to `unreadable-STEP`: they would stand in the way of those to come
        (of a step up to the newest one's, orbax saves nothing). A meeting of all processes, whatever each of them sees."""

        def rename():
            for number in (number for number in self.steps() if number > step):
                aside = self.folder / f"unreadable-{number}"
                if aside.exists():
                    aside.rmtree()
                (self.folder / str(number)).rename(aside)

        distributed.on_first("set aside checkpoints that cannot be read", rename)
        self._manager.reload()

    def save(self, state: TrainState, step: int, config: dict | None = None) -> None:
        """Starts saving; returns when the state has left the devices, before it is on disk. A step that is there already is left alone.

        config: the run's, as plain values. Raises `SaveFailed` if this save cannot be started or the one before it came to nothing.
        """
        health = jax.device_get(state.health)
        meta = {"step": step, "skipped": int(health.skipped), "skipped_in_row": int(health.in_row), "loss_average": float(health.average)}
        items = {name: ocp.args.StandardSave(getattr(state, name)) for name in ITEMS}
        items |= {"meta": ocp.args.JsonSave(meta), "data": ocp.args.JsonSave({"next_batch": step}), "config": ocp.args.JsonSave(config or {})}
        failure = None
        try:
            self.wait()
        except SaveFailed as error:
            failure = error
        if self._manager.latest_step() != step:
            self._check_space(state)
            with self._failures():
                self._manager.save(step, args=ocp.args.Composite(**items))
            self._under_way = True
        if failure is not None:
            raise failure

    def wait(self) -> None:
        """Waits for the save under way. Raises `SaveFailed` if it comes to nothing."""
        with self._failures():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        if self._under_way:
            self._under_way, self.failures = False, 0

    def _check_space(self, state: TrainState) -> None:
        """Before anything is written: a write that fails half way is loud, slow, and fills the disk for everyone else."""
        if "://" in str(self.folder):
            return
        needed = sum(x.nbytes for name in ITEMS for x in jax.tree.leaves(getattr(state, name)))
        free = shutil.disk_usage(self.folder).free
        if distributed.agree(float(free < needed)):  # of process 0, so that all do the same
            self.failures += 1
            raise SaveFailed(f"{needed / 2**20:,.1f} MiB are needed and {free / 2**20:,.1f} MiB are free")

    @contextlib.contextmanager
    def _failures(self):
        """Turns whatever storage raises in the block into `SaveFailed`."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 storage libraries raise what they like
            self.failures += 1
            self._under_way = False
            self.restart()
            raise SaveFailed(_one_line(error)) from error

    def restart(self) -> None:
        """After a failure: clears away what the failed save left, which may be what fills the disk."""
        if jax.process_count() > 1:  # opening anew is a meeting of all processes, and only this one may have failed
            return
        try:
            self._manager.close()
        except Exception:  # noqa: BLE001 what it still holds is what failed
            pass
        self._manager = self._open()

    def restore(self, abstract: TrainState, step: int | None = None) -> TrainState:
        """The state at `step` (newest by default) laid out as `abstract` (`laid_out`).

        A newest checkpoint that cannot be read is told and left out in favour of the one before. With several processes this is a meeting of
        all of them, which see the same steps; they leave out only what none of them could read, or they would go on from different steps.
        Raises `UserError` if there is none, or none of them is of this model, or only some processes could read it.
        """
        steps = self.steps()[::-1] if step is None else [step]
        if not steps:
            raise UserError(f"{self.folder} holds no finished checkpoint; train first")
        reasons = []
        for number in steps:
            state, failure = self._try(abstract, number)
            outcomes = distributed.everyone(float(failure is not None) + isinstance(failure, UserError))
            if not any(outcomes):
                return state
            if isinstance(failure, UserError):
                raise failure
            if not all(outcome == 1 for outcome in outcomes):
                blind = ", ".join(str(i + 1) for i, outcome in enumerate(outcomes) if outcome)
                raise UserError(
                    f"{self.folder / str(number)} cannot be read by process {blind} ({failure or 'its own message says why'}), by others it can; "
                    "run again, or rename it to go on from the one before"
                )
            reasons.append(f"{number}: {failure}")
            if number != steps[-1]:
                print(f"checkpoint {self.folder / str(number)} cannot be read ({failure}); taking the one before it", flush=True)
        raise UserError(f"{self.folder} has no checkpoint of this model ({'; '.join(reasons)[:400]}); use its config or another train.dir")

    def _try(self, abstract: TrainState, step: int):
        """(state, None), or (None, why this process cannot read it): one line, or the `UserError` of a checkpoint of another model."""
        for pause in (*(PAUSES if jax.process_count() > 1 else ()), None):
            try:
                return self._restore(abstract, step), None
            except UserError as error:
                return None, error
            except (ValueError, KeyError, TypeError, OSError) as error:
                reason = _one_line(error)
            if pause is not None:
                time.sleep(pause)
        return None, reason

    def _check_fits(self, abstract: TrainState, step: int) -> None:
        """Raises `UserError` with the names of parameters that the checkpoint lacks, has besides, or has in another shape."""
        stored = ocp.StandardCheckpointHandler().metadata(self.folder / str(step) / "params")
        there, wanted = (
            {_dotted(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_flatten_with_path(t)[0]}
            for t in (getattr(stored, "tree", stored), abstract.params)
        )
        wrong = sorted(n for n in there.keys() | wanted.keys() if there.get(n) != wanted.get(n))
        if wrong:
            told = ", ".join(f"{n} {there.get(n, 'missing')} for {wanted.get(n, 'none')}" for n in wrong[:8])
            raise UserError(f"{self.folder / str(step)} is of another model: {told} ({len(wrong)} in all); use its config or another train.dir")

    def _restore(self, abstract: TrainState, step: int) -> TrainState:
        self._check_fits(abstract, step)
        # Not by the manager, at whose end all processes meet: one that failed would have nobody tell the others, and meet them a step later.
        out = {
            name: ocp.StandardCheckpointHandler().restore(self.folder / str(step) / name, args=ocp.args.StandardRestore(getattr(abstract, name)))
            for name in ITEMS
        }
        meta = self._read_json(step, "meta")
        health = Health(np.float32(meta["loss_average"]), np.int32(meta["skipped"]), np.int32(meta["skipped_in_row"]))
        place = lambda value, like: jax.make_array_from_callback((), like.sharding, lambda _: np.asarray(value, like.dtype))  # noqa: E731
        return TrainState(step=place(meta["step"], abstract.step), health=jax.tree.map(place, health, abstract.health), **out)

    def _read_json(self, step: int, item: str) -> dict:
        return ocp.JsonCheckpointHandler().restore(self.folder / str(step) / item)

    def close(self) -> None:
        """Waits for the save under way and lets go; never raises."""
        with contextlib.suppress(Exception):  # whoever wants to know has called `wait`
            self._manager.wait_until_finished()
        self._manager.close()


def read_arrays(folder, item: str = "ema") -> dict[str, np.ndarray]:
    """One item of a checkpoint (`RUN/checkpoints/STEP`) as NumPy arrays by dotted name: on any machine, without the model or its devices."""
    path = epath.Path(epath.Path(folder) / item)
    tree = ocp.StandardCheckpointHandler().metadata(path)
    tree = getattr(tree, "tree", tree)
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    restored = ocp.PyTreeCheckpointHandler().restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    return {_dotted(p): leaf for p, leaf in jax.tree_util.tree_flatten_with_path(restored)[0]}


def _dotted(path) -> str:
    return ".".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path).removesuffix(".value")


def _one_line(error) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:80]} … {text[-115:]}"  # the cause comes last


def laid_out(state_shapes: TrainState, shardings: TrainState) -> TrainState:
    """ShapeDtypeStructs with shardings, for `restore`."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state_shapes, shardings)
