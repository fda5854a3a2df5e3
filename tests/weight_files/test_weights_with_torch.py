"""Real torch reads what we write, and we read what it writes now."""

import ml_dtypes
import numpy as np
import pytest

from itself_jax import weight_files

torch = pytest.importorskip("torch")

TYPES = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    result = {f"z.{code}": (rng.normal(size=(3, 5)) * 9).astype(code) for code in TYPES}
    result["bfloat16"] = rng.normal(size=(2, 3)).astype(ml_dtypes.bfloat16)
    result["fortran"] = np.asfortranarray(rng.normal(size=(3, 4)))
    result["scalar"] = np.array(2.5, np.float32)
    result["empty"] = np.zeros((3, 0, 4), np.float16)
    return result


def numpy_of(tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def assert_same(state, expected) -> None:
    assert list(state) == list(expected)
    for name, want in expected.items():
        got = state[name]
        assert got.is_contiguous() and not got.requires_grad
        assert got.stride() == torch.zeros(want.shape).stride()
        assert (tuple(got.shape), numpy_of(got).dtype) == (want.shape, want.dtype)
        assert numpy_of(got).tobytes() == np.array(want, order="C").tobytes()


@pytest.mark.parametrize("options", [{"weights_only": True}, {"weights_only": False},
                                     {"mmap": True, "weights_only": True}])  # fmt: skip
def test_torch_loads_what_we_write(options, tmp_path):
    path = tmp_path / "file.pth"
    extra = {"epoch": 3, "big": -(2**50), "f": 0.5, "x": [None, True, ("a",), {"é": "é"}]}
    weight_files.write_torch(path, arrays(), extra=extra)
    state = torch.load(path, **options)
    assert type(state["model"]).__name__ == "OrderedDict"
    assert_same(state.pop("model"), arrays())
    assert state == extra
    weight_files.write_torch(path, arrays(), wrap=None, force=True)
    assert_same(torch.load(path, **options), arrays())


def test_a_model_of_torch_takes_what_we_write(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    torch.save(model.state_dict(), tmp_path / "before.pth")
    tensors = weight_files.read(tmp_path / "before.pth").tensors
    weight_files.write_torch(tmp_path / "after.pth", tensors, wrap=None)
    other = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    other.load_state_dict(torch.load(tmp_path / "after.pth", weights_only=True))
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False},
                                     {"pickle_protocol": 3}, {"pickle_protocol": 5}])  # fmt: skip
def test_we_read_what_torch_writes(options, tmp_path):
    expected = arrays()
    state = {}
    for name, array in expected.items():
        bits = np.array(array.view(np.uint16) if name == "bfloat16" else array, order="C")
        tensor = torch.from_numpy(bits)
        state[name] = tensor.view(torch.bfloat16) if name == "bfloat16" else tensor
    torch.save({"model": state, "epoch": 7}, tmp_path / "file.pth", **options)
    file = weight_files.read(tmp_path / "file.pth")
    assert file.metadata == {"epoch": 7} and list(file.tensors) == list(expected)
    for name, want in expected.items():
        got = file.tensors[name].read()
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        assert got.tobytes() == np.array(want, order="C").tobytes()
