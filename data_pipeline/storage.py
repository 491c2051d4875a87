"""A folder of files on this machine or in a bucket (gs://…, or any other address that fsspec knows).

ArrayRecord reads gs:// by itself but writes local files only; so whoever writes makes the file here and copies it (`Folder.put`).
A file appears complete or not at all: renamed into place on a disk, uploaded as one object in a bucket.
"""

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

import fsspec

from mila_jax.errors import UserError


def is_remote(path) -> bool:
    """Whether `path` is an address such as gs://bucket/folder."""
    return "://" in str(path)


def join(folder, name: str):
    """`folder`/`name`: a Path on this machine, a string in a bucket."""
    return f"{str(folder).rstrip('/')}/{name}" if is_remote(folder) else Path(folder) / name


def open_filesystem(url: str):
    """(filesystem, path in it) of an address. `UserError` for an unknown kind and for a missing package."""
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        remedy = "pip install 'mila_jax[gcs]'" if str(url).startswith(("gs://", "gcs://")) else str(error)
        raise UserError(f"{url} needs a package that is not installed: {remedy}") from None
    except ValueError as error:
        raise UserError(f"{url}: {error}; give a folder or a gs:// address") from None


@contextlib.contextmanager
def named_errors(path, doing: str):
    """Turns what a bucket's client raises into one `UserError` that names the address; errors of local files pass as they are."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_remote(path) or isinstance(error, FileNotFoundError):
            raise
        lines = str(error).strip().splitlines()
        raise UserError(
            f"{path} cannot be {doing} ({lines[0][:160] if lines else type(error).__name__}); check the address and your access"
        ) from error


def read_file(url: str) -> bytes:
    """The content of a file in a bucket; FileNotFoundError when there is none, `UserError` when it cannot be read."""
    fs, path = open_filesystem(url)
    with named_errors(url, "read"):
        return fs.cat_file(path)


def list_names(path) -> list[str]:
    """Names of the files in a folder or under an address; none when it is not there."""
    try:
        if not is_remote(path):
            return os.listdir(path)
        fs, inside = open_filesystem(path)
        with named_errors(path, "listed"):
            return [name.rpartition("/")[2] for name in fs.ls(inside, detail=False)]
    except OSError:
        return []


class Folder:
    """Files by name in one folder; local errors are OSErrors, those of a bucket UserErrors."""

    def __init__(self, path):
        self.path, self.remote = path if is_remote(path) else Path(path), is_remote(path)
        if self.remote:
            self.fs, self.base = open_filesystem(str(path))

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        """The folder's own name."""
        return str(self.path).rstrip("/").rpartition("/")[2]

    def at(self, name: str):
        """Where `name` lies: a Path, or an address."""
        return join(self.path, name)

    def _inside(self, name: str) -> str:
        return f"{self.base.rstrip('/')}/{name}"

    def make(self) -> None:
        """Creates the folder (a bucket needs none)."""
        if not self.remote:
            self.path.mkdir(parents=True, exist_ok=True)

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        if not self.remote:
            return self.at(name).exists()
        with named_errors(self.at(name), "read"):
            return self.fs.exists(self._inside(name))

    def size(self, name: str) -> int:
        """Its bytes; FileNotFoundError when there is none."""
        if not self.remote:
            return self.at(name).stat().st_size
        with named_errors(self.at(name), "read"):
            return int(self.fs.size(self._inside(name)))

    def state(self, name: str) -> str:
        """A text that differs when the content does: size and whatever mark of change the bucket keeps; FileNotFoundError when there is none."""
        if not self.remote:
            stat = self.at(name).stat()
            return f"{stat.st_size} {stat.st_mtime_ns}"
        with named_errors(self.at(name), "read"):
            info = self.fs.info(self._inside(name))
            return " ".join(str(info[key]) for key in ("size", "etag", "ETag", "md5Hash", "mtime", "updated", "created") if key in info)

    def read(self, name: str) -> bytes:
        """Its content; FileNotFoundError when there is none."""
        if not self.remote:
            return self.at(name).read_bytes()
        with named_errors(self.at(name), "read"):
            return self.fs.cat_file(self._inside(name))

    @contextlib.contextmanager
    def open(self, name: str):
        """It as a binary stream, for what is too large to be read at once."""
        if not self.remote:
            with open(self.at(name), "rb") as file:
                yield file
            return
        with named_errors(self.at(name), "read"), self.fs.open(self._inside(name), "rb") as file:
            yield file

    def write(self, name: str, content: bytes) -> None:
        """Replaces it by `content`, all of it or nothing, also where several processes do so at once."""
        if self.remote:
            with named_errors(self.at(name), "written"):
                return self.fs.pipe_file(self._inside(name), content)
        partial = self.at(f"{name}.{os.getpid()}.tmp")
        try:
            partial.write_bytes(content)
            os.replace(partial, self.at(name))
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise

    def remove(self, name: str) -> None:
        """Deletes it if it is there."""
        if not self.remote:
            return self.at(name).unlink(missing_ok=True)
        with named_errors(self.at(name), "deleted"), contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self._inside(name))

    @contextlib.contextmanager
    def writing(self, name: str):
        """A local path to write `name` to; what is there when the block ends without an error becomes `name`, else it is removed: it would keep
        a full disk full. For one process at a time."""
        if not self.remote:
            partial = self.at(name + ".tmp")
            try:
                yield partial
                os.replace(partial, self.at(name))
            except BaseException:
                with contextlib.suppress(OSError):
                    partial.unlink(missing_ok=True)
                raise
            return
        scratch = tempfile.mkdtemp(prefix="mila-")
        try:
            local = Path(scratch) / name
            yield local
            with named_errors(self.at(name), "written"):
                self.fs.put_file(str(local), self._inside(name))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
