"""Packed data sets: pictures and annotations in a few large files that can be read at random.

A set lies in `ROOT/packed/DATASET-FORM/VERSION/`; the form is `original` (the picture files' bytes)
or a size such as `384x128` (raw pixels, resized to it as `images.decode` resizes):

- `packed-SPLIT.array_record-00000-of-00017`, ...: pictures in annotation order, split by split;
- `dataset_info.json`, `features.json`: make it a TFDS data set, for
  `tfds.builder_from_directory(FOLDER).as_data_source()`;
- `annotations.json`: all records in annotation order;
- `manifest.json`: counts, and size and SHA-256 of every other file. It is written last.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from array_record.python import array_record_module
from etils import epath

from itself_jax.data import images, records, remote

VERSION = "1.0.0"
FOLDER = "packed"
MANIFEST = "manifest.json"
ANNOTATIONS = "annotations.json"

_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # random access
_READER_BUFFER = 32768


def find(
    root: epath.PathLike, dataset: str, image_size: tuple[int, int] | None
) -> epath.Path | None:
    """Returns the folder of the finished packed set of `dataset` below `root`, if there is one.

    The form resized to `image_size` goes before the form with the original bytes.

    Args:
      root: what the user gives as data root, or what `packing.pack` wrote to.
      dataset: its name.
      image_size: (H, W) that pictures will be read at; None: only the original bytes will do.

    Raises:
      records.DataError: there are only forms of other sizes, or of another version.
    """
    finished: dict[str, list[str]] = {}  # form: versions
    for folder in _folders(epath.Path(root) / FOLDER):
        if folder.name.startswith(f"{dataset}-"):
            versions = [v.name for v in _folders(folder) if (v / MANIFEST).exists()]
            finished[folder.name.removeprefix(f"{dataset}-")] = versions
    finished = {form: versions for form, versions in finished.items() if versions}
    usable = [form for form in (form_of(image_size), form_of(None)) if form in finished]
    for form in usable:
        if VERSION in finished[form]:
            return epath.Path(root) / FOLDER / f"{dataset}-{form}" / VERSION
    for form in usable:
        folder = epath.Path(root) / FOLDER / f"{dataset}-{form}"
        raise records.DataError(
            f"{folder} was packed in version {', '.join(sorted(finished[form]))} of the format, "
            f"but this program reads version {VERSION}; pack the data set again or delete the "
            "folder."
        )
    if finished and image_size is not None:
        raise records.DataError(
            f"{epath.Path(root) / FOLDER} holds {dataset} resized to {', '.join(sorted(finished))},"
            f" but image_size is {form_of(image_size)}; set it to one of these, or pack {dataset} "
            "again with this size or with the original files."
        )
    return None


def read(folder: epath.PathLike, dataset: str) -> records.Corpus:
    """Reads a finished packed set; its pictures are read when asked for.

    Args:
      folder: as `find` returns it.
      dataset: the name it must have.

    Raises:
      records.DataError: it is of another version or data set, or a file is missing, cut or
        altered. Of the picture files only the size is compared here: `verify` reads all.
    """
    folder = epath.Path(folder)
    manifest = read_manifest(folder)
    if manifest["dataset"] != dataset:
        raise records.DataError(
            f"{folder / MANIFEST}: field 'dataset' is {manifest['dataset']!r}, but {dataset!r} is "
            "wanted; choose the other folder or data set."
        )
    for name, file in manifest["files"].items():
        _check_size(folder / name, file["bytes"])
    content = (folder / ANNOTATIONS).read_bytes()
    if hashlib.sha256(content).hexdigest() != manifest["files"][ANNOTATIONS]["sha256"]:
        raise _altered(folder / ANNOTATIONS)
    rows = json.loads(content)["records"]
    corpus = tuple(
        records.Record(image=image, identity=identity, captions=tuple(captions), split=split)
        for image, identity, captions, split in rows
    )
    pictures = PackedImages(
        folder,
        shards=[Shard(**shard) for shard in manifest["shards"]],
        files=manifest["files"],
        order=file_order(corpus),
        names=[record.image for record in corpus],
        size=tuple(manifest["resize"]) if manifest["resize"] else None,
    )
    return records.Corpus(
        dataset=dataset, source=os.fspath(folder), records=corpus, images=pictures
    )


def verify(folder: epath.PathLike) -> None:
    """Reads every file of a packed set and compares it with its checksum.

    Raises:
      records.DataError: it names the files that are missing or altered, at most ten.
    """
    folder = epath.Path(folder)
    manifest = read_manifest(folder)
    bad = []
    for name, file in manifest["files"].items():
        path = folder / name
        if not path.exists() or sha256(path) != file["sha256"]:
            bad.append(name)
    if bad:
        raise records.DataError(
            f"{folder}: {len(bad)} of {len(manifest['files'])} files are missing or differ from "
            f"the checksums in {MANIFEST}: {', '.join(bad[:10])}{', ...' if bad[10:] else ''}; "
            "copy them anew, or delete the folder and pack again."
        )


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of pictures."""

    name: str
    split: str
    records: int


class PackedImages:
    """Pictures of a packed set, in annotation order.

    A file that lies in a bucket is copied to this machine when the first of its pictures is read;
    see `remote.copy` for the errors of this.

    Args:
      folder: of the packed set.
      shards: all its picture files, in order.
      files: size and checksum of every file, by name, as in the manifest.
      order: annotation index of every record, in the order of the files.
      names: each picture's path in the annotation file.
      size: (H, W) of the raw pixels; None: the records hold the original bytes.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        *,
        shards: Sequence[Shard],
        files: Mapping[str, Mapping[str, Any]],
        order: Sequence[int],
        names: Sequence[str],
        size: tuple[int, int] | None,
    ):
        self._folder = os.fspath(folder)
        self._shards = tuple(shards)
        self._files = tuple(files[shard.name] for shard in shards)
        self._names = tuple(names)
        self._size = size
        places = [(s, i) for s, shard in enumerate(shards) for i in range(shard.records)]
        self._places = np.empty((len(names), 2), np.int32)  # shard, record in it
        self._places[np.asarray(order, int)] = np.asarray(places, np.int32).reshape(-1, 2)
        self._start_reading()

    def __len__(self) -> int:
        return len(self._names)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_readers"], state["_locks"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_reading()

    def _start_reading(self) -> None:
        self._readers: dict[int, Any] = {}  # by shard, opened when first needed
        self._locks = [threading.Lock() for _ in self._shards]

    def name(self, index: int) -> str:
        return f"{self._names[index]} in {self._path(int(self._places[index, 0]))}"

    def load(self, index: int, size: tuple[int, int]) -> np.ndarray:
        if self._size is None:
            return images.decode(self.content(index), self.name(index), size)
        if tuple(size) != self._size:
            raise records.DataError(
                f"{self._folder} holds pictures of {form_of(self._size)} pixels, but "
                f"{form_of(size)} are wanted; change image_size or pack the data set again with "
                "this size."
            )
        record, place = self._read(index)
        if place.stop - place.start != self._size[0] * self._size[1] * 3:
            raise self._damaged(index, f"{place.stop - place.start} bytes of pixels")
        pixels = np.frombuffer(record, np.uint8, place.stop - place.start, place.start)
        return pixels.reshape(*self._size, 3)

    def content(self, index: int) -> bytes:
        if self._size is not None:
            raise records.DataError(
                f"{self._folder} holds pixels resized to {form_of(self._size)}, not the original "
                "picture files, which this needs; use a data root that holds these."
            )
        record, place = self._read(index)
        return record[place]

    def subset(self, indices: Sequence[int]) -> PackedImages:
        chosen = PackedImages.__new__(PackedImages)
        state = self.__getstate__()
        state["_names"] = tuple(self._names[index] for index in indices)
        state["_places"] = self._places[np.asarray(indices, int)]
        chosen.__setstate__(state)
        return chosen

    def _read(self, index: int) -> tuple[bytes, slice]:
        """Returns a serialized tf.train.Example and where the picture lies in it."""
        shard, position = self._places[index].tolist()
        try:
            reader = self._readers[shard] if shard in self._readers else self._open(shard)
            (record,) = reader.read([position])
            return record, _find_bytes(record, b"image")
        except remote.CopyError:  # of the whole file
            raise
        except (RuntimeError, OSError, ValueError, IndexError) as error:
            raise self._damaged(index, str(error)) from error

    def _open(self, shard: int) -> Any:
        with self._locks[shard]:
            if shard not in self._readers:
                self._readers[shard] = array_record_module.ArrayRecordReader(
                    self._local(shard),
                    options=_READER_OPTIONS,
                    file_reader_buffer_size=_READER_BUFFER,
                )
            return self._readers[shard]

    def _path(self, shard: int) -> str:
        return os.fspath(epath.Path(self._folder) / self._shards[shard].name)

    def _local(self, shard: int) -> str:
        path, file = self._path(shard), self._files[shard]
        if remote.is_local(path):
            return path
        copy = remote.copy(epath.Path(path), size=file["bytes"], sha256=file["sha256"])
        return os.fspath(copy)

    def _damaged(self, index: int, reason: str) -> records.DataError:
        shard = int(self._places[index, 0])
        path, cure = self._path(shard), "copy the file anew, or delete its folder and pack again"
        if not remote.is_local(path):
            path, cure = (
                remote.place(self._files[shard]["sha256"]),
                f"delete it, and it is copied anew from {path}",
            )
        return records.DataError(
            f"{path} is damaged: the picture {self._names[index]} cannot be read from it "
            f"({reason}); {cure}."
        )


def read_manifest(folder: epath.Path) -> dict[str, Any]:
    """Returns the manifest of a finished set.

    Raises:
      records.DataError: there is none, it cannot be read, is of another version, or altered.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise records.DataError(
            f"{folder} is no finished packed data set: it has no {MANIFEST}; pack the data set."
        ) from None
    except ValueError as error:
        raise _altered(path) from error
    except Exception as error:  # remote file systems raise errors of their own
        raise records.DataError(
            f"{path} cannot be read ({type(error).__name__}: {error}); see that it can, then try "
            "again."
        ) from error
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if isinstance(version, str) and version != VERSION:
        raise records.DataError(
            f"{path}: field 'version' is {version!r}, but this program reads version {VERSION}; "
            "pack the data set again or delete the folder."
        )
    if version is None or manifest.get("sha256") != own_sha256(manifest):
        raise _altered(path)
    return manifest


def own_sha256(manifest: dict[str, Any]) -> str:
    """Returns the checksum of a manifest's other fields."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def by_split(corpus: Sequence[records.Record]) -> dict[str, list[int]]:
    """Returns the annotation indices of every split, each in annotation order."""
    splits = collections.defaultdict(list)
    for index, record in enumerate(corpus):
        splits[record.split or "unsplit"].append(index)  # TFDS's splits need a name
    return dict(sorted(splits.items()))


def file_order(corpus: Sequence[records.Record]) -> list[int]:
    """Returns the annotation index of every record, in the order of the files."""
    return list(itertools.chain.from_iterable(by_split(corpus).values()))


def form_of(size: tuple[int, int] | None) -> str:
    """Returns what a form is called: "original", or a size as "384x128"."""
    return "original" if size is None else f"{size[0]}x{size[1]}"


def _folders(path: epath.Path) -> list[epath.Path]:
    if not path.is_dir():
        return []
    return [entry for entry in path.iterdir() if not entry.name.startswith(".") and entry.is_dir()]


def _check_size(path: epath.Path, expected: int) -> None:
    try:
        found = path.stat().length
    except FileNotFoundError:
        raise records.DataError(
            f"{path} does not exist, but {MANIFEST} beside it lists it; copy it anew, or delete "
            "the folder and pack again."
        ) from None
    if found != expected:
        raise records.DataError(
            f"{path} has {found} bytes, but {MANIFEST} beside it says {expected}; copy it anew, "
            "or delete the folder and pack again."
        )


def _altered(path: epath.Path) -> records.DataError:
    return records.DataError(
        f"{path} is not what was written there (its checksum differs); copy it anew, or delete its "
        "folder and pack again."
    )


def sha256(path: epath.Path | pathlib.Path) -> str:
    """Returns the checksum of a file, read block by block."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _find_bytes(record: bytes, key: bytes) -> slice:
    """Returns where the one byte string of a feature lies in a serialized tf.train.Example.

    A parser of protocol buffers would copy the pixels.

    Raises:
      ValueError, IndexError: the record is no such Example.
    """
    at, end = _field(record, 0, 0x0A)  # Example.features
    while at < end:
        key_at, entry_end = _field(record, at, 0x0A)  # Features.feature: an entry of a map
        key_start, key_end = _field(record, key_at, 0x0A)
        if record[key_start:key_end] == key:
            value, _ = _field(record, key_end, 0x12)  # the entry's Feature
            value, _ = _field(record, value, 0x0A)  # Feature.bytes_list
            start, stop = _field(record, value, 0x0A)  # BytesList.value
            if stop > len(record):
                break
            return slice(start, stop)
        at = entry_end
    raise ValueError(f"its record has no feature {key.decode()!r}")


def _field(record: bytes, at: int, tag: int) -> tuple[int, int]:
    """Returns start and end of the content of the length-delimited field at `at`."""
    if record[at] != tag:
        raise ValueError(f"its record has byte {record[at]} where {tag} is expected")
    length = shift = 0
    while True:
        at += 1
        length |= (record[at] & 0x7F) << shift
        if record[at] < 0x80:
            return at + 1, at + 1 + length
        shift += 7
