"""What a checkpoint holds, which are kept, and what happens to one that cannot be read. Failing writes: tests/test_survival.py."""

import contextlib
import json
import shutil
import time
import types

import jax
import numpy as np
import pytest

from mila_jax.errors import UserError
from mila_jax.parallel import distributed
from mila_jax.parallel.mesh import make_mesh
from mila_jax.train import checkpoint, loop
from mila_jax.train.checkpoint import Checkpoints, SaveFailed, laid_out, read_arrays
from mila_jax.train.state import abstract_state, create_state, state_shardings
from tests.test_train_step import TINY, adam, muon


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(dict(data=1, fsdp=1, context=1, tensor=1), jax.devices()[:1])


@pytest.fixture(scope="module")
def state(mesh):
    with jax.set_mesh(mesh):
        return create_state(mesh, TINY, adam(), 0)


@pytest.fixture(scope="module")
def abstract(mesh):
    return laid_out(abstract_state(TINY, adam()), state_shardings(mesh, TINY, adam()))


@pytest.fixture
def saved(state, tmp_path):
    """Checkpoints of steps 1 to 5, of which the last two and every third are kept."""
    checkpoints = Checkpoints(tmp_path, keep=2, keep_every=3)
    for step in range(1, 6):
        checkpoints.save(state, step, {"seed": 7})
    checkpoints.wait()
    yield checkpoints
    checkpoints.close()


def test_last_and_every_so_many_are_kept(saved):
    assert saved.steps() == [3, 4, 5] and saved.latest() == 5


def test_items_lie_apart(saved, state):
    folder = saved.folder / "5"
    assert {"params", "ema", "opt_state", "meta", "data", "config"} <= {p.name for p in folder.iterdir()}
    metas = {name: json.loads((folder / name / "metadata").read_text()) for name in ("meta", "data", "config")}
    assert metas["data"] == {"next_batch": 5} and metas["config"] == {"seed": 7} and metas["meta"]["step"] == 5
    ema = read_arrays(folder, "ema")  # alone, without knowing the model
    assert len(ema) == len(jax.tree.leaves(state.ema)) and np.array_equal(ema["final.kernel"], state.ema["final"]["kernel"][...])


def test_what_comes_back_is_what_went_in(saved, state, abstract):
    back = saved.restore(abstract)
    assert int(back.step) == 5
    for a, b in zip(
        jax.tree.leaves((state.params, state.ema, state.opt_state, state.health)),
        jax.tree.leaves((back.params, back.ema, back.opt_state, back.health)),
        strict=True,
    ):
        assert a.dtype == b.dtype and np.array_equal(a, b)


def test_what_comes_back_of_muon(mesh, tmp_path, small_config):
    """Its state has places for parameters that it leaves to AdamW, and constants."""
    tx = muon(small_config)
    with jax.set_mesh(mesh):
        state = create_state(mesh, TINY, tx, 0)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, 1, {})
    checkpoints.wait()
    back = checkpoints.restore(laid_out(abstract_state(TINY, tx), state_shardings(mesh, TINY, tx)))
    checkpoints.close()
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(back.opt_state), strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)


def test_the_one_before_a_newest_that_cannot_be_read(saved, abstract, capsys):
    shutil.rmtree(saved.folder / "5" / "opt_state")
    assert int(saved.restore(abstract).step) == 4
    assert "5 cannot be read" in capsys.readouterr().out


def test_what_cannot_be_read_does_not_stand_in_the_way(saved, state, abstract):
    """Saves of steps up to its own go on, and the settings are those of the one before."""
    shutil.rmtree(saved.folder / "5" / "opt_state")
    shutil.rmtree(saved.folder / "5" / "config")
    assert saved.config() == {"seed": 7}
    step = int(saved.restore(abstract).step)
    saved.set_aside_after(step)
    assert saved.latest() == saved.finished() == 4 and (saved.folder / "unreadable-5" / "params").exists()
    saved.save(state, 5, {"seed": 7})
    saved.wait()
    assert saved.latest() == 5 and int(saved.restore(abstract).step) == 5


@pytest.fixture
def one_of_two(saved, monkeypatch):
    """one_of_two(mine, other) → steps that were tried: this process fails at the steps `mine`, once each number in it; the other at `other`."""

    def make(mine, other):
        tried, left = [], list(mine)

        def restore(abstract, step):
            tried.append(step)
            if step in left:
                left.remove(step)
                raise OSError("no answer")
            return step

        monkeypatch.setattr(saved, "_restore", restore)
        monkeypatch.setattr(distributed, "everyone", lambda value: [value, float(tried[-1] in other)])
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(checkpoint, "PAUSES", (0, 0))
        return tried

    return make


def test_one_of_several_processes_reads_again_before_it_gives_up(saved, abstract, one_of_two):
    tried = one_of_two([5, 5], [])
    assert saved.restore(abstract) == 5 and tried == [5, 5, 5]


@pytest.mark.parametrize("mine, other, blind", [([5] * 3, [], r"1 \(no answer\)"), ([], [5], r"2 \(its own message says why\)")])
def test_what_one_process_alone_cannot_read_ends_all(saved, abstract, one_of_two, mine, other, blind):
    """Each by itself would go on from another step, and a good checkpoint would be set aside."""
    tried = one_of_two(mine, other)
    with pytest.raises(UserError, match=f"checkpoints/5 cannot be read by process {blind}, by others it can; run again"):
        saved.restore(abstract)
    assert set(tried) == {5} and (saved.folder / "5").exists()


def test_what_no_process_can_read_all_leave_out(saved, abstract, one_of_two):
    tried = one_of_two([5] * 3, [5])
    assert saved.restore(abstract) == 4 and tried == [5, 5, 5, 4]


def test_a_restore_meets_nobody_until_all_have_read(saved, abstract, monkeypatch):
    """Orbax's manager would, and whoever failed would meet the others a step later."""
    monkeypatch.setattr(saved._manager, "restore", None)
    assert int(saved.restore(abstract).step) == 5 and saved.config() == {"seed": 7}


def test_setting_aside_is_a_meeting_whatever_a_process_sees(saved, monkeypatch):
    meetings = []
    monkeypatch.setattr(distributed, "on_first", lambda what, function: meetings.append(what) or function())
    saved.set_aside_after(5)
    assert len(meetings) == 1 and saved.steps() == [3, 4, 5]


def test_no_checkpoint_of_this_model(saved, mesh, tmp_path):
    import dataclasses

    wider = dataclasses.replace(TINY, width=32)
    other = laid_out(abstract_state(wider, adam()), state_shardings(mesh, wider, adam()))
    with pytest.raises(UserError, match=r"of another model: .*conditions.camera.fc1.bias \(16,\) for \(32,\)"):
        saved.restore(other)
    with pytest.raises(UserError, match="train first"):
        Checkpoints(tmp_path / "empty").restore(other)


def test_half_a_checkpoint_is_cleared_away(saved, tmp_path):
    half = saved.folder / "9.orbax-checkpoint-tmp"
    half.mkdir()
    (half / "junk").write_bytes(b"junk")
    saved.close()
    again = Checkpoints(tmp_path)
    assert again.latest() == 5
    for _ in range(200):  # in the background
        if not half.exists():
            break
        time.sleep(0.1)
    assert not half.exists()
    again.close()


def leave(checkpoints, state, step, finish=lambda: None, close=lambda: None):
    """The end of a run after a notice. finish: copies the run's folder; close: of the metrics."""
    run = types.SimpleNamespace(
        goodput=types.SimpleNamespace(clock=lambda name: contextlib.nullcontext(), write=lambda step, skipped: None), checkpoints=checkpoints,
        identity="{}", progress=False, trainer=types.SimpleNamespace(run_folder=types.SimpleNamespace(finish=finish), model_path="model"),
    )  # fmt: skip
    return loop._Run._leave(run, state, step - 1, step, "notice", types.SimpleNamespace(code=75), types.SimpleNamespace(close=close))


def test_a_last_checkpoint_counts_although_the_one_before_it_failed(saved, state, capsys, monkeypatch):
    """What fails late is told at the next save, which may well be the last."""
    wait, late = saved.wait, [SaveFailed("no space")]

    def wait_once_in_vain():
        if late:
            raise late.pop()
        wait()

    monkeypatch.setattr(saved, "wait", wait_once_in_vain)
    outcome = leave(saved, state, 6)
    assert outcome.code == 75 and saved.latest() == 6
    err = capsys.readouterr().err
    assert "a checkpoint before step 6 could not be written (no space)" in err and "saved step 6" in err


@pytest.mark.parametrize("error", [UserError("no bucket"), FileNotFoundError("no file")])
def test_nobody_leaves_before_the_files_are_copied_and_a_copy_that_fails_costs_nothing_else(saved, state, capsys, monkeypatch, error):
    done = []
    monkeypatch.setattr(loop.distributed, "agree", lambda value: done.append("together") or value)

    def finish():
        done.append("copied")
        raise error

    outcome = leave(saved, state, 6, finish, lambda: done.append("closed"))
    assert outcome.code == 75 and done[-3:] == ["closed", "copied", "together"]
    err = capsys.readouterr().err
    assert f"warning: {error}" in err and "saved step 6" in err
