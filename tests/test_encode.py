"""One record per instant: content, resume, TFDS metadata without TensorFlow, and what a broken image or encoder says."""

import pathlib
import shutil
import sys

import msgspec
import numpy as np
import pytest

from data_pipeline import records
from data_pipeline.clips import read_scene
from data_pipeline.encode import SceneEncoder, make_job
from data_pipeline.nuscenes.reader import instants, load_image, open_nuscenes
from mila_jax.errors import UserError
from mila_jax.prepare import check_same_job, prepare
from tests import nuscenes_stub as stub


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


def test_records_hold_what_the_reader_and_the_encoder_give(root, encoded):
    for number, scene in enumerate(open_nuscenes(root, "v1.0-sim").scenes):
        found, moments = read_scene(encoded, scene.name), instants(scene)
        images = np.array([[load_image(root / f, stub.HEIGHT, stub.WIDTH) for f in m.files] for m in moments])
        latents = (stub.encode_images(images.reshape(-1, *images.shape[2:])) - 100) / 50
        np.testing.assert_allclose(found["latents"], latents.reshape(len(moments), 6, *stub.LATENT_SHAPE), rtol=2e-3, atol=1e-3)
        assert found["latents"].dtype == np.float16
        for field in ("intrinsics", "cam2ego_translation", "cam2ego_rotation"):
            np.testing.assert_array_equal(found[field], np.array([getattr(m, field) for m in moments], np.float32))
        for field in ("ego_translation", "ego_rotation"):
            np.testing.assert_array_equal(found[field], [getattr(m, field) for m in moments])
        np.testing.assert_array_equal(found["timestamps"], [m.timestamps_us for m in moments])
        np.testing.assert_allclose(found["times"], [(m.timestamp_us - moments[0].timestamp_us) * 1e-6 for m in moments])
        assert found["text"][0, 0] == number + 1 and list(found["text_mask"]) == [True, True, True, False]
        assert (found["description"], found["split"]) == (f"Straight road {number + 1}", "train" if number else "val")


def test_tfds_opens_the_folder_without_tensorflow(encoded):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(encoded))
    index = records.read_index(encoded)
    for split, scenes in (("val", index.scenes[:1]), ("train", index.scenes[1:])):
        source = builder.as_data_source(split=split)
        assert len(source) == sum(len(s.timestamps_us) for s in scenes)
        assert source[0]["latents"].shape == (6, *stub.LATENT_SHAPE)
        assert [r["timestamps"][1] for r in source] == [t for s in scenes for t in s.timestamps_us]
    assert "tensorflow" not in sys.modules


def test_stopped_at_any_scene_then_resumed_gives_the_same_bytes(root, encoded, tmp_path):
    whole = stub.tree_bytes(encoded)
    calls, stop = [], 0

    def failing(images):
        calls.append(len(images))
        if len(calls) == stop:
            raise KeyboardInterrupt
        return stub.encode_images(images)

    stub.encode(root, tmp_path / "uninterrupted", images=failing)
    total = len(calls)
    assert total > 12 and set(calls) == {7}, "always the same batch, so that the encoder compiles once"
    for stop in (1, total // 2, total):
        calls.clear()
        out = tmp_path / f"stop{stop}"
        with pytest.raises(KeyboardInterrupt):
            stub.encode(root, out, images=failing)
        with pytest.raises(UserError, match="no finished encoded data set"):
            records.open_split(out, "train")
        marked = [p.name.removesuffix(".json") for p in out.glob("*-*.json")]
        assert len(marked) == {1: 0, total // 2: 1, total: 2}[stop]
        assert all((out / name).read_bytes() == whole[name] for name in marked)
        calls.clear()
        stop = 0
        stub.encode(root, out, images=failing)
        assert len(calls) <= total - len(marked) * (total // 3 - 1) and stub.tree_bytes(out) == whole
    calls.clear()
    stub.encode(root, out, images=failing)
    assert calls == []


def test_a_shard_without_its_mark_is_made_again(root, encoded, tmp_path):
    stub.encode(root, tmp_path)
    shard = tmp_path / "train-00001.array_record"
    (tmp_path / "train-00001.array_record.json").unlink()
    shard.write_bytes(shard.read_bytes()[:-100])
    stub.encode(root, tmp_path)
    assert stub.tree_bytes(tmp_path) == stub.tree_bytes(encoded)


def test_more_scenes_extend_and_another_encoder_starts_over(tmp_path):
    calls = []

    def counting(images):
        calls.append(1)
        return stub.encode_images(images)

    for scenes in (2, 3):
        stub.write(tmp_path / "sim", scenes=scenes, seconds=2.0)
        before = len(calls)
        stub.encode(tmp_path / "sim", tmp_path / "enc", images=counting)
    per_scene = len(calls) - before
    assert 0.8 < per_scene / (before / 2) < 1.25, "the third scene alone is encoded the second time"
    assert [s.name for s in records.read_index(tmp_path / "enc").scenes] == ["scene-0001", "scene-0002", "scene-0003"]
    calls.clear()

    def stopping(images):
        calls.append(1)
        if len(calls) > per_scene + 2:
            raise KeyboardInterrupt
        return stub.encode_images(images) + 50

    # While shards of two encoders lie side by side, no index says that they belong together.
    with pytest.raises(KeyboardInterrupt):
        stub.encode(tmp_path / "sim", tmp_path / "enc", images=stopping, meta={"autoencoder": "other"})
    with pytest.raises(UserError, match="no finished encoded data set"):
        read_scene(tmp_path / "enc", "scene-0001")


def test_broken_image_is_named_and_finished_scenes_stay(tmp_path):
    stub.write(tmp_path / "sim", seconds=2.0)
    victim = open_nuscenes(tmp_path / "sim", "v1.0-sim").scenes[1].tracks["CAM_BACK"].files[3]
    content = (tmp_path / "sim" / victim).read_bytes()
    (tmp_path / "sim" / victim).write_bytes(content[:200])
    with pytest.raises(UserError, match=victim.split("/")[-1].replace("+", r"\+")):
        stub.encode(tmp_path / "sim", tmp_path / "enc")
    assert (tmp_path / "enc/val-00000.array_record.json").exists()
    (tmp_path / "sim" / victim).write_bytes(content)
    stub.encode(tmp_path / "sim", tmp_path / "enc")
    assert len(read_scene(tmp_path / "enc", "scene-0002")["times"]) > 10


def test_missing_images_are_told_before_the_first_is_encoded(tmp_path):
    stub.write(tmp_path / "sim", seconds=2.0)
    stub.encode(tmp_path / "sim", tmp_path / "enc")
    files = open_nuscenes(tmp_path / "sim", "v1.0-sim").scenes[1].tracks["CAM_BACK"].files
    (tmp_path / "sim" / files[3]).unlink()
    stub.encode(tmp_path / "sim", tmp_path / "enc")  # what is encoded already needs no images
    for mark in (tmp_path / "enc").glob("*.array_record.json"):
        mark.unlink()
    with pytest.raises(UserError, match="is missing, the first of 1 images") as error:
        stub.encode(tmp_path / "sim", tmp_path / "enc", images=lambda _: pytest.fail("an image was encoded"))
    assert files[3] in str(error.value)


def test_a_finished_data_set_is_not_encoded_over_with_other_settings(small_config):
    folder = pathlib.Path(small_config.data.dir)
    before = stub.tree_bytes(folder)
    other = small_config.copy_and_resolve_references()
    other.data.image_size = (64, 96)
    with pytest.raises(UserError, match="image_size .*choose another data.dir"):
        prepare(other, progress=False)
    for size in ((0, 48), (-32, 48), (32,)):
        other.data.image_size = size
        with pytest.raises(UserError, match=r"data.image_size=\("):
            prepare(other, progress=False)
    other.data.image_size, other.data.encode_batch = small_config.data.image_size, 0
    with pytest.raises(UserError, match="data.encode_batch=0"):
        prepare(other, progress=False)
    other.data.encode_batch, other.data.nuscenes = small_config.data.encode_batch, str(folder.parent / "other")
    stub.write(other.data.nuscenes, scenes=1, seconds=2.0, seed=1, height=32, width=48)
    with pytest.raises(UserError, match="holds another scene of the name 'scene-0001' .*choose another data.dir"):
        prepare(other, progress=False)
    assert prepare(small_config, progress=False) == [] and stub.tree_bytes(folder) == before


def encoder_of(root, out):
    """An encoder of the nuScenes folder `root` as `stub.encode` makes it."""
    job = make_job(stub.LATENT_SHAPE, (stub.HEIGHT, stub.WIDTH), 100.0, 50.0, {"autoencoder": "stub"})
    return SceneEncoder(open_nuscenes(root, "v1.0-sim"), out, stub.encode_images, job, 7)


def change_index(folder, change):
    """Replaces each scene of the index by change(scene)."""
    index = records.read_index(folder)
    content = msgspec.structs.replace(index, scenes=[change(scene) for scene in index.scenes])
    (folder / "index.json").write_bytes(msgspec.json.encode(content))


def test_a_finished_data_set_is_not_encoded_over_from_another_source(root, encoded, tmp_path):
    replace, same = msgspec.structs.replace, encoder_of(root, encoded)
    check_same_job(encoded, same)
    check_same_job(tmp_path / "nothing", same)
    stub.write(tmp_path / "other", scenes=1, seconds=2.0, seed=1)
    with pytest.raises(UserError, match="another scene of the name 'scene-0001' .*choose another data.dir"):
        check_same_job(encoded, encoder_of(tmp_path / "other", encoded))
    shutil.copytree(encoded, tmp_path / "enc")
    change_index(tmp_path / "enc", lambda scene: replace(scene, token="other"))
    with pytest.raises(UserError, match="another scene of the name 'scene-0001'"):
        check_same_job(tmp_path / "enc", same)
    # Data sets of earlier versions know no tokens, the oldest no times but those of their records.
    for forgotten in ({"token": ""}, {"token": "", "front_us": []}):
        change_index(tmp_path / "enc", lambda scene: replace(scene, **forgotten))
        check_same_job(tmp_path / "enc", same)
        with pytest.raises(UserError, match="another scene of the name 'scene-0001'"):
            check_same_job(tmp_path / "enc", encoder_of(tmp_path / "other", encoded))
    change_index(tmp_path / "enc", lambda scene: replace(scene, name=scene.name.replace("scene", "drive")))
    with pytest.raises(UserError, match="holds scene 'drive-0001', which .* lacks, and another would take its place"):
        check_same_job(tmp_path / "enc", same)


def test_a_source_that_grew_or_has_fewer_scenes_is_the_same_source(root, encoded, tmp_path):
    shutil.copytree(root, tmp_path / "sim")
    stub.write(tmp_path / "sim", scenes=4, seconds=2.0)
    check_same_job(encoded, encoder_of(tmp_path / "sim", encoded))
    stub.write(tmp_path / "sim", scenes=1, seconds=2.0)
    check_same_job(encoded, encoder_of(tmp_path / "sim", encoded))


def test_a_full_disk_is_told_and_not_kept_full(root, encoded, tmp_path, monkeypatch):
    from array_record.python import array_record_module

    def no_more_files(path, options):
        raise RuntimeError(f"open() failed: Too many open files; opening {path}")

    real = array_record_module.ArrayRecordWriter
    with monkeypatch.context() as patch:
        patch.setattr(array_record_module, "ArrayRecordWriter", lambda path, options: real("/dev/full", options))
        words = r"val-00000.array_record cannot be written \(write\(\) failed: No space left on device.*make room and run the same command again"
        with pytest.raises(UserError, match=words):
            stub.encode(root, tmp_path)
        assert list(tmp_path.iterdir()) == [], "a part of a shard would keep the disk full"
        patch.setattr(array_record_module, "ArrayRecordWriter", no_more_files)
        with pytest.raises(UserError, match="val-00000.array_record cannot be opened: too many files are open"):
            stub.encode(root, tmp_path)
    stub.encode(root, tmp_path)
    assert stub.tree_bytes(tmp_path) == stub.tree_bytes(encoded)


def test_encoder_of_another_size_or_with_nan(root, tmp_path):
    with pytest.raises(UserError, match=r"the expected latent shape is \(4, 4, 3\)"):
        stub.encode(root, tmp_path, latent_shape=(4, 4, 3))
    with pytest.raises(UserError, match="not finite for scene 'scene-0001'"):
        stub.encode(root, tmp_path, images=lambda x: stub.encode_images(x) * np.nan)


def test_unwritable_folder(root, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another folder"):
        stub.encode(root, tmp_path / "file")
