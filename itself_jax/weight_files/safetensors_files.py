"""The safetensors format: a length, a JSON header, and the bytes of the arrays.

Read here and not by the library, which maps the whole file: what is mapped counts as memory. The
library still looks at every header first, so that what it refuses is refused.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import safetensors

from itself_jax.weight_files import source as source_lib

MAX_HEADER = 16 << 20  # a hundred thousand arrays

DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}


def read(source: source_lib.Source) -> tuple[dict[str, source_lib.Tensor], dict[str, Any]]:
    """Returns the arrays in the order of the header, and its `__metadata__`.

    Raises:
      WeightFileError: the header is damaged, or does not fit the file.
    """
    header, start = _header(source)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        source.refuse("has a field '__metadata__' that does not map names to strings")
    places = []
    tensors = {}
    for name, field in header.items():
        source_lib.check_name(source, name)
        dtype, shape, begin, end = _field(source, name, field, source.size - start)
        places.append((begin, end, name))
        tensors[name] = _lazy(source, start + begin, dtype, shape)
    at, before = 0, "the header"
    for begin, end, name in sorted(places):
        if begin != at:
            what = "overlaps" if begin < at else "leaves a hole behind"
            source.refuse(
                f"is damaged: the array {source_lib.show(name)} {what} {source_lib.show(before)}"
            )
        at, before = end, name
    if start + at != source.size:
        source.refuse(
            f"has {source.size} bytes, but its header describes {start + at}: it is damaged or cut "
            "off"
        )
    try:
        with safetensors.safe_open(source.path, framework="np"):
            pass
    except (safetensors.SafetensorError, OSError) as error:
        source.refuse(f"is no valid safetensors file ({error})")
    return tensors, metadata


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without double keys.

    Raises:
      ValueError: a key occurs twice.
    """
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {source_lib.show(key)} occurs twice")
        result[key] = value
    return result


def _header(source: source_lib.Source) -> tuple[dict[str, Any], int]:
    """Returns the header and where the arrays start."""
    size = int.from_bytes(source.read(0, 8), "little")
    if size > source.size - 8:
        source.refuse(
            f"says that its header has {size} bytes, but the file has {source.size}: it is damaged "
            "or cut off"
        )
    if size > MAX_HEADER:
        source.refuse(f"has a header of {size} bytes, more than the {MAX_HEADER} allowed")
    try:
        text = source.read(8, size).decode("utf-8")
        header = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        source.refuse(f"has a header that cannot be read ({source_lib.reason(error)})")
    if not isinstance(header, dict):
        source.refuse("has a header that is no JSON object")
    return header, 8 + size


def _field(
    source: source_lib.Source, name: str, field: Any, room: int
) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """Returns type, shape and place of one array."""
    shown = source_lib.show(name)
    if not isinstance(field, dict) or set(field) != {"dtype", "shape", "data_offsets"}:
        source.refuse(f"describes the array {shown} by something else than dtype, shape and place")
    if type(field["dtype"]) is not str or field["dtype"] not in DTYPES:
        source.refuse(
            f"stores the array {shown} as {source_lib.show(field['dtype'])}, which cannot be read",
            f"convert it to one of {', '.join(DTYPES)}",
        )
    dtype = source_lib.DTYPES[DTYPES[field["dtype"]]]
    shape = source_lib.check_shape(source, shown, field["shape"], dtype.itemsize)
    place = field["data_offsets"]
    if not isinstance(place, list) or len(place) != 2 or {type(p) for p in place} != {int}:
        source.refuse(f"gives the array {shown} the place {source_lib.show(place)}")
    begin, end = place
    if not 0 <= begin <= end <= room:
        source.refuse(
            f"is damaged or cut off: the array {shown} lies at bytes {source_lib.show(place)} of "
            f"{room}"
        )
    if math.prod(shape) * dtype.itemsize != end - begin:
        source.refuse(
            f"is damaged: the array {shown} of {dtype.name}{list(shape)} needs "
            f"{math.prod(shape) * dtype.itemsize} bytes, but has {end - begin}"
        )
    return dtype, shape, begin, end


def _lazy(
    source: source_lib.Source, start: int, dtype: np.dtype, shape: tuple[int, ...]
) -> source_lib.Tensor:
    return source_lib.Tensor(
        shape, dtype, lambda: source_lib.read_strided(source, start, dtype, shape)
    )
