"""Encoding by many processes, into and out of buckets, and killed at any moment: always the same bytes in the end."""

import importlib.util
import os
import pathlib
import signal
import subprocess
import sys
import time

import fsspec
import numpy as np
import pytest

from data_pipeline import records
from data_pipeline.encode import Part
from data_pipeline.jobs import parse_part
from data_pipeline.nuscenes.reader import open_nuscenes
from mila_jax.errors import UserError
from mila_jax.prepare import prepare
from tests.conftest import XLA_FLAGS
from tests import nuscenes_stub as stub

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("sim")
    stub.write(path, scenes=5, seconds=2.0)
    return path


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    path = tmp_path_factory.mktemp("enc")
    stub.encode(root, path)
    return stub.tree_bytes(path)


def command(code, *arguments):
    """The command line of a Python process that runs `code`."""
    return [sys.executable, "-c", code, *map(str, arguments)]


def environment(**more):
    """Of a child process: the repository is on its path."""
    return os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | more


def run_child(code, *arguments, **more):
    """Runs it to its end, which must be a good one."""
    done = subprocess.run(command(code, *arguments), env=environment(**more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_parts_in_any_order_make_the_same_data_set(root, whole, tmp_path):
    left = [stub.encode(root, tmp_path, part=Part(index, 3)) for index in (2, 0, 1)]
    assert [len(names) for names in left] == [4, 2, 0]
    assert left[0] == ["scene-0001", "scene-0002", "scene-0004", "scene-0005"]
    assert stub.tree_bytes(tmp_path) == whole


def test_no_index_before_the_last_part(root, tmp_path):
    stub.encode(root, tmp_path, part=Part(0, 2))
    with pytest.raises(UserError, match="no finished encoded data set"):
        records.read_index(tmp_path)


@pytest.mark.parametrize("text", ["3", "a/b", "2/2", "-1/2", "1/"])
def test_parts_that_there_are_not(text):
    with pytest.raises(UserError, match="part"):
        parse_part(text)
    assert parse_part("1/2") == Part(1, 2) and parse_part(None) == Part()


SLOW = """
import sys, time
from tests import nuscenes_stub as stub
def slow(images):
    time.sleep(0.02)
    return stub.encode_images(images)
stub.encode(sys.argv[1], sys.argv[2], images=slow)
"""


def test_killed_at_any_moment_loses_at_most_one_shard(root, whole, tmp_path):
    marks, kills = [], 0
    for _ in range(20):
        process = subprocess.Popen(command(SLOW, root, tmp_path), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        target = len(marks) + 1  # killed inside the shard after the next one
        while process.poll() is None and len(marks) < target:
            time.sleep(0.005)
            marks = sorted(p.name for p in tmp_path.glob("*.array_record.json"))
        time.sleep(0.03)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        # What is marked is complete, what is not marked is not read, and there is no index.
        assert all((tmp_path / name.removesuffix(".json")).read_bytes() == whole[name.removesuffix(".json")] for name in marks)
        with pytest.raises(UserError, match="no finished encoded data set"):
            records.read_index(tmp_path)
    assert kills >= 2
    stub.encode(root, tmp_path)
    assert {k: v for k, v in stub.tree_bytes(tmp_path).items() if not k.endswith(".tmp")} == whole


def test_two_processes_write_one_file(tmp_path):
    """As parts do that end together: each time one of them has written all of it, and neither fails."""
    code = "import sys; from data_pipeline.storage import Folder; [Folder(sys.argv[1]).write('index.json', b'x' * 2**20) for _ in range(300)]"
    writers = [subprocess.Popen(command(code, tmp_path), env=environment(), stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ends = [writer.communicate(timeout=120)[1] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], ends
    assert [p.name for p in tmp_path.iterdir()] == ["index.json"] and (tmp_path / "index.json").stat().st_size == 2**20


@pytest.fixture
def bucket():
    """fsspec's bucket in memory; empty before and after."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()


def test_into_a_bucket(root, whole, bucket):
    assert stub.encode(root, "memory://bucket/data") == []
    found = {name.removeprefix("/bucket/data/"): bucket.cat_file(name) for name in bucket.find("/bucket/data")}
    assert found == whole
    calls = []
    stub.encode(root, "memory://bucket/data", images=lambda x: calls.append(1) or stub.encode_images(x))
    assert not calls, "finished shards are kept"
    bucket.rm_file("/bucket/data/train-00001.array_record")
    stub.encode(root, "memory://bucket/data", images=lambda x: calls.append(1) or stub.encode_images(x))
    assert calls and {name.removeprefix("/bucket/data/"): bucket.cat_file(name) for name in bucket.find("/bucket/data")} == whole
    assert records.read_index("memory://bucket/data").scenes[0].name == "scene-0001"
    with pytest.raises(UserError, match="local folders and gs:// only"):
        records.open_split("memory://bucket/data", "train")


def test_an_upload_that_fails_leaves_no_mark(root, bucket, monkeypatch):
    monkeypatch.setattr(type(bucket), "put_file", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("denied")))
    with pytest.raises(UserError, match=r"memory://bucket/data/val-00000.array_record cannot be written \(denied\)"):
        stub.encode(root, "memory://bucket/data")
    assert not bucket.find("/bucket/data")


def test_out_of_a_bucket(root, whole, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("MILA_CACHE", str(tmp_path / "cache"))
    bucket.put(str(root), "/bucket/nuscenes", recursive=True)
    stub.encode("memory://bucket/nuscenes", tmp_path / "enc")
    assert stub.tree_bytes(tmp_path / "enc") == whole
    # A table that changes there is fetched again.
    name = "/bucket/nuscenes/v1.0-sim/scene.json"
    bucket.pipe_file(name, bucket.cat_file(name).replace(b"Straight road 1", b"Straight road 11"))
    assert open_nuscenes("memory://bucket/nuscenes", "v1.0-sim").scenes[0].description == "Straight road 11"
    victim = open_nuscenes("memory://bucket/nuscenes", "v1.0-sim").scenes[0].tracks["CAM_BACK"].files[0]
    bucket.rm_file(f"/bucket/nuscenes/{victim}")
    with pytest.raises(UserError, match="is missing: unpack all image archives"):
        stub.encode("memory://bucket/nuscenes", tmp_path / "again")


def test_addresses_that_cannot_be_opened(root):
    with pytest.raises(UserError, match="nosuch://x"):
        stub.encode(root, "nosuch://x/y")
    if importlib.util.find_spec("gcsfs") is None:
        with pytest.raises(UserError, match=r"mila_jax\[gcs\]"):
            stub.encode(root, "gs://bucket/data")


def test_several_processes_give_what_one_gives(small_config, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", XLA_FLAGS)  # the same compiler for all
    config = small_config.copy_and_resolve_references()
    config.data.dir, config.data.workers = str(tmp_path / "enc"), 2
    assert prepare(config, progress=False) == []
    assert stub.tree_bytes(tmp_path / "enc") == stub.tree_bytes(pathlib.Path(small_config.data.dir))


DEVICES = """
import sys, jax, numpy as np
from mila_jax.model.autoencoder_weights import make_codec
codec = make_codec(sys.argv[1], chunk=5)
assert len(jax.local_devices()) == 3 and codec.chunk == 6
images = np.random.default_rng(0).integers(0, 255, (7, 32, 48, 3), dtype=np.uint8)
latents = codec.encode(images)
np.savez(sys.argv[2], latents=latents, images=codec.decode(latents))
"""


def test_images_are_split_over_the_devices(small_config, tmp_path):
    from mila_jax.model.autoencoder_weights import make_codec

    run_child(DEVICES, small_config.autoencoder.path, tmp_path / "out.npz", XLA_FLAGS="--xla_force_host_platform_device_count=3")
    codec = make_codec(small_config.autoencoder.path, chunk=7)
    images = np.random.default_rng(0).integers(0, 255, (7, 32, 48, 3), dtype=np.uint8)
    with np.load(tmp_path / "out.npz") as found:
        np.testing.assert_allclose(found["latents"], codec.encode(images), atol=2e-5)
        assert np.abs(found["images"].astype(int) - codec.decode(found["latents"])).max() <= 1


BEAM = """
import sys, pathlib
from mila_jax.config import load_config
from mila_jax.prepare import prepare
import ml_collections, json
if __name__ == "__main__":
    config = ml_collections.ConfigDict(json.loads(pathlib.Path(sys.argv[1]).read_text()))
    assert prepare(config, progress=False, beam=sys.argv[2]) == []
"""


@pytest.mark.skipif(importlib.util.find_spec("apache_beam") is None, reason="Apache Beam is not installed: pip install -e '.[beam]'")
@pytest.mark.parametrize("options", ["--direct_running_mode=multi_processing --direct_num_workers=2", "--direct_running_mode=in_memory"])
def test_beam_gives_the_same_bytes(small_config, tmp_path, options):
    config = small_config.copy_and_resolve_references()
    config.data.dir = str(tmp_path / "enc")
    (tmp_path / "config.json").write_text(config.to_json())
    run_child(BEAM, tmp_path / "config.json", f"--runner=DirectRunner {options}")
    assert stub.tree_bytes(tmp_path / "enc") == stub.tree_bytes(pathlib.Path(small_config.data.dir))


@pytest.mark.skipif(importlib.util.find_spec("apache_beam") is None, reason="Apache Beam is not installed: pip install -e '.[beam]'")
@pytest.mark.filterwarnings("ignore")
def test_beam_mode_that_loses_elements_is_refused():
    from data_pipeline.beam import parse_options

    with pytest.raises(UserError, match="loses elements"):
        parse_options("--runner=DirectRunner --direct_running_mode=multi_threading")
