"""`mila prepare` as one process, as several on this machine, or as one part of a job that many machines share.

A job is described by the config alone (as JSON), so that any process anywhere can open it: `mila_jax.prepare.open_encoder`.
"""

import concurrent.futures
import json
import multiprocessing

import ml_collections

from data_pipeline.encode import Part, encode_part
from mila_jax.errors import UserError


def parse_part(text: str | None) -> Part:
    """Of "3/16": part 3 of 16 (numbered from 0); None → this process's part of an initialised `jax.distributed` job, else the whole."""
    if text is None:
        import jax

        return Part(jax.process_index(), jax.process_count()) if jax.distributed.is_initialized() else Part()
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit()):
        raise UserError(f"--part={text} must be written I/N, e.g. 0/16 to 15/16")
    return Part(int(index), int(count))


def open_from_settings(settings: str):
    """(scene encoder, text encoder) of a config given as JSON."""
    from mila_jax.prepare import open_encoder

    return open_encoder(ml_collections.ConfigDict(json.loads(settings)))


def run_workers(settings: str, part: Part, workers: int) -> None:
    """Encodes a part's scenes in `workers` processes of this machine, each with its own copy of the networks; writes no index.

    Fresh processes, since a forked JAX may hang. Raises what a worker raises; the shards that the others finish stay.
    """
    parts = [Part(part.index + part.count * i, part.count * workers) for i in range(workers)]
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        try:
            for future in concurrent.futures.as_completed([pool.submit(_worker, settings, p) for p in parts]):
                future.result()
        except concurrent.futures.process.BrokenProcessPool:
            raise UserError("an encoding process was killed (out of memory?); finished shards are kept, lower data.workers and run again") from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _worker(settings: str, part: Part) -> None:
    import jax

    from mila_jax.runtime import use_chosen_platform

    use_chosen_platform()
    if jax.default_backend() != "cpu":
        raise UserError(
            f"data.workers is for CPUs: a {jax.default_backend().upper()} belongs to one process, which uses all its devices; set data.workers=1"
        )
    encode_part(open_from_settings(settings)[0], part, progress=False)
