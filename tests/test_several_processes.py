"""Two processes of four CPU devices each as one training run, connected as a pod's machines are."""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import time

import numpy as np
import pytest

from mila_jax.train.checkpoint import Checkpoints
from mila_jax.train.loop import train
from mila_jax.train.metrics import read_metrics
from tests.test_survival import assert_equal, finish, make, state_of  # noqa: F401 make is a fixture
from tests.train_probe import start

STEPS = 5


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def start_two(files, *arguments, devices: int = 4):
    """Both processes; `files`: one config file for both, or one for each."""
    port, files = free_port(), [files] * 2 if not isinstance(files, list) else files
    env = [{"MILA_COORDINATOR": f"localhost:{port}", "MILA_PROCESS_ID": str(i), "MILA_PROCESS_COUNT": "2"} for i in range(2)]
    return [start(file, *arguments, devices=devices, **e) for file, e in zip(files, env)]


@pytest.fixture(scope="module")
def make_sharded(make):  # noqa: F811
    """Batches of eight; parameters are split over the devices of a process, gradients meet across processes."""

    def make_(name, mesh=None, **settings):
        config, file = make(name, **dict(batch=8, epsilon=1e-4, steps=STEPS, checkpoint_every=3) | settings)
        config.train.trainable = ("*",)
        config.mesh.update(mesh or dict(data=4, fsdp=2))
        file.write_text(config.to_json())
        return config, file

    return make_


def one_after_the_other(first, *others) -> list:
    """What two processes run in turn, as their start takes longer than a short run. Each run: a config file, or one for each process, and
    arguments. Of each the ends (code, stderr) on both."""
    ends = [finish(p, 1 + len(others))[1] for p in start_two(*first, *(word for run in others for word in ("THEN", *run)))]
    parts = [re.split(r"^ENDED (\d+)$", err, flags=re.MULTILINE) for err in ends]
    assert [len(p) for p in parts] == [2 * len(others) + 3] * 2, ends[0][-1500:] + ends[1][-1500:]
    return [[(int(p[i + 1]), p[i]) for p in parts] for i in range(0, 2 * len(others) + 2, 2)]


@pytest.fixture(scope="module")
def ended(make_sharded):
    """Two runs that end at once and then one that is undisturbed: (its config, ends of each by name)."""
    _, odd = make_sharded("odd")
    other = odd.with_name("other.json")
    other.write_text(json.dumps(json.loads(odd.read_text()) | {"seed": 1}))
    config, file = make_sharded("two", eval_every=3, eval_steps=2, minutes=60.0)  # whose clock both agree on at each log
    ends = one_after_the_other([[odd, other]], [make_sharded("local")[1], "HOOK=own_disk"], [file])
    return config, dict(zip(("odd", "local", "two"), ends, strict=True))


@pytest.fixture(scope="module")
def two(ended):
    """An undisturbed run of two processes: (config, leaves of its state)."""
    config, ends = ended[0], ended[1]["two"]
    assert [code for code, _ in ends] == [0, 0], ends[0][1][-1500:] + ends[1][1][-1500:]
    # Read here, by one process with one device.
    config.mesh.update(dict(data=1, fsdp=1))
    step, leaves = state_of(config)
    assert step == STEPS
    return config, leaves


def test_two_processes_train_what_one_does(two, make_sharded):
    config, leaves = two
    one, _ = make_sharded("one", dict(data=1, fsdp=1))
    assert train(one, progress=False).finished
    losses = [{m["step"]: m["loss"] for m in read_metrics(c.train.dir) if "loss" in m} for c in (config, one)]
    np.testing.assert_allclose(list(losses[0].values()), list(losses[1].values()), rtol=1e-5)
    assert losses[0].keys() == losses[1].keys() == set(range(1, STEPS + 1))


def test_two_processes_show_losses_and_a_picture(two):
    config, _ = two
    assert any("eval/12Hz_from_2/loss" in m for m in read_metrics(config.train.dir))
    assert [p.name for p in (pathlib.Path(config.train.dir) / "pictures").iterdir()] == ["eval_clip_0000003.png"]


@pytest.mark.slow
def test_an_autoencoder_that_is_not_there_costs_pictures_on_all(make_sharded):
    config, file = make_sharded("blind", eval_every=3, eval_steps=2)
    config.autoencoder.path = str(file.parent / "none.safetensors")
    file.write_text(config.to_json())
    ends = [finish(p) for p in start_two(file)]
    assert [code for code, _ in ends] == [0, 0], ends[0][1][-1500:] + ends[1][1][-1500:]
    assert all("no pictures: " in err for _, err in ends) and "none.safetensors" in ends[0][1]


@pytest.fixture(scope="module")
def noticed(make_sharded):
    """A run of which one process got SIGTERM: its config, saved in the middle."""
    config, file = make_sharded("notice", checkpoint_every=100)
    runs = start_two(file, "HOOK=slow")
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not read_metrics(config.train.dir):
        time.sleep(0.1)
    os.kill(runs[1].pid, signal.SIGTERM)
    ends = [finish(p) for p in runs]
    assert [code for code, _ in ends] == [75, 75], ends[0][1][-1500:] + ends[1][1][-1500:]
    said = {line for _, err in ends for line in err.splitlines() if line.startswith("told to leave")}
    saved = Checkpoints(config.train.dir).steps()
    assert len(saved) == 1 and saved[0] < STEPS and said == {f"told to leave: saved step {saved[0]}; run again to go on"}
    return config


def copied(config, name: str, **mesh):
    """A copy of a run with a mesh of its own: (config, file)."""
    config = config.copy_and_resolve_references()
    folder = pathlib.Path(config.train.dir)
    config.train.dir = str(folder.with_name(name))
    shutil.copytree(folder, config.train.dir)
    config.mesh.update(mesh)
    file = folder.with_name(f"{name}.json")
    file.write_text(config.to_json())
    return config, file


def test_a_notice_to_one_saves_on_both_and_two_go_on_bit_for_bit(two, noticed):
    config, file = copied(noticed, "notice_two")
    ends = [finish(p) for p in start_two(file)]
    assert [code for code, _ in ends] == [0, 0], ends[0][1][-1500:]
    config.mesh.update(dict(data=1, fsdp=1))
    assert_equal(state_of(config)[1], two[1])


@pytest.mark.slow
def test_one_process_goes_on_where_two_were_told_to_leave(two, noticed):
    """On another mesh, with the losses of the undisturbed run."""
    config, file = copied(noticed, "notice_one", data=2, fsdp=2, tensor=2)
    code, err = finish(start(file, devices=8))
    assert code == 0, err[-2000:]
    losses = [{m["step"]: m["loss"] for m in read_metrics(c.train.dir) if "loss" in m} for c in (two[0], config)]
    assert losses[0].keys() == losses[1].keys() == set(range(1, STEPS + 1))
    np.testing.assert_allclose(list(losses[1].values()), list(losses[0].values()), rtol=1e-4)


def test_processes_that_run_other_settings_end_at_once(ended):
    ends = ended[1]["odd"]
    assert [code for code, _ in ends] == [2, 2]
    for _, err in ends:
        assert "do not run the same thing: config (process 2 against process 1)" in err and "Traceback" not in err


def test_checkpoints_on_storage_that_is_not_shared_end_at_once(ended):
    """Each process writes to a folder of its own, as two machines with local disks would."""
    ends = ended[1]["local"]
    assert [code for code, _ in ends] == [2, 2]
    assert all("process 2 does not see what process 1 writes" in err and "train.checkpoints" in err for _, err in ends)


def test_a_notice_during_start_up_is_not_lost_and_a_checkpoint_that_one_process_cannot_read_ends_both_and_stays(two, make_sharded):
    config, file = make_sharded("early", steps=STEPS + 3)
    shutil.copytree(two[0].train.dir, config.train.dir, dirs_exist_ok=True)
    before = Checkpoints(config.train.dir).steps()
    # The notice first: processes that have made steps before count on from them (`Notice.reached`).
    early, unreadable = one_after_the_other([file, "HOOK=early_notice"], [file, "HOOK=blind"])
    assert [code for code, _ in early] == [75, 75], early[0][1][-1500:] + early[1][1][-1500:]
    assert [code for code, _ in unreadable] == [2, 2], unreadable[0][1][-1500:] + unreadable[1][1][-1500:]
    for (_, err), why in zip(unreadable, ("its own message says why", "no answer"), strict=True):
        assert f"{STEPS} cannot be read by process 2 ({why}), by others it can" in err and "Traceback" not in err
    assert Checkpoints(config.train.dir).steps() == before and Checkpoints(config.train.dir).latest() == STEPS
