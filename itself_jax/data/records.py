"""One record type for every data set, and how its records become one split's arrays.

Readers (`benchmarks`, `own`, `packed`) make a `Corpus`; `select` takes one split out of it.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import pathlib
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:  # images.py raises this module's DataError
    from itself_jax.data import images

SPLITS = ("train", "val", "test")

_LOG = logging.getLogger("itself_jax")
_INT32 = np.iinfo(np.int32)
_LEAVING = re.compile(r"^/|\\|:|\.\.")  # what a path needs to lead out of its folder
_INTEGER = re.compile(r"-?[0-9]+")
# Data sets that may come without `val` (own data also without any split); the other benchmarks
# publish one, so that its absence is a defect.
_DRAWN = ("icfg_pedes", "jsonl")
_ONE_IN = 10  # identities of a drawn split


class DataError(ValueError):
    """The data on disk cannot be used; the message names file, field and value."""


class MissingError(DataError):
    """There is no annotation file at all."""


@dataclasses.dataclass(frozen=True)
class Record:
    """One picture with its captions."""

    image: str  # path as in the annotation, relative to the image folder, with forward slashes
    identity: str  # the id as in the file, as text
    captions: tuple[str, ...]
    split: str  # "train", "val" or "test"; "" when the file has no splits


class Corpus(NamedTuple):
    """A whole data set, in the order of its annotation file."""

    dataset: str
    source: str  # annotation file or packed folder, for messages
    records: tuple[Record, ...]
    images: images.Images  # one per record, same order
    image_folder: str = ""  # what `Record.image` is relative to; "" for a packed form


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """One split of one data set, in the order of its annotation file.

    A training *pair* is one caption with its image, so pairs are indexed as captions are.
    """

    dataset: str
    split: str
    images: images.Images  # (g,) the pictures themselves; `images.name(i)` for messages
    image_paths: tuple[str, ...]  # (g,) as in the annotation
    image_ids: np.ndarray  # (g,) int32; train: 0..c-1 by sorted original id, else see `select`
    captions: tuple[str, ...]  # (q,) all captions of record 0, then of record 1, ...
    caption_ids: np.ndarray  # (q,) int32, numbered as `image_ids`
    caption_images: np.ndarray  # (q,) int32 index into `image_paths`
    original_ids: tuple[int, ...] | tuple[str, ...]  # (c,) sorted; train: by label

    @property
    def num_identities(self) -> int:
        return len(self.original_ids)

    def pairs(self, captions: Sequence[int] | np.ndarray) -> Split:
        """Returns the split of these captions, each with its own picture."""
        captions = np.asarray(captions, np.intp)
        pictures = self.caption_images[captions]
        return dataclasses.replace(
            self,
            images=self.images.subset(pictures.tolist()),
            image_paths=tuple(self.image_paths[index] for index in pictures),
            image_ids=self.image_ids[pictures],
            captions=tuple(self.captions[index] for index in captions),
            caption_ids=self.caption_ids[captions],
            caption_images=np.arange(len(captions), dtype=np.int32),
        )

    def with_pictures(self, pictures: Sequence[int]) -> Split:
        """Returns the split of these pictures, in ascending order, and of their captions."""
        kept = np.isin(self.caption_images, pictures)
        return dataclasses.replace(
            self,
            images=self.images.subset(pictures),
            image_paths=tuple(self.image_paths[index] for index in pictures),
            image_ids=self.image_ids[np.asarray(pictures, np.intp)],
            captions=tuple(self.captions[index] for index in np.flatnonzero(kept)),
            caption_ids=self.caption_ids[kept],
            caption_images=np.searchsorted(pictures, self.caption_images[kept]).astype(np.int32),
        )

    def single_caption(self) -> Split:
        """Returns the split with only the first caption of every picture."""
        _, first = np.unique(self.caption_images, return_index=True)
        return dataclasses.replace(
            self,
            captions=tuple(self.captions[index] for index in first),
            caption_ids=self.caption_ids[first],
            caption_images=self.caption_images[first],
        )


class Assignment(NamedTuple):
    """The split of every record, after drawing what the file does not say."""

    splits: tuple[str, ...]  # one per record
    drawn: tuple[str, ...]  # the splits whose identities were drawn here, in the order of SPLITS


def select(corpus: Corpus, split: str, *, train_on_all: bool = False) -> Split:
    """Takes one split out of a corpus.

    Train identities are relabelled 0..c-1 by sorted original id. Other splits keep the original
    number; where ids are not all numbers of the 32-bit range, it is the index into the split's
    sorted ids. What `assign` draws is said in a log line.

    Args:
      corpus: all records.
      split: "train", "val" or "test".
      train_on_all: train also on the identities that `assign` draws for `val`, which are then no
        longer unseen.

    Raises:
      DataError: no record is in the split; too few identities to draw from; `train_on_all` where
        the file has a `val` of its own.
    """
    if split not in SPLITS:
        raise DataError(f"split={split!r} is not known; use one of {', '.join(SPLITS)}.")
    splits, drawn = assign(corpus)
    wanted = {split}
    if split == "train" and train_on_all and "val" in splits and "val" not in drawn:
        raise DataError(
            f"{corpus.source} has a val split of its own, so train_on_all has nothing to add; "
            "leave it out."
        )
    if split == "train" and train_on_all:
        wanted.add("val")
    chosen = [index for index, found in enumerate(splits) if found in wanted]
    if not chosen:
        sizes = collections.Counter(splits)
        found = ", ".join(f"{name} {count}" for name, count in sorted(sizes.items())) or "none"
        raise DataError(
            f"{corpus.source}: no record has split={split!r} (records by split: {found}); choose "
            "another split or complete the file."
        )
    _say_drawn(corpus, splits, drawn, split, train_on_all)
    records = [corpus.records[index] for index in chosen]
    number = numbers(corpus.records)
    original = [record.identity for record in records]
    if number is not None:
        original = [number[identity] for identity in original]
    original_ids = sorted(set(original))
    label = {identity: at for at, identity in enumerate(original_ids)}
    keep = split != "train" and number is not None
    image_ids = np.asarray([i if keep else label[i] for i in original], np.int32)
    counts = [len(record.captions) for record in records]
    caption_images = np.repeat(np.arange(len(records), dtype=np.int32), counts)
    return Split(
        dataset=corpus.dataset,
        split=split,
        images=corpus.images.subset(chosen),
        image_paths=tuple(record.image for record in records),
        image_ids=image_ids,
        captions=tuple(caption for record in records for caption in record.captions),
        caption_ids=image_ids[caption_images],
        caption_images=caption_images,
        original_ids=tuple(original_ids),
    )


def assign(corpus: Corpus) -> Assignment:
    """The split of every record; missing splits are drawn by identity, always the same.

    ICFG-PEDES and own data without `val`: a tenth of the train identities (rounded down, at least
    one) becomes `val`. Own data without any split: a tenth each becomes `val` and `test`, the rest
    `train`. The draw depends on the set of identities only.

    Raises:
      DataError: too few identities to draw from.
    """
    splits = [record.split for record in corpus.records]
    if corpus.dataset not in _DRAWN or not splits or "val" in splits:
        return Assignment(tuple(splits), ())
    whole = not any(splits)
    if not whole and "train" not in splits:
        return Assignment(tuple(splits), ())
    pool_name = "" if whole else "train"
    number = numbers(corpus.records)
    pool = {record.identity for record in corpus.records if record.split == pool_name}
    ids = sorted(pool, key=None if number is None else number.__getitem__)
    needed = 3 if whole else 2
    if len(ids) < needed:
        raise DataError(
            f"{corpus.source} has {len(ids)} "
            f"{'identities and no split' if whole else 'train identities and no val split'}: at "
            f"least {needed} are needed to draw one by identity; add identities or say the split "
            "of every record."
        )
    size = max(1, len(ids) // _ONE_IN)
    names = ("val", "test") if whole else ("val",)
    rng = np.random.default_rng(0)
    order = rng.choice(len(ids), size * len(names), replace=False)
    owner = {ids[index]: names[at // size] for at, index in enumerate(order)}
    splits = [
        owner.get(record.identity, "train") if record.split == pool_name else record.split
        for record in corpus.records
    ]
    return Assignment(tuple(splits), SPLITS if whole else ("val",))


def numbers(records: tuple[Record, ...]) -> dict[str, int] | None:
    """The integer of every identity, or None unless all are distinct integers of 32 bits."""
    identities = {record.identity for record in records}
    if not all(_INTEGER.fullmatch(identity) for identity in identities):
        return None
    result = {identity: int(identity) for identity in identities}
    if len(set(result.values())) < len(result):  # "7" and "07" are two identities
        return None
    fits = all(_INT32.min <= value <= _INT32.max for value in result.values())
    return result if fits else None


def _say_drawn(
    corpus: Corpus,
    splits: tuple[str, ...],
    drawn: tuple[str, ...],
    split: str,
    train_on_all: bool,
) -> None:
    if split not in (*drawn, "train") or not drawn:
        return
    members = collections.defaultdict(set)
    for record, found in zip(corpus.records, splits, strict=True):
        members[found].add(record.identity)
    counts = {name: len(members[name]) for name in SPLITS}
    if len(drawn) > 1:
        sizes = ", ".join(f"{name} {counts[name]}" for name in SPLITS)
        reason = f"has no splits, so its identities were drawn with seed 0 ({sizes})"
    else:
        reason = (
            f"has no val split, so {counts['val']} of its {counts['val'] + counts['train']} train "
            "identities, drawn with seed 0, are val"
        )
    if train_on_all and split in ("train", "val"):
        reason += "; they are trained on too (train_on_all), so figures on val are not unseen"
    _LOG.warning("%s %s: %s %s.", corpus.dataset, split, corpus.source, reason)


def check_image_path(path: object, where: str) -> str:
    """Returns the path of a picture as the annotation has it.

    Args:
      path: the value in the file.
      where: file, record and field, for the message.

    Raises:
      DataError: not a text, empty, absolute, or with "..".
    """
    if not isinstance(path, str) or not path.strip():
        raise DataError(f"{where} must be the image's path as text, but is {kind(path)}.")
    if not _LEAVING.search(path):  # parsing tens of thousands of paths takes a second
        return path
    pure = pathlib.PurePosixPath(path)
    windows = pathlib.PureWindowsPath(path)  # knows backslashes and drives
    remote = re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path)
    absolute = pure.is_absolute() or windows.drive or windows.root or remote
    if absolute or ".." in pure.parts or ".." in windows.parts:
        raise DataError(
            f"{where} is {path!r}; paths must be relative to the image folder and must not contain "
            "'..'."
        )
    return path


def check_captions(captions: object, where: str) -> tuple[str, ...]:
    """Returns the captions of a record: a text, or a list of at least one text.

    Raises:
      DataError: anything else; `where` is file, record and field.
    """
    if isinstance(captions, str):
        captions = [captions]
    if not isinstance(captions, list) or not captions:
        raise DataError(
            f"{where} must be a text or a list of at least one text, but is {kind(captions)}."
        )
    for caption in captions:
        if not isinstance(caption, str):
            raise DataError(f"{where} must contain only text, but has {kind(caption)}.")
    return tuple(captions)


def check_split(split: object, where: str) -> str:
    """Returns the split of a record; raises DataError unless it is one of SPLITS."""
    if not isinstance(split, str) or split not in SPLITS:
        raise DataError(f"{where} is {split!r}; it must be one of {', '.join(SPLITS)}.")
    return split


def kind(value: object) -> str:
    """A JSON value in the words of JSON, shortened, for error messages."""
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "an empty list" if not value else "a list"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
