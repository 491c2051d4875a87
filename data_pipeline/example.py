"""Writes and reads the records' container, a `tf.train.Example`, without TensorFlow and without a copy.

Each record is a protobuf message of named fields: a bytes field holds a tensor's raw bytes (TFDS `encoding="bytes"`), an int64 field a
scalar. A protobuf library would copy the bytes, TFDS adds several times the reading time; this walks the few tags by hand. Protobuf libraries also order a map's entries by a hash that differs
from process to process; written by hand, the same record has the same bytes everywhere.
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


def parse_example(data: bytes, fields: dict[str, tuple[np.dtype, tuple[int, ...]]]) -> dict[str, np.ndarray]:
    """The named fields of a serialised Example as read-only arrays that share its memory.

    fields: name → (dtype, shape). Raises ValueError (or IndexError) for bytes that are no Example, lack a field, or hold one of another size.
    """
    out = {}
    _, at, end = _enter(data, 0, 1)
    while at < end:
        _, inside, at = _enter(data, at, 1)  # one entry of the map
        _, start, stop = _enter(data, inside, 1)
        name = data[start:stop].decode()
        _, start, _ = _enter(data, stop, 2)  # Feature
        if name not in fields:
            continue
        dtype, shape = fields[name]
        kind, start, stop = _enter(data, start)
        if kind == BYTES_LIST:
            _, start, stop = _enter(data, start, 1)
            out[name] = np.frombuffer(data, dtype, (stop - start) // dtype.itemsize, start).reshape(shape)
        elif kind == INT64_LIST:
            _, start, stop = _enter(data, start, 1)  # packed
            out[name] = np.asarray(_varint(data, start)[0], dtype).reshape(shape)
        else:
            raise ValueError(f"field {name!r} is of an unknown kind")
    if len(out) != len(fields):
        raise ValueError(f"fields {sorted(set(fields) - set(out))} are missing")
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
