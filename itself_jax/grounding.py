"""Whether what a model looks at is what matters: saliency against masks and named attributes.

Everything is a share in [0, 1] with, beside it, the share that as many patches or words chosen at
random would have ("chance"). Plain NumPy on what the compiled programs return.

Letters: s saliency sources, g pictures, q captions, n patches, t text tokens, k kept.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from itself_jax.data import masks


class Kept(NamedTuple):
    """What each source kept of each picture or caption, most salient first.

    indices: positions among the tokens of the encoder; patches start at 1, behind CLS.
    valid: False where a caption has fewer words than the bank has rows.
    """

    indices: Int[np.ndarray, "s b k"]
    valid: Bool[np.ndarray, "s b k"]


def measure(
    sources: Sequence[str],
    *,
    images: Kept,
    captions: Kept,
    patches: Bool[np.ndarray, "g n 256"],
    words: Bool[np.ndarray, "q t"],
    lengths: Int[np.ndarray, " q"],
    caption_images: Int[np.ndarray, " q"],
    regions: Mapping[str, Sequence[int]],
    named: Sequence[Mapping[str, str]],
) -> dict[str, float]:
    """All measures of a split, as `saliency/MEASURE/SOURCE`; SOURCE may also be `chance`.

    - `patches_on_person`: of a picture's kept patches, the share that touches the person; mean over
      pictures.
    - `patches_on_named`: … that touches a visible attribute which the caption names (not those of
      the whole figure, `masks.WHOLE_FIGURE`); mean over the captions that name one.
    - `pointing_ATTRIBUTE`: of the pictures that show it, the share whose most salient patch touches
      it (the pointing game); `pointing` is the mean over attributes.
    - `words_on_named`: of a caption's kept words (tokens), the share that names an attribute; mean
      over captions.

    Args:
      patches: which labels each patch touches, by `masks.touched`; label 0 is background.
      words: the tokens that name an attribute, by `masks.word_positions`.
      lengths: number of tokens of each caption between SOT and EOT.
      named: of each caption, the attributes that it names.
    """
    found: dict[str, float] = {}

    def record(measure: str, values: Float[np.ndarray, " s"], chance: float) -> None:
        for source, value in zip(sources, values.tolist(), strict=True):
            found[f"saliency/{measure}/{source}"] = value
        found[f"saliency/{measure}/chance"] = chance

    kept = images.indices - 1  # without CLS
    person = patches[:, :, 1:].any(axis=2)
    record("patches_on_person", _share(person, kept).mean(axis=1), float(person.mean()))

    details = {name: list(labels) for name, labels in regions.items()}
    seen = {name: patches[:, :, labels].any(axis=2) for name, labels in details.items()}
    on_named = np.zeros((len(named), patches.shape[1]), bool)
    for row, attributes in enumerate(named):
        for name in attributes.keys() - set(masks.WHOLE_FIGURE):
            if name in seen:
                on_named[row] |= seen[name][caption_images[row]]
    shown = on_named.any(axis=1)
    if shown.any():
        shares = _share(on_named[shown], kept[:, caption_images[shown]])
        record("patches_on_named", shares.mean(axis=1), float(on_named[shown].mean()))

    first = kept[:, :, 0]
    pointing, chances = [], []
    for name in _distinct(details):
        visible = seen[name].any(axis=1)
        if visible.any():
            on = np.take_along_axis(seen[name][None], first[:, :, None], axis=2)[:, visible, 0]
            pointing.append(on.mean(axis=1))
            chances.append(float(seen[name][visible].mean()))
            record(f"pointing_{name}", pointing[-1], chances[-1])
    if pointing:
        record("pointing", np.mean(pointing, axis=0), float(np.mean(chances)))

    counted = captions.valid & (lengths > 0)[None, :, None]
    hits = np.take_along_axis(words[None], captions.indices, axis=2) & counted
    has_words = lengths > 0
    if has_words.any():
        shares = hits.sum(axis=2)[:, has_words] / counted.sum(axis=2)[:, has_words]
        chance = words[has_words].sum(axis=1) / lengths[has_words]
        record("words_on_named", shares.mean(axis=1), float(chance.mean()))
    return found


def _share(
    marked: Bool[np.ndarray, "b n"], kept: Int[np.ndarray, "s b k"]
) -> Float[np.ndarray, "s b"]:
    return np.take_along_axis(marked[None], kept, axis=2).mean(axis=2)


def _distinct(regions: Mapping[str, Sequence[int]]) -> list[str]:
    """Attributes that are seen in places of their own: the first of those with equal labels."""
    first: dict[tuple[int, ...], str] = {}
    for name, labels in regions.items():
        if name not in masks.WHOLE_FIGURE:
            first.setdefault(tuple(sorted(labels)), name)
    return list(first.values())
