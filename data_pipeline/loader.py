"""The Grain pipeline that feeds training.

Order matters: shuffle → repeat → batch of clip numbers → this host's rows → clips. So row r of batch i is the same clip for any number of
hosts, and a host's whole state is the number of the next batch: resume with `grain.experimental.set_next_index(iterator, step)`. Threads,
no worker processes: worker processes tie the state to their number, and reading latents needs no more than threads.
"""

import grain
import numpy as np

from mila_jax.errors import UserError


def make_loader(source, *, batch_size: int, seed: int, rows=None, shuffle: bool = True):
    """An endless Grain IterDataset of batches, each [len(rows), ...].

    source: has len() and random access to dicts of arrays; batch_size: over all hosts; rows: the rows of each batch that this host
    loads (`parallel.mesh.own_rows`), None = all. Each epoch is a new permutation of all clips, given by `seed`.
    Raises UserError for a batch size below 1.
    """
    if batch_size < 1:
        raise UserError(f"train.batch={batch_size} must be at least 1")
    rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    numbers = grain.MapDataset.range(len(source)).seed(seed)
    if shuffle:
        numbers = numbers.shuffle()

    def load(batch):
        clips = [source[int(number)] for number in np.asarray(batch)[rows]]
        return {name: np.stack([clip[name] for clip in clips]) for name in clips[0]}

    batches = numbers.repeat().batch(batch_size, drop_remainder=True).map(load)
    return batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
