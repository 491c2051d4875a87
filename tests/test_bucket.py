"""The way of the data through a gs:// address, with a stand-in of the bucket: stopped at any operation, and read by the loader."""

import fsspec
import numpy as np
import pytest

from data_pipeline import records, storage
from data_pipeline.clips import ClipSource, ClipSpec, read_scene
from data_pipeline.loader import make_loader
from mila_jax.choose_model import find_weights
from mila_jax.config import load_config
from mila_jax.errors import UserError
from mila_jax.model.weights import SHIPPED, load_model
from mila_jax.train.published import is_published
from tests import nuscenes_stub as stub

HOME = "gs://bucket/data"


class Stopped(BaseException):
    """In the place of a kill: nothing catches it."""


class Bucket:
    """fsspec's store in memory under gs:// addresses; an object appears when its upload has ended, as in a bucket. `stop`: the number of the
    changing operation before or after which everything ends."""

    def __init__(self):
        self.fs = fsspec.filesystem("memory")
        self.fs.store.clear()
        self.stop, self.after, self.done = None, False, 0

    def __getattr__(self, name):
        found = getattr(self.fs, name)
        if name not in ("put_file", "pipe_file", "rm_file"):
            return found

        def counted(*arguments):
            self.done += 1
            if self.done == self.stop and not self.after:
                raise Stopped
            found(*arguments)
            if self.done == self.stop:
                raise Stopped

        return counted

    def files(self):
        return {name.removeprefix("/bucket/data/"): self.fs.cat_file(name) for name in self.fs.find("/bucket/data")}


@pytest.fixture
def bucket(monkeypatch):
    made = Bucket()
    monkeypatch.setattr(storage, "open_filesystem", lambda url: (made, "/" + url.removeprefix("gs://")))
    yield made
    made.fs.store.clear()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("sim")
    stub.write(path, scenes=3, seconds=2.0)
    return path


@pytest.fixture(scope="module")
def encoded(root, tmp_path_factory):
    path = tmp_path_factory.mktemp("enc")
    stub.encode(root, path)
    return path


@pytest.mark.parametrize("after", [False, True])
def test_stopped_at_any_operation(root, encoded, bucket, after):
    whole = stub.tree_bytes(encoded)
    stub.encode(root, HOME)
    operations = bucket.done
    assert bucket.files() == whole and operations >= 2 * 3 + 3
    for stop in range(1, operations + 1):
        bucket.fs.store.clear()
        bucket.stop, bucket.after, bucket.done = stop, after, 0
        with pytest.raises(Stopped):
            stub.encode(root, HOME)
        bucket.stop = None
        found = bucket.files()
        marks = [name.removesuffix(".json") for name in found if name.endswith(".array_record.json")]
        assert all(found[name] == whole[name] for name in marks), "a shard that reads as complete is complete"
        assert ("index.json" in found) == (after and stop == operations)
        written = [name for name in found if name.endswith(".array_record")]
        assert len(written) - len(marks) <= 1, "at most one shard's work is lost"
        calls = []
        stub.encode(root, HOME, images=lambda x: calls.append(1) or stub.encode_images(x))
        assert bucket.files() == whole
        assert bool(calls) == (len(marks) < 3)


def test_the_index_goes_before_a_shard_is_made_again(root, encoded, bucket):
    """Stopped while other latents replace the old ones, no index tells that the two belong together."""
    for stop in range(1, 5):  # index away, mark away, shard there, mark there
        stub.encode(root, HOME)
        bucket.stop, bucket.after, bucket.done = stop, True, 0
        with pytest.raises(Stopped):
            stub.encode(root, HOME, meta={"autoencoder": "other"})
        bucket.stop = None
        with pytest.raises(UserError, match="no finished encoded data set"):
            records.read_index(HOME)
    stub.encode(root, HOME)
    assert bucket.files() == stub.tree_bytes(encoded)


def test_the_loader_reads_the_same_clips(root, encoded, bucket, tmp_path, monkeypatch):
    """ArrayRecord's own reader of gs:// is stood in for by copies of the objects."""
    from array_record.python import array_record_module

    real, opened = array_record_module.ArrayRecordReader, []

    def reader(path, options):
        if not path.startswith("gs://"):
            return real(path, options=options)
        opened.append(options)
        copy = tmp_path / path.rpartition("/")[2]
        copy.write_bytes(bucket.fs.cat_file(path.removeprefix("gs:/")))
        return real(str(copy), options=options)

    monkeypatch.setattr(array_record_module, "ArrayRecordReader", reader)
    stub.encode(root, HOME)
    sources = [ClipSource(folder, "train", [ClipSpec(6, 2, 12.0)]) for folder in (HOME, encoded)]
    there, here = (next(iter(make_loader(source, batch_size=4, seed=3))) for source in sources)
    assert there.keys() == here.keys() and all(np.array_equal(there[k], here[k]) for k in here)
    assert opened and set(opened) == {records.READER_OPTIONS["remote"]}
    np.testing.assert_array_equal(read_scene(HOME, "scene-0001")["latents"], read_scene(encoded, "scene-0001")["latents"])
    bucket.fs.pipe_file("/bucket/data/train-00001.array_record", bucket.fs.cat_file("/bucket/data/train-00001.array_record")[:-100])
    with pytest.raises(UserError, match=r"gs://bucket/data/train-00001.array_record has \d+ bytes instead of"):
        ClipSource(HOME, "train", [ClipSpec(6, 2, 12.0)])
    bucket.fs.rm_file("/bucket/data/train-00001.array_record")
    with pytest.raises(UserError, match="gs://bucket/data/train-00001.array_record is missing"):
        records.open_split(HOME, "train")


def test_a_bucket_that_does_not_answer_is_no_damage(root, bucket, monkeypatch):
    from array_record.python import array_record_module

    def reader(path, options):
        raise RuntimeError(f"Permanent error GetObjectMetadata: 403 Forbidden; reading {path}")

    monkeypatch.setattr(array_record_module, "ArrayRecordReader", reader)
    stub.encode(root, HOME)
    with pytest.raises(
        UserError, match=r"gs://bucket/data/train-00000.array_record cannot be read \(Permanent error .*check that .* you may read it"
    ):
        records.open_split(HOME, "train")


@pytest.mark.parametrize("address", ["gs://bucket/run", "gs://bucket/run/", "gs://bucket/run/model.safetensors"])
def test_weights_of_a_run_in_a_bucket(bucket, tmp_path, monkeypatch, address):
    """`generate.weights` names the run or its file; `train.init_from` the file: fetched once, and again when another one lies there."""
    monkeypatch.setenv("MILA_CACHE", str(tmp_path))
    config = load_config("configs/tiny.py", [f"--config.generate.weights={address}"])
    with pytest.raises(UserError, match="gs://bucket/run/model.safetensors does not exist"):
        find_weights(config)
    bucket.fs.pipe_file("/bucket/run/model.safetensors", SHIPPED.read_bytes())
    found = find_weights(config)
    assert found.read_bytes() == SHIPPED.read_bytes() and find_weights(config) == found
    file = "gs://bucket/run/model.safetensors"
    assert not is_published(file) and load_model(file).sha256 == load_model(SHIPPED).sha256
    bucket.fs.pipe_file("/bucket/run/model.safetensors", b"another")
    assert find_weights(config).read_bytes() == b"another"
