"""Writes and reads the records' container, a `tf.train.Example`, without TensorFlow and without a copy.

Each record is a protobuf message of named fields: a bytes field holds a tensor's raw bytes (TFDS `encoding="bytes"`), an int64 field a
scalar. A protobuf library would copy the bytes, TFDS adds several times the reading time; this walks the few tags by hand, or
compares them (`Layout`). Protobuf libraries also order a map's entries by a hash that differs from process to process; written by hand,
the same record has the same bytes everywhere.
Encoding: https://protobuf.dev/programming-guides/encoding; messages: tensorflow/core/example/{example,feature}.proto.
"""

import numpy as np

LENGTH_DELIMITED = 2
BYTES_LIST, INT64_LIST = 1, 3  # field numbers in Feature


def _varint(data, at: int) -> tuple[int, int]:
    """(number, place after it) of the variable-length number at `at`."""
    value = data[at]
    at += 1
    if value < 0x80:
        return value, at
    value &= 0x7F
    shift = 7
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _enter(data, at: int, field: int | None = None) -> tuple[int, int, int]:
    """(field number, start, end) of the length-delimited value at `at`; ValueError when it is something else."""
    tag, at = _varint(data, at)
    if tag & 7 != LENGTH_DELIMITED or (field is not None and tag >> 3 != field):
        raise ValueError(f"not a tf.train.Example: tag {tag} at byte {at}")
    length, at = _varint(data, at)
    if at + length > len(data):
        raise ValueError(f"not a whole tf.train.Example: {length} bytes at {at} of {len(data)}")
    return tag >> 3, at, at + length


def _walk(data):
    """(name, kind, start, stop) of each field's value in a serialised Example; ValueError or IndexError for other bytes."""
    _, at, end = _enter(data, 0, 1)
    while at < end:
        _, inside, at = _enter(data, at, 1)  # one entry of the map
        _, start, stop = _enter(data, inside, 1)
        name = data[start:stop].decode()
        _, start, _ = _enter(data, stop, 2)  # Feature
        kind, start, stop = _enter(data, start)
        if kind in (BYTES_LIST, INT64_LIST):
            _, start, stop = _enter(data, start, 1)  # the one string of bytes, or the packed numbers
        yield name, kind, start, stop


def parse_example(data: bytes, fields: dict[str, tuple[np.dtype, tuple[int, ...]]]) -> dict[str, np.ndarray]:
    """The named fields of a serialised Example as read-only arrays that share its memory.

    fields: name → (dtype, shape). Raises ValueError (or IndexError) for bytes that are no Example, lack a field, or hold one of another size.
    """
    out = {}
    for name, kind, start, stop in _walk(data):
        if name not in fields:
            continue
        dtype, shape = fields[name]
        if kind == BYTES_LIST:
            out[name] = np.frombuffer(data, dtype, (stop - start) // dtype.itemsize, start).reshape(shape)
        elif kind == INT64_LIST:
            out[name] = np.asarray(_varint(data, start)[0], dtype).reshape(shape)
        else:
            raise ValueError(f"field {name!r} is of an unknown kind")
    if len(out) != len(fields):
        raise ValueError(f"fields {sorted(set(fields) - set(out))} are missing")
    return out


class Layout:
    """Where the arrays lie in a serialised Example, so that many that are built alike are taken apart at once.

    The bytes around the values (tags, lengths, names) alone decide where everything is: records of one length that share them share
    all places. Comparing them for a whole batch costs a fraction of walking each record.
    """

    def __init__(self, data: bytes, fields: dict[str, tuple[np.dtype, tuple[int, ...]]], apart: str):
        """data: the record that the others resemble; apart: the array that is so large that each copy counts. Raises as `parse_example`."""
        self.fields = {name: (value.dtype, value.shape) for name, value in parse_example(data, fields).items() if value.shape}
        spans = {name: (start, stop) for name, _, start, stop in _walk(data)}
        self.start, self.stop = spans[apart]
        around = np.ones(len(data), bool)
        for start, stop in spans.values():
            around[start:stop] = False
        self.around = np.flatnonzero(np.delete(around, np.s_[self.start : self.stop]))
        self.expected = np.frombuffer(self.rest(data), np.uint8)[self.around]
        cut = self.stop - self.start
        self.places = {n: tuple(x - cut * (x >= self.stop) for x in spans[n]) for n in self.fields if n != apart}
        dtype, self.shape = self.fields[apart]
        self.dtype, self.count = dtype, cut // dtype.itemsize

    def view(self, data: bytes) -> np.ndarray:
        """The array apart of a record, read-only and sharing its memory."""
        return np.frombuffer(data, self.dtype, self.count, self.start).reshape(self.shape)

    def rest(self, data: bytes) -> bytes:
        """The record without the array apart."""
        return data[: self.start] + data[self.stop :]

    def parse(self, rests: list[bytes]) -> dict[str, np.ndarray] | None:
        """The other arrays of n records as [n, *shape]; fields without a shape are left out. None when one of them is built otherwise."""
        rest = np.frombuffer(b"".join(rests), np.uint8).reshape(len(rests), -1)
        if not (rest[:, self.around] == self.expected).all():
            return None
        out = {}
        for name, (start, stop) in self.places.items():
            dtype, shape = self.fields[name]
            out[name] = np.ascontiguousarray(rest[:, start:stop]).view(dtype).reshape(-1, *shape)
        return out


def _number(value: int) -> bytes:
    """A variable-length number."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | LENGTH_DELIMITED]) + _number(len(content)) + content


def serialise_example(record: dict, fields: dict[str, tuple[np.dtype, tuple[int, ...]]]) -> bytes:
    """The inverse of `parse_example`; fields in their order. ValueError for a value of another shape."""
    entries = []
    for name, (dtype, shape) in fields.items():
        value = np.asarray(record[name], dtype)
        if value.shape != shape:
            raise ValueError(f"{name} has shape {value.shape}, not {shape}")
        if shape:
            feature = _field(BYTES_LIST, _field(1, value.tobytes()))
        else:
            feature = _field(INT64_LIST, _field(1, _number(int(value) & 0xFFFFFFFFFFFFFFFF)))
        entries.append(_field(1, _field(1, name.encode()) + _field(2, feature)))
    return _field(1, b"".join(entries))
