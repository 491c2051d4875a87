"""Loader speed beside what the same bytes allow: `python scripts/benchmark_loader.py --data=LATENTS`.

In turn, on the clips of one training config: array_record alone (the records of each clip, not decoded), our Grain loader with its memory
of records off and on, np.load of one .npz per clip, and the plain loop of a PyTorch-style loader over those (load, collate). Prints
clips/s and MB/s of latents; the median of the rounds.
"""

import argparse
import pathlib
import statistics
import sys
import tempfile
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from data_pipeline.clips import ClipSource, ClipSpec  # noqa: E402
from data_pipeline.loader import make_loader  # noqa: E402


def main():
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    spec = ClipSpec(options.frames, 2, 12.0)
    uncached = ClipSource(options.data, "train", [spec], cache_bytes=0)
    cached = ClipSource(options.data, "train", [spec])
    numbers = np.random.default_rng(0).permutation(len(uncached))
    scenes, records = uncached.clips[0]
    clip_mb = uncached[0]["latents"].nbytes / 1e6

    def raw():
        for clip in numbers:
            chosen = records[clip % len(scenes)]
            scene = int(np.searchsorted(uncached.reader.first, chosen[0], "right")) - 1
            uncached.reader._reader(scene).read([int(n - uncached.reader.first[scene]) for n in chosen])
            yield 1

    def loader(source):
        for batch in make_loader(source, batch_size=options.batch, seed=0):
            yield len(batch["latents"])

    with tempfile.TemporaryDirectory() as folder:
        files = []
        for n in numbers[:256]:
            files.append(f"{folder}/{n}.npz")
            np.savez(files[-1], **uncached[int(n)])

        def npz():
            while True:
                for file in files:
                    with np.load(file) as z:
                        {k: z[k] for k in z.files}
                    yield 1

        def torch_style():
            while True:
                for first in range(0, len(files), options.batch):
                    rows = []
                    for file in files[first : first + options.batch]:
                        with np.load(file) as z:
                            rows.append({k: z[k] for k in z.files})
                    {k: np.stack([row[k] for row in rows]) for k in rows[0]}
                    yield len(rows)

        jobs = {"array_record alone": raw, "our loader, no memory of records": lambda: loader(uncached), "our loader": lambda: loader(cached),
                "np.load": npz, "PyTorch-style, np.load and collate": torch_style}  # fmt: skip
        rates: dict[str, list[float]] = {name: [] for name in jobs}
        for _ in range(options.rounds):
            for name, job in jobs.items():
                items, done = iter(job()), 0
                next(items)
                began = time.perf_counter()
                while time.perf_counter() - began < options.seconds:
                    done += next(items, 0)
                rates[name].append(done / (time.perf_counter() - began))
        base = statistics.median(rates["array_record alone"])
        for name, found in rates.items():
            rate = statistics.median(found)
            print(f"{name:36} {rate:8.0f} clips/s {rate * clip_mb:8.0f} MB/s  {rate / base:.2f} of array_record alone")


if __name__ == "__main__":
    main()
