"""Where a data set says what is seen: masks of its pictures, attributes of its captions.

A folder may hold, beside its annotation file, what the embedded data set has (`synthetic.py`):

    masks/NAME.png    label map of picture NAME: 0 is background, every other label is the person
    masks.json        {"labels": {label: name}, "regions": {attribute: [labels that show it]}}
    attributes.json   {"pictures": {picture: {"named": [{attribute: words}, …] one per caption}}}

With them one can measure where a model looks. Needs numpy and Pillow, never jax.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image

from itself_jax.data import records, tokenizer

# Shown by the whole figure, so that every patch of a person would be about them.
WHOLE_FIGURE = ("sex", "build")


class Truth(NamedTuple):
    """What is seen in the pictures of a split, and what its captions say about it."""

    folder: pathlib.Path
    names: tuple[str, ...]  # of the pictures
    regions: dict[str, tuple[int, ...]]  # attribute → labels
    named: tuple[dict[str, str], ...]  # per caption: attribute → the words for it

    def labels(self, index: int) -> UInt8[np.ndarray, "y x"]:
        """The label map of a picture, at the resolution of its file.

        Raises:
          DataError: it cannot be read.
        """
        path = self.folder / "masks" / f"{self.names[index].rsplit('.', 1)[0]}.png"
        try:
            with Image.open(path) as mask:
                labels = np.asarray(mask)
            if labels.ndim != 2:
                raise ValueError(f"it has {labels.shape[2]} channels, a label map has one")
            if labels.max() > 255:
                raise ValueError(f"its largest label is {labels.max()}, 255 is the most")
            return labels.astype(np.uint8)
        except (OSError, ValueError) as error:
            raise records.DataError(
                f"{path} is no readable mask ({error}): make the data set's folder again, or "
                "remove its masks.json to go without masks."
            ) from error


def find(folder: pathlib.Path, split: records.Split) -> Truth | None:
    """The masks and attributes in `folder`; None where it has none.

    Raises:
      DataError: they are there, but not of this split's pictures and captions.
    """
    if not (folder / "masks.json").exists():
        return None
    about, attributes = (_read(folder / name) for name in ("masks.json", "attributes.json"))
    try:
        regions = {name: tuple(map(int, labels)) for name, labels in about["regions"].items()}
        pictures = attributes["pictures"]
        named, seen = [], dict.fromkeys(split.image_paths, 0)
        for image in split.caption_images.tolist():
            path = split.image_paths[image]
            captions = pictures[path]["named"]
            named.append(dict(captions[seen[path]]))
            seen[path] += 1
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise records.DataError(
            f"{folder}: masks.json and attributes.json do not describe the pictures and captions "
            f"of {split.dataset} {split.split} ({type(error).__name__}: {error}); make the folder "
            "again, or remove masks.json to go without masks."
        ) from error
    return Truth(folder, split.image_paths, regions, tuple(named))


def touched(
    labels: UInt8[np.ndarray, "y x"],
    *,
    grid: tuple[int, int],
    stride: int,
    patch: int,
    image_size: tuple[int, int],
) -> Bool[np.ndarray, "n 256"]:
    """Which labels each patch shows at least one pixel of; patches row by row.

    The mask has its own resolution; patches are those of the picture resized to `image_size`.
    """
    result = np.zeros((grid[0] * grid[1], 256), bool)
    for n, (row, column) in enumerate(np.ndindex(*grid)):
        rows = _span(row * stride, patch, labels.shape[0], image_size[0])
        columns = _span(column * stride, patch, labels.shape[1], image_size[1])
        result[n, np.unique(labels[rows, columns])] = True
    return result


def _span(start: int, length: int, there: int, here: int) -> slice:
    """The pixels of a mask's side (`there`) that a patch of the picture's (`here`) reaches into."""
    return slice(start * there // here, -(-(start + length) * there // here))


def word_positions(
    ids: Int[np.ndarray, " t"], named: Mapping[str, str], words: tokenizer.Tokenizer
) -> Bool[np.ndarray, " t"]:
    """Marks the tokens of a caption that name one of its attributes, wherever they stand in it."""
    marked = np.zeros(len(ids), bool)
    for phrase in named.values():
        tokens = words.encode(phrase)
        tokens = tokens[1 : int(np.argmax(tokens == tokenizer.EOT))]
        for start in range(len(ids) - len(tokens) + 1):
            if np.array_equal(ids[start : start + len(tokens)], tokens):
                marked[start : start + len(tokens)] = True
    return marked


def _read(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise records.DataError(
            f"{path} cannot be read ({error}): make the data set's folder again, or remove its "
            "masks.json to go without masks."
        ) from error
