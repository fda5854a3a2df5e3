"""Files that are cut, damaged or something else: each is refused with a sentence that helps."""

import gzip
import io
import json
import os
import re
import struct
import tarfile

import craft
import numpy as np
import pytest

from itself_jax import weight_files

MODEL = craft.dict_of({"a": craft.tensor()})
ZIP = craft.torch_zip(MODEL)
OLD = craft.legacy(MODEL)
SAFE = craft.safetensors({"a": craft.field()}, craft.four_floats())
HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': (4,)}"
NPZ = craft.zip_file({"a.npy": craft.npy(HEADER, craft.four_floats())})


def tar(*names: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = 3
            archive.addfile(info, io.BytesIO(b"abc"))
    return buffer.getvalue()


def saved(**tensor) -> bytes:
    """A file of torch with one array of four floats that is not quite right."""
    where = tensor.pop("where", None)
    return craft.torch_zip(craft.dict_of({"a": craft.tensor(where, **tensor)}))


def directory_field(offset: int, layout: str, value: int, content: bytes = ZIP) -> bytes:
    """The zip file with one field of its last directory entry changed."""
    at = content.rfind(b"PK\x01\x02") + offset
    changed = bytearray(content)
    struct.pack_into(layout, changed, at, value)
    return bytes(changed)


def safe(dtype="F32", shape=(4,), place=(0, 16), data=16) -> bytes:
    return craft.safetensors({"a": craft.field(dtype, shape, place)}, bytes(data))


def npz(header: str, data: bytes = bytes(16)) -> bytes:
    return craft.zip_file({"a.npy": craft.npy(header, data)})


SOMETHING_ELSE = {
    "an empty file": (b"", "is empty: copy or download"),
    "a web page": (b"\n<!DOCTYPE html>\n<html>", "is a web page .* you must log in"),
    "another web page": (b"<html lang='en'>", "is a web page"),
    "an error of a bucket": (b"<?xml version='1.0'?><Error/>", "is a web page"),
    "a Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
        "is a pointer of Git LFS .* run `git lfs pull`",
    ),
    "gzip": (gzip.compress(ZIP), "is packed with gzip: unpack it"),
    "bzip2": (b"BZh91AY", "is packed with bzip2"),
    "xz": (b"\xfd7zXZ\x00\x00", "is packed with xz"),
    "zstd": (b"\x28\xb5\x2f\xfd\x04", "is packed with zstd"),
    "a tar file": (tar("weights/model.pt"), "is a tar file: unpack it"),
    "torch 0.1's tar": (
        tar("sys_info", "pickle", "tensors", "storages"),
        "a tar file of torch before 0.2: load it with torch",
    ),
    "HDF5": (b"\x89HDF\r\n\x1a\n\x00", "is an HDF5 file, as Keras writes it"),
    "GGUF": (b"GGUF\x03\x00\x00\x00", "is a GGUF file"),
    "one array": (craft.npy(array=np.arange(3)), r"is a single array without a name \(\.npy\)"),
    "ONNX": (b"\x08\x08\x12\x07pytorch:\x04onnx", "is an ONNX model"),
    "TensorFlow's index": (
        b"model_checkpoint_path: 'model-1'",
        "is the index of a TensorFlow checkpoint",
    ),
    "TensorFlow's other index": (
        bytes(range(40)) + 0xDB4775248B80FB57.to_bytes(8, "little"),
        "is the index of a TensorFlow checkpoint",
    ),
    "zeros": (bytes(5000), "begins with nothing but zeros: it was not written to the end"),
    "text": (b"epoch 1: loss 3.5\n", "is no file of weights: it begins with b'epoch 1:'"),
    "a table": (b"caption,image path\na man,1.jpg\n", "is no file of weights: it begins with b'ca"),
    "another table": (b"id,caption\n1,a man\n", "is no file of weights: it begins with b'id,"),
    "JSON": (b'{"a": 1}', "is no file of weights"),
    "a zip file without entries": (craft.zip_file({}), "is a zip file without entries"),
    "some zip file": (craft.zip_file({"a.txt": b"x"}), "that neither torch.save nor numpy.savez"),
    "a Python pickle": (craft.pickle(craft.number(3)), "a pickle that torch.save has not written"),
}


@pytest.mark.parametrize("case", SOMETHING_ELSE)
def test_what_is_no_file_of_weights_is_told_apart(case, tmp_path):
    content, message = SOMETHING_ELSE[case]
    refused(content, message, tmp_path)


def refused(content: bytes, message: str, tmp_path, name="file.pt") -> None:
    """Reading refuses the file, or an array of it, with its name and the message."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(weight_files.WeightFileError, match=f"{re.escape(str(path))}.*{message}"):
        for tensor in weight_files.read(path).tensors.values():
            tensor.read()


ZIPS = {
    "cut in the middle": (ZIP[: len(ZIP) // 2], "cut off: the directory at its end is missing"),
    "cut at the end": (ZIP[:-1], "cut off"),
    "with bytes before": (b"PK\x03\x04" + bytes(6) + ZIP, "directory is not where it should be"),
    "with bytes behind": (ZIP + b"x", "cut off"),
    "a directory elsewhere": (
        ZIP[:-6] + struct.pack("<L", 0) + ZIP[-2:],
        "directory is not where it should be",
    ),
    "a part of several": (ZIP[:-18] + b"\x01\x00" + ZIP[-16:], "in several parts"),
    "too many entries": (ZIP[:-12] + b"\xff\xff" + ZIP[-10:], "in several parts"),
    "a damaged directory": (craft.change(ZIP, b"PK\x01\x02", b"PK\x01\x03"), "cannot be read"),
    "an encrypted entry": (directory_field(8, "<H", 1), "an encrypted entry 'archive/version'"),
    "an odd compression": (directory_field(10, "<H", 14), r"in a way \(method 14\) that weights"),
    "a size that lies": (directory_field(24, "<L", 3), "has 2 bytes that stand for 3"),
    "both sizes lie": (
        directory_field(24, "<L", 1, directory_field(20, "<L", 1)),
        "'archive/version' says otherwise than the directory",
    ),
    "a wrong checksum of the pickle": (
        craft.change(ZIP, b"cpu", b"gpu"),
        r"its entry 'archive/data\.pkl' does not match its checksum",
    ),
    "a wrong checksum of a storage": (
        craft.change(ZIP, craft.four_floats(), bytes(16)),
        "its entry 'archive/data/0' does not match its checksum",
    ),
    "an entry elsewhere": (directory_field(42, "<L", 5), "is not where the directory says"),
    "an entry beyond the end": (directory_field(42, "<L", 1 << 30), "is not where the directory"),
    "another name in the entry": (
        craft.change(ZIP, b"archive/version", b"archive/Version"),
        "says otherwise than the directory",
    ),
    "a compressed lie": (
        directory_field(10, "<H", 8, craft.change(ZIP, b"archive/version3", b"archive/version3")),
        "says otherwise than the directory",
    ),
    "an entry that leads out": (
        craft.zip_file({"archive/data.pkl": craft.pickle(MODEL), "archive/../../x": b""}),
        r"an entry 'archive/\.\./\.\./x', which would lie outside of it: do not trust",
    ),
    "an absolute entry": (craft.zip_file({"/etc/passwd.npy": b""}), "which would lie outside"),
    "an entry for another system": (
        craft.change(craft.zip_file({"a/b.npy": b""}), b"a/b", b"a\\b", last=True),
        "which would lie outside",
    ),
}


@pytest.mark.parametrize("case", ZIPS)
def test_broken_zip_files_are_refused(case, tmp_path):
    content, message = ZIPS[case]
    refused(content, message, tmp_path)


def test_an_entry_that_reaches_into_the_directory_is_refused(tmp_path):
    content = bytearray(directory_field(24, "<L", 60, directory_field(20, "<L", 60)))
    local = content.rfind(b"PK\x03\x04")
    struct.pack_into("<2L", content, local + 18, 60, 60)
    refused(bytes(content), "its entry 'archive/version' reaches beyond the data", tmp_path)


def test_two_entries_of_a_name_are_refused(tmp_path):
    content = craft.zip_file({"archive/data.pkl": craft.pickle(MODEL), "archive/data.pkX": b"N."})
    content = content.replace(b"data.pkX", b"data.pkl")
    refused(content, r"has two entries 'archive/data\.pkl'", tmp_path)


def test_entries_that_share_bytes_are_refused(tmp_path):
    content = bytearray(craft.zip_file({"a.npy": b"", "b.npy": b""}))
    second = content.rfind(b"PK\x01\x02")
    struct.pack_into("<L", content, second + 42, 0)  # both at the first
    content[second + 46 : second + 51] = b"a.npy"
    refused(bytes(content), "two entries|overlap", tmp_path)
    # The second entry lies in the bytes of the first.
    inner = content[: content.find(b"PK\x01\x02")][: 30 + 5]
    outer = craft.zip_file({"b.npy": bytes(inner), "a.npy": b""})
    at = outer.rfind(b"PK\x01\x02") + 42
    moved = outer[:at] + struct.pack("<L", 35) + outer[at + 4 :]
    refused(moved, "two of its entries overlap", tmp_path)


TORCH = {
    "no storage": (craft.torch_zip(MODEL, storages={}), "its storage '0' is missing"),
    "a short storage": (
        craft.torch_zip(MODEL, storages={"0": bytes(12)}),
        "its storage '0' has 12 bytes, but 4 elements of 4 bytes are expected",
    ),
    "an offset beyond": (saved(offset=1), r"shape \[4\] reaches beyond its storage"),
    "an offset far beyond": (saved(offset=1 << 60), "reaches beyond its storage"),
    "an offset before": (saved(offset=-1), r"strides \[1\] and offset -1"),
    "a stride beyond": (saved(shape=(2, 2), strides=(3, 1)), "reaches beyond its storage"),
    "a stride before": (saved(strides=(-1,)), r"strides \[-1\]"),
    "a size before": (saved(shape=(-4,)), r"the shape \[-4\]"),
    "too many strides": (saved(strides=(1, 1)), r"strides \[1, 1\]"),
    "a huge size": (saved(shape=(0, 1 << 62), strides=(1, 1)), "the impossible shape"),
    "33 dimensions": (saved(shape=(1,) * 33, strides=(1,) * 33), "a shape that is none"),
    "an empty array beyond": (saved(shape=(0,), offset=5), "reaches beyond its storage"),
    "two types of a storage": (
        craft.torch_zip(
            craft.dict_of({"a": craft.tensor(), "b": craft.tensor(craft.storage("IntStorage"))})
        ),
        "its storage '0' is named with two types or sizes",
    ),
    "complex numbers": (
        saved(where=craft.storage("ComplexFloatStorage", count=2)),
        "holds a torch.ComplexFloatStorage",
    ),
    "a name that is none": (
        craft.torch_zip(craft.dict_of({"a\x1b[2J": craft.tensor()})),
        r"names an array 'a\\x1b\[2J': names are",
    ),
    "a name without end": (
        craft.torch_zip(craft.dict_of({"a" * 1001: craft.tensor()})),
        "names an array 'a*'…: names are",
    ),
    "numbers as names": (
        craft.torch_zip(b"}" + craft.number(3) + craft.tensor() + b"s"),
        "names an array 3: names are",
    ),
    "a list of arrays": (craft.torch_zip(craft.list_of(craft.tensor())), "holds a list of 1"),
    "a single array": (craft.torch_zip(craft.tensor()), "holds a single array"),
    "nothing": (craft.torch_zip(b"}"), "holds no arrays: give the file"),
    "no arrays": (craft.torch_zip(craft.dict_of({"epoch": b"K\x01"})), "no arrays, but epoch"),
    "several models": (
        craft.torch_zip(craft.dict_of({"student": MODEL, "teacher": MODEL})),
        "several sets of arrays, student, teacher, and none is called 'model'",
    ),
    "an unknown byte order": (
        craft.torch_zip(MODEL, more={"archive/byteorder": b"middle"}),
        "its entry 'byteorder' is 'middle'",
    ),
    "a pickle without end": (
        craft.zip_file({"archive/data.pkl": craft.PROTOCOL + MODEL}),
        "its pickle cannot be read|its storage '0' is missing",
    ),
    "a pickle that takes too much": (craft.torch_zip(b"00"), "its pickle"),
    "a pickle that leaves something": (craft.torch_zip(MODEL + b"N"), "leaves something over"),
    "an unknown instruction": (craft.torch_zip(b"\xff"), "its pickle cannot be read"),
    "a script without a module": (craft.script_zip(MODEL), "a TorchScript archive without a mod"),
    "a script without arrays": (craft.script_zip(craft.module("Net", {})), "holds no arrays"),
    "truth values": (
        craft.torch_zip(
            craft.dict_of({"a": craft.tensor(craft.storage("BoolStorage"))}),
            storages={"0": b"\0\1\2\0"},
        ),
        "a truth value behind byte [0-9]+ is neither 0 nor 1",
    ),
}


@pytest.mark.parametrize("case", TORCH)
def test_broken_files_of_torch_are_refused(case, tmp_path):
    content, message = TORCH[case]
    refused(content, message, tmp_path)


@pytest.mark.parametrize(
    "name, message",
    [
        ("optimizer.pth", "holds the state of an optimiser and no weights"),
        ("whole_model.pth", r"holds a whole model \(torch\.nn\.modules\.linear\.Linear\), which"),
        ("whole_model_legacy.pth", r"holds a whole model"),
        ("sparse.pth", r"holds a sparse tensor \(torch\._utils\._rebuild_sparse_tensor\)"),
        ("quantized.pth", r"holds a quantised tensor \(torch\._utils\._rebuild_qtensor\)"),
        ("complex.pth", r"holds a torch\.ComplexFloatStorage, which cannot be read"),
        ("float8.pth", "holds a tensor of type float8_e5m2, which cannot be read"),
        ("negated.pth", "a tensor that is yet to be conjugated or negated"),
        ("meta.pth", "a tensor of the device 'meta', which has no values"),
    ],
)
def test_what_torch_can_save_and_we_cannot_read_is_named(name, message, tmp_path):
    refused((craft.FILES / name).read_bytes(), message, tmp_path)


LEGACY = {
    "cut in a storage": (OLD[:-1], "is cut off: it ends at byte"),
    "cut before a storage": (OLD[:-24], "is cut off: a storage is missing"),
    "cut in a pickle": (OLD[:60], "its pickle cannot be read"),
    "another version": (craft.legacy(MODEL, version=1002), "written in version 1002"),
    "no byte order": (
        craft.change(
            OLD, craft.text("little_endian") + b"\x88", craft.text("little_endian") + b"N"
        ),
        "does not say its byte order",
    ),
    "a storage nobody names": (
        craft.legacy(MODEL, storages={"0": (4, bytes(16)), "1": (4, bytes(16))}),
        "nothing refers to its storage '1'",
    ),
    "a storage twice": (
        craft.legacy(MODEL, keys=["0", "0"]) + OLD[-24:],
        "there are two of its storage '0'",
    ),
    "no storages": (craft.legacy(MODEL, storages={}), "its storage '0' is missing"),
    "keys that are none": (
        craft.change(OLD, craft.list_of(craft.text("0")), craft.list_of(b"N"), last=True),
        "the list of its storages cannot be read",
    ),
    "a length that lies": (
        craft.legacy(MODEL, storages={"0": (5, bytes(20))}),
        "its storage '0' has 5 elements, but 4 are expected",
    ),
    "a negative length": (
        craft.legacy(MODEL, storages={"0": (-4, bytes(16))}),
        "its storage '0' has -4 elements",
    ),
    "a view beyond": (
        craft.legacy(
            craft.dict_of(
                {"a": craft.tensor(craft.storage(tail=craft.tuple_of(b"N", b"K\x03", b"K\x02")))}
            ),
            views=True,
        ),
        "elements 3 to 5 are taken from a storage of 4",
    ),
    "a tensor beyond its view": (
        craft.legacy(
            craft.dict_of(
                {
                    "a": craft.tensor(
                        craft.storage(tail=craft.tuple_of(b"N", b"K\x01", b"K\x02")), shape=(3,)
                    )
                }
            ),
            views=True,
        ),
        r"a tensor of shape \[3\] reaches beyond its storage",
    ),
    "a view of nothing": (
        craft.legacy(craft.dict_of({"a": craft.tensor(craft.storage(tail=b"K\x01"))}), views=True),
        "a view of a storage cannot be read",
    ),
}


@pytest.mark.parametrize("case", LEGACY)
def test_broken_old_files_are_refused(case, tmp_path):
    content, message = LEGACY[case]
    refused(content, message, tmp_path)


SAFETENSORS = {
    "a header longer than the file": (
        struct.pack("<Q", 1000) + b'{"a": 1}',
        "its header has 1000 bytes, but the file has 16",
    ),
    "a header of terabytes": (struct.pack("<Q", 1 << 50) + b"{}", "its header has 11258999068426"),
    "a header that is no JSON": (craft.safetensors(b'{"a": '), "a header that cannot be read"),
    "a header that is no object": (craft.safetensors(b'{"a": 1}'), "describes the array 'a' by"),
    "a key twice": (
        craft.safetensors(b'{"a": 1, "a": 2}'),
        "a header that cannot be read .the key 'a' occurs twice",
    ),
    "a header of nests": (
        craft.safetensors(b'{"a":' * 100_000),
        "a header that cannot be read",
    ),
    "half a character": (craft.safetensors(b'{"\xff": 1}'), "a header that cannot be read"),
    "cut": (SAFE[:-1], r"damaged or cut off: the array 'a' lies at bytes \[0, 16\] of 15"),
    "too long": (SAFE + b"x", "bytes, but its header describes"),
    "overlapping arrays": (
        craft.safetensors({"a": craft.field(), "b": craft.field(place=(8, 24))}, bytes(24)),
        "the array 'b' overlaps 'a'",
    ),
    "the same bytes twice": (
        craft.safetensors({"a": craft.field(), "b": craft.field()}, bytes(16)),
        "the array 'b' overlaps 'a'",
    ),
    "a hole": (
        craft.safetensors({"a": craft.field(), "b": craft.field(place=(20, 36))}, bytes(36)),
        "the array 'b' leaves a hole behind 'a'",
    ),
    "a hole at the start": (safe(place=(4, 20), data=20), "leaves a hole behind 'the header'"),
    "a type that does not exist": (safe("F33"), "stores the array 'a' as 'F33', which cannot"),
    "a type we cannot read": (safe("F8_E4M3"), "stores the array 'a' as 'F8_E4M3', which cannot"),
    "a type that is none": (safe(["F32"]), "stores the array 'a' as"),
    "a shape that does not match": (safe(shape=(5,)), r"float32\[5\] needs 20 bytes, but has 16"),
    "a negative size": (safe(shape=(-4,)), r"the shape \[-4\]"),
    "a size that is no number": (safe(shape=(True, 4)), r"the shape \[True, 4\]"),
    "an impossible size": (safe(shape=(1 << 40, 1 << 40)), "the impossible shape"),
    "a place backwards": (safe(place=(16, 0)), r"lies at bytes \[16, 0\]"),
    "a negative place": (safe(place=(-16, 0)), r"lies at bytes \[-16, 0\]"),
    "a place that is none": (safe(place=(0, 16.0)), r"the place \[0, 16\.0\]"),
    "more than a field": (
        craft.safetensors({"a": craft.field() | {"code": "x"}}, bytes(16)),
        "by something else than dtype, shape and place",
    ),
    "metadata that are no strings": (
        craft.safetensors({"__metadata__": {"a": 1}}),
        "'__metadata__' that does not map names to strings",
    ),
    "a name that is none": (craft.safetensors({"": craft.field()}, bytes(16)), "an array '':"),
    "no arrays": (craft.safetensors({}), "holds no arrays"),
    "truth values": (safe("BOOL", (1,), (0, 1), 1)[:-1] + b"\x02", "is neither 0 nor 1"),
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_broken_safetensors_are_refused(case, tmp_path):
    content, message = SAFETENSORS[case]
    refused(content, message, tmp_path, "model.safetensors")


def test_something_else_called_safetensors_is_refused(tmp_path):
    refused(b"x" * 20, "is no safetensors file: no header follows", tmp_path, "a.safetensors")


ARRAYS = {
    "no header": (craft.zip_file({"a.npy": b"x"}), "the header of its array 'a' cannot be read"),
    "a header that is code": (npz("__import__('os').getpid()"), "the header of its array 'a'"),
    "a header of nests": (npz("(" * 5000), "the header of its array 'a'"),
    "a header without end": (npz(HEADER + " " * 20_000), "the header of its array 'a'"),
    "a shape that does not match": (npz(HEADER, bytes(12)), r"needs .* bytes, but has"),
    "a negative size": (npz(HEADER.replace("4,", "-4,")), r"the shape \[-4\]"),
    "a truth value as size": (npz(HEADER.replace("4,", "True,")), r"the shape \[True\]"),
    "pickled objects": (npz(HEADER.replace("<f4", "|O")), "holds pickled Python objects in 'a'"),
    "complex numbers": (npz(HEADER.replace("<f4", "<c8")), "stores the array 'a' as 'complex64'"),
    "texts": (npz(HEADER.replace("<f4", "<U1")), "stores the array 'a' as '<U1'"),
    "records": (npz(HEADER.replace("'<f4'", "[('x', '<f4')]")), "stores the array 'a' as"),
    "dates": (npz(HEADER.replace("<f4", "<M8[s]")), "stores the array 'a' as 'datetime64"),
    "cut": (NPZ[:-3], "cut off"),
    "a wrong checksum": (
        craft.change(NPZ, craft.four_floats(), bytes(16)),
        r"its entry 'a\.npy' does not match its checksum",
    ),
    "metadata that are no JSON": (
        craft.zip_file({"__metadata__.npy": craft.npy(array=np.array("{"))}),
        "an entry '__metadata__' that is not JSON",
    ),
    "metadata that are a list": (
        craft.zip_file({"__metadata__.npy": craft.npy(array=np.array("[1]"))}),
        "an entry '__metadata__' that is no JSON object",
    ),
    "half characters": (
        craft.zip_file({"a.npy": craft.npy(HEADER.replace("<f4", "<U1").replace("4,", ""),
                                           b"\xff\xff\xff\xff")}),
        "the text 'a' cannot be read",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ARRAYS)
def test_broken_npz_files_are_refused(case, tmp_path):
    content, message = ARRAYS[case]
    refused(content, message, tmp_path, "file.npz")


@pytest.mark.parametrize("damage", ["cut", "longer", "garbage"])
def test_damaged_compression_is_refused(damage, tmp_path):
    np.savez_compressed(tmp_path / "good.npz", a=np.arange(1000))
    content = bytearray((tmp_path / "good.npz").read_bytes())
    entry = content.rfind(b"PK\x01\x02")
    if damage == "garbage":
        content[60:80] = b"\xff" * 20
    else:
        change = {"cut": -8, "longer": 8}[damage]
        (size,) = struct.unpack_from("<L", content, entry + 24)
        struct.pack_into("<L", content, entry + 24, size + change)
    message = "cannot be unpacked|unpacks to|the header of its array|but has|checksum|otherwise"
    refused(bytes(content), message, tmp_path, "file.npz")


def test_a_file_that_changes_after_it_was_opened_is_refused(tmp_path):
    path = tmp_path / "file.pth"
    path.write_bytes(ZIP)
    tensor = weight_files.read(path).tensors["a"]
    path.write_bytes(ZIP + b"more")
    with pytest.raises(weight_files.WeightFileError, match="was changed while it was read"):
        tensor.read()
    path.unlink()
    with pytest.raises(weight_files.WeightFileError, match="No such file"):
        tensor.read()


def test_what_cannot_be_opened_is_refused(tmp_path, monkeypatch):
    with pytest.raises(weight_files.WeightFileError, match="cannot be read: No such file"):
        weight_files.read(tmp_path / "missing.pth")
    with pytest.raises(weight_files.WeightFileError, match="cannot be read: .*embedded null"):
        weight_files.read("a\0b")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(weight_files.WeightFileError, match="is not a regular file"):
        weight_files.read(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(ZIP)

    def forbid(*_, **__):
        raise PermissionError(13, "Permission denied", "somewhere")

    monkeypatch.setattr(os, "open", forbid)
    with pytest.raises(weight_files.WeightFileError, match="file cannot be read: Permission den"):
        weight_files.read(tmp_path / "file")


def test_a_file_without_permission_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(ZIP)
    (tmp_path / "file").chmod(0)
    if os.access(tmp_path / "file", os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(weight_files.WeightFileError, match="cannot be read: Permission denied"):
        weight_files.read(tmp_path / "file")


# Folders and shards.


def test_a_folder_without_weights_says_what_was_looked_for(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        weight_files.WeightFileError,
        match=r"holds no weights: neither model\.safetensors, .*open_clip_pytorch_model\.bin nor a",
    ):
        weight_files.read(tmp_path)


def test_a_folder_with_several_files_names_them(tmp_path):
    (tmp_path / "best.pth").write_bytes(ZIP)
    (tmp_path / "last.pth").write_bytes(ZIP)
    with pytest.raises(weight_files.WeightFileError, match=r"several .*, best\.pth, last\.pth: "):
        weight_files.read(tmp_path)


SHARD = "model-00001-of-00002.safetensors"
OTHER = "model-00002-of-00002.safetensors"
SECOND = craft.safetensors({"b": craft.field()}, craft.four_floats())


@pytest.mark.parametrize(
    "places, message",
    [
        ({"a": SHARD, "b": OTHER, "c": OTHER}, "says that 'c' is in model-00002.*but it is not"),
        ({"a": SHARD}, None),
        ({"a": SHARD, "b": SHARD}, "says that 'b' is in model-00001"),
        ({"b": OTHER, "x": SHARD}, "says nothing about the array 'a' in model-00001"),
        ({"a": "../x.bin"}, r"puts the array 'a' into '\.\./x\.bin', which is no file beside it"),
        ({"a": "/etc/passwd"}, "which is no file beside it"),
        ({"a": ".."}, "which is no file beside it"),
        ({"a": 3}, "puts the array 'a' into 3"),
        ({"a": "model.safetensors.index.json"}, "names itself or another index"),
        ({"a": "model-00003-of-00002.safetensors"}, r"00003-of-00002\.safetensors is missing"),
        ({}, "does not say which shards hold which arrays"),
        ([], "does not say which shards hold which arrays"),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(places, message, tmp_path):
    (tmp_path / SHARD).write_bytes(SAFE)
    (tmp_path / OTHER).write_bytes(SECOND)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    for path in (tmp_path, index):
        if message is None:
            assert list(weight_files.read(path).tensors) == ["a"]
        else:
            with pytest.raises(weight_files.WeightFileError, match=message):
                weight_files.read(path)


def test_an_index_is_no_safetensors_file_wherever_it_has_a_brace(tmp_path):
    (tmp_path / "x.bin.index.json").write_text('{"abcd":{}}')
    with pytest.raises(weight_files.WeightFileError, match="does not say which shards"):
        weight_files.read(tmp_path)


def test_an_index_that_is_no_json_is_refused(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": ')
    with pytest.raises(weight_files.WeightFileError, match="is not the JSON file it should be"):
        weight_files.read(tmp_path)


def test_shards_of_different_kinds_are_refused(tmp_path):
    (tmp_path / SHARD).write_bytes(SAFE)
    (tmp_path / "other.bin").write_bytes(craft.torch_zip(craft.dict_of({"b": craft.tensor()})))
    places = {"a": SHARD, "b": "other.bin"}
    (tmp_path / "x.bin.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(weight_files.WeightFileError, match="shards of different kinds"):
        weight_files.read(tmp_path)


def test_a_lone_shard_is_refused(tmp_path):
    (tmp_path / SHARD).write_bytes(SAFE)
    with pytest.raises(weight_files.WeightFileError, match="is one of 2 shards: give their folder"):
        weight_files.read(tmp_path / SHARD)
    with pytest.raises(weight_files.WeightFileError, match="no index that says what they are"):
        weight_files.read(tmp_path)


def test_code_in_a_shard_is_refused_by_name(tmp_path):
    value = craft.torch_zip(craft.dict_of({"a": craft.name("posix", "system")}))
    (tmp_path / "pytorch_model-00001-of-00001.bin").write_bytes(value)
    places = {"a": "pytorch_model-00001-of-00001.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(weight_files.WeightFileError, match=r"asks for posix\.system"):
        weight_files.read(tmp_path)


def test_a_folder_whose_settings_are_damaged_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(SAFE)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(weight_files.WeightFileError, match=r"config\.json is not the JSON file"):
        weight_files.read(tmp_path).settings("config.json")
