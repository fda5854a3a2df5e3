"""The format of `numpy.savez`: a zip file of `.npy` files. Pickled objects in it are refused."""

from __future__ import annotations

import functools
import io
import json
import math
import warnings
from typing import Any

import numpy as np

from itself_jax.weight_files import source as source_lib
from itself_jax.weight_files import zips

METADATA = "__metadata__"

MAX_TEXT = 16 << 20
_MAX_HEADER = 10_000
# What compression may save in all, and what is never too much: the rest is no array but a bomb.
_MAX_EXPANSION = 200
_FREE_EXPANSION = 64 << 20


def read(
    source: source_lib.Source, entries: dict[str, zips.Entry]
) -> tuple[dict[str, source_lib.Tensor], dict[str, Any]]:
    """Returns the arrays in file order, and the metadata: strings, and what is in `__metadata__`.

    NumPy knows no bfloat16 and stores it as two bytes without a type: these are read as bfloat16.

    Raises:
      WeightFileError: it is damaged, or holds something else than arrays of numbers.
    """
    total = sum(entry.size for entry in entries.values())
    if total > _MAX_EXPANSION * source.size + _FREE_EXPANSION:
        source.refuse(
            f"would unpack its {source.size} bytes to {total}", "save it without compression"
        )
    tensors: dict[str, source_lib.Tensor] = {}
    metadata: dict[str, Any] = {}
    for entry in entries.values():
        name = source_lib.check_name(source, entry.name.removesuffix(".npy"))
        dtype, shape, fortran, start = _header(source, name, entry)
        if dtype.kind == "U" and shape == ():
            metadata[name] = _text(source, name, entry, dtype, start)
        else:
            load = functools.partial(_load, source, entry, dtype, shape, fortran, start)
            tensors[name] = source_lib.Tensor(shape, dtype.newbyteorder("="), load)
    if METADATA in metadata:
        try:
            document = json.loads(metadata.pop(METADATA))
        except (ValueError, RecursionError):
            source.refuse(f"has an entry {METADATA!r} that is not JSON")
        if not isinstance(document, dict):
            source.refuse(f"has an entry {METADATA!r} that is no JSON object")
        metadata = document | metadata
    return tensors, metadata


def _header(
    source: source_lib.Source, name: str, entry: zips.Entry
) -> tuple[np.dtype, tuple[int, ...], bool, int]:
    """Returns type, shape, order and where the numbers start in the entry."""
    shown = source_lib.show(name)
    head = bytearray()
    for piece in entry.pieces():
        head += piece[: _MAX_HEADER + 12 - len(head)]
        if len(head) >= _MAX_HEADER + 12:
            break
    stream = io.BytesIO(bytes(head))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of a header by Python 2, or of an odd literal
            version = np.lib.format.read_magic(stream)
            readers = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }
            shape, fortran, dtype = readers[version](stream, max_header_size=_MAX_HEADER)
    # The header is a literal of Python: its parser has many ways to fail.
    except Exception:
        source.refuse(f"is damaged: the header of its array {shown} cannot be read")
    if dtype.hasobject:
        source.refuse(
            f"holds pickled Python objects in {shown}, which would run code; nothing of it was run",
            "do not trust this file, or save arrays of numbers only",
        )
    if dtype == np.dtype("V2"):
        dtype = source_lib.BFLOAT16
    text = dtype.kind == "U" and shape == ()
    if not text and dtype.newbyteorder("=") not in source_lib.DTYPES.values():
        source.refuse(
            f"stores the array {shown} as {source_lib.show(str(dtype))}, which cannot be read",
            f"convert it to one of {', '.join(source_lib.DTYPES)}",
        )
    shape = source_lib.check_shape(source, shown, shape, dtype.itemsize)
    expected = stream.tell() + math.prod(shape) * dtype.itemsize
    if entry.size != expected:
        source.refuse(
            f"is damaged: the array {shown} of {dtype}{list(shape)} needs {expected} bytes, but "
            f"has {entry.size}"
        )
    return dtype, shape, fortran, stream.tell()


def _text(
    source: source_lib.Source, name: str, entry: zips.Entry, dtype: np.dtype, start: int
) -> str:
    content = entry.read(MAX_TEXT)[start:]
    codec = "utf-32-be" if dtype.str[0] == ">" else "utf-32-le"
    try:
        return content.decode(codec).rstrip("\0")
    except UnicodeDecodeError:
        source.refuse(f"is damaged: the text {source_lib.show(name)} cannot be read")


def _load(
    source: source_lib.Source,
    entry: zips.Entry,
    dtype: np.dtype,
    shape: tuple[int, ...],
    fortran: bool,
    start: int,
) -> np.ndarray:
    """Reads the numbers, which start at byte `start` of the entry."""
    native, swapped = dtype.newbyteorder("="), not dtype.isnative
    if not entry.deflated:
        entry.verify()
        strides = [math.prod(shape[:i]) for i in range(len(shape))] if fortran else None
        at = entry.start + start
        return source_lib.read_strided(source, at, native, shape, strides, swapped=swapped)
    array = np.empty(shape[::-1] if fortran else shape, native)
    target = memoryview(array.reshape(-1).view(np.uint8))
    at = -start
    for piece in entry.checked_pieces():
        part = piece[max(0, -at) :]
        target[max(0, at) : max(0, at) + len(part)] = part
        at += len(piece)
    array = source_lib.checked(source, entry.start, array, swapped=swapped)
    return array.T.copy(order="C") if fortran else array
