"""The one door to every data set: the packed form where there is one, else the files."""

from __future__ import annotations

import logging
import re

import numpy as np
from etils import epath

from itself_jax.data import benchmarks, folders, own, packed, records, remote

DATASETS = (*benchmarks.DATASETS, "jsonl")

_LOG = logging.getLogger("itself_jax")
_LONG_CAPTION = 100  # words; the benchmarks' captions have about 25, CLIP takes 77 pieces
_NO_TEXT = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]|<\|(?:startoftext|endoftext|mask)\|>")


def read(
    dataset: str,
    data_root: epath.PathLike,
    split: str,
    *,
    image_size: tuple[int, int] | None = None,
    train_on_all: bool = False,
) -> records.Split:
    """Reads one split of a data set, from its packed form or from its files.

    Empty, wordless and otherwise odd captions are counted in one log line.

    Args:
      dataset: one of `DATASETS`.
      data_root: the folder that holds the data set's own folder (see `benchmarks`, `own`) or what
        `prepare` packed; local or remote.
      split: "train", "val" or "test"; see `records.assign` for those that the file lacks.
      image_size: (H, W) at which pictures will be loaded; None: the original files are wanted.
      train_on_all: train also on identities that were drawn for val.

    Raises:
      records.DataError: an annotation or image of this split is missing or malformed; the message
        says where.
    """
    if split not in records.SPLITS:
        raise records.DataError(
            f"split={split!r} is not known; use one of {', '.join(records.SPLITS)}."
        )
    whole = corpus(dataset, data_root, image_size)
    result = records.select(whole, split, train_on_all=train_on_all)
    if whole.image_folder:
        _check_images(result, whole)
    _log_oddities(result)
    return result


def corpus(
    dataset: str, data_root: epath.PathLike, image_size: tuple[int, int] | None = None
) -> records.Corpus:
    """Reads a whole data set, from the same place as `read`.

    A packed form that does not fit (another size or version), or whose annotation file has been
    changed since, is passed over, and this is logged, where the files are there too.

    Raises:
      records.DataError: as `read`; missing images are not looked for.
    """
    _check_known(dataset)
    root = remote.path(data_root)
    try:
        folder = packed.find(root, dataset, image_size)
    except records.DataError as unfit:
        try:
            annotation(dataset, root)
        except records.MissingError:
            raise unfit from None
        _LOG.warning("%s Reading the files below %s instead.", unfit, root)
        return files(dataset, root)
    if folder is None:
        return files(dataset, root)
    try:
        source = annotation(dataset, root)
    except records.MissingError:
        return packed.read(folder, dataset)
    if packed.sha256(source) != packed.read_manifest(folder)["source_sha256"]:
        _LOG.warning(
            "%s was packed from another state of %s; reading the files instead. Pack again.",
            folder,
            source,
        )
        return files(dataset, root)
    return packed.read(folder, dataset)


def annotation(dataset: str, data_root: epath.PathLike) -> epath.Path:
    """Finds the annotation file of a data set.

    Raises:
      records.MissingError: there is none.
    """
    return own.find(data_root) if dataset == "jsonl" else benchmarks.find(dataset, data_root)


def files(dataset: str, data_root: epath.PathLike) -> records.Corpus:
    """Reads a whole data set from its files, packed or not.

    Raises:
      records.DataError: as `corpus`.
    """
    _check_known(dataset)
    root = remote.path(data_root)
    return own.read(root) if dataset == "jsonl" else benchmarks.read(dataset, root)


def _check_known(dataset: str) -> None:
    if dataset not in DATASETS:
        raise records.DataError(
            f"dataset={dataset!r} is not known; use one of {', '.join(DATASETS)}."
        )


def _check_images(split: records.Split, whole: records.Corpus) -> None:
    located = folders.locate(epath.Path(whole.image_folder), split.image_paths)
    total = f"of {len(split.image_paths)} images of split {split.split!r}"
    if located.outside:
        first = split.image_paths[located.outside[0]]
        raise records.DataError(
            f"{whole.source}: {len(located.outside)} {total} are links that lead out of "
            f"{whole.image_folder} (such as {first!r}), which are refused; put the files there, or "
            "make the image folder itself the link."
        )
    if located.missing:
        shown = [
            repr(split.image_paths[index]) + (f" (there is {other!r})" if other else "")
            for index, other in list(located.missing.items())[:3]
        ]
        more = ", ..." if len(located.missing) > len(shown) else ""
        raise records.DataError(
            f"{whole.source}: {len(located.missing)} {total} do not exist below "
            f"{whole.image_folder}: {', '.join(shown)}{more}; complete the image folder."
        )


def _log_oddities(split: records.Split) -> None:
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
