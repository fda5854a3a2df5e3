"""The augmentations of images and captions, on the host in uint8.

Every random function takes its generator, so the result is a function of (generator state, input).
Pixels stay uint8 until the device step, which normalises them and paints the erased box: the box
is filled with CLIP's mean *after* normalisation, a value that uint8 cannot express.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from itself_jax.data import tokenizer


class AugmentedImage(NamedTuple):
    pixels: np.ndarray  # (H, W, 3) uint8
    erase: np.ndarray  # (4,) int32 top, left, height, width in pixels; height 0: nothing to erase


def augment_image(rng: np.random.Generator, image: np.ndarray, *, pad: int = 10) -> AugmentedImage:
    """Flips, shifts and chooses a box to erase.

    Horizontal flip with p = 0.5; black padding of `pad` pixels on every side and a crop back to
    the old size at uniform offsets 0..2*pad; with p = 0.5 a box of 2-40 % of the area, height/width
    log-uniform in 0.3-3.3, up to 10 tries until it fits strictly inside, else none.

    Args:
      rng: drawn in this order: flip, crop top, crop left, erase or not, then per try area and
        ratio, then the box's top and left.
      image: (H, W, 3) uint8.
      pad: pixels of black padding on every side.
    """
    height, width, channels = image.shape
    flip = rng.random() < 0.5
    top = int(rng.integers(0, 2 * pad + 1))
    left = int(rng.integers(0, 2 * pad + 1))
    rows, source_rows = _overlap(height, top - pad)
    columns, source_columns = _overlap(width, left - pad)
    pixels = np.zeros(image.shape, image.dtype)
    if flip:
        # Channel by channel is seven times faster than copying pixels in reverse order.
        for channel in range(channels):
            mirrored = image[:, ::-1, channel]
            pixels[rows, columns, channel] = mirrored[source_rows, source_columns]
    else:
        pixels[rows, columns] = image[source_rows, source_columns]
    erase = _erase_box(rng, height, width) if rng.random() < 0.5 else (0, 0, 0, 0)
    return AugmentedImage(pixels, np.asarray(erase, np.int32))


def _overlap(length: int, shift: int) -> tuple[slice, slice]:
    """Returns where an axis and the same axis shifted by `shift` overlap: target and source."""
    start = max(0, -shift)
    stop = max(start, min(length, length - shift))
    return slice(start, stop), slice(start + shift, stop + shift)


def _erase_box(rng: np.random.Generator, height: int, width: int) -> tuple[int, int, int, int]:
    for _ in range(10):
        area = height * width * rng.uniform(0.02, 0.4)
        ratio = math.exp(rng.uniform(math.log(0.3), math.log(3.3)))
        box_height = round(math.sqrt(area * ratio))
        box_width = round(math.sqrt(area / ratio))
        # An empty box, possible in images of a few pixels, erases nothing: as if none was drawn.
        if 0 < box_height < height and 0 < box_width < width:
            top = int(rng.integers(0, height - box_height + 1))
            left = int(rng.integers(0, width - box_width + 1))
            return top, left, box_height, box_width
    return 0, 0, 0, 0


def augment_caption(rng: np.random.Generator, ids: np.ndarray) -> np.ndarray:
    """Masks, replaces or deletes words: 12 %, 4 % and 4 % of the BPE tokens.

    Only ids in 1..49404 count as words: PAD, MASK, SOT and EOT are never chosen. What follows a
    deleted token shifts left and PADs fill the end.

    Args:
      rng: one `random()` per word and one `integers(1, 49405)` per replacement, in token order.
      ids: (t,) int32 token ids.

    Returns:
      (t,) int32 ids; `ids` itself is not changed.
    """
    kept = []
    for token in ids.tolist():
        if 0 < token < tokenizer.MASK:
            draw = rng.random() / 0.2
            if draw < 0.6:
                token = tokenizer.MASK
            elif draw < 0.8:
                token = int(rng.integers(1, tokenizer.MASK))
            elif draw < 1:
                continue
        kept.append(token)
    augmented = np.full(ids.shape, tokenizer.PAD, np.int32)
    augmented[: len(kept)] = kept
    return augmented
