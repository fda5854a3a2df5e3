"""What stands in a report, before it is a page: plain values, pictures as bytes.

Every text may come from a data set and is shown as text, never run.
"""

from typing import Any, NamedTuple


class Chart(NamedTuple):
    """A figure. `alt` says what it shows to who cannot see it, in a sentence with numbers."""

    name: str  # of its file, without ending: "loss"
    title: str
    png: bytes
    alt: str


class Crop(NamedTuple):
    """A picture of the data set as a small JPEG; None where its file cannot be read."""

    name: str  # as in the annotation
    jpeg: bytes | None


class Hit(NamedTuple):
    """One ranked answer: a picture (text → image) or a caption (image → text)."""

    rank: int  # from 1
    right: bool
    similarity: float
    crop: Crop | None = None
    caption: str | None = None


class Strip(NamedTuple):
    """A query and its first ten answers. A query without a right answer is never shown."""

    kind: str  # "best", "median", "worst" of the queries by the rank of their first right answer
    first_right: int  # from 1
    gallery: int  # answers that were ranked
    hits: tuple[Hit, ...]
    right: Hit  # the first right answer, wherever it stands
    caption: str | None = None  # of a text query
    crop: Crop | None = None  # of an image query


class Word(NamedTuple):
    """A word of a caption under a saliency source."""

    text: str
    shade: float  # 0 to 1, of the most salient word
    kept: bool


class View(NamedTuple):
    """A pair of picture and caption as one saliency source sees it."""

    source: str  # "mars", "layer:1", ...
    png: bytes | None  # the picture with kept patches coloured and outlined; None as in Crop
    words: tuple[Word, ...]
    patches: int  # kept
    alt: str


class Overlay(NamedTuple):
    """A pair as it is, and under several saliency sources, side by side."""

    crop: Crop
    caption: str
    views: tuple[View, ...]


class Moment(NamedTuple):
    """What was kept of a pair after an epoch."""

    epoch: int
    view: View
    new: float | None  # share of the kept patches that were not kept at the moment before


class Evolution(NamedTuple):
    """How what is kept of one pair changes while the run learns."""

    name: str
    caption: str
    moments: tuple[Moment, ...]


class Table(NamedTuple):
    """Rows of text; `marked` is the row to point out, if any."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    marked: int | None = None


class Report(NamedTuple):
    """All of it. What could not be had is empty, and `notes` says why, one sentence each."""

    title: str  # "synthetic, MARS + ATS"
    state: str  # "finished", "epoch 5 of 14, still running", …
    asked: str  # what queries and answers are of: "synthetic test, α = 0.3"
    followed: str  # what the evolutions are of: "synthetic val"
    facts: tuple[tuple[str, str], ...]  # label and value
    differences: tuple[tuple[str, str, str], ...]  # config key, default, value of this run
    results: tuple[Table, ...]
    curves: tuple[Chart, ...]
    fusion: tuple[Chart, ...]  # R@1 over α; similarities of matched and unmatched pairs
    text_to_image: tuple[Strip, ...]
    image_to_text: tuple[Strip, ...]
    overlays: tuple[Overlay, ...]
    evolutions: tuple[Evolution, ...]
    measured: tuple[Chart, ...]  # saliency against masks, by epoch
    failures: tuple[Strip, ...]  # the page of its own: worst text queries, worst first
    notes: tuple[str, ...]


def to_text(value: Any) -> str:
    """A setting as a person writes it: lists as tuples, None as None."""
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(map(to_text, value)) + ("," if len(value) == 1 else "") + ")"
    return repr(value) if isinstance(value, str) else str(value)
