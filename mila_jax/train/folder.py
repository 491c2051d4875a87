"""A run's folder. On this machine it is what it is; in a bucket it is worked on in a folder here, whose files are copied there as they change.

Logs grow by lines and pictures come one by one, which buckets do not know; and a loop must not wait for a network. So copies go up in the
background, one at a time, and what the run needs to go on on another machine comes down at its start. Checkpoints are not among it: orbax
writes them to the bucket itself.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import shutil
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
        """What another machine left, so that this one goes on with it. What an earlier start left here goes up if it is of the same run, and
        else is deleted. Raises `UserError` if the bucket cannot be reached."""
        self.path.mkdir(parents=True, exist_ok=True)
        if self._remote is None:
            return
        there = {}
        for name in SMALL:
            with contextlib.suppress(FileNotFoundError):
                there[name] = self._remote.read(name)
        if "config.json" not in there or (began := _began(there.get("goodput.jsonl"))) is None or began != _began(self._here("goodput.jsonl")):
            shutil.rmtree(self.path)
            self.path.mkdir()
        for name in SMALL:
            (self.path / name).unlink(missing_ok=True)
            if name in there:
                (self.path / name).write_bytes(there[name])
        self._copied = {name: _state(self.path / name) for name in there}

    def _here(self, name: str) -> bytes | None:
        return (self.path / name).read_bytes() if (self.path / name).exists() else None

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
        files = (pathlib.Path(folder, name) for folder, _, names in os.walk(self.path) for name in names)  # which minds no folder that vanishes
        return sorted(str(p.relative_to(self.path)) for p in files if p.is_file() and p.suffix not in (".tmp", ".partial"))

    def _copy(self, quiet: bool = True) -> None:
        for name in self._files():
            try:
                try:
                    state = _state(self.path / name)
                    if self._copied.get(name) == state:
                        continue
                    content = (self.path / name).read_bytes()
                except FileNotFoundError:  # it was some library's for a moment, and is gone since it was listed
                    continue
                self._remote.write(name, content)
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


def _began(goodput: bytes | None) -> float | None:
    """When the run of a `goodput.jsonl` was started first, by which runs of one address can be told apart; None if it does not say."""
    try:
        return json.loads((goodput or b"").partition(b"\n")[0])["began"]
    except (ValueError, KeyError, TypeError):
        return None
