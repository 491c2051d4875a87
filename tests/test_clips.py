"""Clips by time: which frames, which starts, what a clip holds; and damaged data sets."""

import concurrent.futures
import contextlib
import os
import resource
import shutil

import msgspec
import numpy as np
import pytest

from data_pipeline import records
from data_pipeline.clips import ClipSource, ClipSpec, find_starts, interleave, read_scene
from data_pipeline.example import parse_example, serialise_example
from mila_jax.errors import UserError
from tests import nuscenes_stub as stub


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    stub.write(path / "sim", scenes=3, seconds=6.0)
    stub.encode(path / "sim", path / "enc")
    return path / "enc"


def test_wanted_times():
    np.testing.assert_allclose(ClipSpec(6, 3, 2.0).offsets(), [-2 / 12, -1 / 12, 0, 0.5, 1.0, 1.5])
    np.testing.assert_allclose(ClipSpec(3, 1, 12.0).offsets(), [0, 1 / 12, 2 / 12])
    np.testing.assert_allclose(ClipSpec(4, 2, 2.0, conditioning_fps=2.0).offsets(), [-0.5, 0, 0.5, 1.0])


@pytest.mark.parametrize("spec", [ClipSpec(5, 2, 12.0), ClipSpec(4, 1, 2.0), ClipSpec(4, 3, 1.0), ClipSpec(4, 2, 2.0, 1.0)])
def test_starts_are_those_that_an_exhaustive_search_finds(spec):
    rng = np.random.default_rng(0)
    turns = np.rint(np.arange(120) * 5 / 3) * 0.05 + rng.uniform(-1e-3, 1e-3, 120)
    times = np.delete(turns, [17, 18, 60, 90])
    starts, chosen = find_starts(times, spec)
    expected = []
    for i, t in enumerate(times):
        near = [int(np.argmin(np.abs(times - (t + o)))) for o in spec.offsets()]
        if all(abs(times[n] - (t + o)) <= 1 / 24 for n, o in zip(near, spec.offsets())):
            expected.append((i, near))
    assert [int(s) for s in starts] == [i for i, _ in expected] and chosen.tolist() == [n for _, n in expected]
    assert 0 < len(starts) < len(times)
    assert all(chosen[:, spec.conditioning - 1] == starts)
    whole = find_starts(turns, spec)[0]
    assert len(whole) > len(starts), "missing frames must cost starts"


def test_a_clip_holds_its_frames(encoded):
    spec = ClipSpec(5, 2, 2.0)
    source = ClipSource(encoded, "train", [spec])
    scenes = {name: read_scene(encoded, name) for name in ("scene-0002", "scene-0003")}
    seen = set()
    for i in range(len(source)):
        clip = source[i]
        scene = scenes[f"scene-000{int(clip['text'][0, 0])}"]
        number = source.clips[0][1][i]
        rows = number - source.reader.first[source.clips[0][0][i]]
        seen.add((scene["name"], int(rows[1])))
        assert {k: v.shape for k, v in clip.items()} == {
            "latents": (6, 5, *stub.LATENT_SHAPE),
            "intrinsics": (6, 5, 4),
            "extrinsics": (6, 5, 7),
            "waypoints": (5, 3),
            "frame_times": (5,),
            "fps": (),
            "conditioning": (),
            "text": (4, 5),
            "text_mask": (4,),
        }
        assert all(clip[k].dtype == np.float32 for k in clip if k not in ("conditioning", "text_mask", "latents"))
        assert clip["latents"].dtype == np.float16, "widened where they are used: a host takes longer for that than for reading"
        assert clip["fps"] == 2 and clip["conditioning"] == 2 and clip["conditioning"].dtype == np.int32
        np.testing.assert_array_equal(clip["latents"], scene["latents"][rows].swapaxes(0, 1))
        assert np.abs(clip["frame_times"] - spec.offsets()).max() <= 1 / 24 and clip["frame_times"][1] == 0
        # The stub drives straight on at a constant speed, so waypoints are times.
        np.testing.assert_allclose(clip["waypoints"][:, 0], stub.SPEED * clip["frame_times"], atol=1e-4)
        np.testing.assert_allclose(clip["waypoints"][:, 1:], 0, atol=1e-6)
        np.testing.assert_array_equal(clip["extrinsics"][:, 3, :3], scene["cam2ego_translation"][0])
        np.testing.assert_array_equal(clip["extrinsics"][:, 3, 3:], scene["cam2ego_rotation"][0])
    assert len(seen) == len(source) and {s for s, _ in seen} == set(scenes)


def test_rates_are_mixed_by_weight_and_every_start_occurs(encoded):
    specs = [ClipSpec(4, 1, 12.0), ClipSpec(4, 1, 2.0), ClipSpec(4, 2, 1.0)]
    source = ClipSource(encoded, "train", specs, weights=[3, 1, 0])
    rates = np.array([float(source[i]["fps"]) for i in range(len(source))])
    assert set(rates) == {12.0, 2.0}
    for start in range(0, len(source), 4):
        assert (rates[start : start + 4] == 12).sum() == 3
    slow = {tuple(source.clips[1][1][c]) for c in range(len(source.clips[1][0]))}
    assert len(source) // 4 * 3 >= len(source.clips[0][0]) and len(source) // 4 >= len(slow)
    again = ClipSource(encoded, "train", specs, weights=[3, 1, 0], cache_bytes=1000)
    for i in (0, 5, len(source) - 1):
        assert all(np.array_equal(source[i][k], again[i][k]) for k in source[i])
    assert again.cache.bytes <= 1000
    with pytest.raises(IndexError):
        source[len(source)]


def test_a_batch_is_its_clips_stacked(encoded):
    source = ClipSource(encoded, "train", [ClipSpec(4, 1, 12.0), ClipSpec(4, 2, 2.0)], cache_bytes=0)
    items = [len(source) - 1, 0, 3, 3, 8]
    batch, clips = source.batch(items), [source[i] for i in items]
    for name, values in batch.items():
        assert values.dtype == clips[0][name].dtype
        np.testing.assert_array_equal(values, np.stack([clip[name] for clip in clips]))
    assert set(batch["conditioning"].tolist()) == {1, 2}


def test_records_whose_fields_lie_in_any_order(encoded, tmp_path):
    """Protobuf libraries write a map's entries in an order of their own, which differs from record to record."""
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

    shutil.copytree(encoded, tmp_path / "enc")
    fields = records.record_fields(stub.LATENT_SHAPE)
    shard = tmp_path / "enc/train-00000.array_record"
    reader = ArrayRecordReader(str(shard))
    found = [parse_example(data, fields) for data in reader.read_all()]
    reader.close()
    writer = ArrayRecordWriter(str(shard), records.WRITER_OPTIONS)
    for i, record in enumerate(found):
        names = list(np.random.default_rng(i).permutation(list(fields)))
        writer.write(serialise_example(record, {name: fields[name] for name in names}))
    writer.close()
    expected, again = (ClipSource(folder, "train", [ClipSpec(5, 2, 12.0)]) for folder in (encoded, tmp_path / "enc"))
    for name, values in again.batch(range(8)).items():
        np.testing.assert_array_equal(values, expected.batch(range(8))[name])


def test_interleave():
    assert interleave([1, 1]) == [0, 1]
    assert interleave([0, 2]) == [1]
    assert sorted(interleave([0.5, 0.25, 0.25])) == [0, 0, 1, 2] and interleave([0.5, 0.25, 0.25])[0] == 0
    assert interleave([1, 1e-9]).count(1) == 1
    for weights in ([0.995, 0.005], [0.498, 0.498, 0.004], [0.992, 0.004, 0.004], [0.9, 0.09, 0.01], [0.49, 0.31, 0.2]):
        pattern = interleave(weights)
        assert len(pattern) <= 62 and set(pattern) == set(range(len(weights)))
        assert all(abs(pattern.count(i) / len(pattern) - w) < 1 / 40 for i, w in enumerate(weights)), weights


def with_text(encoded, folder, tokens):
    """A copy of the data set whose text.npz holds `tokens` [scenes, l, e]."""
    shutil.copytree(encoded, folder)
    np.savez(folder / "text.npz", tokens=tokens, mask=np.ones(tokens.shape[:2], bool))
    return folder


def test_text_is_kept_as_stored_and_of_the_split_alone(encoded, tmp_path):
    tokens = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)
    for kind in (np.float16, np.float32):
        folder = with_text(encoded, tmp_path / kind.__name__, tokens.astype(kind))
        source = ClipSource(folder, "train", [ClipSpec(4, 1, 12.0)])
        assert source.text.dtype == kind and source.text.shape == (2, 4, 5) and source.text_mask.shape == (2, 4)
        batch = source.batch(range(len(source)))
        scenes = [source.clips[0][0][source.locate(item)[1]] for item in range(len(source))]
        assert batch["text"].dtype == np.float32 and set(scenes) == {0, 1}
        np.testing.assert_array_equal(batch["text"], tokens.astype(kind)[1:][scenes])
        found = read_scene(folder, "scene-0002")["text"]
        assert found.dtype == np.float32 and np.array_equal(found, tokens[1].astype(kind))


def test_window_longer_than_the_data(encoded):
    with pytest.raises(UserError, match=r"window.frames=40 at train.fps=2 .*longest possible is window.frames=(\d+)") as caught:
        ClipSource(encoded, "train", [ClipSpec(40, 1, 2.0)])
    best = int(str(caught.value).rsplit("=", 1)[1])
    assert 10 <= best <= 13 and len(ClipSource(encoded, "train", [ClipSpec(best, 1, 2.0)])) > 0
    with pytest.raises(UserError, match=f"window.frames={best}$"):
        ClipSource(encoded, "train", [ClipSpec(best + 1, 1, 2.0)])


@pytest.mark.parametrize(
    "specs, weights, words",
    [
        ([], None, "train.fps is empty"),
        ([ClipSpec(4, 1, 2.0), ClipSpec(5, 1, 2.0)], None, "window.frames must be the same"),
        ([ClipSpec(4, 4, 2.0)], None, "window.conditioning=4"),
        ([ClipSpec(4, 0, 2.0)], None, "window.conditioning=0"),
        ([ClipSpec(4, 1, 24.0)], None, "train.fps=24"),
        ([ClipSpec(4, 1, 0.0)], None, "train.fps=0"),
        ([ClipSpec(4, 2, 2.0, 0.0)], None, "conditioning_fps=0"),
        ([ClipSpec(4, 1, 2.0)], [0.0], "train.fps_weights"),
        ([ClipSpec(4, 1, 2.0)], [1.0, 2.0], "train.fps_weights"),
    ],
)
def test_settings_that_make_no_sense(encoded, specs, weights, words):
    with pytest.raises(UserError, match=words):
        ClipSource(encoded, "train", specs, weights)


def test_unknown_split_scene_and_folder(encoded, tmp_path):
    with pytest.raises(UserError, match="no split 'test', only train, val"):
        ClipSource(encoded, "test", [ClipSpec(4, 1, 2.0)])
    with pytest.raises(UserError, match="no scene 'scene-9999'; it has scene-0001"):
        read_scene(encoded, "scene-9999")
    with pytest.raises(UserError, match="run `mila prepare` again"):
        read_scene(tmp_path, "scene-0001")


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "overwritten":
        content[len(content) // 3 : len(content) // 3 + 4000] = bytes(4000)
    elif how == "footer":
        content[-65536 : -65536 + 3000] = bytes(3000)  # the block that says where the footer lies
    path.write_bytes(content)


@pytest.mark.parametrize("how, words", [("truncated", "truncated"), ("overwritten", "damaged"), ("footer", "cannot be opened|damaged")])
def test_a_damaged_shard_is_named(encoded, tmp_path, how, words):
    shutil.copytree(encoded, tmp_path / "enc")
    damage(tmp_path / "enc/train-00001.array_record", how)
    with pytest.raises(UserError, match=rf"train-00001.array_record.*({words}).*run `mila prepare` again"):
        source = ClipSource(tmp_path / "enc", "train", [ClipSpec(4, 1, 12.0)])
        for i in range(len(source)):
            source[i]
    # The other scenes are intact.
    assert len(read_scene(tmp_path / "enc", "scene-0001")["times"]) > 30


def many_shards(encoded, folder, count):
    """A data set of `count` training scenes: those of `encoded` over and over, each a file of its own."""
    index = records.read_index(encoded)
    train, scenes = [s for s in index.scenes if s.split == "train"], []
    folder.mkdir()
    for number in range(count):
        shard = records.shard_name("train", number)
        scenes.append(msgspec.structs.replace(train[number % len(train)], shard=shard))
        os.link(encoded / train[number % len(train)].shard, folder / shard)
    (folder / "index.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(index, scenes=scenes)))
    return folder


def open_files():
    """Numbers of this process's open files."""
    return [int(name) for name in os.listdir("/dev/fd")]


@contextlib.contextmanager
def file_limit(more):
    """At most `more` files than now can be open, as under a lower `ulimit -n`, which is the number that no open file may reach."""
    used = open_files()
    number = next(n for n in range(len(used) + more + 1) if n - sum(u < n for u in used) == more)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_shards_than_files_may_be_open(encoded, tmp_path):
    """150 shards, of which any thread reads any, where 100 files may be open."""
    folder = many_shards(encoded, tmp_path / "enc", 150)
    before = open_files()
    with file_limit(100):
        _, reader = records.open_split(folder, "train")
        assert len(open_files()) <= len(before) + 2, "none stays open that nobody reads"
        _, few = records.open_split(encoded, "train")
        whole, last = few.read(range(few.first[-1])), int(reader.first[-1])
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            numbers = np.random.default_rng(0).integers(0, last, (400, 3)).tolist()
            for asked, found in zip(numbers, pool.map(reader.read, numbers)):
                assert found == [whole[n % len(whole)] for n in asked]
        assert len(open_files()) <= len(before) + 64 + 4


def test_a_shard_that_makes_room_stays_readable_for_who_reads_it(encoded, tmp_path, monkeypatch):
    monkeypatch.setitem(records.OPEN_SHARDS, "local", 1)
    _, reader = records.open_split(many_shards(encoded, tmp_path / "enc", 12), "train")
    held = reader._reader(0)
    (expected,) = held.read([5])
    reader.read(reader.first[1:-1])
    assert list(reader._readers) == [11] and held.read([5]) == [expected] == reader.read([5])


def test_too_many_open_files_are_no_damage(encoded, tmp_path):
    _, reader = records.open_split(encoded, "train")
    with file_limit(0):
        for read in (lambda: reader.read([0]), lambda: records.read_index(encoded), lambda: records.read_text(encoded, 3)):
            with pytest.raises(UserError, match=r"cannot be opened: too many files are open; .*`ulimit -n 8192`") as caught:
                read()
            assert "damaged" not in str(caught.value) and "prepare" not in str(caught.value)
    assert len(reader.read([0])) == 1, "and it goes on when there are fewer"
    shutil.copytree(encoded, tmp_path / "enc")
    _, reader = records.open_split(tmp_path / "enc", "train")
    shard = tmp_path / "enc/train-00000.array_record"
    shard.unlink()
    with pytest.raises(UserError, match=r"train-00000.array_record cannot be read \(open\(\) failed: No such file"):
        reader.read([0])


def test_other_broken_files(encoded, tmp_path):
    shutil.copytree(encoded, tmp_path / "enc")
    (tmp_path / "enc/train-00000.array_record").unlink()
    with pytest.raises(UserError, match="train-00000.array_record is missing"):
        records.open_split(tmp_path / "enc", "train")
    text = (tmp_path / "enc/text.npz").read_bytes()
    for content in (text[:100], b"", text[: len(text) - 60]):
        (tmp_path / "enc/text.npz").write_bytes(content)
        with pytest.raises(UserError, match="text.npz cannot be read"):
            read_scene(tmp_path / "enc", "scene-0001")
    index = (tmp_path / "enc/index.json").read_bytes()
    (tmp_path / "enc/index.json").write_bytes(index.replace(b'"format":1', b'"format":99'))
    with pytest.raises(UserError, match="format 99"):
        records.read_index(tmp_path / "enc")
    (tmp_path / "enc/index.json").write_bytes(index[:50])
    with pytest.raises(UserError, match="index.json cannot be read"):
        records.read_index(tmp_path / "enc")
