"""What is written is read back bit for bit, by us and by others; a failure leaves nothing."""

import errno
import json
import os
import pickletools
import struct
import subprocess
import sys
import zipfile

import craft
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from itself_jax import weight_files

ALL = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
WRITERS = {
    "torch": weight_files.write_torch,
    "safetensors": weight_files.write_safetensors,
    "npz": weight_files.write_npz,
}
EVERY_WRITER = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


def arrays(*more: str) -> dict[str, np.ndarray]:
    """Every type and layout, in an order that is neither the alphabet's nor that of sizes."""
    rng = np.random.default_rng(0)
    result = {f"z.{code}": (rng.normal(size=(3, 5)) * 9).astype(code) for code in (*ALL, *more)}
    result["bfloat16"] = rng.normal(size=(2, 3)).astype(ml_dtypes.bfloat16)
    result["nan"] = np.array([np.nan, -np.inf, -0.0, 5e-324])
    result["fortran"] = np.asfortranarray(rng.normal(size=(3, 4)).astype(np.float32))
    result["steps"] = rng.normal(size=(6, 6))[::2, ::-3]
    result["big"] = np.arange(5, dtype=">i4")
    result["scalar"] = np.array(2.5, np.float32)
    result["empty"] = np.zeros((0, 4), np.float16)
    result["empty.rows"] = np.zeros((3, 0, 2))
    result["a/b é"] = np.arange(3)
    return result


def assert_same(file: weight_files.TensorFile, expected: dict[str, np.ndarray]) -> None:
    assert list(file.tensors) == list(expected)
    for name, want in expected.items():
        got = file.tensors[name].read()
        want = np.asarray(want)
        want = np.array(want, want.dtype.newbyteorder("="), order="C")
        assert (got.shape, got.dtype) == (want.shape, want.dtype), name
        assert got.tobytes() == want.tobytes(), name


@EVERY_WRITER
def test_what_is_written_is_read_back_bit_for_bit_and_in_order(write, tmp_path):
    more = () if write is weight_files.write_torch else ("uint16", "uint32", "uint64")
    expected = arrays(*more)
    write(tmp_path / "file", expected)
    file = weight_files.read(tmp_path / "file")
    assert_same(file, expected)
    assert os.listdir(tmp_path) == ["file"]
    # What was read lazily is written lazily, to every format.
    for other in WRITERS.values():
        tensors = {n: t for n, t in file.tensors.items() if "uint" not in n}
        other(tmp_path / "copy", tensors, force=True)
        assert_same(weight_files.read(tmp_path / "copy"), {n: expected[n] for n in tensors})


@EVERY_WRITER
def test_the_same_arrays_make_the_same_file(write, tmp_path):
    for name in ("a", "b"):
        write(str(tmp_path / name), {"x": jnp.arange(3), "y": np.float32(1)})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_metadata_come_back(tmp_path):
    array = {"a": np.arange(3)}
    weight_files.write_safetensors(tmp_path / "s", array, metadata={"é": "x\ny", "": ""})
    assert weight_files.read(tmp_path / "s").metadata == {"é": "x\ny", "": ""}
    document = {"epoch": 3, "x": [1, {"y": None}], "é": "😀", "f": 1e300, "t": True}
    weight_files.write_npz(tmp_path / "n", array, metadata=document)
    assert weight_files.read(tmp_path / "n").metadata == document
    extra = {
        **{"epoch": 3, "big": 2**62, "small": -(2**40), "f": 0.1, "t": True, "n": None, "é": "é😀"},
        **{
            "np": np.float64(0.5),
            "npi": np.int32(7),
            "list": [1, "a", [None]],
            "dict": {1: (2.5,)},
        },
    }
    weight_files.write_torch(tmp_path / "t", array, extra=extra)
    file = weight_files.read(tmp_path / "t")
    assert file.metadata == {n: v for n, v in extra.items() if n not in ("list", "dict")}
    assert file.notes == ("took 'model' of a training state (beside it: list, dict)",)


def test_torch_files_may_have_another_wrapper_or_none(tmp_path):
    array = {"a": np.arange(3)}
    weight_files.write_torch(tmp_path / "none", array, wrap=None)
    assert weight_files.read(tmp_path / "none").notes == ()
    weight_files.write_torch(tmp_path / "other", array, wrap="state_dict")
    assert weight_files.read(tmp_path / "other").notes == ("took 'state_dict' of the file",)
    with pytest.raises(ValueError, match="cannot stand beside the model with wrap='model'"):
        weight_files.write_torch(tmp_path / "x", array, extra={"model": 1})
    with pytest.raises(ValueError, match="with wrap=None"):
        weight_files.write_torch(tmp_path / "x", array, extra={"epoch": 1}, wrap=None)
    assert sorted(os.listdir(tmp_path)) == ["none", "other"]


def test_torch_files_are_laid_out_as_torch_lays_them_out(tmp_path):
    weight_files.write_torch(tmp_path / "file", arrays(), extra={"epoch": 3})
    content = (tmp_path / "file").read_bytes()
    with zipfile.ZipFile(tmp_path / "file") as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        assert names[0] == "archive/data.pkl" and names[-1] == "archive/version"
        assert archive.read("archive/version") == b"3\n"
        assert archive.read("archive/byteorder") == b"little"
        codes = {op.name for op, _, _ in pickletools.genops(archive.read("archive/data.pkl"))}
        for info in archive.infolist():
            assert info.compress_type == zipfile.ZIP_STORED
            if "/data/" in info.filename:
                n, x = struct.unpack_from("<2H", content, info.header_offset + 26)
                assert (info.header_offset + 30 + n + x) % 64 == 0
    # Every instruction that torch.load(weights_only=True) knew when it was new (1.13).
    assert codes <= {
        *("PROTO", "GLOBAL", "EMPTY_TUPLE", "REDUCE", "MARK", "BINUNICODE", "BININT", "TUPLE"),
        *("BINPERSID", "NEWFALSE", "SETITEMS", "EMPTY_DICT", "STOP", "LONG1", "BINFLOAT", "NONE"),
        *("NEWTRUE", "EMPTY_LIST", "APPENDS"),
    }


def test_long_entries_are_aligned_too(tmp_path, monkeypatch):
    """From 2 GiB on an entry has sizes of 64 bits; here from 100 bytes on."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    expected = {"long": np.arange(100), "short": np.arange(3), "other": np.arange(50.0)}
    for write in (weight_files.write_torch, weight_files.write_npz):
        write(tmp_path / "file", expected, force=True)
        assert_same(weight_files.read(tmp_path / "file"), expected)
        content = (tmp_path / "file").read_bytes()
        assert b"PK\x06\x06" in content and b"PK\x06\x07" in content
        if write is weight_files.write_torch:
            with zipfile.ZipFile(tmp_path / "file") as archive:
                for info in archive.infolist():
                    n, x = struct.unpack_from("<2H", content, info.header_offset + 26)
                    aligned = (info.header_offset + 30 + n + x) % 64 == 0
                    assert aligned or "/data/" not in info.filename


def test_the_library_reads_our_safetensors(tmp_path):
    expected = arrays("uint16", "uint32", "uint64")
    weight_files.write_safetensors(tmp_path / "file", expected, metadata={"format": "pt"})
    with safetensors.safe_open(tmp_path / "file", framework="np") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(expected)
        for name, want in expected.items():
            got = file.get_tensor(name)
            assert (got.shape, got.dtype) == (want.shape, want.dtype.newbyteorder("=")), name
            assert got.tobytes() == np.array(want, got.dtype, order="C").tobytes()
    header = json.loads((tmp_path / "file").read_bytes()[8:].split(b"  ")[0].rstrip(b" \0")
                        .split(b"]}}")[0] + b"]}}")  # fmt: skip
    start = 8 + int.from_bytes((tmp_path / "file").read_bytes()[:8], "little")
    assert start % 8 == 0
    for name, want in expected.items():
        assert header[name]["data_offsets"][0] % want.dtype.itemsize == 0, name


def test_we_read_what_the_library_writes(tmp_path):
    expected = {n: np.array(a, a.dtype.newbyteorder("="), order="C") for n, a in arrays().items()}
    safetensors.numpy.save_file(expected, tmp_path / "file", metadata={"a": "b"})
    file = weight_files.read(tmp_path / "file")
    assert file.metadata == {"a": "b"}
    assert_same(file, {name: expected[name] for name in file.tensors})
    assert set(file.tensors) == set(expected)


def test_numpy_reads_our_npz(tmp_path):
    expected = arrays()
    weight_files.write_npz(tmp_path / "file.npz", expected, metadata={"a": 1})
    with np.load(tmp_path / "file.npz", allow_pickle=False) as file:
        assert json.loads(str(file["__metadata__"])) == {"a": 1}
        assert file.files == ["__metadata__", *expected]
        for name, want in expected.items():
            got = file[name]
            if name == "bfloat16":
                got = got.view(ml_dtypes.bfloat16)
            np.testing.assert_array_equal(got, want)


# Refusals and failures.


@EVERY_WRITER
def test_a_file_that_exists_is_replaced_by_force_only(write, tmp_path):
    (tmp_path / "file").write_text("before")
    with pytest.raises(weight_files.WeightFileError, match="file exists: give another name, or"):
        write(tmp_path / "file", {"a": np.arange(3)})
    assert (tmp_path / "file").read_text() == "before"
    write(tmp_path / "file", {"a": np.arange(3)}, force=True)
    assert list(weight_files.read(tmp_path / "file").tensors) == ["a"]
    with pytest.raises(weight_files.WeightFileError, match="is a folder: give the name of a file"):
        write(tmp_path, {"a": np.arange(3)}, force=True)
    with pytest.raises(weight_files.WeightFileError, match="could not be written: No such file"):
        write(tmp_path / "missing" / "file", {"a": np.arange(3)})
    assert os.listdir(tmp_path) == ["file"]


@EVERY_WRITER
def test_a_file_can_be_written_over_what_is_read_from_it(write, tmp_path):
    write(tmp_path / "file", {"a": np.arange(3), "b": np.arange(5.0)})
    tensors = weight_files.read(tmp_path / "file").tensors
    write(tmp_path / "file", {"c": tensors["b"]}, force=True)
    assert_same(weight_files.read(tmp_path / "file"), {"c": np.arange(5.0)})


@EVERY_WRITER
@pytest.mark.parametrize(
    "tensors, message",
    [
        ({}, "is to be written, but there are no arrays"),
        ({"a": np.ones(2, np.complex64)}, "the array 'a' is complex64, and the format holds"),
        ({"a": np.array(["x"])}, "the array 'a' is str"),
        ({"a": np.array([{}], object)}, "the array 'a' is object"),
        ({"a": np.ones(2, ml_dtypes.float8_e5m2)}, "the array 'a' is float8_e5m2"),
        ({"": np.ones(2)}, "cannot hold an array named ''"),
        ({"a\n": np.ones(2)}, r"cannot hold an array named 'a\\n'"),
        ({"a" * 1001: np.ones(2)}, "cannot hold an array named 'aaaa"),
        ({"a/../b": np.ones(2)}, "no paths that lead elsewhere"),
        ({"/a": np.ones(2)}, "no paths that lead elsewhere"),
        ({"\udc80": np.ones(2)}, "cannot hold an array named"),
        ({"a": np.ones((1,) * 33)}, "the array 'a' has 33 dimensions"),
    ],
)
def test_what_no_format_holds_is_refused(write, tensors, message, tmp_path):
    with pytest.raises(weight_files.WeightFileError, match=message):
        write(tmp_path / "file", tensors)
    assert os.listdir(tmp_path) == []


def test_what_one_format_does_not_hold_is_refused(tmp_path):
    one = {"a": np.ones(2)}
    with pytest.raises(weight_files.WeightFileError, match="is uint16, and the format holds bool"):
        weight_files.write_torch(tmp_path / "file", {"a": np.ones(2, np.uint16)})
    for value in ({1}, b"x", np.arange(3), 1 << 70, object()):
        with pytest.raises(weight_files.WeightFileError, match="beside the arrays: give dict"):
            weight_files.write_torch(tmp_path / "file", one, extra={"x": [value]})
    for write in (weight_files.write_safetensors, weight_files.write_npz):
        with pytest.raises(weight_files.WeightFileError, match="the name that is kept for metada"):
            write(tmp_path / "file", {"__metadata__": np.ones(2)})
    with pytest.raises(TypeError, match=r"metadata(.|\n)*\{'a': 1\}"):
        weight_files.write_safetensors(tmp_path / "file", one, metadata={"a": 1})
    with pytest.raises(TypeError, match="JSON serializable"):
        weight_files.write_npz(tmp_path / "file", one, metadata={"a": {1}})
    assert os.listdir(tmp_path) == []


class Lazy:
    """An array that is made when it is asked for."""

    def __init__(self, shape, dtype, make):
        self.shape, self.dtype, self._make = shape, np.dtype(dtype), make

    def read(self):
        return self._make()


def fail():
    raise KeyboardInterrupt


@EVERY_WRITER
def test_arrays_that_fail_leave_nothing_behind(write, tmp_path):
    first = np.arange(3)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "file", {"a": first, "b": Lazy((3,), "int64", fail)})
    for made in (np.arange(4), np.arange(3.0), np.arange(3).reshape(1, 3)):
        lazy = Lazy((3,), "int64", lambda made=made: made)
        with pytest.raises(weight_files.WeightFileError, match=r"'b' was announced as int64\[3\]"):
            write(tmp_path / "file", {"a": first, "b": lazy})
    assert os.listdir(tmp_path) == []


@EVERY_WRITER
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_nothing_behind(write, call, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "secret")

    (tmp_path / "file").write_text("before")
    monkeypatch.setattr(os, call, full)
    with pytest.raises(
        weight_files.WeightFileError,
        match=r"file could not be written: No space left on device; nothing is left of it, free",
    ):
        write(tmp_path / "file", {"a": np.arange(3)}, force=True)
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "before"


@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_fills_up_in_the_middle_leaves_nothing_behind(name, tmp_path):
    """A limit on the size of files makes writing fail as a full disk does."""
    code = f"""
import resource, signal, numpy as np
from itself_jax import weight_files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
arrays = {{str(i): np.ones(1 << 16) for i in range(8)}}
try:
    weight_files.write_{name}({str(tmp_path / "file")!r}, arrays)
except weight_files.WeightFileError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "file could not be written: File too large; nothing is left of it" in done.stdout
    assert done.stderr == ""
    assert os.listdir(tmp_path) == []


def test_files_are_made_with_the_users_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        weight_files.write_npz(tmp_path / "file", {"a": np.arange(3)})
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


_MEASURE = f"""{craft.PEAK}
import sys
import ml_dtypes, numpy as np
from itself_jax import weight_files

class Lazy:
    shape, dtype = (1 << 20, 8), np.dtype(sys.argv[2])
    def read(self):
        return np.full(self.shape, 0.5, self.dtype)

write = getattr(weight_files, "write_" + sys.argv[1])
write(sys.argv[3] + "/small", {{"a": Lazy()}})
weight_files.read(sys.argv[3] + "/small").tensors["a"].read().astype(np.float32)
before = peak()
write(sys.argv[3] + "/file", {{str(i): Lazy() for i in range(12)}})
written = peak()
total = 0.0
for tensor in weight_files.read(sys.argv[3] + "/file").tensors.values():
    total += float(tensor.read().astype(np.float32)[0, 0])
assert total == 6.0, total
print(written - before, peak() - before)
"""


@pytest.mark.parametrize("name", WRITERS)
def test_no_more_than_one_array_is_in_memory(name, tmp_path):
    """Twelve arrays of 16 MiB take no more memory than one, written or read."""
    command = [sys.executable, "-c", _MEASURE, name, "float16", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "file").stat().st_size > 12 * 16 << 20
    for beyond in map(int, done.stdout.split()):
        assert beyond < 8 << 20


def test_the_example_of_the_package(tmp_path):
    """A training state of torch becomes safetensors."""
    file = weight_files.read(craft.FILES / "training.pth")
    tensors = {n: t for n, t in file.tensors.items() if t.dtype != np.uint16}
    metadata = {name: str(value) for name, value in file.metadata.items()}
    weight_files.write_safetensors(tmp_path / "model.safetensors", tensors, metadata=metadata)
    again = weight_files.read(tmp_path)
    assert again.metadata["epoch"] == "3"
    assert_same(again, {n: t.read() for n, t in tensors.items()})
