"""The torch-free weight reader: both layouts, and what it refuses."""

import io
import pickle
import struct
import zipfile

import numpy as np
import pytest

from mila_jax.errors import UserError
from mila_jax.evaluate.torch_files import check_sha256, read_torch_file


class StateDictPickler(pickle._Pickler):
    """Writes tensors the way torch.save does, from `(storage type, key, count, offset, size, stride)` tuples."""

    dispatch = dict(pickle._Pickler.dispatch)

    def write_global(self, module, name):
        self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())

    def save_tensor(self, obj):
        self.write_global("torch._utils", "_rebuild_tensor_v2")
        self.write(pickle.MARK + pickle.MARK)
        self.save("storage")
        self.write_global("torch", obj.kind)
        for item in (obj.key, "cpu", obj.count):
            self.save(item)
        if obj.legacy:
            self.save(None)
        self.write(pickle.TUPLE + pickle.BINPERSID)
        for item in (obj.offset, obj.size, obj.stride, False):
            self.save(item)
        self.write_global("collections", "OrderedDict")
        self.write(pickle.EMPTY_TUPLE + pickle.REDUCE + pickle.TUPLE + pickle.REDUCE)


class Tensor:
    def __init__(self, kind, key, count, offset, size, stride, legacy=False):
        self.kind, self.key, self.count, self.offset = kind, key, count, offset
        self.size, self.stride, self.legacy = size, stride, legacy


StateDictPickler.dispatch[Tensor] = StateDictPickler.save_tensor


def dumps(value):
    stream = io.BytesIO()
    StateDictPickler(stream, 2).dump(value)
    return stream.getvalue()


def write_zip(path, body, blocks, **extra):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/data.pkl", body)
        for key, block in blocks.items():
            archive.writestr(f"net/data/{key}", block)
        for name, block in extra.items():
            archive.writestr(f"net/{name}", block)
    return path


def write_legacy(path, value, blocks):
    data = b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    data += dumps(value) + pickle.dumps(list(blocks), 2)
    for count, block in blocks.values():
        data += struct.pack("<q", count) + block
    path.write_bytes(data)
    return path


def test_reads_zip_files_with_strides_offsets_and_types(tmp_path):
    numbers = np.arange(12, dtype="<f4")
    value = {
        "weight": Tensor("FloatStorage", "0", 12, 2, (3, 2), (1, 3)),
        "nested": [{"count": Tensor("LongStorage", "1", 1, 0, (), ())}, "text", 3],
        "brain": Tensor("BFloat16Storage", "2", 2, 0, (2,), (1,)),
    }
    brain = (np.array([1.5, -2.0], np.float32).view(np.uint32) >> 16).astype("<u2")
    blocks = {"0": numbers.tobytes(), "1": np.array([7], "<i8").tobytes(), "2": brain.tobytes()}
    read = read_torch_file(write_zip(tmp_path / "a.pth", dumps(value), blocks, byteorder=b"little"))
    np.testing.assert_array_equal(read["weight"], [[2, 5], [3, 6], [4, 7]])
    assert read["weight"].dtype == np.float32 and read["weight"].flags.c_contiguous
    assert read["nested"][0]["count"] == 7 and read["nested"][1:] == ["text", 3]
    np.testing.assert_array_equal(read["brain"], np.array([1.5, -2.0], np.float32))


def test_reads_legacy_files(tmp_path):
    value = {
        "a": Tensor("FloatStorage", "94", 4, 0, (2, 2), (2, 1), legacy=True),
        "b": Tensor("DoubleStorage", "95", 3, 1, (2,), (1,), legacy=True),
    }
    blocks = {"94": (4, np.arange(4, dtype="<f4").tobytes()), "95": (3, np.array([1, 2, 3], "<f8").tobytes())}
    path = write_legacy(tmp_path / "old.pth", value, blocks)
    read = read_torch_file(path)
    np.testing.assert_array_equal(read["a"], [[0, 1], [2, 3]])
    np.testing.assert_array_equal(read["b"], [2.0, 3.0])
    short = tmp_path / "short.pth"
    short.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match="cut short"):
        read_torch_file(short)


class RunsACommand:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (self.target, "w")


@pytest.mark.parametrize("layout", ["zip", "legacy"])
def test_refuses_a_pickle_that_calls_functions(tmp_path, layout):
    target = tmp_path / "created_by_the_pickle"
    body = pickle.dumps({"weight": RunsACommand(str(target))}, 2)
    if layout == "zip":
        path = write_zip(tmp_path / "bad.pth", body, {})
    else:
        path = tmp_path / "bad.pth"
        path.write_bytes(b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {})) + body)
    with pytest.raises(UserError, match=r"bad\.pth: refused, the file asks for (io|_io)\.open"):
        read_torch_file(path)
    assert not target.exists()
    pickle.loads(body)["weight"].close()  # the file would have done harm: an ordinary unpickler runs it
    assert target.exists()


@pytest.mark.parametrize("name", ["torch.load", "torch._utils._import_dotted_name", "collections.namedtuple", "os.system"])
def test_refuses_by_name(tmp_path, name):
    module, name = name.rsplit(".", 1)
    body = b"\x80\x02c" + f"{module}\n{name}\n".encode() + b")R."
    with pytest.raises(UserError, match=f"asks for {module}.{name}"):
        read_torch_file(write_zip(tmp_path / "x.pth", body, {}))


@pytest.mark.parametrize(
    "tensor, message",
    [
        (Tensor("FloatStorage", "0", 4, 0, (5,), (1,)), "reaches past"),
        (Tensor("FloatStorage", "0", 4, -1, (2,), (1,)), "broken file"),
        (Tensor("FloatStorage", "0", 4, 0, (1 << 40,), (0,)), "reaches past"),
        (Tensor("FloatStorage", "0", 1 << 40, 0, (2,), (1,)), "holds 16 bytes"),
        (Tensor("FloatStorage", "9", 4, 0, (2,), (1,)), "not a readable PyTorch"),
    ],
)
def test_refuses_tensors_outside_their_storage(tmp_path, tensor, message):
    path = write_zip(tmp_path / "x.pth", dumps({"w": tensor}), {"0": np.zeros(4, "<f4").tobytes()})
    with pytest.raises(UserError, match=message):
        read_torch_file(path)


def test_names_the_file_that_is_missing_or_not_weights(tmp_path):
    with pytest.raises(UserError, match="absent.pth: cannot be read"):
        read_torch_file(tmp_path / "absent.pth")
    (tmp_path / "noise.pth").write_bytes(b"not a pickle at all")
    with pytest.raises(UserError, match="noise.pth: not a readable"):
        read_torch_file(tmp_path / "noise.pth")
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(UserError, match="no data.pkl"):
        read_torch_file(tmp_path / "other.pth")


def test_checks_the_hash(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    check_sha256(path, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    with pytest.raises(UserError, match="file: SHA-256 is ba7816bf"):
        check_sha256(path, "00" * 32)
