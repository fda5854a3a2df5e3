"""Writing named arrays, one at a time: no more than one of them is in memory."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pathlib
import secrets
import struct
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from itself_jax.weight_files import npz_files, safetensors_files, torch_names
from itself_jax.weight_files import source as source_lib

_ALIGNMENT = 64  # where torch puts the storages in its zip file
_STORAGE_OF = {name: storage for storage, name in torch_names.STORAGES.items()}
_SAFE_NAME_OF = {name: code for code, name in safetensors_files.DTYPES.items()}
_DATE = (1980, 1, 1, 0, 0, 0)  # the same arrays make the same file
_WHAT_TORCH_HOLDS = (dict, list, tuple, str, int, float, bool, type(None))


def write_torch(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    *,
    extra: Mapping[str, Any] = {},  # noqa: B006  (never changed)
    wrap: str | None = "model",
    force: bool = False,
) -> None:
    """Writes what `torch.save({wrap: OrderedDict(tensors), **extra}, path)` would write.

    Any torch since 1.6 loads it, and since 1.13 also with `weights_only=True` (2.0, if `extra` has
    a float).

    Args:
      path: the file; its folder exists.
      tensors: arrays, or what has shape, dtype and `read()`, by name, in the order of the file.
      extra: plain values beside the model: str, int, float, bool, None, and lists, tuples and
        dicts of these.
      wrap: the key of the model; None: the file is the state dict itself, without `extra`.
      force: replace a file that exists.

    Raises:
      WeightFileError: the file exists, an array or value cannot be stored, or the disk is full;
        nothing is left behind.
      ValueError: `extra` has a key of its own for `wrap`, or there is no `wrap` to be beside.
    """
    path = pathlib.Path(path)
    if wrap in extra or (wrap is None and extra):
        raise ValueError(f"extra={list(extra)} cannot stand beside the model with wrap={wrap!r}")
    arrays = _check(path, tensors, _STORAGE_OF)
    pickle = _TorchPickle(path)
    pickle.write(arrays, extra, wrap)
    with _new_file(path, force=force) as file, _zip(file) as archive:
        _add(archive, "archive/data.pkl", pickle.content())
        # torch's own reader asks for the version, and for the byte order since 2.0.
        _add(archive, "archive/byteorder", b"little")
        for number, array in enumerate(arrays.values()):
            with _entry(archive, f"archive/data/{number}", array.nbytes, file) as entry:
                entry.write(_bytes(array.read()))
        _add(archive, "archive/version", b"3\n")


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    *,
    metadata: Mapping[str, str] = {},  # noqa: B006  (never changed)
    force: bool = False,
) -> None:
    """Writes a safetensors file.

    Args:
      path: the file; its folder exists.
      tensors: arrays, or what has shape, dtype and `read()`, by name, in the order of the header.
      metadata: strings by name.
      force: replace a file that exists.

    Raises:
      WeightFileError: the file exists, an array cannot be stored, or the disk is full; nothing is
        left behind.
      TypeError: the metadata are not strings.
    """
    path = pathlib.Path(path)
    arrays = _check(path, tensors, _SAFE_NAME_OF)
    if not all(type(item) is str for pair in metadata.items() for item in pair):
        raise TypeError(f"safetensors stores strings only, got metadata={dict(metadata)!r}")
    if "__metadata__" in arrays:
        raise _unfit(path, "__metadata__", "has the name that is kept for metadata")
    # Arrays of larger elements first, as the library does it: torch's reader wants every array to
    # start at a multiple of its element size. The order of the names is that of the header.
    by_size = sorted(arrays.values(), key=lambda array: -array.dtype.itemsize)
    at, places = 0, {}
    for array in by_size:
        places[array.name] = [at, at + array.nbytes]
        at += array.nbytes
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, array in arrays.items():
        header[name] = {
            "dtype": _SAFE_NAME_OF[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": places[name],
        }
    try:
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        raise TypeError("safetensors stores strings of whole characters only") from None
    text += b" " * (-len(text) % 8)
    if len(text) > safetensors_files.MAX_HEADER:
        raise source_lib.WeightFileError(
            f"{path} would have a header of {len(text)} bytes, more than safetensors allows: "
            "write less metadata."
        )
    with _new_file(path, force=force) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in by_size:
            file.write(_bytes(array.read()))


def write_npz(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    *,
    metadata: Mapping[str, Any] = {},  # noqa: B006  (never changed)
    force: bool = False,
) -> None:
    """Writes what `numpy.savez(path, **tensors)` would write, and metadata as JSON.

    bfloat16 is stored as two bytes without a type, because NumPy has none: `numpy.load` returns
    such an array as "V2", and `read` as bfloat16.

    Args:
      path: the file; its folder exists. No ".npz" is appended.
      tensors: arrays, or what has shape, dtype and `read()`, by name, in the order of the file.
      metadata: anything JSON can hold, by name; stored as the text `__metadata__`.
      force: replace a file that exists.

    Raises:
      WeightFileError: the file exists, an array cannot be stored, or the disk is full; nothing is
        left behind.
      TypeError, ValueError: the metadata are not JSON.
    """
    path = pathlib.Path(path)
    arrays = _check(path, tensors, source_lib.DTYPES)
    if npz_files.METADATA in arrays:
        raise _unfit(path, npz_files.METADATA, "has the name that is kept for metadata")
    document = np.array(json.dumps(dict(metadata)))
    if document.nbytes > npz_files.MAX_TEXT:
        raise ValueError(
            f"metadata of {document.nbytes // 4} characters are more than is read back"
        )
    with _new_file(path, force=force) as file, _zip(file) as archive:
        if metadata:
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, document, allow_pickle=False)
            _add(archive, f"{npz_files.METADATA}.npy", buffer.getvalue())
        for name, array in arrays.items():
            buffer = io.BytesIO()
            plain = array.dtype if array.dtype.name != "bfloat16" else np.dtype("V2")
            fields = {
                "descr": np.lib.format.dtype_to_descr(plain.newbyteorder("<")),
                "fortran_order": False,
                "shape": array.shape,
            }
            np.lib.format.write_array_header_1_0(buffer, fields)
            header = buffer.getvalue()
            with _entry(archive, f"{name}.npy", len(header) + array.nbytes, None) as entry:
                entry.write(header)
                entry.write(_bytes(array.read()))


class _Array(NamedTuple):
    """One array to write."""

    path: pathlib.Path  # of the file it goes to
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    origin: Any

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """Its numbers, little-endian and C-contiguous, as announced."""
        origin = self.origin
        array = np.asarray(origin.read() if hasattr(origin, "read") else origin)
        if array.shape != self.shape or array.dtype.newbyteorder("=") != self.dtype:
            raise _unfit(
                self.path,
                self.name,
                f"was announced as {self.dtype.name}{list(self.shape)} and is "
                f"{array.dtype.name}{list(array.shape)}",
            )
        return array.astype(self.dtype.newbyteorder("<"), order="C", copy=False)


def _check(
    path: pathlib.Path, tensors: Mapping[str, Any], dtypes: Mapping[str, Any]
) -> dict[str, _Array]:
    """The arrays with names and types that the format can hold."""
    if not tensors:
        raise source_lib.WeightFileError(f"{path} is to be written, but there are no arrays.")
    arrays = {}
    for name, origin in tensors.items():
        parts = name.split("/") if source_lib.is_name(name) else [".."]
        if ".." in parts or name.startswith("/") or "\\" in name or name.endswith("/"):
            raise source_lib.WeightFileError(
                f"{path} cannot hold an array named {source_lib.show(name)}: names are 1 to "
                f"{source_lib.MAX_NAME} printable characters and no paths that lead elsewhere."
            )
        if not hasattr(origin, "shape") or not hasattr(origin, "dtype"):
            origin = np.asarray(origin)  # a number; other arrays stay where they are until written
        dtype, shape = np.dtype(origin.dtype).newbyteorder("="), tuple(origin.shape)
        if dtype.name not in dtypes:
            raise _unfit(
                path, name, f"is {dtype.name}, and the format holds {', '.join(dtypes)} only"
            )
        if len(shape) > source_lib.MAX_DIMENSIONS:
            raise _unfit(path, name, f"has {len(shape)} dimensions")
        arrays[name] = _Array(path, name, shape, dtype, origin)
    return arrays


def _unfit(path: pathlib.Path, name: str, what: str) -> source_lib.WeightFileError:
    return source_lib.WeightFileError(
        f"{path} cannot be written: the array {source_lib.show(name)} {what}; convert or leave it "
        "out."
    )


def _bytes(array: np.ndarray) -> memoryview:
    # As bytes, because bfloat16 has no buffer interface of its own.
    return memoryview(array.reshape(-1).view(np.uint8))


@contextlib.contextmanager
def _new_file(path: pathlib.Path, *, force: bool) -> Iterator[Any]:
    """Opens a file that gets its name when everything is on disk; else nothing is left."""
    temporary = path.parent / f".itself_jax-{secrets.token_hex(8)}.tmp"
    try:
        if path.is_dir():
            raise source_lib.WeightFileError(f"{path} is a folder: give the name of a file.")
        if os.path.lexists(path) and not force:
            raise source_lib.WeightFileError(
                f"{path} exists: give another name, or allow it to be replaced."
            )
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise source_lib.WeightFileError(
            f"{path} could not be written: {source_lib.reason(error)}; nothing is left of it, free "
            "space there or give another folder."
        ) from error
    finally:
        with contextlib.suppress(OSError, ValueError):
            os.unlink(temporary)


def _sync_folder(folder: pathlib.Path) -> None:
    """Without this a new name can be lost with the power; not every file system can do it."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def _zip(file: Any) -> zipfile.ZipFile:
    return zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True)


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    archive.writestr(zipfile.ZipInfo(name, _DATE), content)


@contextlib.contextmanager
def _entry(archive: zipfile.ZipFile, name: str, size: int, aligned: Any | None) -> Iterator[Any]:
    """Opens an entry of known size; its bytes start at a multiple of `_ALIGNMENT` in `aligned`."""
    info = zipfile.ZipInfo(name, _DATE)
    info.file_size = size
    if aligned is not None:
        # The header has 30 bytes, the name, and perhaps zipfile's own field with two long sizes.
        long = size * 1.05 > zipfile.ZIP64_LIMIT
        before = aligned.tell() + 30 + len(name.encode()) + 20 * long + 4
        padding = -before % _ALIGNMENT
        info.extra = struct.pack("<2H", 0x4246, padding) + b"Z" * padding  # "FB", as torch's
    with archive.open(info, "w") as entry:
        yield entry


class _TorchPickle:
    """The pickle that torch.save would write, in protocol 2."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._out = io.BytesIO()

    def content(self) -> bytes:
        return self._out.getvalue()

    def write(
        self, arrays: Mapping[str, _Array], extra: Mapping[str, Any], wrap: str | None
    ) -> None:
        self._out.write(b"\x80\x02")
        if wrap is None:
            self._state_dict(arrays)
        else:
            self._out.write(b"}(")
            self._value(wrap)
            self._state_dict(arrays)
            for key, value in extra.items():
                self._value(key)
                self._value(value)
            self._out.write(b"u")
        self._out.write(b".")

    def _state_dict(self, arrays: Mapping[str, _Array]) -> None:
        self._out.write(b"ccollections\nOrderedDict\n)R(")
        for number, (name, array) in enumerate(arrays.items()):
            self._value(name)
            self._out.write(b"ctorch._utils\n_rebuild_tensor_v2\n((")
            self._value("storage")
            self._out.write(f"ctorch\n{_STORAGE_OF[array.dtype.name]}\n".encode())
            self._value(str(number))
            self._value("cpu")
            self._value(math.prod(array.shape))
            self._out.write(b"tQ")  # a tuple, taken as a persistent id
            self._value(0)  # offset
            self._value(array.shape)
            self._value(_strides(array.shape))
            # No gradient, and no hooks.
            self._out.write(b"\x89ccollections\nOrderedDict\n)RtR")
        self._out.write(b"u")

    def _value(self, value: Any) -> None:
        """A plain value; it may not contain itself."""
        write = self._out.write
        if isinstance(value, np.generic):
            value = value.item()
        if value is None:
            write(b"N")
        elif value is True or value is False:
            write(b"\x88" if value else b"\x89")
        elif type(value) is int and -(1 << 31) <= value < 1 << 31:
            write(struct.pack("<ci", b"J", value))
        elif type(value) is int and -(1 << 63) <= value < 1 << 63:
            write(b"\x8a\x08" + value.to_bytes(8, "little", signed=True))
        elif type(value) is float:
            write(struct.pack(">cd", b"G", value))
        elif type(value) is str:
            content = value.encode("utf-8", "surrogatepass")
            write(struct.pack("<cI", b"X", len(content)) + content)
        elif type(value) is tuple:
            write(b"(")
            self._values(value)
            write(b"t")
        elif type(value) is list:
            write(b"](")
            self._values(value)
            write(b"e")
        elif isinstance(value, Mapping):
            write(b"}(")
            for item in value.items():
                self._values(item)
            write(b"u")
        else:
            raise source_lib.WeightFileError(
                f"{self._path} cannot hold {source_lib.show(value)} beside the arrays: give "
                f"{', '.join(kind.__name__ for kind in _WHAT_TORCH_HOLDS)} only."
            )

    def _values(self, values: Any) -> None:
        for value in values:
            self._value(value)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    # torch counts an empty dimension as one.
    return tuple(math.prod(max(n, 1) for n in shape[i + 1 :]) for i in range(len(shape)))
