"""The names in the pickles of torch, and what stands for each: whatever is not here is refused."""

from __future__ import annotations

import collections
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from itself_jax.weight_files import pickles
from itself_jax.weight_files import source as source_lib

# What storages hold. The other ones exist too, and are refused by their name.
STORAGES = {
    "BoolStorage": "bool",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "HalfStorage": "float16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "BFloat16Storage": "bfloat16",
}
_OTHER_STORAGES = ("ComplexFloat", "ComplexDouble", "QInt8", "QUInt8", "QInt32", "QUInt4x2")
_OTHER_STORAGES += ("QUInt2x4",)
# torch names its types twice: `torch.half` is `torch.float16`.
DTYPES = {
    **{name: name for name in source_lib.DTYPES},
    **{"half": "float16", "float": "float32", "double": "float64"},
    **{"short": "int16", "int": "int32", "long": "int64"},
}
OTHER_DTYPES = ("complex32", "complex64", "complex128", "chalf", "cfloat", "cdouble")
OTHER_DTYPES += ("qint8", "quint8", "qint32", "quint4x2", "quint2x4")
OTHER_DTYPES += ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
_OTHER_TENSORS = {
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_sparse_csr_tensor": "a sparse tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_qtensor": "a quantised tensor",
    "_rebuild_meta_tensor_no_storage": "a tensor of the device 'meta', which has no values",
    "_rebuild_device_tensor_from_numpy": "a tensor of a device without storages",
    "_rebuild_device_tensor_from_cpu_tensor": "a tensor of a device without storages",
    "_rebuild_xla_tensor": "a tensor of a device without storages",
    "_rebuild_wrapper_subclass": "a tensor of a class of its own",
}
UNREADABLE = "convert it to an ordinary tensor and save it anew"
WHOLE_MODEL = "which is code and not arrays; nothing of it was run"
SAVE_STATE = "load it with its own program and save only its state_dict()"


def table(
    tensor: Callable[..., Any], typed_tensor: Callable[..., Any], *, script: bool
) -> Callable[[str], pickles.Name | None]:
    """Returns what the names in a pickle of torch stand for.

    Args:
      tensor: makes what `torch._utils._rebuild_tensor` and `_v2` return.
      typed_tensor: makes what `torch._utils._rebuild_tensor_v3` returns.
      script: also the classes of a TorchScript archive.
    """
    utils = "torch._utils."
    calls: dict[str, Callable[..., Any] | None] = {
        "collections.OrderedDict": _ordered_dict,
        "collections.defaultdict": lambda *_: collections.OrderedDict(),
        "collections.Counter": lambda *_: pickles.Inert("Counter"),  # milestones of a scheduler
        "argparse.Namespace": lambda: pickles.Namespace(),
        f"{utils}_rebuild_tensor": tensor,
        f"{utils}_rebuild_tensor_v2": tensor,
        f"{utils}_rebuild_tensor_v3": typed_tensor,
        f"{utils}_rebuild_parameter": lambda data, *_: _tensor(data),
        f"{utils}_rebuild_parameter_with_state": lambda data, *_: _tensor(data),
        "torch._tensor._rebuild_from_type_v2": _from_type,
        "torch.Tensor": None,
        "torch.nn.parameter.Parameter": None,
        "torch.nn.parameter.Buffer": None,
        "torch.Size": lambda sizes=(): tuple(sizes),
        "torch.device": lambda *_: pickles.Inert("device"),
        "torch.serialization._get_layout": lambda *_: pickles.Inert("layout"),
        "torch.jit._pickle.build_intlist": _unchanged,
        "torch.jit._pickle.build_doublelist": _unchanged,
        "torch.jit._pickle.build_boollist": _unchanged,
        "torch.jit._pickle.build_tensorlist": _unchanged,
        "torch.jit._pickle.restore_type_tag": lambda value, _: value,
        "_codecs.encode": _encode,
    }
    for module in ("__builtin__", "builtins"):  # the first is Python 2's
        calls |= {f"{module}.{name}": None for name in ("dict", "list", "tuple", "int", "float")}
        calls |= {f"{module}.{name}": _inert(name) for name in ("set", "frozenset", "complex")}
        calls[f"{module}.bytearray"] = _inert("bytearray")
    for module in ("numpy.core", "numpy._core"):
        calls[f"{module}.multiarray.scalar"] = _numpy_scalar
        calls[f"{module}.multiarray._reconstruct"] = _inert("numpy.ndarray")
        calls[f"{module}.numeric._frombuffer"] = _inert("numpy.ndarray")
    calls |= {"numpy.dtype": _NumpyType, "numpy.ndarray": None}
    for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"):
        calls[f"pathlib.{name}"] = _inert("path")
        calls[f"pathlib._local.{name}"] = _inert("path")
    for name in [*STORAGES, *(f"{name}Storage" for name in _OTHER_STORAGES)]:
        calls |= {f"torch.{name}": None, f"torch.cuda.{name}": None}
    for name in ("UntypedStorage", "_UntypedStorage"):
        calls |= {f"torch.{name}": None, f"torch.storage.{name}": None}
    calls |= {f"torch.{name}": None for name in (*DTYPES, *OTHER_DTYPES)}

    def find(name: str) -> pickles.Name | None:
        if name in calls:
            return pickles.Name(name, calls[name])
        if script and name.startswith("__torch__."):
            return pickles.Name(name, lambda *_: pickles.Module(name))
        if name.startswith(utils) and name.removeprefix(utils) in _OTHER_TENSORS:
            kind = _OTHER_TENSORS[name.removeprefix(utils)]
            raise pickles.Refused(f"holds {kind} ({name}), which cannot be read", UNREADABLE)
        if name.startswith("torch.nn.modules."):
            what = f"holds a whole model ({source_lib.bare(name)}), {WHOLE_MODEL}"
            raise pickles.Refused(what, SAVE_STATE, code=True)
        return None

    return find


def _ordered_dict(*arguments: Any) -> collections.OrderedDict:
    # Python 2 hands the items over as a list of lists.
    result: collections.OrderedDict[Any, Any] = collections.OrderedDict()
    for pair in arguments[0] if arguments else ():
        if not isinstance(pair, list | tuple) or len(pair) != 2 or type(pair[0]) is not str:
            raise pickles.Refused("is damaged: an OrderedDict cannot be read")
        result[pair[0]] = pair[1]
    return result


def _tensor(value: Any) -> source_lib.Tensor:
    if not isinstance(value, source_lib.Tensor):
        raise pickles.Refused("is damaged: a parameter has no tensor")
    return value


def _from_type(function: Any, kind: Any, arguments: Any, _: Any) -> source_lib.Tensor:
    """A tensor with Python attributes, or of a subclass: the tensor in it."""
    allowed = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")
    ours = isinstance(kind, pickles.Name) and kind.name in allowed and type(arguments) is tuple
    rebuild = isinstance(function, pickles.Name) and "_rebuild_" in function.name
    if not ours or not rebuild or function.call is None:
        raise pickles.Refused("holds a tensor of a class of its own", UNREADABLE)
    return _tensor(function.call(*arguments))


def _unchanged(value: Any) -> Any:
    return value


def _inert(kind: str) -> Callable[..., pickles.Inert]:
    return lambda *_: pickles.Inert(kind)


def _encode(text: Any, encoding: Any = "utf-8") -> bytes:
    """How pickles for Python 2 spell bytes."""
    if type(text) is not str or encoding not in ("latin1", "latin-1", "utf-8", "ascii"):
        raise pickles.Refused("is damaged: bytes cannot be read")
    return text.encode(encoding)


class _NumpyType(pickles.Inert):
    """`numpy.dtype("f8")`, of which only numbers are understood."""

    __slots__ = ("code", "order")

    def __init__(self, code: Any, *_: Any):
        super().__init__("numpy.dtype")
        plain = type(code) is str and re.fullmatch("b1|[iu][1248]|f[248]", code)
        self.code = code if plain else None
        self.order = "<"

    def set_state(self, state: Any) -> None:
        order = state[1] if type(state) is tuple and len(state) > 1 else None
        if order in ("<", ">"):
            self.order = order


def _numpy_scalar(kind: Any, content: Any = None) -> Any:
    """A NumPy number, such as the best score of a training run, as a Python number."""
    if isinstance(kind, _NumpyType) and kind.code and type(content) is bytes:
        dtype = np.dtype(kind.order + kind.code)
        if len(content) == dtype.itemsize:
            return np.frombuffer(content, dtype)[0].item()
    return pickles.Inert("numpy.generic")
