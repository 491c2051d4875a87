"""Runs that are told to leave or killed, in real processes, run out of time, are fed with broken data or given a full disk."""

import functools
import json
import re
import shutil
import signal

import jax
import numpy as np
import pytest

from mila_jax.errors import UserError
from mila_jax.train import loop
from mila_jax.train.checkpoint import Checkpoints, laid_out
from mila_jax.train.metrics import read_metrics
from mila_jax.train.state import abstract_state
from mila_jax.train.trainer import Trainer
from tests.shared_programs import shared_steps
from tests.train_probe import broken_batches, full_disk, start

STEPS = 8


@pytest.fixture(scope="module", autouse=True)
def one_program():
    """All runs here are of one program."""
    with shared_steps():
        yield


@pytest.fixture(scope="module")
def make(small_config, tmp_path_factory):
    """make(name) → (config, its file) of a run in a folder of its own."""

    def make_(name, **train):
        config = small_config.copy_and_resolve_references()
        folder = tmp_path_factory.mktemp(name)
        config.train.dir = str(folder / "run")
        config.train.update(dict(steps=STEPS, checkpoint_every=2, log_every=1, keep=10) | train)
        # The smaller program compiles sooner; that all of a state goes on bit for bit is shown in tests/test_train.py.
        config.model.precondition, config.train.trainable = "none", ("final.*",)
        file = folder / "config.json"
        file.write_text(config.to_json())
        return config, file

    return make_


def state_of(config):
    """The newest checkpoint: (step, leaves in full precision)."""
    trainer = Trainer(config)
    with jax.set_mesh(trainer.mesh):
        state = Checkpoints(trainer.folder).restore(laid_out(abstract_state(trainer.dit, trainer.tx, trainer.trainable), trainer.shardings))
    return int(state.step), [np.asarray(x) for x in jax.tree.leaves(state)]


def finish(process, runs: int = 1):
    """(exit code, stderr) of a process with so many runs."""
    _, err = process.communicate(timeout=240 * runs)
    return process.returncode, err


@pytest.fixture(scope="module")
def undisturbed(make):
    config, file = make("whole")
    code, err = finish(start(file))
    assert code == 0, err[-2000:]
    step, leaves = state_of(config)
    assert step == STEPS and len(leaves) > 100
    return leaves


def assert_equal(leaves, expected):
    assert all(np.array_equal(a, b) for a, b in zip(leaves, expected, strict=True))


@pytest.fixture
def here(monkeypatch):
    """Runs in this process, where nothing is to happen to the process itself; what hooks replace comes back."""
    monkeypatch.setattr(Trainer, "batches", Trainer.batches)
    monkeypatch.setattr(shutil, "disk_usage", shutil.disk_usage)
    return functools.partial(loop.train, progress=False)


def test_a_run_that_is_told_to_leave_twice_and_killed_ends_as_if_undisturbed(make, undisturbed):
    """Ctrl-C and SIGTERM save and leave, a kill loses only the steps since the last save, and each time the same command goes on."""
    config, file = make("disturbed", checkpoint_every=100)
    code, err = finish(start(file, "HOOK=interrupt_at_three"))
    assert code == 130 and "saved step 3" in err and "Traceback" not in err, err[-2000:]
    assert Checkpoints(config.train.dir).steps() == [3]
    code, err = finish(start(file, "HOOK=terminate_at_five"))
    assert code == 75 and "saved step 5" in err, err[-2000:]
    trainer = Trainer(config)
    assert Checkpoints(trainer.folder).latest() == 5 and not trainer.model_path.exists()
    assert [m["step"] for m in read_metrics(config.train.dir)] == list(range(1, 6))
    code, err = finish(start(file, "HOOK=kill_at_seven", "checkpoint_every=2"))
    assert code == -signal.SIGKILL, err[-2000:]
    saved = Checkpoints(trainer.folder).latest()
    assert saved in (5, 6)  # the save of step 6 may have been under way
    code, err = finish(start(file))
    assert code == 0, err[-2000:]
    step, leaves = state_of(config)
    assert step == STEPS
    assert_equal(leaves, undisturbed)
    line = json.loads((trainer.folder / "goodput.jsonl").read_text().splitlines()[-1])
    assert line["first"] == saved and line["last"] == STEPS
    steps = [m["step"] for m in read_metrics(config.train.dir)]
    assert steps == sorted(set(steps)) and {*range(1, STEPS + 1)} - {*steps} <= {saved}  # which was not written yet


def test_minutes_end_a_run_that_goes_on_later(make, here):
    """Time is up at the first log: saved and exported, with exit code 0; without a limit the same command finishes."""
    config, _ = make("minutes", checkpoint_every=100, minutes=1e-6)
    outcome = here(config)
    assert (outcome.code, outcome.step, outcome.finished) == (0, 1, False)
    assert Checkpoints(config.train.dir).steps() == [1] and Trainer(config).model_path.exists()
    config.train.minutes = 0.0
    assert here(config).finished and Checkpoints(config.train.dir).latest() == STEPS


def test_broken_batches_are_skipped_and_too_many_stop_the_run(make, here):
    broken_batches()
    config, _ = make("nan", skip_limit=10)
    assert here(config).finished
    metrics = {m["step"]: m for m in read_metrics(config.train.dir)}
    assert [metrics[s]["skipped"] for s in (3, 4, 6, 8)] == [0, 1, 3, 3] and "loss" not in metrics[5]
    assert all(np.isfinite(x).all() for x in state_of(config)[1])
    assert Checkpoints(config.train.dir).steps() == [2, 8]  # none between skipped steps
    config, _ = make("nan_limit", skip_limit=2)
    with pytest.raises(UserError, match="loss of steps 4 to 5 was no number.*the last checkpoint, of step 2, is good"):
        here(config)
    assert Checkpoints(config.train.dir).latest() == 2


def is_told(said: str, error: str, reason: str):
    """`said`: on stderr while it trained; `error`: its end."""
    # Anywhere in a line, and either of the two warnings: what storage libraries print of their own runs in between, even within a line.
    assert "warning: a checkpoint could not be written" in said, said[-3000:]
    assert re.search(r"training goes on at step \d+, failure [12] of 3", said), said[-3000:]
    assert "3 checkpoints in a row could not be written" in error and "there is none yet" in error and reason in error, error[-3000:]


def test_a_full_disk_is_told_and_training_goes_on_until_the_limit(make, here, monkeypatch, capfd):
    config, _ = make("full_disk", save_failures=3, checkpoint_every=1)
    with monkeypatch.context() as patch, pytest.raises(UserError) as error:
        patch.setattr(shutil, "disk_usage", shutil.disk_usage)
        full_disk()
        here(config)
    is_told(capfd.readouterr().err, str(error.value), "0.0 MiB are free")
    assert max(m["step"] for m in read_metrics(config.train.dir)) >= 2
    assert here(config).finished and state_of(config)[0] == STEPS  # with room again


def test_writes_that_fail_half_way_are_told_as_a_full_disk_is(make):
    config, file = make("small_files", save_failures=3, checkpoint_every=1)
    code, err = finish(start(file, "HOOK=small_files"))
    assert code == 2, err[-3000:]
    is_told(err, err[err.index("error: ") :], "File too large")
    assert max(m["step"] for m in read_metrics(config.train.dir)) >= 2


def test_a_checkpoint_folder_that_goes_away_and_comes_back(make, here, monkeypatch):
    """Saves fail in the middle of a run and work again later: nothing else happens."""
    config, _ = make("away", save_failures=5)
    save, failed = Checkpoints.save, []

    def sometimes(self, state, step, run=None):
        if step in (2, 4):
            failed.append(step)
            file = self.folder / str(step)
            file.write_bytes(b"in the way")  # a folder of this name cannot be made
        return save(self, state, step, run)

    monkeypatch.setattr(Checkpoints, "save", sometimes)
    assert here(config).finished and failed == [2, 4] and Checkpoints(config.train.dir).latest() == STEPS
