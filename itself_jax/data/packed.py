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
import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from etils import epath

from itself_jax.data import images, records

VERSION = "1.0.0"

_FOLDER = "packed"
_MANIFEST = "manifest.json"
_ANNOTATIONS = "annotations.json"
_PROGRESS = "progress.json"
_RECORDS_PER_SHARD = 2048  # 300 MB of raw pixels at 384x128
_LOG_SECONDS = 5
# Pictures hardly compress; without compression a record is read three times faster than decoded.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"  # random access
_READER_BUFFER = 32768


def find(
    root: epath.PathLike, dataset: str, image_size: tuple[int, int] | None
) -> epath.Path | None:
    """Returns the folder of the finished packed set of `dataset` below `root`, if there is one.

    The form resized to `image_size` goes before the form with the original bytes.

    Args:
      root: what the user gives as data root, or what `pack` wrote to.
      dataset: its name.
      image_size: (H, W) that pictures will be read at; None: only the original bytes will do.

    Raises:
      records.DataError: there are only forms of other sizes, or of another version.
    """
    finished: dict[str, list[str]] = {}  # form: versions
    for folder in _folders(epath.Path(root) / _FOLDER):
        if folder.name.startswith(f"{dataset}-"):
            versions = [v.name for v in _folders(folder) if (v / _MANIFEST).exists()]
            finished[folder.name.removeprefix(f"{dataset}-")] = versions
    finished = {form: versions for form, versions in finished.items() if versions}
    usable = [form for form in (_form(image_size), _form(None)) if form in finished]
    for form in usable:
        folder = epath.Path(root) / _FOLDER / f"{dataset}-{form}"
        if VERSION in finished[form]:
            return folder / VERSION
        raise records.DataError(
            f"{folder} was packed in version {', '.join(sorted(finished[form]))} of the format, "
            f"but this program reads version {VERSION}; pack the data set again or delete the "
            "folder."
        )
    if finished and image_size is not None:
        raise records.DataError(
            f"{epath.Path(root) / _FOLDER} holds {dataset} resized to "
            f"{', '.join(sorted(finished))}, but image_size is {_form(image_size)}; set it to one "
            f"of these, or pack {dataset} again with this size or with the original files."
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
    manifest = _read_manifest(folder)
    if manifest["dataset"] != dataset:
        raise records.DataError(
            f"{folder / _MANIFEST}: field 'dataset' is {manifest['dataset']!r}, but {dataset!r} is "
            "wanted; choose the other folder or data set."
        )
    for name, file in manifest["files"].items():
        _check_size(folder / name, file["bytes"])
    content = (folder / _ANNOTATIONS).read_bytes()
    if hashlib.sha256(content).hexdigest() != manifest["files"][_ANNOTATIONS]["sha256"]:
        raise _altered(folder / _ANNOTATIONS)
    rows = json.loads(content)["records"]
    corpus = tuple(
        records.Record(image=image, identity=identity, captions=tuple(captions), split=split)
        for image, identity, captions, split in rows
    )
    pictures = PackedImages(
        folder,
        shards=[_Shard(**shard) for shard in manifest["shards"]],
        order=_order(corpus),
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
    manifest = _read_manifest(folder)
    bad = []
    for name, file in manifest["files"].items():
        path = folder / name
        if not path.exists() or _sha256(path) != file["sha256"]:
            bad.append(name)
    if bad:
        raise records.DataError(
            f"{folder}: {len(bad)} of {len(manifest['files'])} files are missing or differ from "
            f"the checksums in {_MANIFEST}: {', '.join(bad[:10])}{', ...' if bad[10:] else ''}; "
            "copy them anew, or delete the folder and pack again."
        )


@dataclasses.dataclass(frozen=True)
class _Shard:
    name: str
    split: str
    records: int


class PackedImages:
    """Pictures of a packed set, in annotation order.

    Args:
      folder: of the packed set.
      shards: all its picture files, in order.
      order: annotation index of every record, in the order of the files.
      names: each picture's path in the annotation file.
      size: (H, W) of the raw pixels; None: the records hold the original bytes.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        *,
        shards: Sequence[_Shard],
        order: Sequence[int],
        names: Sequence[str],
        size: tuple[int, int] | None,
    ):
        self._folder = os.fspath(folder)
        self._shards = tuple(shards)
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
        del state["_readers"], state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_reading()

    def _start_reading(self) -> None:
        self._readers: dict[int, Any] = {}  # by shard, opened when first needed
        self._lock = threading.Lock()

    def name(self, index: int) -> str:
        return f"{self._names[index]} in {self._path(int(self._places[index, 0]))}"

    def load(self, index: int, size: tuple[int, int]) -> np.ndarray:
        if self._size is None:
            return images.decode(self.content(index), self.name(index), size)
        if tuple(size) != self._size:
            raise records.DataError(
                f"{self._folder} holds pictures of {_form(self._size)} pixels, but {_form(size)} "
                "are wanted; change image_size or pack the data set again with this size."
            )
        record, place = self._read(index)
        if place.stop - place.start != self._size[0] * self._size[1] * 3:
            raise self._damaged(index, f"{place.stop - place.start} bytes of pixels")
        pixels = np.frombuffer(record, np.uint8, place.stop - place.start, place.start)
        return pixels.reshape(*self._size, 3)

    def content(self, index: int) -> bytes:
        if self._size is not None:
            raise records.DataError(
                f"{self._folder} holds pixels resized to {_form(self._size)}, not the original "
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
        except (RuntimeError, OSError, ValueError, IndexError) as error:
            raise self._damaged(index, str(error)) from error

    def _open(self, shard: int) -> Any:
        with self._lock:
            if shard not in self._readers:
                reader = _reader(self._path(shard))
                found, expected = reader.num_records(), self._shards[shard].records
                if found != expected:  # a damaged footer reads as no record at all
                    reader.close()
                    raise ValueError(f"it has {found} records, not {expected}")
                self._readers[shard] = reader
            return self._readers[shard]

    def _path(self, shard: int) -> str:
        return os.fspath(epath.Path(self._folder) / self._shards[shard].name)

    def _damaged(self, index: int, reason: str) -> records.DataError:
        path = self._path(int(self._places[index, 0]))
        return records.DataError(
            f"{path} is damaged: the picture {self._names[index]} cannot be read from it "
            f"({reason}); copy the file anew, or delete its folder and pack again."
        )


def pack(
    corpus: records.Corpus,
    out: epath.PathLike,
    *,
    resize: tuple[int, int] | None = None,
    log: Callable[[str], None],
    num_threads: int | None = None,
) -> epath.Path:
    """Packs a corpus below `out` and returns the folder of the finished set.

    Every file of pictures is finished before the next one is begun. An interrupted packing, started
    again with the same annotations, keeps the finished files and goes on after them. Only a set
    that is complete gets its final name; in an object store, where folders have no names of their
    own, only such a set gets its manifest. A finished set of these very annotations is left alone,
    and one of other annotations replaced.

    Args:
      corpus: what to pack, in this order.
      out: the folder to write to; will be a data root.
      resize: (H, W) to store raw pixels of this size; None to store the original bytes.
      log: takes one line of progress at a time.
      num_threads: that read and decode pictures; None: one per core.

    Raises:
      records.DataError: a picture cannot be read; the disk is full or read-only; another process
        is packing the same set. Finished files stay, for the next attempt.
    """
    out = epath.Path(out)
    if _is_local(out):
        out = epath.Path(os.path.abspath(out))
    final = out / _FOLDER / f"{corpus.dataset}-{_form(resize)}" / VERSION
    # An object store has no folder to rename.
    work = final.with_name(f".{VERSION}.incomplete") if _is_local(out) else final
    annotations = _annotations(corpus, resize)
    digest = hashlib.sha256(annotations).hexdigest()
    with _locked(final.parent):
        if (final / _MANIFEST).exists():
            if _read_manifest(final)["files"][_ANNOTATIONS]["sha256"] == digest:
                log(f"{final} is packed already; delete the folder to pack its pictures anew.")
                return final
            log(f"{final} holds other annotations; packing anew.")
        if work == final:
            (final / _MANIFEST).unlink(missing_ok=True)
        with _writing(work):
            work.mkdir(parents=True, exist_ok=True)
        builder = Packed(corpus, resize, data_dir=os.fspath(work), num_threads=num_threads)
        shards = _plan(corpus)
        finished = _write_shards(builder, shards, work, digest, log)
        with _writing(work):
            (work / _ANNOTATIONS).write_bytes(annotations)
            builder.describe(shards, finished, work)
            _write_manifest(corpus, resize, shards, finished, work)
            if work != final:
                if final.exists():
                    final.rmtree()
                work.rename(final)
            (final / _PROGRESS).unlink(missing_ok=True)
    log(f"{final}: {len(corpus.records)} pictures in {len(shards)} files.")
    return final


class Packed(tfds.core.GeneratorBasedBuilder):
    """A packed set as TFDS sees it.

    `pack` writes the files itself: TFDS's own `download_and_prepare`, which works too, keeps
    everything twice on the disk, needs TensorFlow beyond 1 GB and cannot go on after a stop.

    Args:
      corpus: what to pack.
      resize: (H, W) of the raw pixels, or None for the original bytes.
      data_dir: TFDS's root folder.
      num_threads: that read and decode pictures; None: one per core.
    """

    VERSION = tfds.core.Version(VERSION)

    def __init__(
        self,
        corpus: records.Corpus,
        resize: tuple[int, int] | None,
        *,
        data_dir: str,
        num_threads: int | None = None,
    ):
        self.corpus = corpus
        self.resize = resize
        self._num_threads = num_threads or os.cpu_count() or 1
        self._config = tfds.core.BuilderConfig(name=f"{corpus.dataset}-{_form(resize)}")
        super().__init__(config=self._config, data_dir=data_dir, file_format="array_record")

    def get_builder_config(self, name: str, version: Any = None) -> tfds.core.BuilderConfig:
        # TFDS warns of a configuration that is not listed in the class, and this one depends on
        # the corpus.
        return self._config

    def _info(self) -> tfds.core.DatasetInfo:
        if self.resize is None:
            picture = tfds.features.Image()
        else:
            # As an image it would be encoded, by TensorFlow.
            shape = (*self.resize, 3)
            picture = tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding="bytes")
        return tfds.core.DatasetInfo(
            builder=self,
            description="Pictures of people with captions and identities.",
            features=tfds.features.FeaturesDict(
                {
                    "image": picture,
                    "image_path": tfds.features.Text(doc="As in the annotation file."),
                    "id": tfds.features.Text(doc="The identity, as in the annotation file."),
                    "captions": tfds.features.Sequence(tfds.features.Text()),
                    "split": tfds.features.Text(doc="As in the annotation file, or empty."),
                    "index": tfds.features.Scalar(np.int64, doc="In the annotation file, from 0."),
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        del dl_manager
        return {
            split: self._generate_examples(indices)
            for split, indices in _splits(self.corpus.records).items()
        }

    def _generate_examples(self, indices: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        loaded = images.ahead(
            self._load, indices, depth=4 * self._num_threads, num_threads=self._num_threads
        )
        for index, picture in zip(indices, loaded, strict=True):
            record = self.corpus.records[index]
            yield (
                index,
                {
                    "image": picture,
                    "image_path": _encoded(record.image),
                    "id": _encoded(record.identity),
                    "captions": [_encoded(caption) for caption in record.captions],
                    "split": record.split,
                    "index": index,
                },
            )

    def _load(self, index: int) -> bytes | np.ndarray:
        if self.resize is None:
            return self.corpus.images.content(index)
        return self.corpus.images.load(index, self.resize)

    def serialized(self, indices: Sequence[int]) -> Iterator[bytes]:
        """Yields the records of these annotation indices, as they are written to the files."""
        for _, example in self._generate_examples(indices):
            yield self.info.features.serialize_example(example)

    def describe(
        self, shards: Sequence[_Shard], finished: dict[str, dict[str, Any]], folder: epath.Path
    ) -> None:
        """Writes what TFDS needs to know of a set of these files into `folder`."""
        infos = []
        for split, group in itertools.groupby(shards, key=lambda shard: shard.split):
            group = list(group)
            infos.append(
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=[shard.records for shard in group],
                    num_bytes=sum(finished[shard.name]["content"] for shard in group),
                    filename_template=_template(split, folder),
                )
            )
        self.info.set_splits(tfds.core.SplitDict(infos))
        self.info.write_to_directory(folder)


def _write_shards(
    builder: Packed,
    shards: Sequence[_Shard],
    work: epath.Path,
    digest: str,
    log: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Writes the files that are not finished yet and returns what the manifest says of each."""
    order = _order(builder.corpus.records)
    starts = np.cumsum([0, *(shard.records for shard in shards)]).tolist()
    finished = _read_progress(work, digest)
    todo = [n for n, shard in enumerate(shards) if shard.name not in finished]
    ready = sum(shards[n].records for n in range(len(shards)) if n not in todo)
    if ready:
        log(f"{work}: going on after {ready} of {len(order)} pictures.")
    _check_space(work, sum(shards[n].records for n in todo), builder.resize)
    meter = _Meter(log, ready, len(order))
    indices = [index for n in todo for index in order[starts[n] : starts[n + 1]]]
    with contextlib.closing(builder.serialized(indices)) as examples:
        for n in todo:
            wanted = itertools.islice(examples, shards[n].records)
            finished[shards[n].name] = _write_shard(work / shards[n].name, wanted, meter)
            with _writing(work):
                progress = json.dumps({"annotations": digest, "files": finished})
                _publish(progress.encode(), work / _PROGRESS)
    return finished


def _write_shard(
    path: epath.Path, examples: Iterator[bytes], meter: Callable[[], None]
) -> dict[str, Any]:
    content = 0
    with contextlib.ExitStack() as stack:
        if _is_local(path):
            part = pathlib.Path(path.with_name(f".{path.name}.part"))
            stack.callback(part.unlink, missing_ok=True)
        else:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="packing"))
            part = pathlib.Path(folder) / path.name
        with _writing(path):
            writer = array_record_module.ArrayRecordWriter(os.fspath(part), _WRITER_OPTIONS)
            try:
                for example in examples:
                    writer.write(example)
                    content += len(example)
                    meter()
            except BaseException:
                with contextlib.suppress(RuntimeError):
                    writer.close()
                raise
            writer.close()  # raises what went wrong at any time since the opening
            with part.open("rb") as file:
                os.fsync(file.fileno())
            digest, size = _sha256(part), part.stat().st_size
            if _is_local(path):
                part.replace(path)
            else:
                epath.Path(part).copy(path, overwrite=True)
    return {"bytes": size, "sha256": digest, "content": content}


class _Meter:
    """Counts pictures and says every few seconds how far it is."""

    def __init__(self, log: Callable[[str], None], ready: int, total: int):
        self._log = log
        self._done = self._ready = ready
        self._total = total
        self._start = self._said = time.monotonic()

    def __call__(self) -> None:
        self._done += 1
        now = time.monotonic()
        if now - self._said >= _LOG_SECONDS:
            self._said = now
            speed = (self._done - self._ready) / (now - self._start)
            self._log(
                f"packed {self._done} of {self._total} pictures, {speed:.0f} a second, about "
                f"{(self._total - self._done) / speed:.0f} s left"
            )


def _write_manifest(
    corpus: records.Corpus,
    resize: tuple[int, int] | None,
    shards: Sequence[_Shard],
    finished: dict[str, dict[str, Any]],
    work: epath.Path,
) -> None:
    wanted = {shard.name for shard in shards}
    files = {}
    for path in sorted(work.iterdir(), key=lambda path: path.name):
        if path.name in wanted:
            files[path.name] = {key: finished[path.name][key] for key in ("bytes", "sha256")}
        elif path.name not in (_MANIFEST, _PROGRESS):
            files[path.name] = {"bytes": path.stat().length, "sha256": _sha256(path)}
    splits = {
        split: {
            "pictures": len(indices),
            "captions": sum(len(corpus.records[index].captions) for index in indices),
        }
        for split, indices in _splits(corpus.records).items()
    }
    manifest = {
        "version": VERSION,
        "dataset": corpus.dataset,
        "resize": resize,
        "splits": splits,
        "shards": [dataclasses.asdict(shard) for shard in shards],
        "files": files,
    }
    manifest["sha256"] = _own_sha256(manifest)
    _publish(json.dumps(manifest, indent=1).encode(), work / _MANIFEST)


def _read_manifest(folder: epath.Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise records.DataError(
            f"{folder} is no finished packed data set: it has no {_MANIFEST}; pack the data set."
        ) from None
    except (OSError, ValueError) as error:
        raise _altered(path) from error
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if isinstance(version, str) and version != VERSION:
        raise records.DataError(
            f"{path}: field 'version' is {version!r}, but this program reads version {VERSION}; "
            "pack the data set again or delete the folder."
        )
    if version is None or manifest.get("sha256") != _own_sha256(manifest):
        raise _altered(path)
    return manifest


def _own_sha256(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_progress(work: epath.Path, digest: str) -> dict[str, dict[str, Any]]:
    """Returns the files finished by an earlier packing of the same annotations; clears others."""
    with _writing(work):
        try:
            progress = json.loads((work / _PROGRESS).read_text())
        except (FileNotFoundError, ValueError):
            progress = {}
        files = progress.get("files", {}) if progress.get("annotations") == digest else {}
        kept = {}
        for path in work.iterdir():
            file = files.get(path.name)
            if file and path.stat().length == file["bytes"]:
                kept[path.name] = file
            elif path.name != _PROGRESS:
                path.unlink()
    return kept


def _check_space(work: epath.Path, pictures: int, resize: tuple[int, int] | None) -> None:
    if resize is None or not _is_local(work):
        return
    needed = pictures * resize[0] * resize[1] * 3
    free = shutil.disk_usage(work).free
    if free < needed:
        raise records.DataError(
            f"{work}: packing needs {needed / 1e9:.1f} GB more, but its disk has only "
            f"{free / 1e9:.1f} GB free; free some space or choose another folder to write to."
        )


@contextlib.contextmanager
def _writing(path: epath.PathLike) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # ArrayRecord raises RuntimeError
        raise records.DataError(
            f"{path} cannot be written ({error}); make room or choose another folder, then start "
            "the same command again: finished files are kept."
        ) from error


@contextlib.contextmanager
def _locked(folder: epath.Path) -> Iterator[None]:
    """Lets one process in at a time; the lock of a process that dies goes with it."""
    if _is_local(folder):
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        path = pathlib.Path(folder) / ".lock"
    else:  # packers on other machines cannot be noticed there
        name = hashlib.sha256(os.fspath(folder).encode()).hexdigest()
        path = pathlib.Path(tempfile.gettempdir()) / f"packing-{name[:16]}.lock"
    with contextlib.ExitStack() as stack:
        with _writing(path):
            file = stack.enter_context(path.open("a+"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise records.DataError(
                f"{folder} is being packed by another process ({file.read().strip()}); wait until "
                "it has finished, or stop it."
            ) from None
        with _writing(path):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield


def _publish(content: bytes, path: epath.Path) -> None:
    """Writes a small file so that it is there as a whole or not at all."""
    if not _is_local(path):  # an object appears when it is complete
        path.write_bytes(content)
        return
    part = pathlib.Path(path.with_name(f".{path.name}.part"))
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _plan(corpus: records.Corpus) -> list[_Shard]:
    shards = []
    for split, indices in _splits(corpus.records).items():
        count = -(-len(indices) // _RECORDS_PER_SHARD)
        template = _template(split, "")
        for n, some in enumerate(np.array_split(indices, count)):
            name = template.sharded_filepath(shard_index=n, num_shards=count).name
            shards.append(_Shard(name, split, len(some)))
    return shards


def _template(split: str, folder: epath.PathLike) -> tfds.core.ShardedFileTemplate:
    return tfds.core.ShardedFileTemplate(
        dataset_name=Packed.name, data_dir=folder, split=split, filetype_suffix="array_record"
    )


def _splits(corpus: Sequence[records.Record]) -> dict[str, list[int]]:
    """Returns the annotation indices of every split, each in annotation order."""
    splits = collections.defaultdict(list)
    for index, record in enumerate(corpus):
        splits[record.split or "unsplit"].append(index)  # TFDS's splits need a name
    return dict(sorted(splits.items()))


def _order(corpus: Sequence[records.Record]) -> list[int]:
    """Returns the annotation index of every record, in the order of the files."""
    return list(itertools.chain.from_iterable(_splits(corpus).values()))


def _annotations(corpus: records.Corpus, resize: tuple[int, int] | None) -> bytes:
    rows = [[r.image, r.identity, list(r.captions), r.split] for r in corpus.records]
    content = {"dataset": corpus.dataset, "resize": resize, "version": VERSION, "records": rows}
    return json.dumps(content).encode()


def _encoded(text: str) -> bytes:
    # JSON may hold half a surrogate pair, which is no text; annotations.json keeps it.
    return text.encode("utf-8", errors="replace")


def _form(size: tuple[int, int] | None) -> str:
    return "original" if size is None else f"{size[0]}x{size[1]}"


def _folders(path: epath.Path) -> list[epath.Path]:
    if not path.is_dir():
        return []
    return [entry for entry in path.iterdir() if not entry.name.startswith(".") and entry.is_dir()]


def _is_local(path: epath.PathLike) -> bool:
    return "://" not in os.fspath(path)


def _reader(path: str) -> Any:
    return array_record_module.ArrayRecordReader(
        path, options=_READER_OPTIONS, file_reader_buffer_size=_READER_BUFFER
    )


def _check_size(path: epath.Path, expected: int) -> None:
    try:
        found = path.stat().length
    except FileNotFoundError:
        raise records.DataError(
            f"{path} does not exist, but {_MANIFEST} beside it lists it; copy it anew, or delete "
            "the folder and pack again."
        ) from None
    if found != expected:
        raise records.DataError(
            f"{path} has {found} bytes, but {_MANIFEST} beside it says {expected}; copy it anew, "
            "or delete the folder and pack again."
        )


def _altered(path: epath.Path) -> records.DataError:
    return records.DataError(
        f"{path} is not what was written there (its checksum differs); copy it anew, or delete its "
        "folder and pack again."
    )


def _sha256(path: epath.Path | pathlib.Path) -> str:
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
