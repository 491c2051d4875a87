"""A run whose folder is a bucket (fsspec's in memory) goes on on another machine, and outlives a bucket that does not answer for a while."""

import json

import fsspec
import numpy as np
import pytest

from mila_jax.errors import UserError
from mila_jax.train import loop
from mila_jax.train.folder import RunFolder
from mila_jax.train.metrics import read_metrics


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The bucket; `machine(name)` makes what lies on this machine that of another one."""
    fs = fsspec.filesystem("memory")
    fs.rm("/", recursive=True) if fs.ls("/") else None
    fs.machine = lambda name: monkeypatch.setenv("MILA_CACHE", str(tmp_path / name))
    fs.machine("first")
    yield fs
    fs.rm("/", recursive=True) if fs.ls("/") else None


def test_files_go_up_as_they_change_and_come_down_at_a_start(bucket):
    folder = RunFolder("memory://bucket/run")
    folder.fetch()
    (folder.path / "metrics.jsonl").write_text("one\n")
    (folder.path / "pictures").mkdir()
    (folder.path / "pictures" / "a.png").write_bytes(b"a")
    folder.finish()
    assert bucket.cat_file("/bucket/run/pictures/a.png") == b"a"
    bucket.pipe_file("/bucket/run/pictures/a.png", b"untouched")  # what has not changed here is not copied again
    (folder.path / "metrics.jsonl").write_text("one\ntwo\n")
    folder.push()
    folder.finish()
    assert bucket.cat_file("/bucket/run/metrics.jsonl") == b"one\ntwo\n" and bucket.cat_file("/bucket/run/pictures/a.png") == b"untouched"
    bucket.machine("second")
    again = RunFolder("memory://bucket/run")
    again.fetch()
    assert (again.path / "metrics.jsonl").read_text() == "one\ntwo\n" and not (again.path / "pictures").exists()


def test_a_bucket_that_does_not_answer_is_told_once_and_tried_again(bucket, monkeypatch, capsys):
    folder = RunFolder("memory://bucket/run")
    folder.fetch()
    (folder.path / "metrics.jsonl").write_text("one\n")
    put = type(bucket).pipe_file

    def denied(*args, **kwargs):
        raise PermissionError(13, "denied")

    monkeypatch.setattr(type(bucket), "pipe_file", denied)
    for _ in range(2):
        folder.push()
        folder._last.result()
    assert capsys.readouterr().err.count("warning: memory://bucket/run does not take metrics.jsonl") == 1
    with pytest.raises((UserError, OSError), match="denied"):
        folder.finish()
    monkeypatch.setattr(type(bucket), "pipe_file", put)
    folder.finish()
    assert bucket.cat_file("/bucket/run/metrics.jsonl") == b"one\n"


def start_of(address, began, picture=None):
    """A start of the run that began at `began`, as far as its folder goes, and after its last copy maybe a picture."""
    folder = RunFolder(address)
    folder.fetch()
    (folder.path / "config.json").write_text("{}")
    (folder.path / "goodput.jsonl").write_text(json.dumps({"began": began}) + "\n")
    folder.finish()
    if picture:
        (folder.path / "pictures").mkdir(exist_ok=True)
        (folder.path / "pictures" / picture).write_bytes(b"a")
    return folder


def test_what_a_killed_start_had_not_copied_goes_up_later(bucket):
    start_of("memory://bucket/run", 1.0, "a.png")
    assert not bucket.exists("/bucket/run/pictures/a.png")
    start_of("memory://bucket/run", 1.0)
    assert bucket.cat_file("/bucket/run/pictures/a.png") == b"a"


def test_what_another_run_left_stays_out_of_the_bucket(bucket):
    """The one before was deleted; then this machine starts the next, or goes on with one that another machine has started."""
    old = start_of("memory://bucket/run", 1.0, "old.png")
    bucket.rm("/bucket/run", recursive=True)
    start_of("memory://bucket/run", 2.0)
    assert not (old.path / "pictures").exists() and not bucket.exists("/bucket/run/pictures")
    start_of("memory://bucket/run", 2.0, "old.png")
    bucket.rm("/bucket/run", recursive=True)
    bucket.machine("second")
    start_of("memory://bucket/run", 3.0)
    bucket.machine("first")
    folder = start_of("memory://bucket/run", 3.0)
    assert not (folder.path / "pictures").exists() and not bucket.exists("/bucket/run/pictures")


def test_a_bucket_that_cannot_be_read_costs_nothing_that_lies_here(bucket, monkeypatch):
    folder = start_of("memory://bucket/run", 1.0, "a.png")

    def denied(*args, **kwargs):
        raise PermissionError(13, "denied")

    monkeypatch.setattr(type(bucket), "cat_file", denied)
    with pytest.raises(UserError, match="denied"):
        RunFolder("memory://bucket/run").fetch()
    assert (folder.path / "config.json").exists() and (folder.path / "pictures" / "a.png").exists()


def test_a_file_that_vanishes_is_no_failure(bucket, monkeypatch):
    folder = RunFolder("memory://bucket/run")
    folder.fetch()
    (folder.path / "metrics.jsonl").write_text("one\n")
    listed = folder._files
    monkeypatch.setattr(folder, "_files", lambda: ["gone", *listed()])
    folder.finish()
    assert [name.rpartition("/")[2] for name in bucket.find("/bucket/run")] == ["metrics.jsonl"]


def test_a_run_goes_on_on_another_machine(small_config, bucket, tmp_path):
    c = small_config.copy_and_resolve_references()
    c.train.dir, c.train.checkpoints = "memory://bucket/run", str(tmp_path / "shared")
    c.train.update(dict(steps=6, log_every=1))
    assert loop.train(c, progress=False, stop_after=3).step == 3
    first = RunFolder(c.train.dir).path
    bucket.machine("second")
    outcome = loop.train(c, progress=False)
    assert outcome.step == 6 and outcome.finished and outcome.model.is_relative_to(tmp_path / "second") and first.is_relative_to(tmp_path / "first")
    assert [m["step"] for m in read_metrics(outcome.model.parent)] == [1, 2, 3, 4, 5, 6]
    assert np.array_equal(np.frombuffer(bucket.cat_file("/bucket/run/model.safetensors"), np.uint8), np.fromfile(outcome.model, np.uint8))
    other = c.copy_and_resolve_references()
    other.seed = 5
    bucket.machine("third")
    with pytest.raises(UserError, match="another seed"):
        loop.train(other, progress=False)
