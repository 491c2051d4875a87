"""Loader speed beside what the same bytes allow: `python scripts/benchmark_loader.py [--data=LATENTS]`.

Without --data, records of full size are made up in a temporary folder (six views of 256×448 pixels, 28 frames a clip). All read the same files, from
the system's cache once it has them, with as many threads as our loader takes for such clips and with malloc as the commands set it up on CPUs.
But for the shards, all read the same clips in the same random order, in turn:

  array_record, clip by clip      the records of each clip in one call, as Grain asks ArrayRecord's data source for a batch; not decoded. ArrayRecord
                                  reads such records by its own 64 threads, whatever the number of callers
  array_record, record by record  one call for each record, as that data source is indexed; not decoded
  array_record, as asked          the same records, not decoded, in the calls that our loader makes
  array_record, whole shards      every shard from its begin to its end (`read_all`), which no shuffled loader can do
  array_record through Grain      as asked, handed over by Grain as our loader's batches are: what is left to our own code
  our loader                      our Grain loader, its memory of records off and on
  np.load, PyTorch-style          one .npz per clip; loaded, or loaded and collated

Prints the medians over the rounds of clips/s, MB/s of latents and CPU time per clip, each also as a share of the first two rows (a loaded machine
gives wall-clock time to whoever has more threads; CPU time tells what a clip costs). Last, what one host of a v5p slice needs by the
modelled step times in docs/plan.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import json
import pathlib
import statistics
import sys
import tempfile
import time

import msgspec
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data_pipeline import records  # noqa: E402
from data_pipeline.clips import ClipSource, ClipSpec  # noqa: E402
from data_pipeline.example import serialise_example  # noqa: E402
from data_pipeline.loader import AHEAD, SMALL_CLIP, THREADS, Order, make_loader  # noqa: E402
from mila_jax.malloc import keep_freed_memory  # noqa: E402

CHANNELS, HOST_CHIPS = 8, 4


def make_up(folder, latent_shape, scenes=4, instants=60) -> None:
    """An encoded data set of random latents at 12 Hz."""
    from array_record.python.array_record_module import ArrayRecordWriter

    rng, fields, entries = np.random.default_rng(0), records.record_fields(latent_shape), []
    for scene in range(scenes):
        shard = records.shard_name("train", scene)
        writer = ArrayRecordWriter(f"{folder}/{shard}", records.WRITER_OPTIONS)
        stamps = 10**12 + (np.arange(instants) * 1e6 / 12).astype(np.int64)
        for i, stamp in enumerate(stamps):
            record = {name: rng.standard_normal(shape).astype(dtype) for name, (dtype, shape) in fields.items()}
            record |= {"timestamps": np.full(6, stamp), "scene": scene, "instant": i}
            writer.write(serialise_example(record, fields))
        writer.close()
        size = pathlib.Path(f"{folder}/{shard}").stat().st_size
        entries.append(records.SceneIndex(f"scene-{scene}", "", "", "train", shard, size, size, stamps.tolist(), ""))
    channels = [1.0] * latent_shape[-1]
    index = records.Index(records.FORMAT, latent_shape, (8 * latent_shape[0], 8 * latent_shape[1]), channels, channels, {}, entries)
    pathlib.Path(f"{folder}/index.json").write_bytes(msgspec.json.encode(index))
    np.savez(f"{folder}/text.npz", tokens=np.zeros((scenes, 32, 384), np.float32), mask=np.ones((scenes, 32), bool))


def threads_for(source: ClipSource) -> int:
    """As many as make_loader takes."""
    return THREADS if source.clip_bytes >= SMALL_CLIP else 1


def threaded(work, threads: int):
    """Results of work(0), work(1), … in order, as Grain has them: by so many threads, AHEAD results in advance."""
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        coming = collections.deque(pool.submit(work, step) for step in range(AHEAD))
        try:
            for step in range(AHEAD, sys.maxsize):
                done = coming.popleft().result()
                coming.append(pool.submit(work, step))
                yield done
        finally:
            for future in coming:
                future.cancel()


class Undecoded:
    """A source of clips that reads their records as a `ClipSource` does and leaves it at that."""

    def __init__(self, source: ClipSource, numbers):
        self.source, self.numbers, self.clip_bytes = source, numbers, source.clip_bytes

    def __len__(self):
        return len(self.source)

    def batch(self, items):
        """Records of clips `items`."""
        return {"records": [self.source.reader.read(self.numbers[item].tolist()) for item in items]}


def jobs_of(data, spec: ClipSpec, batch: int, folder):
    """(name → generator of numbers of clips done, MB of latents of a clip)."""
    from array_record.python.array_record_module import ArrayRecordReader

    uncached, cached = ClipSource(data, "train", [spec], cache_bytes=0), ClipSource(data, "train", [spec])
    scenes, numbers = uncached.clips[0]
    readers = [ArrayRecordReader(f"{data}/{s.shard}", options="readahead_buffer_size:0") for s in uncached.reader.scenes]
    first, order, rows = uncached.reader.first, Order(len(uncached), 0, True), np.arange(batch)

    def alone(step):
        for clip in order(step * batch + rows):
            readers[scenes[clip]].read((numbers[clip] - first[scenes[clip]]).tolist())
        return batch

    def by_record(step):
        for clip in order(step * batch + rows):
            read = readers[scenes[clip]].read
            for number in (numbers[clip] - first[scenes[clip]]).tolist():
                read([number])
        return batch

    of_clip = len(numbers[0])
    whole = [ArrayRecordReader(f"{data}/{s.shard}") for s in uncached.reader.scenes]

    def shards(step):
        return len(whole[step % len(whole)].read_all()) / of_clip

    def as_asked(step):
        for clip in order(step * batch + rows):
            uncached.reader.read(numbers[clip].tolist())
        return batch

    def through_grain():
        with contextlib.closing(iter(make_loader(Undecoded(uncached, numbers), batch_size=batch, seed=0))) as batches:
            for _ in batches:
                yield batch

    def ours(source):
        with contextlib.closing(iter(make_loader(source, batch_size=batch, seed=0))) as batches:
            for found in batches:
                yield len(found["latents"])

    files = [f"{folder}/{i}.npz" for i in range(min(256, len(uncached), int(1e9 / uncached[0]["latents"].nbytes)))]
    for i, file in enumerate(files):
        np.savez(file, **uncached[i])

    def load(i):
        with np.load(files[i % len(files)]) as file:
            return {k: file[k] for k in file.files}

    def collate(step):
        found = [load(step * batch + i) for i in range(batch)]
        {k: np.stack([clip[k] for clip in found]) for k in found[0]}
        return batch

    def by(work):
        return lambda: threaded(work, threads_for(uncached))

    jobs = {
        "array_record, clip by clip": by(alone),
        "array_record, record by record": by(by_record),
        "array_record, as asked": by(as_asked),
        "array_record, whole shards": by(shards),
        "array_record through Grain": through_grain,
        "our loader, no memory of records": lambda: ours(uncached),
        "our loader": lambda: ours(cached),
        "np.load": by(lambda step: [load(step * batch + i) for i in range(batch)] and batch),
        "PyTorch-style, np.load and collate": by(collate),
    }
    return jobs, uncached[0]["latents"].nbytes / 1e6


def measure(jobs, rounds: int, seconds: float) -> dict[str, tuple[float, float]]:
    """Medians of (clips/s, CPU seconds per clip) of each job; the jobs take turns."""
    found: dict[str, list] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            with contextlib.closing(job()) as items:
                for _ in range(AHEAD + 1):  # what was done in advance is not this time's work
                    next(items)
                done, began, cpu = 0, time.perf_counter(), time.process_time()
                while time.perf_counter() - began < seconds:
                    done += next(items)
                found[name].append((done / (time.perf_counter() - began), (time.process_time() - cpu) / done))
    return {name: tuple(statistics.median(column) for column in zip(*rows)) for name, rows in found.items()}


def needs():
    """(plan, clips/s of a host, MB of latents a clip) of the v5p training plan that takes most, at its fastest (`roofline`) step time."""
    best = ("", 0.0, 0.0)
    for path in sorted((ROOT / "docs/plan").glob("*.json")):
        plan = json.loads(path.read_text())
        if plan["step"] == "train" and plan["chip"]["name"] == "v5p" and "seconds" in plan:
            sizes, hosts = plan["sizes"], plan["devices"] / HOST_CHIPS
            rate = sizes["batch"] / hosts / plan["seconds"]["roofline"]
            megabytes = sizes["frames"] * sizes["tokens_per_frame"] * 4 * CHANNELS * 2 / 1e6  # 2×2 latents a token, two bytes each
            if rate * megabytes > best[1] * best[2]:
                best = (path.stem, rate, megabytes)
    return best


def main():
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data")
    parser.add_argument("--frames", type=int, help="of a clip; 8, or 28 without --data")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        data = options.data or f"{folder}/data"
        if not options.data:
            pathlib.Path(data).mkdir()
            make_up(data, (32, 56, CHANNELS))
        spec = ClipSpec(options.frames or (8 if options.data else 28), 2, 12.0)
        jobs, megabytes = jobs_of(data, spec, options.batch, folder)
        threads = threads_for(ClipSource(data, "train", [spec], cache_bytes=0))
        found = measure(jobs, options.rounds, options.seconds)
    by_clip, by_record = found["array_record, clip by clip"], found["array_record, record by record"]
    print(
        f"{megabytes:.3f} MB of latents a clip, batches of {options.batch}, {threads} thread(s); shares are of array_record's first row and of its second"
    )
    for name, (rate, cpu) in found.items():
        shares = f"{rate / by_clip[0]:6.2f} {rate / by_record[0]:5.2f}"
        print(
            f"{name:36}{rate:8.0f} clips/s {rate * megabytes:6.0f} MB/s {shares}   {cpu * 1e6:7.0f} us CPU a clip, {by_clip[1] / cpu:.2f} {by_record[1] / cpu:.2f}"
        )
    plan, rate, full = needs()
    reached = found["our loader, no memory of records"][0] * megabytes
    print(
        f"a v5p host ({HOST_CHIPS} chips) takes at most {rate:.2f} clips/s of {full:.2f} MB = {rate * full:.1f} MB/s ({plan}, modelled); "
        f"our loader reached {reached:.0f} MB/s, {reached / rate / full:.0f} times as much"
    )


if __name__ == "__main__":
    main()
