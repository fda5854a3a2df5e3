"""Queries with their answers, and what the model looks at in them: what needs the model."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from itself_jax import config as config_lib
from itself_jax import retrieval, watching
from itself_jax.data import records, tokenizer
from itself_jax.reporting import answers as answers_lib
from itself_jax.reporting import content, drawing

_STRIPS = 3  # of each kind
_FAILURES = 24
_MOMENTS = 7
_KINDS = ("best", "median", "worst")


class Material(NamedTuple):
    """What a report asks the model for; every process of a run gathers it, one draws it."""

    config: config_lib.Config
    split: records.Split  # that was ranked
    alpha: float
    text_to_image: answers_lib.Answers
    image_to_text: answers_lib.Answers
    overlaid: watching.Pairs  # of that split
    watched: records.Split | None  # the split whose pairs were followed through the run, if any


def gather(
    config: config_lib.Config,
    split: records.Split,
    embeddings: retrieval.Embeddings,
    alpha: float,
    look: Callable[[records.Split, Int[np.ndarray, " p"]], watching.Pairs],
    watched: records.Split | None,
    should_stop: Callable[[], None] = lambda: None,
) -> Material:
    """Ranks a split in both directions and looks at some of its pairs.

    look: `watching.Watcher.pairs` with the weights that made the embeddings.
    """
    found = [
        answers_lib.find(embeddings, alpha, direction, should_stop=should_stop)
        for direction in retrieval.DIRECTIONS
    ]
    chosen = answers_lib.spread(found[0], split.caption_ids, 2)
    captions = dict.fromkeys(
        query
        for kind, count in zip(_KINDS, (1, 2, 1), strict=True)
        for query in chosen[kind][:count]
    )
    return Material(
        config, split, alpha, *found, look(split, np.asarray(list(captions), np.int32)), watched
    )


def strips(material: Material) -> tuple[tuple[content.Strip, ...], tuple[content.Strip, ...]]:
    """Best, median and worst queries: (text → image, image → text)."""
    split = material.split
    found = []
    for direction, answers, owners in (
        ("t2i", material.text_to_image, split.caption_ids),
        ("i2t", material.image_to_text, split.image_ids),
    ):
        chosen = answers_lib.spread(answers, owners, _STRIPS)
        found.append(
            tuple(
                _strip(material, direction, answers, kind, query)
                for kind in _KINDS
                for query in chosen[kind]
            )
        )
    return found[0], found[1]


def failures(material: Material) -> tuple[content.Strip, ...]:
    """The worst text queries, worst first; none whose first answer is right."""
    answers = material.text_to_image
    worst = answers_lib.spread(answers, material.split.caption_ids, _FAILURES)["worst"]
    return tuple(
        _strip(material, "t2i", answers, "worst", query)
        for query in worst
        if answers.first_right[query] > 1
    )


def _strip(
    material: Material, direction: str, answers: answers_lib.Answers, kind: str, query: int
) -> content.Strip:
    split, model = material.split, material.config.model
    by_text = direction == "t2i"
    owner = (split.caption_ids if by_text else split.image_ids)[query]
    ids = split.image_ids if by_text else split.caption_ids

    def hit(rank: int, index: int, similarity: float) -> content.Hit:
        shown = (
            {"crop": drawing.crop(split, index, model)}
            if by_text
            else {"caption": split.captions[index]}
        )
        return content.Hit(rank, bool(ids[index] == owner), similarity, **shown)

    first = int(answers.first_right[query])
    ranked = zip(answers.top[query].tolist(), answers.top_similarity[query].tolist(), strict=True)
    return content.Strip(
        kind=kind,
        first_right=first,
        gallery=len(ids),
        hits=tuple(
            hit(rank, index, similarity) for rank, (index, similarity) in enumerate(ranked, start=1)
        ),
        right=hit(first, int(answers.right[query]), float(answers.right_similarity[query])),
        caption=split.captions[query] if by_text else None,
        crop=None if by_text else drawing.crop(split, query, model),
    )


def overlays(
    material: Material, words: tokenizer.Tokenizer, sources: Sequence[str]
) -> tuple[content.Overlay, ...]:
    """The pairs that `gather` looked at, under these sources side by side."""
    split, pairs = material.split, material.overlaid
    found = []
    for row, caption in enumerate(pairs.captions.tolist()):
        found.append(
            content.Overlay(
                crop=drawing.crop(
                    split,
                    int(split.caption_images[caption]),
                    material.config.model,
                    drawing.VIEW_HEIGHT,
                ),
                caption=split.captions[caption],
                views=tuple(
                    _view(material.config, split, pairs, row, source, words) for source in sources
                ),
            )
        )
    return tuple(found)


def evolutions(
    material: Material,
    words: tokenizer.Tokenizer,
    looks: Mapping[int, watching.Pairs],
    source: str,
) -> tuple[content.Evolution, ...]:
    """How what `source` keeps of the followed pairs changed, at up to seven epochs.

    looks: by epoch, as `watching.saved` reads them; those without the source, of other pairs or of
      other sizes are left out.
    """
    split = material.watched
    if split is None:
        return ()
    epochs = sorted(
        epoch
        for epoch, pairs in looks.items()
        if source in pairs.sources and pairs.are_of(split, material.config.model)
    )
    places = np.linspace(0, len(epochs) - 1, min(_MOMENTS, len(epochs))).astype(int)
    chosen = [epochs[place] for place in sorted(set(places.tolist()))]
    if not chosen:
        return ()
    followed = looks[chosen[0]].captions
    chosen = [epoch for epoch in chosen if np.array_equal(looks[epoch].captions, followed)]
    found = []
    for row, caption in enumerate(followed.tolist()):
        moments, before = [], None
        for epoch in chosen:
            pairs = looks[epoch]
            kept = set(pairs.image_indices[pairs.sources.index(source), row].tolist())
            new = None if before is None else len(kept - before) / len(kept)
            view = _view(material.config, split, pairs, row, source, words)
            moments.append(content.Moment(epoch, view, new))
            before = kept
        found.append(
            content.Evolution(
                split.image_paths[split.caption_images[caption]],
                split.captions[caption],
                tuple(moments),
            )
        )
    return tuple(found)


def _view(
    config: config_lib.Config,
    split: records.Split,
    pairs: watching.Pairs,
    row: int,
    source: str,
    words: tokenizer.Tokenizer,
) -> content.View:
    at = pairs.sources.index(source)
    caption = int(pairs.captions[row])
    saliency = pairs.image_saliency[at, row, 1:]  # without CLS
    kept = pairs.image_indices[at, row] - 1
    index = int(split.caption_images[caption])
    top = int(kept[0])
    columns = config.model.grid[1]
    try:
        drawn = drawing.picture(split, index, config.model, drawing.VIEW_HEIGHT)
        png = drawing.heat(drawn, saliency, kept, config.model)
    except drawing.UNREADABLE:
        png = None
    return content.View(
        source=source,
        png=png,
        words=_words(
            words.encode(split.captions[caption]),
            pairs.text_saliency[at, row],
            pairs.text_indices[at, row][pairs.text_valid[at, row]],
            words,
        ),
        patches=len(kept),
        alt=(
            f"{source} keeps {len(kept)} of {len(saliency)} patches of {split.image_paths[index]}, "
            f"first the one in row {top // columns + 1}, column {top % columns + 1}."
        ),
    )


def _words(
    ids: Int[np.ndarray, " t"],
    saliency: np.ndarray,
    kept: Int[np.ndarray, " k"],
    words: tokenizer.Tokenizer,
) -> tuple[content.Word, ...]:
    """A caption's words; one of several tokens is as salient as its most salient token."""
    pieces = words.tokens(ids)
    found: list[tuple[str, float, bool]] = []
    text, score, is_kept = "", 0.0, False
    for position in range(1, len(pieces) - 1):
        text += pieces[position]
        score = max(score, float(saliency[position]))
        is_kept |= position in kept
        if text.endswith(" ") or position == len(pieces) - 2:
            found.append((text.strip(), score, is_kept))
            text, score, is_kept = "", 0.0, False
    most = max((score for _, score, _ in found), default=0.0) or 1.0
    return tuple(content.Word(text, score / most, is_kept) for text, score, is_kept in found)
