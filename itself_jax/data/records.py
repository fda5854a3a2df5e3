"""Benchmarks as one record type: images, captions and identities of one split."""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
import pathlib
import re

import numpy as np

SPLITS = ("train", "val", "test")

_LOG = logging.getLogger("itself_jax")
# The benchmark's own folder below `data_root`; "" means that `data_root` is that folder.
_RSTP_FORM_FOLDERS = {"rstp_reid": "RSTPReid", "synthetic": ""}
_PLANNED = ("cuhk_pedes", "icfg_pedes", "jsonl")
_INT32 = np.iinfo(np.int32)
_LONG_CAPTION = 100  # words; the benchmarks' captions have about 25, CLIP takes 77 pieces
_NO_TEXT = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]|<\|(?:startoftext|endoftext|mask)\|>")


class DataError(ValueError):
    """The data on disk cannot be used; the message names file, field and value."""


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """One split of one benchmark, in the order of its annotation file.

    A training *pair* is one caption with its image, so pairs are indexed as captions are.
    """

    dataset: str
    split: str
    image_root: pathlib.Path  # folder that `image_paths` are relative to
    image_paths: tuple[str, ...]  # (g,)
    image_ids: np.ndarray  # (g,) int32; train: 0..c-1 by sorted original id, else the original id
    captions: tuple[str, ...]  # (q,) all captions of record 0, then of record 1, ...
    caption_ids: np.ndarray  # (q,) int32, numbered as `image_ids`
    caption_images: np.ndarray  # (q,) int32 index into `image_paths`
    original_ids: tuple[int, ...]  # (c,) sorted; train: original_ids[label] is the original id

    @property
    def num_identities(self) -> int:
        return len(self.original_ids)


def read(dataset: str, data_root: str | pathlib.Path, split: str) -> Split:
    """Reads one split of a benchmark.

    `rstp_reid` lies in `data_root/RSTPReid`, `synthetic` in `data_root` itself; both are
    `data_captions.json` (a list of records with `id`, `img_path`, `captions`, `split`) next to
    `imgs/`. Captions are kept as written; empty or wordless ones are counted in one log line.

    Args:
      dataset: "synthetic" or "rstp_reid".
      data_root: folder that holds the benchmark's own folder.
      split: "train", "val" or "test".

    Raises:
      DataError: an annotation or image is missing or malformed; the message says where.
    """
    if dataset in _PLANNED:
        raise DataError(
            f"dataset={dataset!r} cannot be read yet: its reader is not available in this version; "
            f"use one of {', '.join(sorted(_RSTP_FORM_FOLDERS))}."
        )
    if dataset not in _RSTP_FORM_FOLDERS:
        raise DataError(
            f"dataset={dataset!r} is not known; use one of {', '.join(sorted(_RSTP_FORM_FOLDERS))}."
        )
    if split not in SPLITS:
        raise DataError(f"split={split!r} is not known; use one of {', '.join(SPLITS)}.")
    folder = pathlib.Path(data_root) / _RSTP_FORM_FOLDERS[dataset]
    annotation = folder / "data_captions.json"
    records = _read_annotation(annotation, dataset)
    result = _build_split(dataset, split, folder / "imgs", records, annotation)
    _check_images_exist(result, annotation)
    _log_oddities(result)
    return result


def _read_annotation(path: pathlib.Path, dataset: str) -> list:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(
            f"{path} does not exist: dataset={dataset!r} needs this annotation file; point "
            "data_root at the folder that holds the benchmark."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}; restore it.") from error
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}; "
            "restore the file (an interrupted copy ends early)."
        ) from error
    if not isinstance(records, list):
        raise DataError(
            f"{path} must hold a list of records, but its top level is {_kind(records)}; is this "
            "the benchmark's annotation file?"
        )
    return records


def _build_split(
    dataset: str, split: str, image_root: pathlib.Path, records: list, annotation: pathlib.Path
) -> Split:
    image_paths, original, captions, caption_images = [], [], [], []
    sizes = collections.Counter()
    for number, record in enumerate(records):
        where = f"{annotation}: record {number}"
        identity, image_path, record_captions, record_split = _check_record(record, where)
        sizes[record_split] += 1
        if record_split != split:
            continue
        caption_images.extend([len(image_paths)] * len(record_captions))
        captions.extend(record_captions)
        image_paths.append(image_path)
        original.append(identity)
    if not image_paths:
        found = ", ".join(f"{name} {count}" for name, count in sorted(sizes.items())) or "none"
        raise DataError(
            f"{annotation}: no record has split={split!r} (records by split: {found}); choose "
            "another split or complete the file."
        )
    original_ids, labels = np.unique(np.asarray(original, np.int32), return_inverse=True)
    image_ids = (labels if split == "train" else np.asarray(original)).astype(np.int32)
    caption_images = np.asarray(caption_images, np.int32)
    return Split(
        dataset=dataset,
        split=split,
        image_root=image_root,
        image_paths=tuple(image_paths),
        image_ids=image_ids,
        captions=tuple(captions),
        caption_ids=image_ids[caption_images],
        caption_images=caption_images,
        original_ids=tuple(original_ids.tolist()),
    )


def _check_record(record, where: str) -> tuple[int, str, list[str], str]:
    if not isinstance(record, dict):
        raise DataError(f"{where} must be an object, but is {_kind(record)}; correct this record.")
    for field in ("id", "img_path", "captions", "split"):
        if field not in record:
            raise DataError(
                f"{where} lacks the field {field!r} (it has: "
                f"{', '.join(sorted(record)) or 'no field'}); add it."
            )
    identity, path = record["id"], record["img_path"]
    captions, split = record["captions"], record["split"]
    if isinstance(identity, bool) or not isinstance(identity, int):
        raise DataError(f"{where}: field 'id' must be an integer, but is {_kind(identity)}.")
    if not _INT32.min <= identity <= _INT32.max:
        raise DataError(f"{where}: field 'id' is {identity}, which does not fit 32 bits; renumber.")
    if not isinstance(path, str) or not path.strip():
        raise DataError(
            f"{where}: field 'img_path' must be the image's path as text, but is {_kind(path)}."
        )
    pure = pathlib.PurePosixPath(path)
    if pure.is_absolute() or pathlib.PureWindowsPath(path).drive or ".." in pure.parts:
        raise DataError(
            f"{where}: field 'img_path' is {path!r}; paths must be relative to the image folder "
            "and must not contain '..'."
        )
    if isinstance(captions, str):
        captions = [captions]
    if not isinstance(captions, list) or not captions:
        raise DataError(
            f"{where}: field 'captions' must be a text or a list of at least one text, but is "
            f"{_kind(captions)}."
        )
    for caption in captions:
        if not isinstance(caption, str):
            raise DataError(
                f"{where}: field 'captions' must contain only text, but has {_kind(caption)}."
            )
    if not isinstance(split, str) or split not in SPLITS:
        raise DataError(
            f"{where}: field 'split' is {split!r}; it must be one of {', '.join(SPLITS)}."
        )
    return identity, path, captions, split


def _check_images_exist(split: Split, annotation: pathlib.Path) -> None:
    # One listing per folder: a stat per file takes minutes on network file systems.
    names: dict[pathlib.PurePosixPath, frozenset[str]] = {}
    missing = []
    for path in split.image_paths:
        pure = pathlib.PurePosixPath(path)
        if pure.parent not in names:
            try:
                entries = (split.image_root / pure.parent).iterdir()
                names[pure.parent] = frozenset(entry.name for entry in entries)
            except (OSError, ValueError):  # absent, not a folder, or a NUL in its name
                names[pure.parent] = frozenset()
        if pure.name not in names[pure.parent]:
            missing.append(path)
    if missing:
        shown = ", ".join(repr(path) for path in missing[:3])
        raise DataError(
            f"{annotation}: {len(missing)} of {len(split.image_paths)} images of split "
            f"{split.split!r} do not exist below {split.image_root}: {shown}"
            f"{', ...' if len(missing) > 3 else ''}; complete the image folder."
        )


def _log_oddities(split: Split) -> None:
    """Counts, in one line, what training survives but its owner should know."""
    odd = []
    empty = sum(not caption.strip() for caption in split.captions)
    wordless = sum(
        bool(caption.strip()) and not any(map(str.isalnum, caption)) for caption in split.captions
    )
    if empty:
        odd.append(f"{empty} empty captions")
    if wordless:
        odd.append(f"{wordless} captions without a word")
    long = sum(len(caption.split()) > _LONG_CAPTION for caption in split.captions)
    if long:
        odd.append(f"{long} captions of more than {_LONG_CAPTION} words (cut at text_length)")
    marked = sum(bool(_NO_TEXT.search(caption)) for caption in split.captions)
    if marked:
        odd.append(f"{marked} captions with control characters or CLIP's special tokens")
    if split.split == "train":
        single = int(np.sum(np.bincount(split.caption_ids) == 1))
        if single:
            odd.append(f"{single} identities with one pair (drawn repeatedly)")
    if odd:
        _LOG.warning("%s %s has %s; going on.", split.dataset, split.split, ", ".join(odd))


def _kind(value) -> str:
    """A JSON value in the words of JSON, shortened, for error messages."""
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "an empty list" if not value else "a list"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
