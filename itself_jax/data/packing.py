"""Writes packed data sets: in whole files, so that it may be stopped at any time and goes on.

`packed` says what they are and reads them. It does so without TensorFlow Datasets, which only
writing needs: every worker process would spend half a second on importing it.
"""

from __future__ import annotations

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
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from etils import epath

from itself_jax.data import images, packed, records, remote

_PROGRESS = "progress.json"
_RECORDS_PER_SHARD = 2048  # 300 MB of raw pixels at 384x128
_LOG_SECONDS = 5
# Pictures hardly compress, and uncompressed ones need no time to unpack.
_WRITER_OPTIONS = "group_size:1,uncompressed"


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
    if remote.is_local(out):
        out = epath.Path(os.path.abspath(out))
    final = out / packed.FOLDER / f"{corpus.dataset}-{packed.form_of(resize)}" / packed.VERSION
    # An object store has no folder to rename.
    work = final.with_name(f".{packed.VERSION}.incomplete") if remote.is_local(out) else final
    annotations = _annotations(corpus, resize)
    digest = hashlib.sha256(annotations).hexdigest()
    with _locked(final.parent):
        if (final / packed.MANIFEST).exists():
            if packed.read_manifest(final)["files"][packed.ANNOTATIONS]["sha256"] == digest:
                log(f"{final} is packed already; delete the folder to pack its pictures anew.")
                return final
            log(f"{final} holds other annotations; packing anew.")
        with _writing(work):
            work.mkdir(parents=True, exist_ok=True)
        builder = Packed(corpus, resize, data_dir=os.fspath(work), num_threads=num_threads)
        shards = _plan(corpus)
        finished = _write_shards(builder, shards, work, digest, log)
        with _writing(work):
            (work / packed.ANNOTATIONS).write_bytes(annotations)
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

    VERSION = tfds.core.Version(packed.VERSION)

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
        self._config = tfds.core.BuilderConfig(name=f"{corpus.dataset}-{packed.form_of(resize)}")
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
            for split, indices in packed.by_split(self.corpus.records).items()
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
        self,
        shards: Sequence[packed.Shard],
        finished: dict[str, dict[str, Any]],
        folder: epath.Path,
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
    shards: Sequence[packed.Shard],
    work: epath.Path,
    digest: str,
    log: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Writes the files that are not finished yet and returns what the manifest says of each."""
    order = packed.file_order(builder.corpus.records)
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
        if remote.is_local(path):
            part = pathlib.Path(path.with_name(f".{path.name}.part"))
            stack.callback(part.unlink, missing_ok=True)
        else:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="packing"))
            part = pathlib.Path(folder) / path.name
        with _writing(path):
            writer = array_record_module.ArrayRecordWriter(os.fspath(part), _WRITER_OPTIONS)
        try:
            for example in examples:  # what fails here is the reading of a picture
                with _writing(path):
                    writer.write(example)
                content += len(example)
                meter()
        except BaseException:
            with contextlib.suppress(RuntimeError):
                writer.close()
            raise
        with _writing(path):
            writer.close()  # raises what went wrong at any time since the opening
            with part.open("rb") as file:
                os.fsync(file.fileno())
            digest, size = packed.sha256(part), part.stat().st_size
            if remote.is_local(path):
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
    shards: Sequence[packed.Shard],
    finished: dict[str, dict[str, Any]],
    work: epath.Path,
) -> None:
    wanted = {shard.name for shard in shards}
    files = {}
    for path in sorted(work.iterdir(), key=lambda path: path.name):
        if path.name in wanted:
            files[path.name] = {key: finished[path.name][key] for key in ("bytes", "sha256")}
        elif path.name not in (packed.MANIFEST, _PROGRESS):
            files[path.name] = {"bytes": path.stat().length, "sha256": packed.sha256(path)}
    splits = {
        split: {
            "pictures": len(indices),
            "captions": sum(len(corpus.records[index].captions) for index in indices),
        }
        for split, indices in packed.by_split(corpus.records).items()
    }
    manifest = {
        "version": packed.VERSION,
        "dataset": corpus.dataset,
        "source_sha256": _source_sha256(corpus),  # to notice that the annotation file has changed
        "resize": resize,
        "splits": splits,
        "shards": [dataclasses.asdict(shard) for shard in shards],
        "files": files,
    }
    manifest["sha256"] = packed.own_sha256(manifest)
    _publish(json.dumps(manifest, indent=1).encode(), work / packed.MANIFEST)


def _read_progress(work: epath.Path, digest: str) -> dict[str, dict[str, Any]]:
    """Returns the files finished by an earlier packing of the same annotations; clears others."""
    with _writing(work):
        try:
            progress = json.loads((work / _PROGRESS).read_text())
        except (FileNotFoundError, ValueError):
            progress = {}
        files = progress.get("files", {}) if progress.get("annotations") == digest else {}
        kept = {}
        # In an object store, a folder without files does not exist, whatever mkdir did.
        for path in work.iterdir() if work.exists() else ():
            file = files.get(path.name)
            if file and path.stat().length == file["bytes"]:
                kept[path.name] = file
            elif path.name != _PROGRESS:
                path.unlink()
    return kept


def _check_space(work: epath.Path, pictures: int, resize: tuple[int, int] | None) -> None:
    if resize is None or not remote.is_local(work):
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
    if remote.is_local(folder):
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
        except BlockingIOError:
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
    if not remote.is_local(path):  # an object appears when it is complete
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


def _plan(corpus: records.Corpus) -> list[packed.Shard]:
    shards = []
    for split, indices in packed.by_split(corpus.records).items():
        count = -(-len(indices) // _RECORDS_PER_SHARD)
        template = _template(split, "")
        for n, some in enumerate(np.array_split(indices, count)):
            name = template.sharded_filepath(shard_index=n, num_shards=count).name
            shards.append(packed.Shard(name, split, len(some)))
    return shards


def _template(split: str, folder: epath.PathLike) -> tfds.core.ShardedFileTemplate:
    return tfds.core.ShardedFileTemplate(
        dataset_name=Packed.name, data_dir=folder, split=split, filetype_suffix="array_record"
    )


def _annotations(corpus: records.Corpus, resize: tuple[int, int] | None) -> bytes:
    rows = [[r.image, r.identity, list(r.captions), r.split] for r in corpus.records]
    content = {
        "dataset": corpus.dataset,
        "source_sha256": _source_sha256(corpus),
        "resize": resize,
        "version": packed.VERSION,
        "records": rows,
    }
    return json.dumps(content).encode()


def _source_sha256(corpus: records.Corpus) -> str | None:
    path = epath.Path(corpus.source)
    return packed.sha256(path) if path.is_file() else None


def _encoded(text: str) -> bytes:
    # JSON may hold half a surrogate pair, which is no text; annotations.json keeps it.
    return text.encode("utf-8", errors="replace")
