"""Pickles that would run code, and files that would fill the memory: refused, and nothing runs."""

import pickle
import re
import struct
import zlib

import craft
import numpy as np
import pytest

from itself_jax import weight_files

MODEL = craft.dict_of({"a": craft.tensor()})


def make_folder(path) -> bytes:
    """The arguments of `os.mkdir`: what the payloads below would do."""
    return craft.tuple_of(craft.text(str(path)))


# Each is run by Python's own pickle, which `test_the_payloads_are_live` shows.
LIVE = {
    "GLOBAL": lambda path: craft.name("posix", "mkdir") + make_folder(path) + b"R",
    "STACK_GLOBAL": lambda path: (
        craft.text("posix") + craft.text("mkdir") + b"\x93" + make_folder(path) + b"R"
    ),
    "STACK_GLOBAL from the memo": lambda path: (
        craft.text("posix")
        + b"q\x000"
        + b"h\x00"
        + craft.text("mkdir")
        + b"\x93"
        + make_folder(path)
        + b"R"
    ),  # fmt: skip
    "INST": lambda path: b"(" + craft.text(str(path)) + b"iposix\nmkdir\n",
    "OBJ": lambda path: b"(" + craft.name("posix", "mkdir") + craft.text(str(path)) + b"o",
    "a call by a helper": lambda path: (
        craft.name("functools", "partial")
        + craft.tuple_of(craft.name("posix", "mkdir"), craft.text(str(path)))
        + b"R)R"
    ),
    "in a list in a list": lambda path: craft.list_of(
        craft.list_of(craft.name("posix", "mkdir") + make_folder(path) + b"R")
    ),
    "dropped at once": lambda path: craft.name("posix", "mkdir") + make_folder(path) + b"R0" + b"N",
    "in an OrderedDict's state": lambda path: (
        craft.ORDERED_DICT
        + craft.dict_of({"x": craft.name("posix", "mkdir") + make_folder(path) + b"R"})
        + b"b"
    ),
}
NAMED = {"GLOBAL": "posix.mkdir", "a call by a helper": "functools.partial"}

# Where a payload may hide.
PLACES = {
    "the whole of a zip file": craft.torch_zip,
    "beside the model": lambda p: craft.torch_zip(craft.dict_of({"model": MODEL, "args": p})),
    "among the arrays": lambda p: craft.torch_zip(
        craft.dict_of({"a": craft.tensor(), "b": craft.list_of(p)})
    ),
    "constants.pkl": lambda p: craft.script_zip(
        craft.module("Net", {"a": craft.tensor()}), constants=p
    ),
    "an archive in the archive": lambda p: craft.torch_zip(
        MODEL, more={"archive/extra/inner/data.pkl": craft.pickle(p)}
    ),
    "another pickle outside of the archive": lambda p: craft.torch_zip(
        MODEL, more={"other.pkl": craft.pickle(p)}
    ),
    "a TorchScript attribute": lambda p: craft.script_zip(
        craft.module("Net", {"a": craft.tensor(), "b": p})
    ),
    "an old file": craft.legacy,
    "the magic number of an old file": lambda p: craft.pickle(p) + craft.legacy(MODEL),
    "the storage keys of an old file": lambda p: change_keys(p),
    "a pickle": lambda p: craft.pickle(p),
}


def change_keys(payload: bytes) -> bytes:
    keys = craft.pickle(craft.list_of(craft.text("0")))
    return craft.change(craft.legacy(MODEL), keys, craft.pickle(payload), last=True)


@pytest.mark.parametrize("payload", LIVE)
def test_the_payloads_are_live(payload, tmp_path):
    pickle.loads(craft.pickle(LIVE[payload](tmp_path / "made")))
    assert (tmp_path / "made").is_dir()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("payload", LIVE)
def test_code_is_refused_by_name_wherever_it_hides(payload, place, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(PLACES[place](LIVE[payload](tmp_path / "made")))
    name = re.escape(NAMED.get(payload, "posix.mkdir"))
    with pytest.raises(weight_files.WeightFileError, match=f"asks for {name}, which is code"):
        weight_files.read(path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_by_python_are_refused_by_name(protocol, tmp_path):
    class Payload:
        def __reduce__(self):
            import os

            return os.mkdir, (str(tmp_path / "made"),)

    for value in (Payload(), [Payload()], {"model": Payload()}):
        (tmp_path / "file").write_bytes(pickle.dumps(value, protocol))
        with pytest.raises(weight_files.WeightFileError, match=r"asks for posix\.mkdir"):
            weight_files.read(tmp_path / "file")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "module, attribute",
    [
        ("os", "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("__builtin__", "exec"),
        ("subprocess", "Popen"),
        ("torch", "load"),
        ("torch.hub", "load"),
        ("torch.storage", "_load_from_bytes"),
        ("torch._utils", "_import_dotted_name"),
        ("torch.serialization", "load"),
        ("numpy", "load"),
        ("numpy.core.multiarray", "fromfile"),
        ("collections", "namedtuple"),
        ("collections", "OrderedDict.fromkeys"),
        ("pathlib", "PosixPath.unlink"),
        ("argparse", "ArgumentParser"),
        ("copyreg", "_reconstructor"),
        ("__torch__", "Net"),
        ("__main__", "Model"),
    ],
)
def test_what_is_not_on_the_list_is_refused_by_name(module, attribute, tmp_path):
    for value in (craft.name(module, attribute), craft.call(module, attribute)):
        path = tmp_path / "file.pth"
        path.write_bytes(craft.torch_zip(craft.dict_of({"a": value})))
        with pytest.raises(weight_files.WeightFileError) as error:
            weight_files.read(path)
        assert f"asks for {module}.{attribute}, which is code" in str(error.value)


def test_other_pickles_in_an_archive_may_be_anything_but_code(tmp_path):
    for content in (b"hello", b"", craft.pickle(b"\xff"), craft.pickle(craft.tensor())):
        value = craft.torch_zip(MODEL, more={"archive/extra/notes.pkl": content})
        (tmp_path / "file").write_bytes(value)
        assert list(weight_files.read(tmp_path / "file").tensors) == ["a"]
    for content in (b"\x822", b"(oR", b"2"):
        value = craft.torch_zip(MODEL, more={"archive/extra/notes.pkl": content})
        (tmp_path / "file").write_bytes(value)
        with pytest.raises(weight_files.WeightFileError, match="nothing of it was run"):
            weight_files.read(tmp_path / "file")


def test_script_classes_are_inert_in_a_script_and_code_elsewhere(tmp_path):
    value = craft.module("Net", {"a": craft.tensor()})
    (tmp_path / "script").write_bytes(craft.script_zip(value))
    assert list(weight_files.read(tmp_path / "script").tensors) == ["a"]
    (tmp_path / "saved").write_bytes(craft.torch_zip(value))
    with pytest.raises(weight_files.WeightFileError, match=r"asks for __torch__\.Net"):
        weight_files.read(tmp_path / "saved")


REBUILD = craft.name("torch._utils", "_rebuild_tensor_v2")
TRICKS = {
    "state of a function": (REBUILD + b"}b", "sets the state of torch._utils._rebuild_tensor_v2"),
    "state of a dict": (b"}" + craft.dict_of({"__class__": b"N"}) + b"b", "sets the state of a di"),
    "state of a list": (b"]}b", "sets the state of []"),
    "state of a tensor": (craft.tensor() + b"}b", "sets the state of a Tensor"),
    "a call of a string": (craft.text("os.system") + b")R", "calls 'os.system'"),
    "a call of a tensor": (craft.tensor() + b")R", "calls a Tensor"),
    "a call of a type": (
        craft.name("torch", "FloatStorage") + b")R",
        "calls torch.FloatStorage, which",
    ),
    "a call of dict": (craft.name("builtins", "dict") + b")R", "calls builtins.dict, which"),
    "a new function": (craft.name("torch", "Tensor") + b")\x81", "calls torch.Tensor, which"),
    "NEWOBJ_EX": (craft.name("collections", "OrderedDict") + b")}\x92", "instruction NEWOBJ_EX"),
    "OBJ": (b"(" + craft.name("collections", "OrderedDict") + b"o", "instruction OBJ"),
    "EXT1": (b"\x82\x01", "asks for extension 1 of copyreg"),
    "EXT2": (b"\x83\x01\x01", "asks for extension 257 of copyreg"),
    "EXT4": (b"\x84\x01\x00\x00\x00", "asks for extension 1 of copyreg"),
    "PERSID": (b"P0\n", "instruction PERSID"),
    "out-of-band data": (b"\x97", "instruction NEXT_BUFFER"),
    "a codec that unpacks": (
        craft.call("_codecs", "encode", craft.text("x"), craft.text("zlib_codec")),
        "bytes cannot be read",
    ),
    "a persistent id that is a path": (craft.text("/etc/passwd") + b"Q", "in an unknown way"),
    "a persistent id that is a module": (
        craft.tuple_of(craft.text("module"), b"N", craft.text("f.py"), craft.text("code")) + b"Q",
        "holds a whole model",
    ),
    "a storage that lies elsewhere": (
        craft.tensor(craft.storage(key="../../data/0")),
        "its storage '../../data/0' is missing",
    ),
    "a storage of a type that is code": (
        craft.tensor(craft.storage("UntypedStorage.from_file", module="torch")),
        "asks for torch.UntypedStorage.from_file",
    ),
    "a storage of a type that is a function": (
        craft.tensor(craft.storage("_rebuild_tensor", module="torch._utils")),
        "names a storage without a type",
    ),
    "a name with an escape": (b"cposi\\x78\nmkdir\n)R", "asks for posix.mkdir"),
    "a name with an odd escape": (b"cposi\\sx\nmkdir\n)R", "pickle cannot be read"),
    "a subclass that rebuilds itself": (
        craft.call(
            "torch._tensor",
            "_rebuild_from_type_v2",
            craft.name("torch", "Size"),
            craft.name("torch", "Tensor"),
            b")",
            b"}",
        ),
        "a tensor of a class of its own",
    ),
}


@pytest.mark.parametrize("trick", TRICKS)
@pytest.mark.parametrize("wrap", [craft.torch_zip, craft.legacy, craft.script_zip])
def test_tricks_are_refused(trick, wrap, tmp_path):
    value, message = TRICKS[trick]
    if wrap is craft.legacy and "lies elsewhere" in trick:
        pytest.skip("old files have no entries")
    (tmp_path / "file").write_bytes(wrap(craft.dict_of({"a": value})))
    with pytest.raises(weight_files.WeightFileError, match=re.escape(message)):
        weight_files.read(tmp_path / "file")


def refused_quickly(content: bytes, message: str, tmp_path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    found, seconds, memory = craft.read_in_a_fresh_process(path)
    assert re.search(message, found or "read"), found
    assert seconds < 20
    assert memory < 300 << 20


def test_doubling_lists_are_never_walked_through(tmp_path):
    """ "Billion laughs": sixty lists that each hold the one before twice."""
    value = b"]q\x000" + b"".join(b"](h%ch%ceq%c0" % (i, i, i + 1) for i in range(60)) + b"h\x3c"
    content = craft.torch_zip(craft.dict_of({"model": MODEL, "laughs": value}))
    (tmp_path / "file").write_bytes(content)
    file = weight_files.read(tmp_path / "file")
    assert list(file.tensors) == ["a"]
    assert "laughs" in file.notes[0]


def test_doubling_keys_are_never_hashed(tmp_path):
    """The hash of the last of sixty doubling tuples takes longer than the universe is old."""
    value = b")q\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60))
    content = craft.torch_zip(craft.dict_of({"model": MODEL, "x": value + b"0}h\x3cNs"}))
    (tmp_path / "file").write_bytes(content)
    assert list(weight_files.read(tmp_path / "file").tensors) == ["a"]


def test_colliding_keys_are_never_compared(tmp_path):
    """Multiples of Python's hash modulus all have the hash 0."""
    prime = (1 << 61) - 1
    keys = b"".join(craft.number(i * prime) + b"N" for i in range(40_000))
    content = craft.torch_zip(craft.dict_of({"model": MODEL, "x": b"}(" + keys + b"u"}))
    (tmp_path / "file").write_bytes(content)
    message, seconds, _ = craft.read_in_a_fresh_process(tmp_path / "file")
    assert message is None
    assert seconds < 5


def test_dicts_that_hold_themselves_are_refused(tmp_path):
    value = b"}q\x00(" + craft.text("model") + b"h\x00u"
    refused_quickly(craft.torch_zip(value), "holds no arrays", tmp_path)
    value = b"}q\x00(" + craft.text("model") + b"h\x00" + craft.text("t") + craft.tensor() + b"u"
    refused_quickly(craft.torch_zip(value), "nested more than 8 deep", tmp_path)


def test_many_paths_through_the_same_dicts_are_walked_once(tmp_path):
    keys = ("model", "state_dict", "net", "network", "weights", "module", "params", "state")
    value = b"}q\x000"
    for i in range(40):
        items = b"".join(craft.text(key) + b"h%c" % i for key in keys)
        value += b"}(" + items + b"uq%c0" % (i + 1)
    value += b"h%c" % 40
    refused_quickly(craft.torch_zip(value), "holds no arrays", tmp_path)


def test_modules_that_hold_themselves_are_refused(tmp_path):
    value = craft.name("__torch__", "Net") + b")\x81q\x00" + craft.dict_of({"me": b"h\x00"}) + b"b"
    refused_quickly(craft.script_zip(value), "its modules contain each other", tmp_path)
    value = craft.module("Net", {"a": craft.tensor()}) + b"q\x000"
    for i in range(60):
        value += craft.module("Net", {"x": b"h%c" % i, "y": b"h%c" % i}) + b"q%c0" % (i + 1)
    value += b"h%c" % 60
    refused_quickly(craft.script_zip(value), "or are too many", tmp_path)


def test_a_pickle_with_too_many_instructions_is_refused(tmp_path):
    value = b"](" + b"N" * 2_000_001 + b"e"
    refused_quickly(craft.torch_zip(value), "more than 2000000 instructions", tmp_path)


@pytest.mark.parametrize(
    "value",
    [
        b"\x8d" + (1 << 40).to_bytes(8, "little") + b"x",  # BINUNICODE8
        b"\x8e" + (1 << 62).to_bytes(8, "little") + b"x",  # BINBYTES8
        b"\x8b" + (1 << 30).to_bytes(4, "little") + b"x",  # LONG4
        b"T" + (1 << 30).to_bytes(4, "little") + b"x",  # BINSTRING
    ],
)
def test_lengths_that_lie_are_refused_before_memory_is_taken(value, tmp_path):
    message = "is damaged, or has a pickle of more than 64 MB|pickle cannot be read"
    for wrap in (craft.torch_zip, craft.legacy):
        refused_quickly(wrap(value), message, tmp_path)


def test_a_stride_of_zero_does_not_stand_for_a_terabyte(tmp_path):
    for shape, strides in (((1 << 38,), (0,)), ((1 << 19, 1 << 19), (0, 0)), ((5, 1), (0, 1))):
        value = craft.dict_of({"a": craft.tensor(shape=shape, strides=strides)})
        refused_quickly(craft.torch_zip(value), "expands 16 bytes", tmp_path)


def test_a_thousand_names_for_the_same_bytes_are_refused(tmp_path):
    content = bytes(4 << 20)
    names = {
        f"n{i}": craft.tensor(craft.storage(count=1 << 20), shape=(1 << 20,)) for i in range(1000)
    }
    value = craft.torch_zip(craft.dict_of(names), storages={"0": content})
    refused_quickly(value, "would turn its .* bytes into arrays of 4194304000", tmp_path)


def test_more_arrays_than_any_model_has_are_refused(tmp_path):
    function, arguments = craft.name("torch._utils", "_rebuild_tensor_v2"), craft.tensor()
    arguments = arguments.removeprefix(function).removesuffix(b"R")
    value = function + b"q\x000" + arguments + b"q\x010](" + b"h\x00h\x01R" * 100_001 + b"e"
    refused_quickly(craft.torch_zip(value), "more than 100000 arrays", tmp_path)


def test_a_zip_bomb_is_refused(tmp_path):
    np.savez_compressed(tmp_path / "file.npz", a=np.zeros(1 << 27, np.uint8))
    content = (tmp_path / "file.npz").read_bytes()
    refused_quickly(content, "would unpack its [0-9]+ bytes to 134217856", tmp_path)


def test_a_packed_entry_that_lies_about_its_size_is_not_unpacked(tmp_path):
    """Half a gigabyte of zeros that claims to be a thousand bytes of code."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(512)) + packer.flush()
    value = craft.module("Net", {"a": craft.tensor()})
    name = "archive/code/__torch__.py"
    content = bytearray(craft.script_zip(value, more={name: packed}))
    for mark, method in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        at = content.rfind(mark, 0, content.rfind(name.encode()))
        at = content.find(name.encode()) - 30 if mark == b"PK\x03\x04" else at
        struct.pack_into("<H", content, at + method, 8)
        struct.pack_into("<L", content, at + method + 14, 1000)
    refused_quickly(bytes(content), "py' unpacks to more than its 1000 bytes", tmp_path)


def test_pickled_objects_in_npz_are_refused_and_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            import os

            return os.mkdir, (str(tmp_path / "made"),)

    np.savez(tmp_path / "file.npz", a=np.arange(3), b=np.array([Payload()], dtype=object))
    with pytest.raises(weight_files.WeightFileError, match="pickled Python objects in 'b'"):
        weight_files.read(tmp_path / "file.npz")
    assert not (tmp_path / "made").exists()
