"""The dataset doctor: what is wrong with a data set, how much of it, and what to do about it.

An *error* stops training or evaluation, or makes its figures meaningless; a *warning* is survived,
in a way that its line names.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import ftfy.badness
import numpy as np
import simplejpeg
import tqdm
from etils import epath
from PIL import ExifTags, Image

from itself_jax.data import benchmarks, folders, images, records
from itself_jax.data import tokenizer as tokenizer_lib

OK, WARNING, ERROR = "ok", "warning", "error"

_TINY = (32, 16)  # (H, W); below, a person is a handful of pixels
_LONGEST = 4096  # token ids; longer captions are cut even for counting
_KEPT_EXAMPLES = 1000  # in the file; the table shows a few
_SHOWN_EXAMPLES = 3
_SHOWN_LETTERS = 80
_CHUNK = 32  # pictures per task of a thread
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")
_SPECIAL = re.compile(r"<\|(?:startoftext|endoftext|mask)\|>")
# U+FFFD stands for what could not be decoded; C1 controls and half surrogates are no text at all.
_DAMAGED = re.compile("[\ufffd\x80-\x9f\ud800-\udfff]")


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    verdict: str  # OK, WARNING or ERROR
    count: int  # how many cases; 0 when there is nothing to see
    advice: str  # what it means and what to do, "" where there is nothing to
    examples: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Report:
    """What `examine` found."""

    dataset: str
    source: str
    text_length: int
    splits: Mapping[str, benchmarks.Counts]  # as the file has them
    checks: tuple[Check, ...]

    @property
    def verdict(self) -> str:
        """The worst verdict of all checks."""
        found = {check.verdict for check in self.checks}
        return next((worst for worst in (ERROR, WARNING) if worst in found), OK)

    def count(self, verdict: str) -> int:
        """How many checks came to this verdict."""
        return sum(check.verdict == verdict for check in self.checks)

    def check(self, name: str) -> Check:
        """The check of this name."""
        return next(check for check in self.checks if check.name == name)

    def table(self) -> str:
        """The report as aligned text."""
        published = benchmarks.PUBLISHED.get(self.dataset, {})
        rows = [("SPLIT", "IDENTITIES", "IMAGES", "CAPTIONS", "PUBLISHED" if published else "")]
        for split in dict.fromkeys((*self.splits, *published)):
            expected = published.get(split)
            rows.append(
                (
                    split or "(none)",
                    *map(str, self.splits.get(split, (0, 0, 0))),
                    " / ".join(map(str, expected)) if expected else "",
                )
            )
        lines = [f"{self.dataset}: {self.source}", "", *_aligned(rows, right=(1, 2, 3)), ""]
        heads = [("CHECK", "VERDICT", "COUNT", "WHAT TO DO")]
        heads += [(c.name, c.verdict, str(c.count), c.advice or "-") for c in self.checks]
        table = _aligned(heads, right=(2,))
        lines.append(table[0])
        for check, line in zip(self.checks, table[1:], strict=True):
            lines.append(line)
            if check.examples and check.verdict != OK:
                more = ", ..." if len(check.examples) > _SHOWN_EXAMPLES else ""
                shown = ", ".join(map(_fitting, check.examples[:_SHOWN_EXAMPLES]))
                lines.append(f"    {shown}{more}")
        lines += ["", f"Errors: {self.count(ERROR)}. Warnings: {self.count(WARNING)}."]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        published = benchmarks.PUBLISHED.get(self.dataset)
        return {
            "dataset": self.dataset,
            "source": self.source,
            "verdict": self.verdict,
            "text_length": self.text_length,
            "splits": {name: counts._asdict() for name, counts in self.splits.items()},
            "published": published and {n: counts._asdict() for n, counts in published.items()},
            "checks": [dataclasses.asdict(check) for check in self.checks],
        }


def _fitting(example: str) -> str:
    """Fits a terminal's line; the file has it in full."""
    return example if len(example) <= _SHOWN_LETTERS else example[: _SHOWN_LETTERS - 1] + "…"


def examine(
    corpus: records.Corpus,
    *,
    text_length: int = 77,
    num_threads: int | None = None,
    log: Callable[[str], None] = print,
) -> Report:
    """Examines a data set; every picture is read and decoded once.

    Args:
      corpus: all records, as `datasets.files` or `packed.read` return them (original bytes).
      text_length: ids per caption, SOT and EOT included, at which captions are cut.
      num_threads: that read and decode pictures; None: one per core.
      log: takes one line before the pictures are read.
    """
    assigned, drawing = _assign(corpus)
    splits = benchmarks.counts(corpus)
    published = _published(corpus.dataset, splits)
    # Whoever has the published files, flaws and all, can only go on; their figures are everyone's.
    genuine = benchmarks.PUBLISHED.get(corpus.dataset) == splits
    located = folders.Located({}, ())
    if corpus.image_folder:
        paths = [record.image for record in corpus.records]
        located = folders.locate(epath.Path(corpus.image_folder), paths)
    absent = {*located.missing, *located.outside}
    there = [index for index in range(len(corpus.records)) if index not in absent]
    pictures = _look_at_all(corpus, there, num_threads, log)
    return Report(
        dataset=corpus.dataset,
        source=corpus.source,
        text_length=text_length,
        splits=splits,
        checks=(
            published,
            drawing,
            _splits(corpus, assigned),
            *_files(corpus, located),
            *_readability(corpus, pictures),
            *_duplicates(corpus, assigned, pictures, genuine),
            *_identities(corpus, assigned, genuine),
            *_captions(corpus, assigned, text_length),
        ),
    )


# ------------------------------------------------------------------------------ splits and counts


def _published(dataset: str, splits: Mapping[str, benchmarks.Counts]) -> Check:
    """Compares with the benchmark's table.

    Fewer is a warning, for it may be a deliberate subset and it trains; its figures are just not
    comparable. More cannot be a part of the benchmark, so it is an error.
    """
    name = "published counts"
    published = benchmarks.PUBLISHED.get(dataset)
    if published is None:
        return Check(name, OK, 0, "")
    found = dict(splits)
    if "val" in found and "val" not in published:  # somebody's own, taken from train
        pairs = zip(found.pop("val"), found.get("train", (0, 0, 0)), strict=True)
        found["train"] = benchmarks.Counts(*map(sum, pairs))
    differences = []
    more = False
    for split in dict.fromkeys((*published, *found)):
        expected = published.get(split, benchmarks.Counts(0, 0, 0))
        have = found.get(split, benchmarks.Counts(0, 0, 0))
        for unit, number, wanted in zip(expected._fields, have, expected, strict=True):
            if number != wanted:
                differences.append(f"{split}: {number} {unit} instead of {wanted}")
                more |= number > wanted
    if not differences:
        return Check(name, OK, 0, "")
    if more:
        advice = "more than was published is not this benchmark: take the published file"
        return Check(name, ERROR, len(differences), advice, tuple(differences))
    advice = "a subset trains, but its figures cannot be compared with published ones"
    return Check(name, WARNING, len(differences), advice, tuple(differences))


def _assign(corpus: records.Corpus) -> tuple[tuple[str, ...], Check]:
    """The split of every record as training sees it, and the line about what was drawn."""
    name = "drawn splits"
    try:
        splits, drawn = records.assign(corpus)
    except records.DataError as error:
        return tuple(record.split for record in corpus.records), Check(name, ERROR, 1, str(error))
    if not drawn:
        return splits, Check(name, OK, 0, "")
    members = collections.defaultdict(set)
    for record, split in zip(corpus.records, splits, strict=True):
        members[split].add(record.identity)
    counts = ", ".join(f"{split} {len(members[split])}" for split in records.SPLITS)
    if len(drawn) > 1:
        advice = f"no splits in the file: drawn by identity, seed 0 ({counts}); say them to choose"
        return splits, Check(name, WARNING, len(corpus.records), advice)
    held_out = len(members["val"])
    advice = f"no val in the file: held out of the train identities, seed 0 ({counts})"
    return splits, Check(name, OK, held_out, advice)


def _splits(corpus: records.Corpus, assigned: Sequence[str]) -> Check:
    empty = [split for split in records.SPLITS if split not in set(assigned)]
    if not empty:
        return Check("empty splits", OK, 0, "")
    own = corpus.dataset == "jsonl"  # may be made for evaluation only
    advice = f"no record is in {' and '.join(empty)}, without which a run stops: complete the file"
    return Check("empty splits", WARNING if own else ERROR, len(empty), advice, tuple(empty))


# --------------------------------------------------------------------------------------- pictures


class _Picture(NamedTuple):
    """What one reading of a picture's bytes tells."""

    digest: bytes = b""  # of the content; b"" when there is none
    problem: str = ""  # why it cannot be read, in two words, and ...
    message: str = ""  # ... in one sentence
    size: tuple[int, int] = (0, 0)  # (H, W)
    mode: str = ""  # PIL's
    rotated: bool = False  # by an EXIF entry
    animated: bool = False


def _look_at_all(
    corpus: records.Corpus,
    indices: Sequence[int],
    num_threads: int | None,
    log: Callable[[str], None],
) -> dict[int, _Picture]:
    if not indices:
        return {}
    num_threads = num_threads or os.cpu_count() or 1
    chunks = [indices[start : start + _CHUNK] for start in range(0, len(indices), _CHUNK)]
    log(f"Reading {len(indices)} pictures ...")
    seen = {}
    looked = images.ahead(
        lambda chunk: [(index, _look_at(corpus, index)) for index in chunk],
        chunks,
        depth=4 * num_threads,
        num_threads=num_threads,
    )
    # The bar appears on terminals only.
    with tqdm.tqdm(total=len(indices), unit=" pictures", disable=None) as bar:
        for found in looked:
            seen.update(found)
            bar.update(len(found))
    return seen


def _look_at(corpus: records.Corpus, index: int) -> _Picture:
    name = corpus.images.name(index)
    try:
        content = corpus.images.content(index)
    except records.DataError as error:
        return _Picture(b"", "unreadable", str(error))
    if not content:
        return _Picture(b"", "empty", f"{name} is an empty file.")
    digest = hashlib.sha256(content).digest()
    try:
        looks = _look_at_header(content)._replace(digest=digest)
    except Exception as error:  # damaged headers raise errors of many kinds
        looks = _Picture(digest, "damaged", f"{name} has a damaged header ({error}).", size=(1, 1))
    try:
        # The very function that training calls, so that both agree on what can be read.
        images.decode(content, name, looks.size)
        return looks
    except records.DataError as error:
        return _Picture(digest, _problem(error.__cause__), str(error))


def _look_at_header(content: bytes) -> _Picture:
    if content[:2] == b"\xff\xd8" and b"Exif\0\0" not in content[:65536]:
        try:  # 20 times faster than PIL, and without the interpreter's lock
            height, width, colors, _ = simplejpeg.decode_jpeg_header(content)
            mode = {"Gray": "L", "CMYK": "CMYK", "YCCK": "CMYK"}.get(colors, "RGB")
            return _Picture(size=(height, width), mode=mode)
        except ValueError:
            pass  # PIL may know it
    with Image.open(io.BytesIO(content)) as image:
        return _Picture(
            size=(image.height, image.width),
            mode=image.mode,
            rotated=_orientation(image) != 1,
            animated=getattr(image, "is_animated", False),
        )


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a damaged entry, in a picture that may be fine
        return 1


def _problem(reason: BaseException | None) -> str:
    text = str(reason).casefold()
    if isinstance(reason, Image.DecompressionBombError):
        return "too large"
    if "fits no image format" in text:
        return "no image"
    if "premature end" in text or "truncated" in text:
        return "truncated"
    return "damaged"


def _files(corpus: records.Corpus, located: folders.Located) -> list[Check]:
    missing = [
        corpus.records[index].image + (f" (there is {other})" if other else "")
        for index, other in located.missing.items()
    ]
    advice = "copy these pictures to the image folder"
    if missing:
        parts = collections.Counter(path.partition("/")[0] for path in missing if "/" in path)
        all_of = collections.Counter(r.image.partition("/")[0] for r in corpus.records)
        whole = [part for part, count in sorted(parts.items()) if count == all_of[part]]
        if whole:
            advice += f"; the folders {', '.join(whole)} are missing entirely"
        if misspelt := sum(other is not None for other in located.missing.values()):
            advice += f"; {misspelt} are there in another spelling: rename them"
    outside = [corpus.records[index].image for index in located.outside]
    return [
        _check("missing images", ERROR, missing, advice),
        _check(
            "links out of the folder",
            ERROR,
            outside,
            "refused: put the files there, or make the image folder itself the link",
        ),
    ]


def _readability(corpus: records.Corpus, pictures: Mapping[int, _Picture]) -> list[Check]:
    bad = {index: picture for index, picture in pictures.items() if picture.problem}
    good = {index: picture for index, picture in pictures.items() if not picture.problem}
    problems = collections.Counter(picture.problem for picture in bad.values())
    modes = collections.Counter(p.mode for p in good.values() if p.mode != "RGB")

    def paths(wanted: Callable[[_Picture], bool]) -> list[str]:
        return [corpus.records[index].image for index, p in good.items() if wanted(p)]

    return [
        _check(
            "unreadable images",
            ERROR,
            [picture.message for picture in bad.values()],
            f"{_listed(problems)}: copy them anew or remove their records",
        ),
        _check(
            "images not RGB",
            WARNING,
            paths(lambda picture: picture.mode != "RGB"),
            f"{_listed(modes)}: converted as PIL does, alpha dropped",
        ),
        _check(
            "images rotated by EXIF",
            WARNING,
            paths(lambda picture: picture.rotated),
            "the entry is ignored, so they are seen as stored: rotate the pixels if they lie",
        ),
        _check(
            "animated images",
            WARNING,
            paths(lambda picture: picture.animated),
            "only their first frame is used",
        ),
        _check(
            "tiny images",
            WARNING,
            paths(lambda p: p.size[0] < _TINY[0] or p.size[1] < _TINY[1]),
            f"lower than {_TINY[0]} or narrower than {_TINY[1]} pixels: little to learn from",
        ),
    ]


def _duplicates(
    corpus: records.Corpus,
    assigned: Sequence[str],
    pictures: Mapping[int, _Picture],
    genuine: bool,
) -> list[Check]:
    groups = collections.defaultdict(list)
    for index, picture in pictures.items():
        if picture.digest:
            groups[picture.digest].append(index)
    leaks, repeated, torn = [], [], []
    for group in groups.values():
        if len(group) < 2:
            continue
        line = " = ".join(corpus.records[index].image for index in group)
        if len({assigned[index] for index in group}) > 1:
            leaks.append(line + f" ({', '.join(sorted({assigned[index] for index in group}))})")
        elif len({corpus.records[index].identity for index in group}) > 1:
            torn.append(line)
        else:
            repeated.append(line)
    return [
        _check(
            "images in two splits",
            WARNING if genuine else ERROR,
            leaks,
            "same content: what is tested was trained on; "
            + ("the published files have them" if genuine else "remove them from one split"),
        ),
        _check(
            "images of two identities",
            WARNING,
            torn,
            "same content within a split: correct the ids or remove one of the records",
        ),
        _check(
            "duplicate images",
            WARNING,
            repeated,
            "same content, split and identity: seen twice as often; merge their records",
        ),
    ]


# ------------------------------------------------------------------------- identities and captions


def _identities(corpus: records.Corpus, assigned: Sequence[str], genuine: bool) -> list[Check]:
    places = collections.defaultdict(set)
    pairs = collections.Counter()
    for record, split in zip(corpus.records, assigned, strict=True):
        places[record.identity].add(split)
        if split == "train":
            pairs[record.identity] += len(record.captions)
    both = [
        f"{identity} ({', '.join(sorted(found))})"
        for identity, found in places.items()
        if len(found) > 1
    ]
    return [
        _check(
            "identities in two splits",
            WARNING if genuine else ERROR,
            both,
            "test people must be unseen in training; "
            + ("the published file has them" if genuine else "keep each identity in one split"),
        ),
        _check(
            "identities with one pair",
            WARNING,
            [identity for identity, count in pairs.items() if count == 1],
            "drawn repeatedly in training: a second picture or caption would help",
        ),
    ]


def _captions(corpus: records.Corpus, assigned: Sequence[str], text_length: int) -> list[Check]:
    empty, wordless, damaged, marked, twice = [], [], [], [], []
    lengths, cut = [], []
    owners = collections.defaultdict(set)  # identities that a caption of a split is given to
    writings = collections.Counter()
    tokenizer = tokenizer_lib.Tokenizer(max(_LONGEST, text_length))
    for record, split in zip(corpus.records, assigned, strict=True):
        texts = [" ".join(caption.split()).casefold() for caption in record.captions]
        if len(set(texts)) < len(texts):
            twice.append(record.image)
        for caption, text in zip(record.captions, texts, strict=True):
            example = f"{record.image}: {_shortened(caption)}"
            if not text:
                empty.append(record.image)
            elif not any(map(str.isalnum, text)):
                wordless.append(example)
            else:
                owners[split, text].add(record.identity)
                writings[split, text] += 1
            if _is_damaged(caption):
                damaged.append(example)
            if _CONTROL.search(caption) or _SPECIAL.search(caption):
                marked.append(example)
            length = _num_tokens(tokenizer, caption)
            if length > text_length:
                lengths.append(length)
                cut.append(f"{example} ({length - text_length} of {length} lost)")
    shared = {key: found for key, found in owners.items() if len(found) > 1}
    advice = ""
    if lengths:
        lost = np.asarray(lengths) - text_length
        advice = (
            f"cut at {text_length} tokens: {lost.mean():.1f} lost on average, {lost.max()} at most "
            f"(longest: {max(lengths)}); shorten them or raise model.text_length"
        )
    return [
        _check("empty captions", WARNING, empty, "their pairs teach nothing: write or remove them"),
        _check("captions without words", WARNING, wordless, "write or remove them"),
        _check("captions cut", WARNING, cut, advice),
        _check(
            "captions repeated in a record",
            WARNING,
            twice,
            "the same text twice for one picture: remove one",
        ),
        _check(
            "captions of two identities",
            WARNING,
            [
                f"{_shortened(text)} ({len(found)} identities)"
                for (_, text), found in shared.items()
            ],
            f"{sum(writings[key] for key in shared)} captions say the same of different people, "
            "whom no search can tell apart: more exact words help",
        ),
        _check(
            "encoding damage",
            WARNING,
            damaged,
            "letters were lost or garbled when the file was saved: restore it as UTF-8",
        ),
        _check(
            "control characters",
            WARNING,
            marked,
            "these or CLIP's special tokens (<|endoftext|>, ...) are in the text: remove them",
        ),
    ]


def _is_damaged(caption: str) -> bool:
    if caption.isascii():
        return False
    return bool(_DAMAGED.search(caption)) or ftfy.badness.is_bad(caption)


def _num_tokens(tokenizer: tokenizer_lib.Tokenizer, caption: str) -> int:
    """Ids of a caption with SOT and EOT, at most `_LONGEST`."""
    ids = tokenizer.encode(caption)
    return len(ids) - int(np.argmax(ids[::-1] == tokenizer_lib.EOT))


# ----------------------------------------------------------------------------------------- wording


def _check(name: str, verdict: str, found: Iterable[str], advice: str) -> Check:
    """A check that is fine when nothing was found."""
    found = list(found)
    if not found:
        return Check(name, OK, 0, "")
    return Check(name, verdict, len(found), advice, tuple(found[:_KEPT_EXAMPLES]))


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def _shortened(text: str) -> str:
    # repr also keeps control characters off the terminal.
    return repr(text if len(text) <= 40 else text[:37] + "...")


def _aligned(rows: Sequence[Sequence[str]], right: Sequence[int]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if at in right else cell.ljust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
