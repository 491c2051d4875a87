"""Runs that are told to leave, killed, fed with broken data or given a full disk, in real processes."""

import json
import re
import signal

import jax
import numpy as np
import pytest

from mila_jax.train import loop
from mila_jax.train.checkpoint import Checkpoints, laid_out
from mila_jax.train.metrics import read_metrics
from mila_jax.train.state import abstract_state
from mila_jax.train.trainer import Trainer
from tests.train_probe import start

STEPS = 8


@pytest.fixture(scope="module")
def make(small_config, tmp_path_factory):
    """make(name) → (config, its file) of a run in a folder of its own."""

    def make_(name, **train):
        config = small_config.copy_and_resolve_references()
        folder = tmp_path_factory.mktemp(name)
        config.train.dir = str(folder / "run")
        config.train.update(dict(steps=STEPS, checkpoint_every=2, log_every=1, keep=10) | train)
        config.model.precondition = "none"  # the smaller program compiles sooner
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


def finish(process):
    """(exit code, stderr)."""
    _, err = process.communicate(timeout=240)
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


def test_sigterm_saves_and_the_next_start_goes_on(make, undisturbed):
    config, file = make("term", checkpoint_every=100)
    code, err = finish(start(file, "HOOK=terminate_at_five"))
    assert code == 75 and "saved step 5" in err, err[-2000:]
    step, _ = state_of(config)
    assert step == 5 and not (Trainer(config).model_path).exists()
    code, err = finish(start(file, "HOOK=terminate_at_five"))
    assert code == 0, err[-2000:]
    assert_equal(state_of(config)[1], undisturbed)
    assert [m["step"] for m in read_metrics(config.train.dir)] == list(range(1, STEPS + 1))


def test_ctrl_c_saves_and_leaves(make):
    config, file = make("interrupt", checkpoint_every=100)
    code, err = finish(start(file, "HOOK=interrupt_at_five"))
    assert code == 130 and "saved step 5" in err and "Traceback" not in err, err[-2000:]
    assert Checkpoints(config.train.dir).steps() == [5]


def test_minutes_end_a_run_that_goes_on_later(make):
    """Time is up at the first log: saved and exported, with exit code 0; without a limit the same command finishes."""
    config, file = make("minutes", checkpoint_every=100, minutes=1e-6)
    code, err = finish(start(file))
    assert code == 0, err[-2000:]
    assert Checkpoints(config.train.dir).steps() == [1] and Trainer(config).model_path.exists()
    code, err = finish(start(file, "minutes=0.0"))
    assert code == 0 and Checkpoints(config.train.dir).latest() == STEPS, err[-2000:]


def test_kill_loses_only_the_steps_since_the_last_save(make, undisturbed):
    config, file = make("kill")
    code, err = finish(start(file, "HOOK=kill_at_five"))
    assert code == -signal.SIGKILL, err[-2000:]
    trainer = Trainer(config)
    saved = Checkpoints(trainer.folder).latest()
    assert saved in (2, 4)  # the save of step 4 may have been under way
    code, err = finish(start(file))
    assert code == 0, err[-2000:]
    assert_equal(state_of(config)[1], undisturbed)
    line = json.loads((trainer.folder / "goodput.jsonl").read_text().splitlines()[-1])
    assert line["first"] == saved and line["last"] == STEPS


def test_broken_batches_are_skipped_and_too_many_stop_the_run(make):
    config, file = make("nan", skip_limit=10)
    code, err = finish(start(file, "HOOK=broken_batches"))
    assert code == 0, err[-2000:]
    metrics = {m["step"]: m for m in read_metrics(config.train.dir)}
    assert [metrics[s]["skipped"] for s in (3, 4, 6, 8)] == [0, 1, 3, 3] and "loss" not in metrics[5]
    assert all(np.isfinite(x).all() for x in state_of(config)[1])
    assert Checkpoints(config.train.dir).steps() == [2, 8]  # none between skipped steps
    config, file = make("nan_limit", skip_limit=2)
    code, err = finish(start(file, "HOOK=broken_batches"))
    assert code == 2 and "loss of steps 4 to 5 was no number" in err and "the last checkpoint, of step 2, is good" in err, err[-2000:]
    assert "Traceback" not in err
    assert Checkpoints(config.train.dir).latest() == 2


@pytest.mark.parametrize("hook, reason", [("full_disk", "0.0 MiB are free"), ("small_files", "File too large")])
def test_a_full_disk_is_told_and_training_goes_on_until_the_limit(make, hook, reason):
    """A disk that says it is full, and one whose writes fail half way."""
    config, file = make(hook, save_failures=3, checkpoint_every=1)
    code, err = finish(start(file, f"HOOK={hook}"))
    # Anywhere in a line, and either of the two warnings: what storage libraries print of their own runs in between, even within a line.
    assert code == 2 and "warning: a checkpoint could not be written" in err, err[-3000:]
    assert re.search(r"training goes on at step \d+, failure [12] of 3", err), err[-3000:]
    assert "error: 3 checkpoints in a row could not be written" in err and "there is none yet" in err and reason in err
    assert max(m["step"] for m in read_metrics(config.train.dir)) >= 2
    if hook == "full_disk":
        code, err = finish(start(file))  # with room again
        assert code == 0, err[-2000:]
        assert state_of(config)[0] == STEPS


def test_a_checkpoint_folder_that_goes_away_and_comes_back(make, monkeypatch):
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
    outcome = loop.train(config, progress=False)
    assert outcome.finished and failed == [2, 4] and Checkpoints(config.train.dir).latest() == STEPS
