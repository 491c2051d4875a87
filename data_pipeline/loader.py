"""The Grain pipeline that feeds training.

Order matters: shuffle → repeat → slice by host → batch. So batch i holds the same clips for any number of hosts, and a host's
whole state is the number of the next batch: resume with `grain.experimental.set_next_index(iterator, step)`. Threads, no worker
processes: worker processes tie the state to their number, and reading latents needs no more than threads.
"""

import grain

from mila_jax.errors import UserError


def make_loader(source, *, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1, shuffle: bool = True):
    """An endless Grain IterDataset of batches, each [batch_size // process_count, ...].

    source: has len() and random access. batch_size: over all hosts. Each epoch is a new permutation of all clips, given by `seed`.
    Raises UserError when the hosts cannot share the batch evenly.
    """
    if batch_size < 1 or batch_size % process_count:
        raise UserError(f"train.batch={batch_size} must be a positive multiple of the number of hosts, {process_count}")
    clips = grain.MapDataset.source(source).seed(seed)
    if shuffle:
        clips = clips.shuffle()
    clips = clips.repeat()[process_index::process_count].batch(batch_size // process_count, drop_remainder=True)
    return clips.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
