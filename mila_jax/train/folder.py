"""A run's folder. On this machine it is what it is; in a bucket it is worked on in a folder here, whose files are copied there as they change.

Logs grow by lines and pictures come one by one, which buckets do not know; and a loop must not wait for a network. So copies go up in the
background, one at a time, and what the run needs to go on on another machine comes down at its start. Checkpoints are not among it: orbax
writes them to the bucket itself.
"""

import concurrent.futures
import contextlib
import hashlib
import os
import pathlib
import sys

from data_pipeline.storage import Folder, is_remote
from mila_jax.errors import UserError

SMALL = ("config.json", "prior.json", "metrics.jsonl", "goodput.jsonl", "model.safetensors")


class RunFolder:
    """`path`: where files are read and written, a folder of this machine; `address`: what the user calls it."""

    def __init__(self, address):
        self.address = str(address)
        self._remote = Folder(self.address) if is_remote(self.address) else None
        if self._remote is None:
            self.path = pathlib.Path(self.address)
            return
        home = pathlib.Path(os.environ.get("MILA_CACHE") or pathlib.Path.home() / ".cache" / "mila_jax")
        self.path = home / "runs" / hashlib.sha256(self.address.encode()).hexdigest()[:16]
        self._copied: dict[str, tuple] = {}
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="run-folder")
        self._last, self._told = None, False

    def fetch(self) -> None:
        """What another machine left, so that this one goes on with it. Raises `UserError` if the bucket cannot be reached."""
        self.path.mkdir(parents=True, exist_ok=True)
        if self._remote is None:
            return
        for name in SMALL:
            with contextlib.suppress(FileNotFoundError):
                (self.path / name).unlink(missing_ok=True)  # what lies here may be of a run that is no more
                (self.path / name).write_bytes(self._remote.read(name))
        self._copied = {name: _state(self.path / name) for name in self._files()}

    def push(self) -> None:
        """Starts copying what has changed; returns at once."""
        if self._remote is not None and (self._last is None or self._last.done()):
            self._last = self._pool.submit(self._copy)

    def finish(self) -> None:
        """Copies what has changed and waits for it. Raises `UserError` if that fails."""
        if self._remote is None:
            return
        self._pool.submit(self._copy, quiet=False).result()

    def _files(self) -> list[str]:
        return sorted(str(p.relative_to(self.path)) for p in self.path.rglob("*") if p.is_file() and p.suffix not in (".tmp", ".partial"))

    def _copy(self, quiet: bool = True) -> None:
        for name in self._files():
            state = _state(self.path / name)
            if self._copied.get(name) == state:
                continue
            try:
                self._remote.write(name, (self.path / name).read_bytes())
                self._copied[name] = state
            except (UserError, OSError) as error:
                if not quiet:
                    raise
                if not self._told:
                    print(f"warning: {self.address} does not take {name} ({error}); trying again at the next log", file=sys.stderr, flush=True)
                self._told = True
                return
        self._told = False


def _state(path) -> tuple:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
