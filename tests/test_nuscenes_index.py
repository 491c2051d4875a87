"""The kept index of the tables: the same data as without it, and made again whenever it may be wrong."""

import dataclasses
import os

import numpy as np
import pytest

from data_pipeline.nuscenes import index as index_module
from data_pipeline.nuscenes.index import ARRAYS, build_index, cache_path, open_index
from tests import nuscenes_stub as stub


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MILA_CACHE", str(tmp_path / "cache"))
    stub.write(tmp_path / "sim", seconds=2.0)
    return tmp_path / "sim/v1.0-sim"


@pytest.fixture
def builds(monkeypatch):
    """The number of times that tables were read."""
    made = []
    monkeypatch.setattr(index_module, "build_index", lambda folder: made.append(folder) or build_index(folder))
    return made


def same(a, b):
    return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))


def test_second_opening_reads_the_copy(folder, builds):
    first, second = (open_index(folder, worth_keeping=0) for _ in range(2))
    assert len(builds) == 1 and same(first, second) and second.files(3) == first.files(3)
    assert all(getattr(second, name).dtype == getattr(first, name).dtype for name in ARRAYS)
    assert [p.suffix for p in cache_path(folder).parent.iterdir()] == [".safetensors"]


def test_small_tables_leave_no_copy(folder, builds):
    open_index(folder), open_index(folder)
    assert len(builds) == 2 and not cache_path(folder).exists()


@pytest.mark.parametrize("table", ["sample_data", "log"])
def test_changed_table_is_read_again(folder, builds, table):
    open_index(folder, worth_keeping=0)
    path = folder / f"{table}.json"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    open_index(folder, worth_keeping=0)
    path.write_bytes(path.read_bytes() + b"\n")
    open_index(folder, worth_keeping=0)
    open_index(folder, worth_keeping=0)
    assert len(builds) == 3


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\x80\x04cos\nsystem\n", lambda b: b.replace(b"_index/1", b"_index/0")]
)
def test_damaged_copy_is_made_again(folder, builds, damage):
    whole = open_index(folder, worth_keeping=0)
    cache_path(folder).write_bytes(damage(cache_path(folder).read_bytes()))
    assert same(open_index(folder, worth_keeping=0), whole) and len(builds) == 2
    open_index(folder, worth_keeping=0)
    assert len(builds) == 2


def test_cache_that_cannot_be_written_is_said_and_no_error(folder, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MILA_CACHE", str(tmp_path / "file"))
    assert len(open_index(folder, worth_keeping=0).scenes) == 2
    assert "set MILA_CACHE to a writable folder" in capsys.readouterr().err


def test_a_mapped_table_is_read_as_a_small_one(folder, monkeypatch):
    whole = build_index(folder)
    monkeypatch.setattr("data_pipeline.nuscenes.tables.SMALL", 0)
    assert same(build_index(folder), whole)
