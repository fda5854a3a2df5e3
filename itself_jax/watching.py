"""What a model looks at, followed through a run: a few pairs, and a whole split that has masks.

`Watcher` is set up and compiled once; each `look` is a validation's. Plain arrays come out.
"""

import functools
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from itself_jax import config as config_lib
from itself_jax import files, grounding, sharding, step, workdir
from itself_jax.data import masks, pipeline, records, tokenizer
from itself_jax.models import itself

FOLDER = "saliency"  # of a work directory: epoch-001.npz, … hold `Pairs`


class Pairs(NamedTuple):
    """What each source sees in pairs of a picture and a caption, on the host.

    sources: names as `local.saliency` has them, the first axis of the others.
    captions: which captions of the split; each with its own picture.
    texts, pictures: the captions themselves, and their pictures' paths as in the annotation.
    grid: rows and columns of patches.
    image_*: over all tokens, CLS first; of `indices` the most salient first.
    text_*: over `text_length` tokens; `text_valid` is False where a caption has no more words.
    entropy: of each layer's attention, in nats, mean over the pairs: (image, text).
    """

    sources: tuple[str, ...]
    captions: Int[np.ndarray, " p"]
    texts: tuple[str, ...]
    pictures: tuple[str, ...]
    grid: tuple[int, int]
    image_saliency: Float[np.ndarray, "s p n"]
    image_indices: Int[np.ndarray, "s p k"]
    text_saliency: Float[np.ndarray, "s p t"]
    text_indices: Int[np.ndarray, "s p j"]
    text_valid: Bool[np.ndarray, "s p j"]
    image_entropy: Float[np.ndarray, " l"]
    text_entropy: Float[np.ndarray, " r"]

    def are_of(self, split: records.Split, model: config_lib.Model) -> bool:
        """Whether they are pairs of this split, seen at the sizes of this model."""
        return (
            self.grid == model.grid
            and self.text_saliency.shape[2] == model.text_length
            and bool((self.captions < len(split.captions)).all())
            and self.texts == tuple(split.captions[i] for i in self.captions)
            and self.pictures
            == tuple(split.image_paths[split.caption_images[i]] for i in self.captions)
        )


class Attention(NamedTuple):
    """`itself.Attended` on the host, of all rows of a split."""

    saliency: Float[np.ndarray, "s b n"]
    indices: Int[np.ndarray, "s b k"]
    valid: Bool[np.ndarray, "s b k"]
    entropy: Float[np.ndarray, "b l"]

    def rows(self, chosen: Int[np.ndarray, " c"]) -> "Attention":
        """Of these rows alone."""
        return Attention(*(x.take(chosen, axis) for x, axis in zip(self, _ROWS, strict=True)))


_ROWS = (1, 1, 1, 0)  # the axis of rows of each


class Seen(NamedTuple):
    """Both sides of a split."""

    image: Attention
    text: Attention


class Watcher:
    """Looks at a split with one run's model.

    Args:
      variables: shapes and places of the parameters, or themselves.
      truth: the split's masks; with them all of it is measured, else `pairs` are looked at alone.
      pairs: how many are followed.
      should_stop: called before each batch; may raise.
    """

    def __init__(
        self,
        training: step.Training,
        variables: Any,
        mesh: jax.sharding.Mesh,
        split: records.Split,
        words: tokenizer.Tokenizer,
        *,
        truth: masks.Truth | None = None,
        pairs: int = 4,
        should_stop: Callable[[], None] = lambda: None,
    ) -> None:
        self._training, self._mesh, self._words = training, mesh, words
        self._split, self._truth, self._stop = split, truth, should_stop
        self._attend = step.compile_attention(training, variables, mesh)
        self.captions = followed(split, pairs)

    def look(self, variables: Any) -> tuple[Pairs, dict[str, float]]:
        """What the followed pairs look like to the model, and the measures of the whole split.

        Without masks there are no measures.
        """
        if self._truth is None:
            return self.pairs(variables, self._split, self.captions), {}
        seen = self.see(variables, self._split)
        chosen = Seen(
            seen.image.rows(self._split.caption_images[self.captions]),
            seen.text.rows(self.captions),
        )
        return self._as_pairs(chosen, self._split, self.captions), self.measure(seen)

    def pairs(self, variables: Any, split: records.Split, captions: Int[np.ndarray, " p"]) -> Pairs:
        """The same of any pairs of any split: captions by index, each with its own picture."""
        return self._as_pairs(self.see(variables, split.pairs(captions)), split, captions)

    def _as_pairs(self, seen: Seen, split: records.Split, captions: np.ndarray) -> Pairs:
        pairs = split.pairs(captions)
        return Pairs(
            sources=self.sources,
            captions=np.asarray(captions, np.int32),
            texts=pairs.captions,
            pictures=pairs.image_paths,
            grid=self._training.config.model.grid,
            image_saliency=seen.image.saliency,
            image_indices=seen.image.indices,
            text_saliency=seen.text.saliency,
            text_indices=seen.text.indices,
            text_valid=seen.text.valid,
            image_entropy=seen.image.entropy.mean(axis=0),
            text_entropy=seen.text.entropy.mean(axis=0),
        )

    @property
    def sources(self) -> tuple[str, ...]:
        config = self._training.config
        return tuple(itself.attention_sources(config.model, config.local))

    def see(self, variables: Any, split: records.Split) -> Seen:
        """What the model looks at in all pictures and captions of a split."""
        config = self._training.config
        batch_size = sharding.eval_batch_size(config, self._mesh)
        shard = sharding.host_rows(self._mesh)
        pictures = pipeline.image_batches(
            split, image_size=config.model.image_size, batch_size=batch_size, shard=shard
        )
        captions = pipeline.caption_batches(split, self._words, batch_size=batch_size, shard=shard)
        of_images, of_captions = self._attend
        return Seen(
            self._collect(of_images, variables, pictures, len(split.images)),
            self._collect(of_captions, variables, captions, len(split.captions)),
        )

    def _collect(self, attend: Any, variables: Any, batches: Iterator[Any], rows: int) -> Attention:
        found: list[Attention] = []
        order: list[np.ndarray] = []
        for batch, indices in batches:
            self._stop()
            attended = jax.device_get(attend(variables, sharding.shard_batch(self._mesh, batch)))
            found.append(Attention(*attended).rows(np.arange(len(indices))))
            order.append(indices)
        back = np.argsort(np.concatenate(order))
        if len(back) != rows:
            raise ValueError(f"expected {rows} rows, the batches hold {len(back)}")
        return Attention(
            *(
                np.concatenate(x, axis=axis)
                for x, axis in zip(zip(*found, strict=True), _ROWS, strict=True)
            )
        ).rows(back)

    def measure(self, seen: Seen) -> dict[str, float]:
        """`grounding.measure` of the split with masks, which `seen` must be of."""
        return grounding.measure(
            self.sources,
            images=grounding.Kept(seen.image.indices, seen.image.valid),
            captions=grounding.Kept(seen.text.indices, seen.text.valid),
            caption_images=self._split.caption_images,
            regions=self._truth.regions,
            named=self._truth.named,
            **self._marked,
        )

    @functools.cached_property
    def _marked(self) -> dict[str, np.ndarray]:
        """Of the split with masks: what each patch touches, which words name an attribute."""
        split, truth, model = self._split, self._truth, self._training.config.model
        ids = self._words.encode_batch(split.captions)
        patches = [
            masks.touched(
                truth.labels(index),
                grid=model.grid,
                stride=model.stride or model.patch_size,
                patch=model.patch_size,
                image_size=model.image_size,
            )
            for index in range(len(split.images))
        ]
        words = [
            masks.word_positions(row, named, self._words)
            for row, named in zip(ids, truth.named, strict=True)
        ]
        lengths = (ids != tokenizer.PAD).sum(axis=1) - 2
        return {"patches": np.stack(patches), "words": np.stack(words), "lengths": lengths}


def followed(split: records.Split, pairs: int) -> Int[np.ndarray, " p"]:
    """The captions that are followed: the first one of each of the first `pairs` people."""
    _, first = np.unique(split.caption_ids, return_index=True)
    return np.sort(first)[:pairs].astype(np.int32)


def save(directory: workdir.Workdir, epoch: int, pairs: Pairs) -> None:
    """Writes `saliency/epoch-NNN.npz`, as a whole, by the process that writes.

    Raises:
      WorkdirError: the disk is full or the directory cannot be written.
    """
    arrays = {name: np.asarray(x) for name, x in pairs._asdict().items()}
    name = f"{FOLDER}/epoch-{epoch:03d}.npz"
    directory.write(name, lambda file: np.savez(file, **arrays))


def saved(directory: files.Path) -> dict[int, Pairs]:
    """What `save` left in a work directory, by epoch; what cannot be read is left out."""
    found = {}
    folder = directory / FOLDER
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        number = path.name.removeprefix("epoch-").removesuffix(".npz")
        if not number.isdigit():
            continue
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                values = {field: arrays[field] for field in Pairs._fields}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            continue
        for field in ("sources", "texts", "pictures", "grid"):
            values[field] = tuple(values[field].tolist())
        found[int(number)] = Pairs(**values)
    return found
