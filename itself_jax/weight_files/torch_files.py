"""What `torch.save` and TorchScript write, without torch.

- `torch.save` since 1.6 writes a zip file: `NAME/data.pkl`, a pickle in which every tensor names a
  storage, and `NAME/data/KEY`, the bytes of one storage each.
- Before, it wrote five pickles one after the other (a magic number, a version, the sizes of C
  types, the object, the keys of the storages), then the storages, each behind its length.
- A TorchScript archive (OpenAI publishes CLIP as one) is a zip file of the first kind, with code
  in `NAME/code/` and the constants of the code in `NAME/constants.pkl`; its object is a module.
"""

from __future__ import annotations

import functools
import io
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from itself_jax.weight_files import pickles, torch_names, zips
from itself_jax.weight_files import source as source_lib

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001

_MAX_CODE = 16 << 20
_MAX_ARRAYS = 100_000


def read_zip(
    source: source_lib.Source, entries: dict[str, zips.Entry], prefix: str
) -> tuple[str, Any]:
    """Reads what `torch.save` or TorchScript wrote into a zip file.

    Args:
      source: the file.
      entries: its entries.
      prefix: of the names that belong to the archive, with its slash.

    Returns:
      The kind, and the object: see `pickles.load`; tensors are `source.Tensor`s. Of a TorchScript
      module it is its state dict.

    Raises:
      WeightFileError: it is damaged, or holds what is no array.
    """
    files = {name.removeprefix(prefix): e for name, e in entries.items() if name.startswith(prefix)}
    script = "constants.pkl" in files
    order = files["byteorder"].read(16).decode("latin-1") if "byteorder" in files else "little"
    if order not in ("little", "big"):
        source.refuse(f"is damaged: its entry 'byteorder' is {source_lib.show(order)}")
    # The other pickles are read for the sake of what they might ask for. Else they may be anything:
    # users can add files, and the storages of a trace's example inputs are left out.
    for name, entry in entries.items():
        if name.endswith(".pkl") and name != prefix + "data.pkl":
            content = io.BytesIO(entry.read(pickles.MAX_BYTES))
            _refuse_code(content, _Archive(source, script=script))
    archive = _Archive(source, script=script)
    archive.swapped = order != sys.byteorder
    stored = {n.removeprefix("data/"): e for n, e in files.items() if n.startswith("data/")}
    result = archive.interpret(
        io.BytesIO(files["data.pkl"].read(pickles.MAX_BYTES)),
        lambda identifier: archive.entry_storage(identifier, stored),
    )
    if not script:
        return "torch.save (zip)", result
    if not isinstance(result, pickles.Module):
        source.refuse("is a TorchScript archive without a module", "give a file of weights")
    return "TorchScript", _module_state(source, result, files)


def read_legacy(source: source_lib.Source) -> Any:
    """Reads what `torch.save` wrote before version 1.6.

    Returns:
      The object: see `pickles.load`; tensors are `source.Tensor`s.

    Raises:
      WeightFileError: it is damaged, or holds what is no array.
    """
    stream = io.BufferedReader(_Stream(source), 1 << 16)
    archive = _Archive(source, script=False)
    if archive.interpret(stream) != LEGACY_MAGIC:
        source.refuse(
            "is a pickle that torch.save has not written",
            "give a file of weights that torch.save, safetensors or numpy.savez has written",
        )
    version = archive.interpret(stream)
    if version != LEGACY_PROTOCOL:
        source.refuse(
            f"was written in version {source_lib.show(version)} of torch.save's old format, but "
            f"only {LEGACY_PROTOCOL} is known",
            "load it with torch and save it anew",
        )
    system = archive.interpret(stream)
    little = system.get("little_endian") if isinstance(system, dict) else None
    if type(little) is not bool:
        source.refuse("is damaged: it does not say its byte order")
    archive.swapped = little != (sys.byteorder == "little")
    result = archive.interpret(stream, archive.legacy_storage)
    keys = archive.interpret(stream)
    if not isinstance(keys, list) or set(map(type, keys)) - {str}:
        source.refuse("is damaged: the list of its storages cannot be read")
    at = stream.tell()
    for key in keys:
        storage = archive.storages.get(key)
        if storage is None or storage.start is not None:
            how = "nothing refers to" if storage is None else "there are two of"
            source.refuse(f"is damaged: {how} its storage {source_lib.show(key)}")
        length = source.read(at, 8)
        if len(length) < 8:
            source.refuse("is cut off: a storage is missing")
        count = int.from_bytes(length, "little", signed=True)
        if count != storage.count:
            source.refuse(
                f"is damaged: its storage {source_lib.show(key)} has {count} elements, but "
                f"{storage.count} are expected"
            )
        storage.start = at + 8
        at = storage.start + count * storage.itemsize
        if at > source.size:
            source.refuse(f"is cut off: it ends at byte {source.size} of at least {at}")
    missing = [key for key, storage in archive.storages.items() if storage.start is None]
    if missing:
        source.refuse(f"is damaged: its storage {source_lib.show(missing[0])} is missing")
    return result


def refuse_code(source: source_lib.Source) -> None:
    """Says so if the file begins with a pickle that asks for code.

    Raises:
      WeightFileError: it does.
    """
    _refuse_code(io.BufferedReader(_Stream(source)), _Archive(source, script=False))


def _refuse_code(stream: Any, archive: _Archive) -> None:
    try:
        pickles.load(stream, archive.lookup, archive.nowhere)
    except pickles.Refused as refused:
        if refused.code:
            archive.refuse(refused)


class _Storage:
    """The bytes of one or more tensors.

    Attributes:
      dtype: of the elements; None: bytes, whose tensors say themselves what they are.
      count: elements.
      start: where it lies in the file; None until that is known.
    """

    __slots__ = ("dtype", "count", "start", "entry", "verified")

    def __init__(self, dtype: np.dtype | None, count: int, start: int | None):
        self.dtype = dtype
        self.count = count
        self.start = start
        self.entry: zips.Entry | None = None
        self.verified = False

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize if self.dtype is not None else 1


class _Part:
    """A range of a storage's elements: old files name storages that are views of others."""

    __slots__ = ("whole", "offset", "count")

    def __init__(self, whole: _Storage, offset: int, count: int):
        self.whole = whole
        self.offset = offset
        self.count = count


class _Archive:
    """One pickle with its storages."""

    def __init__(self, source: source_lib.Source, *, script: bool):
        self.source = source
        self.swapped = False  # the other byte order than this machine's
        self.storages: dict[str, _Storage] = {}
        self._count = 0
        self.lookup = torch_names.table(self.tensor, self.typed_tensor, script=script)

    def interpret(self, stream: Any, persistent: Callable[[Any], Any] | None = None) -> Any:
        try:
            return pickles.load(stream, self.lookup, persistent)
        except pickles.Refused as refused:
            self.refuse(refused)

    def refuse(self, refused: pickles.Refused) -> NoReturn:
        if refused.advice is None:
            self.source.refuse(refused.what)
        self.source.refuse(refused.what, refused.advice)

    def nowhere(self, identifier: Any) -> _Part:
        """A storage whose bytes nobody will read."""
        kind, _, count = self._identify(identifier, 5)
        return _Part(_Storage(kind, count, None), 0, count)

    def entry_storage(self, identifier: Any, entries: dict[str, zips.Entry]) -> _Part:
        """The storage that a zip file's persistent id names."""
        kind, key, count = self._identify(identifier, 5)
        known = self.storages.get(key)
        if known is None:
            entry = entries.get(key)
            if entry is None:
                raise pickles.Refused(f"is damaged: its storage {source_lib.show(key)} is missing")
            known = _Storage(kind, count, entry.start)
            known.entry = entry
            if entry.deflated or entry.size != count * known.itemsize:
                raise pickles.Refused(
                    f"is damaged: its storage {source_lib.show(key)} has {entry.size} bytes, but "
                    f"{count} elements of {known.itemsize} bytes are expected"
                )
            self.storages[key] = known
        self._same(known, kind, count, key)
        return _Part(known, 0, count)

    def legacy_storage(self, identifier: Any) -> _Part:
        """The storage that an old file's persistent id names; where it lies is found later."""
        kind, key, count = self._identify(identifier, 6)
        known = self.storages.setdefault(key, _Storage(kind, count, None))
        self._same(known, kind, count, key)
        view = identifier[5]
        if view is None:
            return _Part(known, 0, count)
        if type(view) is not tuple or len(view) != 3 or {type(v) for v in view[1:]} != {int}:
            raise pickles.Refused("is damaged: a view of a storage cannot be read")
        _, offset, size = view
        if offset < 0 or size < 0 or offset + size > count:
            raise pickles.Refused(
                f"is damaged: elements {offset} to {offset + size} are taken from a storage of "
                f"{count}"
            )
        return _Part(known, offset, size)

    def _identify(self, identifier: Any, length: int) -> tuple[np.dtype | None, str, int]:
        """Returns type, key and number of elements."""
        if type(identifier) is not tuple or not identifier or type(identifier[0]) is not str:
            raise pickles.Refused("is damaged: its pickle names a storage in an unknown way")
        if identifier[0] == "module":
            raise pickles.Refused(
                f"holds a whole model, {torch_names.WHOLE_MODEL}", torch_names.SAVE_STATE
            )
        if identifier[0] != "storage" or len(identifier) != length:
            raise pickles.Refused("is damaged: its pickle names a storage in an unknown way")
        kind, key, _, count = identifier[1:5]
        short = kind.name.rpartition(".")[2] if isinstance(kind, pickles.Name) else ""
        if short in ("UntypedStorage", "_UntypedStorage"):
            dtype = None
        elif short in torch_names.STORAGES:
            dtype = source_lib.DTYPES[torch_names.STORAGES[short]]
        elif short.endswith("Storage"):
            raise pickles.Refused(
                f"holds a torch.{short}, which cannot be read", torch_names.UNREADABLE
            )
        else:
            raise pickles.Refused("is damaged: its pickle names a storage without a type")
        if type(key) is not str or type(count) is not int or not 0 <= count < 1 << 56:
            raise pickles.Refused("is damaged: its pickle names a storage in an unknown way")
        return dtype, key, count

    def _same(self, known: _Storage, dtype: np.dtype | None, count: int, key: str) -> None:
        if known.dtype != dtype or known.count != count:
            raise pickles.Refused(
                f"is damaged: its storage {source_lib.show(key)} is named with two types or sizes"
            )

    def tensor(self, *arguments: Any) -> source_lib.Tensor:
        """What `torch._utils._rebuild_tensor` and `_v2` return."""
        storage, offset, shape, strides = arguments[:4]
        _check_flags(arguments[6:])
        if not isinstance(storage, _Part) or storage.whole.dtype is None:
            raise pickles.Refused("is damaged: a tensor has no storage")
        return self._view(storage, storage.whole.dtype, offset, shape, strides)

    def typed_tensor(self, *arguments: Any) -> source_lib.Tensor:
        """What `torch._utils._rebuild_tensor_v3` returns."""
        storage, offset, shape, strides, _, _, dtype = arguments[:7]
        _check_flags(arguments[7:])
        name = dtype.name.removeprefix("torch.") if isinstance(dtype, pickles.Name) else ""
        if name in torch_names.OTHER_DTYPES:
            raise pickles.Refused(
                f"holds a tensor of type {name}, which cannot be read", torch_names.UNREADABLE
            )
        if not isinstance(storage, _Part) or name not in torch_names.DTYPES:
            raise pickles.Refused("is damaged: a tensor has no storage or no type")
        return self._view(
            storage, source_lib.DTYPES[torch_names.DTYPES[name]], offset, shape, strides
        )

    def _view(
        self, part: _Part, dtype: np.dtype, offset: Any, shape: Any, strides: Any
    ) -> source_lib.Tensor:
        """A tensor, after a check that it lies inside its storage."""
        self._count += 1
        if self._count > _MAX_ARRAYS:
            raise pickles.Refused(f"holds more than {_MAX_ARRAYS} arrays")
        storage = part.whole
        shape = source_lib.check_shape(self.source, "a tensor", shape, dtype.itemsize)
        integers = isinstance(strides, tuple | list) and len(strides) == len(shape)
        if not integers or any(type(s) is not int or s < 0 for s in (offset, *strides)):
            raise pickles.Refused(
                f"is damaged: a tensor has strides {source_lib.show(strides)} and offset "
                f"{source_lib.show(offset)}"
            )
        # In bytes, because the elements of an untyped storage are bytes.
        room = part.count * storage.itemsize
        reach = offset
        count = 1
        for size, stride in zip(shape, strides, strict=True):
            reach += max(size - 1, 0) * stride
            count *= size
        if offset * dtype.itemsize > room or (count and (reach + 1) * dtype.itemsize > room):
            raise pickles.Refused(
                f"is damaged: a tensor of shape {source_lib.show(shape)} reaches beyond its storage"
            )
        # A stride of 0 lets four bytes stand for a terabyte.
        if count * dtype.itemsize > room:
            raise pickles.Refused(
                f"expands {room} bytes to a tensor of shape {source_lib.show(shape)}",
                "save it with .contiguous()",
            )
        begin = part.offset * storage.itemsize + offset * dtype.itemsize
        load = functools.partial(self._load, storage, begin, dtype, shape, tuple(strides))
        return source_lib.Tensor(shape, dtype, load)

    def _load(
        self,
        storage: _Storage,
        begin: int,
        dtype: np.dtype,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
    ) -> np.ndarray:
        if storage.entry is not None and not storage.verified:
            storage.entry.verify()
            storage.verified = True
        assert storage.start is not None  # known once the file has been read
        return source_lib.read_strided(
            self.source, storage.start + begin, dtype, shape, strides, swapped=self.swapped
        )


def _check_flags(flags: tuple[Any, ...]) -> None:
    """torch marks a tensor that is yet to be conjugated or negated when it is used."""
    if any(flags):
        raise pickles.Refused(
            "holds a tensor that is yet to be conjugated or negated", torch_names.UNREADABLE
        )


def _module_state(
    source: source_lib.Source, module: pickles.Module, files: dict[str, zips.Entry]
) -> dict[str, source_lib.Tensor]:
    """The tensors of a TorchScript module, named as its `state_dict()` names them."""
    state: dict[str, source_lib.Tensor] = {}
    saved: dict[str, set[str] | None] = {}  # class: what its code calls parameters and buffers
    budget = [_MAX_ARRAYS]

    def walk(module: pickles.Module, path: str, above: tuple[int, ...]) -> None:
        budget[0] -= 1 + len(module.attributes)
        if id(module) in above or len(above) > 100 or budget[0] < 0:
            source.refuse("is damaged: its modules contain each other, or are too many")
        if module.kind not in saved:
            saved[module.kind] = _declared(module.kind, files)
        declared = saved[module.kind]
        for name, value in module.attributes.items():
            if isinstance(value, source_lib.Tensor) and (declared is None or name in declared):
                state[source_lib.check_name(source, f"{path}{name}")] = value
        for name, value in module.attributes.items():
            if isinstance(value, pickles.Module):
                walk(value, f"{path}{name}.", (*above, id(module)))

    walk(module, "", ())
    return state


def _declared(kind: str, files: dict[str, zips.Entry]) -> set[str] | None:
    """What the code of a class lists as parameters and buffers; None if that is not found.

    Plain attributes can be tensors too, and are no weights.
    """
    path, _, name = kind.rpartition(".")
    entry = files.get(f"code/{path.replace('.', '/')}.py")
    if entry is None:
        return None
    code = entry.read(_MAX_CODE).decode("utf-8", "replace")
    found = re.search(
        rf"^class {re.escape(name)}\(Module\):\n"
        r"  __parameters__ = \[([^\]\n]*)\]\n  __buffers__ = \[([^\]\n]*)\]",
        code,
        re.MULTILINE,
    )
    return set(re.findall(r'"([^"]*)"', f"{found[1]}, {found[2]}")) if found else None


class _Stream(io.RawIOBase):
    """A source as a stream, for pickles whose length nothing tells."""

    def __init__(self, source: source_lib.Source):
        super().__init__()
        self._source = source
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (self._at if whence == io.SEEK_CUR else 0)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        count = max(0, min(len(target), self._source.size - self._at))
        self._source.fill(self._at, target[:count])
        self._at += count
        return count
