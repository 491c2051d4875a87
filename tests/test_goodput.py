"""Where a run's time goes, over several starts; metrics and speed."""

import json
import sys

import numpy as np
import pytest

from mila_jax.errors import UserError
from mila_jax.train import goodput as goodput_module
from mila_jax.train.goodput import Goodput, describe, summary
from mila_jax.train.metrics import MetricWriter, read_metrics
from mila_jax.train.speed import Speed, peak_flops


class Time:
    """Clocks that a test sets."""

    now = 1000.0

    def time(self):
        return self.now

    monotonic = time


@pytest.fixture
def clock(monkeypatch):
    clock = Time()
    monkeypatch.setattr(goodput_module, "time", clock)
    return clock


def test_what_is_no_step_is_told_apart(tmp_path, clock):
    goodput = Goodput(tmp_path, clock.now)
    clock.now += 10
    with goodput.clock("restore"):
        clock.now += 5
    goodput.begin(100)
    with goodput.clock("compile"):
        clock.now += 25
    clock.now += 50  # steps
    with goodput.clock("data"):
        clock.now += 10
    total = goodput.write(200, skipped=20)
    assert (total["wall"], total["start"], total["restore"], total["compile"], total["data"], total["skipped"]) == (100, 10, 5, 25, 10, 10)
    assert total["goodput"] == pytest.approx(0.4)
    assert "goodput 40.0 % of 100 s in 1 start(s); start 10.0 %" in describe(total)


def test_steps_made_again_after_a_kill_are_lost(tmp_path, clock):
    first = Goodput(tmp_path, clock.now)
    first.begin(0)
    clock.now += 100
    first.write(100)
    second = Goodput(tmp_path, clock.now)  # the last save was of step 75
    second.begin(75)
    clock.now += 50
    total = second.write(125)
    assert total["starts"] == 2 and total["lost"] == pytest.approx(25) and total["goodput"] == pytest.approx(125 / 150)
    with (tmp_path / "goodput.jsonl").open("a") as f:
        f.write('{"half')
    assert Goodput(tmp_path, clock.now).earlier == second.earlier + [second.record(125)]


def test_steps_skipped_by_earlier_starts_cost_this_one_nothing(tmp_path, clock):
    goodput = Goodput(tmp_path, clock.now)
    goodput.begin(100, skipped=50)
    clock.now += 100
    assert goodput.write(120, skipped=50)["skipped"] == 0
    assert goodput.write(120, skipped=55)["skipped"] == pytest.approx(25)


def test_a_full_disk_costs_lines_not_the_run(tmp_path, clock, monkeypatch, capsys):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(goodput_module, "write_atomically", full)
    goodput = Goodput(tmp_path, clock.now)
    goodput.begin(0)
    clock.now += 10
    assert goodput.write(10)["goodput"] == goodput.write(20)["goodput"] == 1
    told = capsys.readouterr().err
    assert told.count("warning") == 1 and "No space left on device" in told and "goodput.jsonl" in told


def test_a_run_killed_twice_before_its_first_save_counts_once():
    start = dict(wall=10.0, first=0, last=10, steps=10.0)
    assert summary([start, start, start])["goodput"] == pytest.approx(1 / 3)


def test_metrics_leave_out_what_is_no_number(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write(1, {"loss": float("nan"), "skipped": 1})
    writer.picture(1, "eval/clip", np.zeros((4, 6, 3), np.uint8))
    writer.close()
    assert read_metrics(tmp_path) == [{"step": 1, "skipped": 1}]
    assert [p.name for p in (tmp_path / "pictures").iterdir()] == ["eval_clip_0000001.png"]


def test_metrics_that_cannot_be_written_cost_no_run(tmp_path, capsys):
    writer = MetricWriter(tmp_path)

    class Full:
        def write(self, text):
            raise OSError(28, "No space left on device")

        closed = False

        def close(self):
            self.closed = True

    writer._lines.close()
    writer._lines = Full()
    writer.write(1, {"loss": 1.0})
    writer.write(2, {"loss": 1.0})
    writer.close()
    assert capsys.readouterr().err.count("No space left on device") == 1


def test_wandb_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"mila_jax\[wandb\]"):
        MetricWriter(tmp_path, wandb_project="mila")


def test_wandb_gets_the_metrics(tmp_path, monkeypatch):
    logged, known = [], []

    class Run:
        def log(self, scalars, step):
            logged.append((step, scalars))

        def finish(self):
            logged.append("finished")

    class Fake:
        @staticmethod
        def init(**options):
            known.append(options)
            return Run()

    monkeypatch.setitem(sys.modules, "wandb", Fake)
    writer = MetricWriter(tmp_path / "run-7", wandb_project="mila", config={"seed": 0})
    writer.write(3, {"loss": 0.5})
    writer.close()
    assert logged == [(3, {"loss": 0.5}), "finished"]
    assert known[0]["project"] == "mila" and known[0]["name"] == "run-7" and known[0]["resume"] == "allow"
    for folder, address in ((tmp_path / "run-7", "run-7"), (tmp_path / "other" / "run-7", "run-7"), (tmp_path / "run-7", "gs://bucket/run-7")):
        MetricWriter(folder, wandb_project="mila", config={"train": {"dir": address}}).close()
    ids = [options["id"] for options in known]
    assert ids[0] == ids[1] and len(set(ids)) == 3 and all(name.startswith("run-7-") for name in ids)


def test_speed():
    class Device:
        device_kind = "TPU v5p"

    speed = Speed(tokens=1000, flops=459e12, devices=2, peak=peak_flops(Device))
    found = speed.metrics(2.0)
    assert found == {"speed/step_seconds": 2.0, "speed/tokens_per_second": 500.0, "speed/model_tflops_per_second": 229.5, "speed/mfu": 0.25}
    Device.device_kind = "cpu"
    assert peak_flops(Device) is None and "speed/mfu" not in Speed(1000, 1e12, 1, None).metrics(1.0)
    assert json.dumps(found)
