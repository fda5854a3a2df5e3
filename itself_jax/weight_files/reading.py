"""The one door for reading: files by their content, folders by the names in them."""

from __future__ import annotations

import json
import os
import pathlib
import re
from typing import Any, NamedTuple

from itself_jax.weight_files import (
    foreign,
    npz_files,
    safetensors_files,
    torch_files,
    unwrapping,
    zips,
)
from itself_jax.weight_files import source as source_lib

# safetensors before pickles; a whole file before shards.
_HUGGING_FACE = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
_OPEN_CLIP = (
    *("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors"),
    "open_clip_pytorch_model.bin",
)
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".npz", ".ckpt")
_INDICES = (".safetensors.index.json", ".bin.index.json")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.(?:safetensors|bin)")
_MAX_JSON = 16 << 20
_HEAD = 4096


class TensorFile(NamedTuple):
    """Named arrays that still lie in a file.

    Attributes:
      path: what was given, a file or a folder.
      file: the file of weights itself, or the index of its shards.
      kind: "torch.save (zip)", "torch.save (legacy)", "TorchScript", "safetensors" or "npz".
      tensors: in file order, by the names that are left after unwrapping.
      metadata: numbers and strings beside the arrays, such as the epoch of a training state.
      notes: what was chosen and left out, one sentence each without a full stop.
    """

    path: pathlib.Path
    file: pathlib.Path
    kind: str
    tensors: dict[str, source_lib.Tensor]
    metadata: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def is_lone(self) -> bool:
        """Whether a file was given and no folder: it may lie beside anything."""
        return self.path == self.file

    def settings(self, name: str) -> dict[str, Any] | None:
        """The JSON object in the file `name` beside the weights, or None.

        Beside a lone file, what is no JSON object is ignored.

        Raises:
          WeightFileError: the file of a folder is damaged.
        """
        path = self.file.parent / name
        if not path.is_file():
            return None
        try:
            return _json(source_lib.Source(path))
        except source_lib.WeightFileError:
            if not self.is_lone:
                raise
            return None


class _Content(NamedTuple):
    kind: str
    tensors: dict[str, source_lib.Tensor]
    metadata: dict[str, Any]
    notes: list[str]


def read(path: str | os.PathLike[str]) -> TensorFile:
    """Reads which arrays a file or folder holds; an array's numbers are read when asked for.

    What a file is decides its content, not its name. Nothing of a file is executed.

    Args:
      path: a file that torch.save (of any version), TorchScript, safetensors or numpy.savez wrote;
        the index of a sharded one; or a folder with one, as Hugging Face and open_clip have it.

    Raises:
      WeightFileError: it is none of these, is damaged, or asks for code; it says what to do.
    """
    given = pathlib.Path(path)
    notes: list[str] = []
    file = given
    if _is_folder(given):
        file = _choose(given, notes)
    content = _read_file(file, alone=file == given)
    tensors, removed = unwrapping.without_prefix(content.tensors)
    if not tensors:
        raise source_lib.WeightFileError(
            f"{file} holds no arrays: give a file that a model was saved to."
        )
    notes += [*content.notes, *removed]
    return TensorFile(given, file, content.kind, tensors, content.metadata, tuple(notes))


def _is_folder(path: pathlib.Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False  # Opening it will say why.


def _choose(folder: pathlib.Path, notes: list[str]) -> pathlib.Path:
    """The file of weights in a folder."""
    try:
        names = {entry.name for entry in folder.iterdir()}
    except OSError as error:
        raise source_lib.WeightFileError(
            f"{folder} cannot be read: {source_lib.reason(error)}."
        ) from error
    known = [name for name in (*_HUGGING_FACE, *_OPEN_CLIP) if name in names]
    known.sort(key=lambda name: "safetensors" not in name)  # stable
    if not known:
        known = sorted(name for name in names if name.endswith(_INDICES))
    if not known:
        known = sorted(
            name for name in names if name.endswith(_SUFFIXES) and not _SHARD.fullmatch(name)
        )
        if len(known) > 1:
            raise source_lib.WeightFileError(
                f"{folder} holds several files of weights, {', '.join(known[:8])}: give the one "
                "that you mean."
            )
    if not known:
        shards = sorted(name for name in names if _SHARD.fullmatch(name))
        if shards:
            raise source_lib.WeightFileError(
                f"{folder} holds shards such as {shards[0]}, but no index that says what they are "
                "(*.safetensors.index.json or *.bin.index.json): copy or download it too."
            )
        raise source_lib.WeightFileError(
            f"{folder} holds no weights: neither {', '.join(_HUGGING_FACE + _OPEN_CLIP)} nor a "
            f"single file that ends in {', '.join(_SUFFIXES)} is there; give the file itself."
        )
    beside = f" (beside it: {', '.join(known[1:])})" if known[1:] else ""
    notes.append(f"took {known[0]} of the folder{beside}")
    return folder / known[0]


def _read_file(path: pathlib.Path, *, alone: bool) -> _Content:
    """Reads one file by its content; an index with all its shards."""
    source = source_lib.Source(path)
    head = source.read(0, _HEAD)
    if alone and (shard := _SHARD.fullmatch(path.name)) and int(shard[3]) > 1:
        source.refuse(f"is one of {int(shard[3])} shards", "give their folder or their index")
    if head.startswith(zips.MAGIC):
        return _read_zip(source)
    if head[:1] == b"{" and path.name.endswith(".json"):
        return _read_shards(source)
    # The length of a header can begin like a pickle: 384 is b"\x80\x01".
    if head[:1] == b"\x80" and head[1:2] <= b"\x05" and head[5:9] != b"\0\0\0{":
        return _read_pickle(source)
    if head[8:9] == b"{":
        tensors, metadata = safetensors_files.read(source)
        return _Content("safetensors", tensors, metadata, [])
    # Pickles of protocol 0 begin with one of these; what they ask for is named.
    if head[:1] in (b"c", b"(", b"]", b"}", b"i"):
        torch_files.refuse_code(source)
    foreign.refuse(source, head)


def _read_zip(source: source_lib.Source) -> _Content:
    entries = zips.entries(source)
    mains = [name for name in entries if name == "data.pkl" or name.endswith("/data.pkl")]
    if mains:
        main = min(mains, key=lambda name: name.count("/"))
        prefix = main.removesuffix("data.pkl")
        kind, content = torch_files.read_zip(source, entries, prefix)
        return _Content(kind, *unwrapping.state_dict(source, content))
    if entries and all(name.endswith(".npy") for name in entries):
        tensors, metadata = npz_files.read(source, entries)
        return _Content("npz", tensors, metadata, [])
    source.refuse(
        "is a zip file that neither torch.save nor numpy.savez has written",
        "unpack it and give the file inside" if entries else "copy or download the file anew",
    )


def _read_pickle(source: source_lib.Source) -> _Content:
    content = torch_files.read_legacy(source)
    return _Content("torch.save (legacy)", *unwrapping.state_dict(source, content))


def _read_shards(source: source_lib.Source) -> _Content:
    """Reads the shards that an index names; every array must be where the index says."""
    index = _json(source)
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places:
        source.refuse(
            "is a JSON file that does not say which shards hold which arrays",
            "give a file of weights, or its index",
        )
    for name, shard in places.items():
        source_lib.check_name(source, name)
        if not source_lib.is_name(shard) or "/" in shard or "\\" in shard or shard in (".", ".."):
            source.refuse(
                f"puts the array {source_lib.show(name)} into {source_lib.show(shard)}, which is "
                "no file beside it"
            )
    shards: dict[str, _Content] = {}
    for shard in dict.fromkeys(places.values()):
        file = source.path.parent / shard
        if not file.exists():
            raise source_lib.WeightFileError(
                f"{file} is missing, but {source.path.name} beside it names it: copy or download "
                "it too."
            )
        if file.name.endswith(".json"):
            source.refuse(f"names itself or another index, {shard}, as a shard")
        shards[shard] = _read_file(file, alone=False)
        for name in shards[shard].tensors:
            if places.get(name) != shard:
                source.refuse(
                    f"says nothing about the array {source_lib.show(name)} in {shard}: they do not "
                    "belong together"
                )
    for name, shard in places.items():
        if name not in shards[shard].tensors:
            source.refuse(
                f"says that {source_lib.show(name)} is in {shard}, but it is not: they do not "
                "belong together"
            )
    tensors = {name: shards[shard].tensors[name] for name, shard in places.items()}
    metadata: dict[str, Any] = {}
    notes: list[str] = []
    for content in shards.values():
        metadata = content.metadata | metadata
        notes += [note for note in content.notes if note not in notes]
    extra = index.get("metadata")
    if isinstance(extra, dict):
        scalars = (str, int, float, bool)
        metadata |= {key: value for key, value in extra.items() if type(value) in scalars}
    kinds = {content.kind for content in shards.values()}
    if len(kinds) > 1:
        source.refuse(f"names shards of different kinds, {' and '.join(sorted(kinds))}")
    return _Content(kinds.pop(), tensors, metadata, notes)


def _json(source: source_lib.Source) -> dict[str, Any]:
    if source.size > _MAX_JSON:
        source.refuse(f"has {source.size} bytes, too many for an index or settings")
    try:
        text = source.read(0, source.size).decode("utf-8")
        content = json.loads(text, object_pairs_hook=safetensors_files.unique)
    except (ValueError, RecursionError) as error:
        source.refuse(f"is not the JSON file it should be ({source_lib.reason(error)})")
    if not isinstance(content, dict):
        source.refuse("is a JSON file, but no object")
    return content
