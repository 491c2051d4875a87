"""Windows of a video on disk while it is made, so that an interrupted generation goes on where it stopped."""

import contextlib
import json
import pathlib
import zipfile

import numpy as np

from data_pipeline.records import write_atomically
from mila_jax.errors import UserError


def differences(old, new, prefix=""):
    """Dotted names of what differs between two trees of plain values, with both values where they are short."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [line for key in sorted(old.keys() | new.keys()) for line in differences(old.get(key), new.get(key), f"{prefix}{key}.")]
    if old == new:
        return []
    values = f" ({old} then, {new} now)" if len(str(old)) + len(str(new)) < 60 else ""
    return [prefix.rstrip(".") + values]


def is_finished(folder, identity: dict, files) -> bool:
    """Whether the video of `identity` is finished in `folder`, with all of `files` there.

    generate.json, written last, says which video it is. Raises `UserError` if another video is finished there, or files that nothing is known of are.
    """
    record = pathlib.Path(folder) / "generate.json"
    try:
        about = json.loads(record.read_text())
        old = about["identity"]
    except FileNotFoundError:
        there = [file for file in files if (record.parent / file).exists()]
        if there and not (record.parent / "unfinished" / "identity.json").exists():
            raise UserError(f"{folder} holds {there[0]}, and nothing tells that mila generate made it; choose another --out") from None
        return False
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder} holds a finished video, but {record} does not tell which; remove that folder, or choose another --out") from None
    different = differences(old, json.loads(json.dumps(identity)))
    if different:
        raise UserError(
            f"{folder} holds another finished video, which differs in {', '.join(different[:4])}; remove that folder, or choose another --out"
        )
    return all((record.parent / file).exists() for file in files)


class Unfinished:
    """The windows of one video in a folder: window-00000.npy and so on, float32, each written whole or not at all.

    identity: plain values that decide what the windows are (weights, settings, seed, start). Windows of another video there are removed with
    `replace`, else refused by a `UserError`.
    """

    def __init__(self, folder, identity: dict, replace: bool = False):
        self.folder = pathlib.Path(folder)
        record = self.folder / "identity.json"
        identity = json.loads(json.dumps(identity))
        if record.exists():
            try:
                old = json.loads(record.read_text())
            except (OSError, ValueError):
                old = {}
            different = differences(old, identity)
            if different and replace:
                self.remove()
            elif different:
                raise UserError(
                    f"{self.folder} holds the first windows of another video, which differs in {', '.join(different[:4])}; "
                    "finish it with those settings, remove that folder, or choose another --out"
                )
        if not record.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                write_atomically(record, json.dumps(identity, indent=1).encode())
            except OSError as error:
                raise UserError(f"{record} cannot be written ({error.strerror or error}); make room, or choose another --out") from None

    def _path(self, number: int) -> pathlib.Path:
        return self.folder / f"window-{number:05d}.npy"

    def read(self, shape):
        """Yields the windows from the first on, up to one that is missing or damaged. `shape`: of each."""
        number = 0
        while self._path(number).exists():
            try:
                with self._path(number).open("rb") as file:
                    window = np.load(file, allow_pickle=False)
            except (ValueError, OSError, EOFError, zipfile.BadZipFile):
                return
            if window.shape != tuple(shape) or window.dtype != np.float32:
                return
            yield window
            number += 1

    def write(self, number: int, window) -> None:
        """Keeps window `number`. Raises `UserError` if it cannot be written."""
        partial = self._path(number).with_suffix(".tmp")
        try:
            with partial.open("wb") as file:
                np.save(file, np.asarray(window, np.float32))
            partial.replace(self._path(number))
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise UserError(
                f"{self._path(number)} cannot be written ({error.strerror or error}); make room and run the same command again, it goes on there"
            ) from None

    def remove(self) -> None:
        """Removes the folder: the video is finished."""
        for file in [*self.folder.glob("window-*.npy"), *self.folder.glob("window-*.tmp"), self.folder / "identity.json"]:
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # something else lies in it
            self.folder.rmdir()
