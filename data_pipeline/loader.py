"""The Grain pipeline that feeds training.

Order matters: batch number → clip numbers of this host's rows → clips. So row r of batch i is the same clip for any number of
hosts, and a host's whole state is the number of the next batch: resume with `grain.experimental.set_next_index(iterator, step)`. Threads,
no worker processes: worker processes tie the state to their number, and reading latents needs no more than threads.
"""

import functools

import grain
import numpy as np

from mila_jax.errors import UserError

ENDLESS = 2**62
THREADS, AHEAD = 2, 4  # of reading; batches in advance
# Clips below this size are read by one thread: reading them is mostly Python, and two threads then wait for each other's lock (on two cores 8,460
# clips/s of 86 kB by one thread, 7,740 by two; 343 and 479 clips/s of 4.8 MB).
SMALL_CLIP = 2**20


def make_loader(source, *, batch_size: int, seed: int, rows=None, shuffle: bool = True):
    """An endless Grain IterDataset of batches, each [len(rows), ...].

    source: has len() and random access to dicts of arrays, or `batch(numbers)` that gives them stacked; `clip_bytes`, if it has that, decides
    how many threads read; batch_size: over all hosts; rows:
    the rows of each batch that this host loads (`parallel.mesh.own_rows`), None = all. Each epoch is a new permutation of all clips,
    given by `seed`. Raises UserError for a batch size below 1 and for a negative seed.
    """
    if batch_size < 1:
        raise UserError(f"train.batch={batch_size} must be at least 1")
    if seed < 0:  # NumPy would refuse it only in a thread that reads
        raise UserError(f"seed={seed} must not be negative")
    rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    order = Order(len(source), seed, shuffle)

    def load(step):
        numbers = order(int(step) * batch_size + rows)
        if hasattr(source, "batch"):
            return source.batch(numbers)
        clips = [source[int(number)] for number in numbers]
        return {name: np.stack([clip[name] for clip in clips]) for name in clips[0]}

    threads = THREADS if getattr(source, "clip_bytes", SMALL_CLIP) >= SMALL_CLIP else 1
    return grain.MapDataset.range(ENDLESS).map(load).to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=AHEAD))


class Order:
    """Which clip comes at which place of an endless sequence of epochs; each epoch's permutation follows from seed and epoch alone.

    A whole epoch at once, since drawing number after number would take longer than reading the clip.
    """

    def __init__(self, clips: int, seed: int, shuffle: bool):
        self.clips, self.seed, self.shuffle = clips, seed, shuffle
        self.permutation = functools.lru_cache(2)(self._permutation)  # a batch may reach into the next epoch

    def _permutation(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.clips)
        # Raw bits: NumPy keeps a generator's stream the same for ever, but not how it shuffles.
        bits = np.random.Philox(np.random.SeedSequence([self.seed, epoch])).random_raw(self.clips)
        return np.argsort(bits, kind="stable")

    def __call__(self, places) -> np.ndarray:
        """Clip numbers [n] at places [n]."""
        epochs, inside = np.divmod(places, self.clips)
        if epochs[0] == epochs[-1] and (epochs == epochs[0]).all():
            return self.permutation(int(epochs[0]))[inside]
        return np.array([self.permutation(int(epoch))[place] for epoch, place in zip(epochs, inside)])
