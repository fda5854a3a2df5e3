"""Files that torch, safetensors and NumPy have written, read without them and bit for bit."""

import json
import struct
import subprocess
import sys

import craft
import ml_dtypes
import numpy as np
import pytest

from itself_jax import weight_files

FILES = craft.FILES
SIZES = (("b1", "bool"), ("u1", "uint8"), ("i2", "int16"), ("f2", "float16"), ("f8", "float64"))


def assert_same(file: weight_files.TensorFile, expected: dict[str, np.ndarray]) -> None:
    """Names in order, shapes, types and bits; what is read owns its memory."""
    assert list(file.tensors) == list(expected)
    for name, want in expected.items():
        tensor = file.tensors[name]
        got = tensor.read()
        assert (tensor.shape, tensor.dtype) == (want.shape, want.dtype), name
        assert (got.shape, got.dtype) == (want.shape, want.dtype), name
        assert got.tobytes() == want.tobytes(), name
        assert got.flags.c_contiguous and got.flags.writeable and got.flags.owndata


@pytest.mark.parametrize(
    "name, kind, notes",
    [
        ("plain.pth", "torch.save (zip)", ()),
        ("plain_legacy.pth", "torch.save (legacy)", ()),
        ("training.pth", "torch.save (zip)", 2),
        ("training_legacy.pth", "torch.save (legacy)", 2),
        ("training_protocol5.pth", "torch.save (zip)", 2),
    ],
)
def test_torch_files_of_every_age_give_what_torch_saved(name, kind, notes):
    file = weight_files.read(FILES / name)
    assert (file.path, file.file, file.kind) == (FILES / name, FILES / name, kind)
    assert_same(file, craft.expected("state/"))
    if notes:
        assert file.notes == (
            "took 'model' of a training state (beside it: optimizer, scheduler, args, rng)",
            "removed the prefix 'module.'",
        )
        assert file.metadata == {
            **{"epoch": 3, "num_epoch": 60, "iteration": 2**40, "best": 0.7525},
            **{"name": "ViT-B/16", "done": True, "parent": None},
        }
        assert type(file.metadata["best"]) is float and file.metadata["done"] is True
    else:
        assert (file.notes, file.metadata) == ((), {})


@pytest.mark.parametrize("name", ["scripted", "traced"])
def test_torchscript_gives_what_its_state_dict_gives(name):
    """Buffers and modules that occur twice, but no constants and no plain attributes."""
    file = weight_files.read(str(FILES / f"{name}.pt"))
    assert (file.kind, file.metadata, file.notes) == ("TorchScript", {}, ())
    expected = craft.expected(f"{name}/")
    assert {"context_length", "again.weight", "layers.1.bias", "small"} < set(expected)
    assert "plain" not in expected
    assert_same(file, expected)


def test_torchscript_without_code_gives_every_array(tmp_path):
    inner = craft.module("a.Inner", {"w": craft.tensor(), "n": craft.number(3)})
    value = craft.module("Net", {"inner": inner, "b": craft.tensor(), "training": b"\x88"})
    (tmp_path / "file").write_bytes(craft.script_zip(value))
    file = weight_files.read(tmp_path / "file")
    assert list(file.tensors) == ["b", "inner.w"]
    code = b"class Net(Module):\n  __parameters__ = []\n  __buffers__ = []\n  b : Tensor\n"
    more = {"archive/code/__torch__.py": code}
    (tmp_path / "file").write_bytes(craft.script_zip(value, more=more))
    assert list(weight_files.read(tmp_path / "file").tensors) == ["inner.w"]


def test_files_without_checksums_are_read(tmp_path):
    content = (FILES / "without_checksums.pth").read_bytes()
    (tmp_path / "file").write_bytes(content)
    assert_same(weight_files.read(tmp_path / "file"), {"a": np.arange(3)})


def test_safetensors_by_the_library_are_read():
    file = weight_files.read(FILES / "library.safetensors")
    expected = craft.expected("state/")
    assert (file.kind, file.metadata, file.notes) == ("safetensors", {"format": "pt"}, ())
    assert_same(file, {name: expected[name] for name in file.tensors})
    assert set(file.tensors) == set(expected)


@pytest.mark.parametrize("high", range(7))
def test_a_header_whose_length_looks_like_a_pickle_is_read(high, tmp_path):
    """384 = 0x180 is stored as 80 01, which is how a pickle of protocol 1 would begin."""
    header = json.dumps({"a": craft.field()}).encode().ljust(0x80 + 0x100 * high)
    (tmp_path / "file").write_bytes(craft.safetensors(header, craft.four_floats()))
    assert_same(weight_files.read(tmp_path / "file"), {"a": np.arange(4, dtype=np.float32)})


def test_npz_by_numpy_is_read(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {code: (rng.normal(size=(3, 4)) * 9).astype(code) for code, _ in SIZES}
    arrays["bfloat16"] = rng.normal(size=5).astype(ml_dtypes.bfloat16)
    arrays["a/b"] = np.asfortranarray(arrays["f8"])
    arrays["big"] = np.arange(5, dtype=">i4")
    arrays["big.fortran"] = np.asfortranarray(np.arange(6, dtype=">f4").reshape(2, 3))
    arrays["scalar"] = np.float32(2)
    arrays["empty"] = np.zeros((0, 3))
    texts = {"text": np.array("é½😀"), "big.text": np.array("abc").astype(">U3")}
    settings = {"__metadata__": np.array(json.dumps({"epoch": 3, "nested": {"a": [1]}}))}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "file.npz", **arrays, **texts, **settings)
        file = weight_files.read(tmp_path / "file.npz")
        assert file.kind == "npz"
        expected = {n: np.array(a, a.dtype.newbyteorder("="), order="C") for n, a in arrays.items()}
        assert_same(file, expected)
        assert file.metadata == {
            **{"epoch": 3, "nested": {"a": [1]}},
            **{"text": "é½😀", "big.text": "abc"},
        }


def test_compressed_truth_values_are_checked(tmp_path):
    np.savez_compressed(tmp_path / "file.npz", a=np.array([True, False] * 50))
    assert weight_files.read(tmp_path / "file.npz").tensors["a"].read().sum() == 50


@pytest.mark.parametrize("little", [True, False])
def test_the_other_byte_order_is_turned(little, tmp_path):
    order = "<" if little else ">"
    floats, integers = np.arange(4, dtype=f"{order}f4"), np.arange(3, dtype=f"{order}i8")
    value = craft.dict_of(
        {
            "f": craft.tensor(),
            "t": craft.tensor(shape=(2, 2), strides=(1, 2)),
            "i": craft.tensor(craft.storage("LongStorage", "1", 3), shape=(3,)),
        }
    )
    expected = {"f": floats, "t": floats.reshape(2, 2).T, "i": integers}
    expected = {n: np.array(a, a.dtype.newbyteorder("="), order="C") for n, a in expected.items()}
    more = {"archive/byteorder": b"little" if little else b"big"}
    storages = {"0": floats.tobytes(), "1": integers.tobytes()}
    (tmp_path / "zip").write_bytes(craft.torch_zip(value, storages=storages, more=more))
    assert_same(weight_files.read(tmp_path / "zip"), expected)
    old = {"0": (4, floats.tobytes()), "1": (3, integers.tobytes())}
    (tmp_path / "old").write_bytes(craft.legacy(value, storages=old, little=little))
    assert_same(weight_files.read(tmp_path / "old"), expected)


def test_an_old_storage_may_be_a_view_of_another(tmp_path):
    """Elements 1 to 3 of the storage; of these the tensor takes the second and the third."""
    view = craft.tuple_of(craft.text("view"), craft.number(1), craft.number(3))
    part = craft.tensor(craft.storage(tail=view), offset=1, shape=(2,))
    whole = craft.tensor(craft.storage(tail=b"N"))
    value = craft.dict_of({"part": part, "whole": whole})
    (tmp_path / "old").write_bytes(craft.legacy(value, views=True))
    floats = np.arange(4, dtype=np.float32)
    assert_same(weight_files.read(tmp_path / "old"), {"part": floats[2:4], "whole": floats})


def test_pickles_of_python_2_and_of_torch_0_3_are_read(tmp_path):
    """Strings as bytes, an OrderedDict as a list of pairs, tensors without a version."""
    old = craft.call(
        "torch._utils", "_rebuild_tensor",
        craft.storage(), craft.number(0), craft.numbers((2, 2)), craft.numbers((2, 1)),
    )  # fmt: skip
    pair = craft.list_of(b"U\x01a", craft.call("torch._utils", "_rebuild_parameter", old, b"\x88",
                                               craft.ORDERED_DICT))  # fmt: skip
    value = craft.name("collections", "OrderedDict") + craft.tuple_of(craft.list_of(pair)) + b"R"
    value += craft.dict_of({"_metadata": craft.ORDERED_DICT}) + b"b"
    (tmp_path / "old").write_bytes(craft.legacy(value))
    expected = {"a": np.arange(4, dtype=np.float32).reshape(2, 2)}
    assert_same(weight_files.read(tmp_path / "old"), expected)


def test_what_training_programs_keep_beside_the_model_is_no_hindrance(tmp_path):
    """Each of these is a plain container or value, and nothing of it is run."""
    scalar = craft.call(
        "numpy.core.multiarray",
        "scalar",
        craft.call("numpy", "dtype", craft.text("f4"), b"K\x00", b"K\x01")
        + craft.tuple_of(b"K\x03", craft.text(">"), b"N") + b"b",
        craft.call("_codecs", "encode", craft.text("@I\x0fÛ"), craft.text("latin1")),
    )  # fmt: skip
    value = craft.dict_of(
        {
            "state_dict": craft.dict_of({"a": craft.tensor()}),
            "pi": scalar,
            "args": craft.call("argparse", "Namespace") + craft.dict_of({"lr": b"K\x01"}) + b"b",
            "path": craft.call("pathlib", "PosixPath", craft.text("a")),
            "milestones": craft.call("collections", "Counter", craft.dict_of({"3": b"K\x01"})),
            "set": craft.call("__builtin__", "set", craft.list_of(b"K\x01")),
            "new": b"\x8f(K\x01\x90",
            "frozen": b"(K\x01\x91",
            "default": craft.call("collections", "defaultdict", craft.name("builtins", "dict"))
            + craft.text("k") + b"Ns",
            "device": craft.call("torch", "device", craft.text("cuda")),
            "type": craft.name("torch", "float16"),
            "size": craft.call("torch", "Size", craft.list_of(b"K\x01")),
            "array": craft.call("numpy.core.multiarray", "_reconstruct", b"N") + b"Nb",
        }
    )  # fmt: skip
    for wrap in (craft.torch_zip, craft.legacy):
        (tmp_path / "file").write_bytes(wrap(value))
        file = weight_files.read(tmp_path / "file")
        assert list(file.tensors) == ["a"]
        assert file.metadata == {"pi": pytest.approx(3.1415927)}
        beside = "args, path, milestones, set, new, frozen, default, device and 3 more"
        assert file.notes == (f"took 'state_dict' of a training state (beside it: {beside})",)


A = craft.tensor()
STATE = craft.dict_of({"x.a": A, "x.b": A})


@pytest.mark.parametrize(
    "value, names, notes",
    [
        (STATE, ["x.a", "x.b"], ()),
        (craft.dict_of({"model": STATE}), ["x.a", "x.b"], ("took 'model' of the file",)),
        (
            craft.dict_of({"state_dict": craft.dict_of({"net": STATE, "queue": A})}),
            ["x.a", "x.b"],
            (
                "took 'state_dict' of the file",
                "took 'net' of a training state (beside it: queue)",
            ),
        ),
        (
            craft.dict_of({"ema": STATE, "weights": STATE}),
            ["x.a", "x.b"],
            ("took 'weights' of a training state (beside it: ema)",),
        ),
        (
            craft.dict_of({"generator": STATE, "epoch": b"K\x01"}),
            ["x.a", "x.b"],
            ("took 'generator' of the file",),
        ),
        (
            craft.dict_of({"module.a": A, "module.b": A}),
            ["a", "b"],
            ("removed the prefix 'module.'",),
        ),
        (
            craft.dict_of({"_orig_mod.module.a": A}),
            ["a"],
            ("removed the prefix '_orig_mod.'", "removed the prefix 'module.'"),
        ),
        (craft.dict_of({"module.a": A, "b": A}), ["module.a", "b"], ()),
        (craft.dict_of({"module.": A}), ["module."], ()),
        (
            craft.dict_of({"a": A, "note": craft.text("x"), "_extra": b"]"}),
            ["a"],
            ("left out what is no array: _extra",),
        ),
        (craft.dict_of({"model": A, "b": A}), ["model", "b"], ()),
    ],
)
def test_wrappers_are_taken_off_and_said(value, names, notes, tmp_path):
    (tmp_path / "file").write_bytes(craft.torch_zip(value))
    file = weight_files.read(tmp_path / "file")
    assert (list(file.tensors), file.notes) == (names, notes)


def test_metadata_of_the_outer_wrapper_wins(tmp_path):
    inner = craft.dict_of({"model": STATE, "epoch": b"K\x01", "best": b"K\x02"})
    value = craft.dict_of({"model": inner, "epoch": b"K\x05"})
    (tmp_path / "file").write_bytes(craft.torch_zip(value))
    assert weight_files.read(tmp_path / "file").metadata == {"epoch": 5, "best": 2}


@pytest.mark.parametrize("prefix", ["", "best/", "a/b/", "é/"])
def test_the_name_of_the_archive_does_not_matter(prefix, tmp_path):
    (tmp_path / "file").write_bytes(craft.torch_zip(STATE, prefix=prefix))
    assert list(weight_files.read(tmp_path / "file").tensors) == ["x.a", "x.b"]


def test_views_are_copied_piece_by_piece(tmp_path, monkeypatch):
    """With a window of 40 bytes every path through the copying is taken."""
    from itself_jax.weight_files import source

    monkeypatch.setattr(source, "_WINDOW", 40)
    base = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
    views = {
        "whole": base,
        "transposed": base.transpose(3, 1, 0, 2),
        "steps": base[:, ::2, 1::2, ::3],
        "column": base[:, :, :, 4],
        "one": base[1:, 2:, 3:, 4:],
        "swapped": base.swapaxes(0, 3),
        "repeated": np.lib.stride_tricks.as_strided(base, (4, 5), (0, 4)),
    }
    items = {}
    for name, view in views.items():
        offset = (view.ctypes.data - base.ctypes.data) // 4
        strides = [s // 4 for s in view.strides]
        where = craft.storage(count=base.size)
        items[name] = craft.tensor(where, offset=offset, shape=view.shape, strides=strides)
    content = craft.torch_zip(craft.dict_of(items), storages={"0": base.tobytes()})
    (tmp_path / "file").write_bytes(content)
    expected = {name: np.array(view, order="C") for name, view in views.items()}
    assert_same(weight_files.read(tmp_path / "file"), expected)


def test_the_content_decides_and_not_the_name(tmp_path):
    for name, kind in (
        ("plain.pth", "torch.save (zip)"),
        ("plain_legacy.pth", "torch.save (legacy)"),
        ("scripted.pt", "TorchScript"),
        ("library.safetensors", "safetensors"),
        ("expected.npz", "npz"),
    ):
        (tmp_path / "weights.txt").write_bytes((FILES / name).read_bytes())
        assert weight_files.read(tmp_path / "weights.txt").kind == kind


# Folders, shards and settings.

TORCH = craft.torch_zip(craft.dict_of({"b": A}))
SAFE = craft.safetensors({"a": craft.field()}, craft.four_floats())
CLIP = {"model_type": "clip", "vision_config": {"patch_size": 16}}
OPEN_CLIP = {"model_cfg": {"embed_dim": 512}}
OUR_RUN = {"config": {"model": {"name": "ViT-B/16"}}, "compute_dtype": "float32", "model": "x"}


def fill(folder, files) -> None:
    for name, content in files.items():
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    "files, names, note",
    [
        ({"model.safetensors": SAFE, "config.json": CLIP}, ["a"], "took model.safetensors"),
        ({"pytorch_model.bin": TORCH, "config.json": CLIP}, ["b"], "took pytorch_model.bin"),
        (
            {"pytorch_model.bin": TORCH, "model.safetensors": SAFE, "other.pt": TORCH},
            ["a"],
            "took model.safetensors of the folder (beside it: pytorch_model.bin)",
        ),
        (
            {"open_clip_pytorch_model.bin": TORCH, "open_clip_config.json": OPEN_CLIP},
            ["b"],
            "took open_clip_pytorch_model.bin of the folder",
        ),
        (
            {
                "open_clip_model.safetensors": SAFE,
                "pytorch_model.bin": TORCH,
                "open_clip_config.json": OPEN_CLIP,
                "config.json": CLIP,
            },
            ["a"],
            "took open_clip_model.safetensors of the folder (beside it: pytorch_model.bin)",
        ),
        (
            {"model.safetensors": SAFE, "open_clip_config.json": OPEN_CLIP, "config.json": CLIP},
            ["a"],
            "took model.safetensors of the folder",
        ),
        ({"best.pth": TORCH, "config.json": OUR_RUN}, ["b"], "took best.pth of the folder"),
        ({"x.safetensors": SAFE, "log.txt": b"x"}, ["a"], "took x.safetensors of the folder"),
    ],
)
def test_folders_are_read_as_hugging_face_and_open_clip_write_them(files, names, note, tmp_path):
    fill(tmp_path, files)
    file = weight_files.read(tmp_path)
    assert (file.path, list(file.tensors), file.is_lone) == (tmp_path, names, False)
    for name in ("config.json", "open_clip_config.json"):
        assert file.settings(name) == (files[name] if name in files else None)
    assert file.notes[0].startswith(note) and len(file.notes) == 1


@pytest.mark.parametrize("content", [b"{", [1], b"[" * 100_000])
def test_damaged_settings_are_ignored_beside_a_lone_file_and_named_in_a_folder(content, tmp_path):
    fill(tmp_path, {"best.pth": SAFE, "config.json": content})
    assert weight_files.read(tmp_path / "best.pth").settings("config.json") is None
    with pytest.raises(weight_files.WeightFileError, match=r"config\.json is (not the|a) JSON"):
        weight_files.read(tmp_path).settings("config.json")


def test_shards_are_read_in_the_order_of_the_index(tmp_path):
    first = craft.safetensors(
        {"__metadata__": {"format": "pt"}, "module.c": craft.field()}, craft.four_floats()
    )
    two = {"module.b": craft.field(), "module.a": craft.field("I64", (2,), (16, 32))}
    second = craft.safetensors(two, craft.four_floats() + struct.pack("<2q", 1, -1))
    places = {"module.a": "s-2", "module.c": "s-1", "module.b": "s-2"}
    index = {"metadata": {"total_size": 48, "x": [1]}, "weight_map": places}
    fill(tmp_path, {"s-1": first, "s-2": second, "model.safetensors.index.json": index,
                    "config.json": CLIP})  # fmt: skip
    expected = {
        "a": np.array([1, -1]),
        "c": np.arange(4, dtype=np.float32),
        "b": np.arange(4, dtype=np.float32),
    }
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        file = weight_files.read(path)
        assert_same(file, expected)
        assert (file.kind, file.settings("config.json")) == ("safetensors", CLIP)
        assert file.metadata == {"format": "pt", "total_size": 48}
        assert file.notes[-1] == "removed the prefix 'module.'"


@pytest.mark.parametrize("wrap", [craft.torch_zip, craft.legacy])
def test_shards_of_torch_are_read(wrap, tmp_path):
    names = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    fill(tmp_path, {names[n]: wrap(craft.dict_of({n: A})) for n in names})
    fill(tmp_path, {"pytorch_model.bin.index.json": {"metadata": {}, "weight_map": names}})
    file = weight_files.read(tmp_path)
    assert list(file.tensors) == ["a", "b"] and file.kind.startswith("torch.save")
    assert file.tensors["b"].read().tolist() == [0, 1, 2, 3]


def test_neither_torch_nor_jax_is_needed():
    """In a fresh interpreter where neither can be imported."""
    code = "import sys\nfor n in ('torch', 'jax', 'tensorflow'): sys.modules[n] = None\n"
    code += f"from itself_jax import weight_files\nweight_files.read({str(FILES / 'plain.pth')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
