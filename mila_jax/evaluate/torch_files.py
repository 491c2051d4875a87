"""Reads PyTorch weight files (.pth, .pt) with NumPy alone, and runs nothing that the file asks for.

A PyTorch file is a pickle, and a pickle is a small program: it may name any Python function and call it. This reader names
only what a state dict needs (tensor rebuilders, storage types, OrderedDict), each replaced by an inert stand-in of our own;
anything else ends in `UserError` that says what was refused. Both layouts are read: the zip archive (torch >= 1.6) and the
older single stream. TorchScript archives name classes of their own, which `read_torchscript` takes for plain records: their
tensors are read, their code is not.
"""

import collections
import dataclasses
import hashlib
import io
import math
import os
import pickle
import struct
import zipfile
import zlib

import numpy as np

from mila_jax.errors import UserError

# Storage class -> NumPy type. bfloat16 has none: its 16 bits are read as integers and widened to float32.
_STORAGES = {
    "FloatStorage": "<f4",
    "DoubleStorage": "<f8",
    "HalfStorage": "<f2",
    "BFloat16Storage": "<u2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "|i1",
    "ByteStorage": "|u1",
    "BoolStorage": "|b1",
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
# What a damaged or hostile file makes the unpickler, zipfile and NumPy raise.
_BROKEN = (
    pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError,
    MemoryError, struct.error, zlib.error, zipfile.BadZipFile, NotImplementedError,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _StorageType:
    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    """One block of numbers, named but not read yet."""

    kind: str
    key: str
    count: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A view of a storage, as written in the pickle; `_as_array` makes the array once the storages are read."""

    storage: _Storage
    offset: int
    size: tuple
    stride: tuple


class _WeightUnpickler(pickle.Unpickler):
    """Unpickler that knows nothing but state dicts."""

    def __init__(self, stream, path, allow=True):
        super().__init__(stream)
        self._path, self._allow = path, allow

    def find_class(self, module, name):
        if self._allow:
            if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
                # A fresh function each time: a pickle may set attributes on what it is given.
                return lambda storage, offset, size, stride, *_: _Tensor(storage, offset, tuple(size), tuple(stride))
            if module == "torch._utils" and name == "_rebuild_parameter":
                return lambda tensor, *_: tensor
            if module == "torch" and name in _STORAGES:
                return _StorageType(name)
            if module == "collections" and name == "OrderedDict":
                return collections.OrderedDict
        raise UserError(
            f"{self._path}: refused, the file asks for {module}.{name}, which weights do not need; "
            "pass a plain state dict from a source that you trust"
        )

    def persistent_load(self, pid):
        tag, kind, key, _, count, *view = pid
        if tag != "storage" or not isinstance(kind, _StorageType) or not isinstance(count, int) or count < 0:
            raise UserError(f"{self._path}: refused, unknown kind of persistent object {tag!r}")
        if view and view[0] is not None:
            raise UserError(f"{self._path}: storages that are views of others are not supported; save the state dict again with torch.save")
        return _Storage(kind.name, str(key), count)


class _Module:
    """A module of a TorchScript archive: the record of its attributes."""

    def __setstate__(self, state):
        self.attributes = state if isinstance(state, dict) else {}


class _ScriptUnpickler(_WeightUnpickler):
    """Knows the classes that an archive defines (all under `__torch__`) as records, and its typed lists as lists."""

    def find_class(self, module, name):
        if module == "__torch__" or module.startswith("__torch__."):
            return type("Module", (_Module,), {})
        if module == "torch.jit._pickle" and name in ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist"):
            return lambda items: list(items)
        if module == "torch.jit._pickle" and name == "restore_type_tag":
            return lambda value, _: value
        return super().find_class(module, name)


def _attributes(value, prefix=""):
    """Tensors of nested `_Module`s by dotted name."""
    for key, item in getattr(value, "attributes", {}).items():
        if isinstance(item, _Module):
            yield from _attributes(item, f"{prefix}{key}.")
        elif isinstance(item, _Tensor):
            yield f"{prefix}{key}", item


def _as_array(tensor, storages, path):
    """`_Tensor` -> own contiguous array, after checking that it stays inside its storage."""
    whole = storages[tensor.storage.key]
    numbers = (tensor.offset, *tensor.size, *tensor.stride)
    if len(tensor.size) != len(tensor.stride) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise UserError(f"{path}: broken file, a tensor has size {tensor.size} and stride {tensor.stride}")
    empty = 0 in tensor.size
    last = tensor.offset + sum((n - 1) * s for n, s in zip(tensor.size, tensor.stride, strict=True))
    # A stride of zero could blow a few numbers up to any size.
    if not empty and (last >= whole.size or math.prod(tensor.size) > whole.size):
        raise UserError(f"{path}: broken file, a tensor of size {tensor.size} reaches past its storage of {whole.size} numbers")
    if empty:
        out = np.zeros(tensor.size, whole.dtype)
    else:
        strides = [s * whole.itemsize for s in tensor.stride]
        out = np.array(np.lib.stride_tricks.as_strided(whole[tensor.offset :], tensor.size, strides, writeable=False), order="C")
    if tensor.storage.kind == "BFloat16Storage":
        out = (out.astype(np.uint32) << 16).view(np.float32)
    return out


def _resolve(value, storages, path):
    """Replaces every `_Tensor` inside nested dicts, lists and tuples by its array."""
    if isinstance(value, _Tensor):
        return _as_array(value, storages, path)
    if isinstance(value, dict):
        return {k: _resolve(v, storages, path) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_resolve(v, storages, path) for v in value)
    return value


def _storages_in(value, found):
    """Collects the `_Storage`s used anywhere inside `value` into `found` (key -> storage)."""
    if isinstance(value, _Tensor):
        found[value.storage.key] = value.storage
    elif isinstance(value, dict):
        for item in value.values():
            _storages_in(item, found)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _storages_in(item, found)
    return found


def _read_zip(path, unpickler=_WeightUnpickler):
    with zipfile.ZipFile(path) as archive:
        pickles = [n for n in archive.namelist() if n == "data.pkl" or n.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UserError(f"{path}: a zip archive, but not one of PyTorch's (no data.pkl inside); pass a .pth state dict")
        root = pickles[0][: -len("data.pkl")]
        if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
            raise UserError(f"{path}: written on a big-endian machine, which is not supported; save it again on a little-endian one")
        value = unpickler(io.BytesIO(archive.read(pickles[0])), path).load()
        if unpickler is _ScriptUnpickler:
            value = dict(_attributes(value))
        storages = {}
        for key, storage in _storages_in(value, {}).items():
            dtype = np.dtype(_STORAGES[storage.kind])
            entry = archive.getinfo(f"{root}data/{key}")
            if entry.file_size != storage.count * dtype.itemsize:  # before reading: the header may promise anything
                raise UserError(f"{path}: broken file, storage {key} holds {entry.file_size} bytes, not {storage.count * dtype.itemsize}")
            storages[key] = np.frombuffer(archive.read(entry), dtype)
    return _resolve(value, storages, path)


def _read_legacy(path):
    with open(path, "rb") as file:
        stream = io.BytesIO(file.read())
    plain = [_WeightUnpickler(stream, path, allow=False).load() for _ in range(3)]  # magic number, protocol, machine
    if plain[0] != _LEGACY_MAGIC or plain[1] != _LEGACY_PROTOCOL:
        raise UserError(f"{path}: not a PyTorch weight file (wrong magic number); pass a .pth state dict")
    value = _WeightUnpickler(stream, path).load()
    used = _storages_in(value, {})
    storages = {}
    for key in _WeightUnpickler(stream, path, allow=False).load():
        (count,) = struct.unpack("<q", stream.read(8))
        if key not in used:
            raise UserError(f"{path}: broken file, storage {key!r} belongs to no tensor")
        dtype = np.dtype(_STORAGES[used[key].kind])
        block = stream.read(max(count, 0) * dtype.itemsize)
        if count != used[key].count or len(block) != count * dtype.itemsize:
            raise UserError(f"{path}: the file is cut short or damaged in storage {key!r}; fetch it again")
        storages[key] = np.frombuffer(block, dtype)
    return _resolve(value, storages, path)


def read_torch_file(path):
    """Reads a PyTorch weight file without PyTorch.

    path: file written by `torch.save` of a state dict (or of nested dicts and lists of tensors, numbers and strings).
    Returns the same nesting with NumPy arrays in place of tensors (bfloat16 widened to float32). Raises `UserError` if the
    file is missing, damaged, or asks for anything besides tensors.
    """
    path = os.fspath(path)
    try:
        return _read_zip(path) if zipfile.is_zipfile(path) else _read_legacy(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    except _BROKEN as error:
        raise UserError(f"{path}: not a readable PyTorch weight file ({type(error).__name__}: {error}); fetch it again") from error


def read_torchscript(path):
    """Reads the tensors of a TorchScript archive (torch.jit.save) without PyTorch; its code is not looked at.

    Returns dict dotted attribute name -> array: parameters and buffers. Raises `UserError` if the file is missing, damaged, or asks
    for anything besides modules and tensors.
    """
    path = os.fspath(path)
    try:
        return _read_zip(path, _ScriptUnpickler)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    except _BROKEN as error:
        raise UserError(f"{path}: not a readable TorchScript archive ({type(error).__name__}: {error}); fetch it again") from error


def check_sha256(path, expected):
    """Raises `UserError` unless the file's SHA-256 is `expected` (64 hexadecimal digits, or a prefix of them)."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    if not digest.hexdigest().startswith(expected):
        raise UserError(f"{path}: SHA-256 is {digest.hexdigest()[:16]}…, expected {expected[:16]}…; install the published file again")
