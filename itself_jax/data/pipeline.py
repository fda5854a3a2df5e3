"""Input pipeline: identity-balanced training batches and padded evaluation batches.

The training stream is a pure function of (seed, step): the sampler of (seed, epoch), augmentation
and the replacement of unreadable pictures of (seed, position in the run). So it is the same for any
number of threads, worker processes and hosts, and resuming means starting at a step; there is no
iterator state to save.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np

from itself_jax.data import batch as batch_lib
from itself_jax.data import images, records, transforms
from itself_jax.data import tokenizer as tokenizer_lib

_LOG = logging.getLogger("itself_jax")
_MAX_UNREADABLE = 0.01  # of a training split's pictures


def epoch_order(
    pids: np.ndarray, *, batch_size: int, num_instances: int, seed: int, epoch: int
) -> np.ndarray:
    """Draws one epoch of identity-balanced batches.

    Each identity's pairs are shuffled and cut into groups of `num_instances`; remainders are
    dropped for this epoch, and an identity with fewer pairs has one group drawn with replacement.
    Each batch takes the next group of batch_size/num_instances identities, drawn uniformly among
    those that have groups left; the epoch ends when these are too few. So its length varies
    slightly between epochs.

    Args:
      pids: (p,) identity of every pair.
      batch_size: pairs per batch, a multiple of `num_instances`.
      num_instances: pairs per identity in a batch.
      seed: of the run, >= 0.
      epoch: from 1; the result depends on (seed, epoch) only.

    Returns:
      (steps * batch_size,) int32 indices into `pids`; groups are contiguous.

    Raises:
      ValueError: `batch_size` is no multiple of `num_instances`.
      records.DataError: too few identities for one batch.
    """
    if num_instances < 1 or batch_size < 1 or batch_size % num_instances:
        raise ValueError(
            f"batch_size={batch_size} must be a positive multiple of num_instances={num_instances}."
        )
    per_batch = batch_size // num_instances
    _, labels, counts = np.unique(pids, return_inverse=True, return_counts=True)
    if len(counts) < per_batch:
        raise records.DataError(
            f"batch_size={batch_size} with num_instances={num_instances} needs {per_batch} "
            f"identities per batch, but the data has {len(counts)}; lower batch_size."
        )
    rng = np.random.default_rng([seed, epoch])

    # All groups of identity i are rows first_group[i] : first_group[i + 1] of `groups`.
    num_groups = np.maximum(counts // num_instances, 1)
    first_group = np.concatenate([[0], np.cumsum(num_groups)])
    first_pair = np.concatenate([[0], np.cumsum(counts)])[:-1]
    shuffled = np.lexsort((rng.random(len(labels)), labels))  # by identity, random within
    owner = np.repeat(np.arange(len(counts)), num_groups)
    rank = np.arange(first_group[-1]) - first_group[owner]
    within = rank[:, None] * num_instances + np.arange(num_instances)
    few = counts[owner] < num_instances
    within[few] = rng.integers(0, counts[owner[few], None], (few.sum(), num_instances))
    groups = shuffled[first_pair[owner, None] + within].astype(np.int32)

    next_group = first_group[:-1].copy()
    available = np.arange(len(counts))
    chosen = []
    while len(available) >= per_batch:
        drawn = available[rng.choice(len(available), per_batch, replace=False)]
        chosen.append(next_group[drawn])
        next_group[drawn] += 1
        available = available[next_group[available] < first_group[available + 1]]
    return groups[np.concatenate(chosen)].reshape(-1)


class TrainStream:
    """All training batches of a run, addressed by step (0-based, over all epochs).

    A picture that cannot be read is replaced, whenever its turn comes, by another one of the same
    identity, warned of once and counted.

    Args:
      split: the training split, identities relabelled 0..c-1.
      tokenizer: all captions are tokenised once, here.
      image_size: (H, W) in pixels.
      batch_size: pairs per batch, a multiple of `num_instances`.
      num_instances: pairs per identity in a batch.
      num_epochs: length of the run.
      seed: of sampler and augmentation, >= 0.
      augment_image: flip, shift and erase; False leaves pixels as decoded and no box to erase.
      augment_caption: mask, replace and delete words.
      augment_pad: pixels that a picture may shift by, each way.
      num_workers: worker processes; 0 decodes in threads of this process. Workers are spawned, so
        a script needs `if __name__ == "__main__"` and parsed absl flags (`absl.app.run`).
      num_threads: batches being built at a time, in this process or in each worker.
      cache_bytes: keep decoded images in memory if all of them fit (only with num_workers=0).
      shard: (index, count) of this host: its batches are rows index * b/count ... of the global
        batches, which are the same for every count.

    Raises:
      ValueError: `batch_size` is no multiple of `num_instances` or of the number of hosts.
      records.DataError: too few identities for one batch.
    """

    def __init__(
        self,
        split: records.Split,
        tokenizer: tokenizer_lib.Tokenizer,
        *,
        image_size: tuple[int, int],
        batch_size: int,
        num_instances: int,
        num_epochs: int,
        seed: int,
        augment_image: bool,
        augment_caption: bool,
        augment_pad: int = 10,
        num_workers: int = 0,
        num_threads: int = 2,
        cache_bytes: int = 512 << 20,
        shard: tuple[int, int] = (0, 1),
    ):
        host, hosts = shard
        if not 0 <= host < hosts:
            raise ValueError(f"shard={shard} must be (index, count) with index in 0..count-1.")
        if batch_size % hosts:
            raise ValueError(
                f"batch_size={batch_size} must be divisible by the number of hosts, {hosts}; "
                "change batch_size."
            )
        self._num_workers = num_workers
        self._num_threads = num_threads
        orders = [
            epoch_order(
                split.caption_ids,
                batch_size=batch_size,
                num_instances=num_instances,
                seed=seed,
                epoch=epoch,
            )
            for epoch in range(1, num_epochs + 1)
        ]
        self.steps_per_epoch = tuple(len(order) // batch_size for order in orders)
        self.total_steps = sum(self.steps_per_epoch)
        pairs = [np.zeros((0, batch_size), np.int32), *(o.reshape(-1, batch_size) for o in orders)]
        self._source = _BatchSource(
            split=split,
            captions=tokenizer.encode_batch(split.captions),
            pairs=np.concatenate(pairs),
            epochs=np.repeat(np.arange(1, num_epochs + 1, dtype=np.int32), self.steps_per_epoch),
            image_size=image_size,
            seed=seed,
            augment_image=augment_image,
            augment_caption=augment_caption,
            augment_pad=augment_pad,
            rows=slice(host * batch_size // hosts, (host + 1) * batch_size // hosts),
            cache_bytes=0 if num_workers else cache_bytes,
        )
        self._replaced = 0
        self._unreadable: set[int] = set()  # image indices

    @property
    def replaced(self) -> int:
        """How many rows of the batches handed out so far hold a replaced picture."""
        return self._replaced

    @property
    def unreadable(self) -> tuple[str, ...]:
        """The pictures found unreadable so far, in annotation order."""
        return tuple(self._source.split.images.name(image) for image in sorted(self._unreadable))

    def epoch_of(self, step: int) -> int:
        """Returns the epoch, from 1, that the batch of this step belongs to."""
        return int(self._source.epochs[self._checked(step)])

    def pairs(self, step: int) -> np.ndarray:
        """Returns the (b,) int32 caption indices of this step's global batch."""
        return self._source.pairs[self._checked(step)]

    def paths(self, step: int) -> list[str]:
        """Returns the b image files of this step's global batch, to name them in an error."""
        split = self._source.split
        indices = split.caption_images[self.pairs(step)].tolist()
        return [split.images.name(index) for index in indices]

    def batches(self, start_step: int = 0) -> grain.DatasetIterator[batch_lib.Batch]:
        """Returns one iterator over this host's batches of steps start_step..total_steps-1.

        Call its `close()` when done, which stops threads and workers.

        Raises:
          ValueError: `start_step` is not in 0..total_steps.
          records.DataError: from `next`, when none of an identity's pictures can be read, or more
            than 1 % of the split's pictures were found unreadable by this host.
          remote.CopyError: from `next`, when a file of pictures cannot be had from its bucket.
        """
        if not 0 <= start_step <= self.total_steps:
            raise ValueError(f"start_step={start_step} is not in 0..{self.total_steps}.")
        # Grain's own default buffers 500 elements, and an element is a whole batch here.
        read_options = grain.ReadOptions(
            num_threads=self._num_threads, prefetch_buffer_size=max(2, self._num_threads)
        )
        # Grain's iterator state is tied to the number of workers; slicing by step is not.
        batches = grain.MapDataset.source(self._source)[start_step:]
        dataset = batches.to_iter_dataset(read_options)
        if self._num_workers:
            options = grain.MultiprocessingOptions(
                num_workers=self._num_workers, per_worker_buffer_size=2
            )
            dataset = dataset.mp_prefetch(options)
        return iter(dataset.map(self._report))

    def _report(self, element: _Element) -> batch_lib.Batch:
        """Counts in this process what worker processes found, and strips it."""
        split = self._source.split
        self._replaced += element.replaced
        for image, message in element.unreadable:
            if image not in self._unreadable:
                self._unreadable.add(image)
                _LOG.warning("%s Another picture of the person takes its place.", message)
        total = len(split.images)
        if len(self._unreadable) > _MAX_UNREADABLE * total:
            names = self.unreadable
            raise records.DataError(
                f"{len(names)} of {total} pictures of {split.dataset} {split.split} cannot be "
                f"read, more than {_MAX_UNREADABLE:.0%}: {', '.join(names[:10])}"
                f"{', ...' if names[10:] else ''}; restore them or remove their records from the "
                "annotation file."
            )
        if self._num_workers:
            # Their arrays lie in shared memory, which Grain cannot free at the process's end.
            return batch_lib.Batch(*(np.array(value) for value in element.batch))
        return element.batch

    def _checked(self, step: int) -> int:
        if not 0 <= step < self.total_steps:
            raise IndexError(f"step {step} is not in 0..{self.total_steps - 1}.")
        return step


class _Element(NamedTuple):
    """What travels from worker threads and processes."""

    batch: batch_lib.Batch
    replaced: int  # rows
    unreadable: tuple[tuple[int, str], ...]  # image index and error message


class _BatchSource:
    """Random access to training batches by step; sent to worker processes."""

    def __init__(
        self,
        *,
        split: records.Split,
        captions: np.ndarray,
        pairs: np.ndarray,
        epochs: np.ndarray,
        image_size: tuple[int, int],
        seed: int,
        augment_image: bool,
        augment_caption: bool,
        augment_pad: int,
        rows: slice,
        cache_bytes: int,
    ):
        self.split = split
        self.pairs = pairs  # (steps, b) int32 caption indices
        self.epochs = epochs  # (steps,) int32
        self._captions = captions  # (q, t) int32
        self._image_size = image_size
        self._seed = seed
        self._augment_image = augment_image
        self._augment_caption = augment_caption
        self._augment_pad = augment_pad
        self._rows = rows  # of the global batch
        self._errors: dict[int, str] = {}  # by image index; an unreadable file is read once
        shape = (len(split.images), *image_size, 3)
        # np.empty takes memory only as images arrive.
        self._cache = np.empty(shape, np.uint8) if np.prod(shape) <= cache_bytes else None
        self._cached = np.zeros(len(split.images), bool)

    def __len__(self) -> int:
        return len(self.pairs)

    def __repr__(self) -> str:  # Grain writes its source into logs and errors.
        return f"_BatchSource({self.split.dataset} {self.split.split}, {len(self)} steps)"

    def __getitem__(self, step: int) -> _Element:
        pairs = self.pairs[step][self._rows]
        pixels = np.empty((len(pairs), *self._image_size, 3), np.uint8)
        erase = np.zeros((len(pairs), 4), np.int32)
        captions = self._captions[pairs]
        replaced = 0
        unreadable: dict[int, str] = {}
        # A position counts from 1 here: a trailing 0 does not change a seed, and [seed, 1, 0]
        # would repeat the sampler's [seed, 1].
        first = int(step) * self.pairs.shape[1] + self._rows.start + 1
        for row, wanted in enumerate(self.split.caption_images[pairs].tolist()):
            rng = np.random.default_rng([self._seed, 1, first + row])
            image, used = self._picture(wanted, first + row, unreadable)
            replaced += used != wanted
            if self._augment_image:
                image, erase[row] = transforms.augment_image(rng, image, pad=self._augment_pad)
            pixels[row] = image
            if self._augment_caption:
                captions[row] = transforms.augment_caption(rng, captions[row])
        pids, epoch = self.split.caption_ids[pairs], np.asarray(self.epochs[step])
        batch = batch_lib.Batch(pixels, erase, captions, pids, epoch)
        return _Element(batch, replaced, tuple(unreadable.items()))

    def _picture(
        self, wanted: int, position: int, unreadable: dict[int, str]
    ) -> tuple[np.ndarray, int]:
        """Returns the picture, or another one of its identity, and which one it is.

        Adds to `unreadable` what could not be read.
        """
        try:
            return self._load(wanted), wanted
        except records.DataError as error:
            first_error = error
        unreadable[wanted] = str(first_error)
        ids = self.split.image_ids
        others = np.flatnonzero(ids == ids[wanted])
        rng = np.random.default_rng([self._seed, 2, position])
        for other in rng.permutation(others[others != wanted]).tolist():
            try:
                return self._load(other), other
            except records.DataError as error:
                unreadable[other] = str(error)
        raise first_error

    def _load(self, index: int) -> np.ndarray:
        if self._cache is not None and self._cached[index]:
            return self._cache[index]
        if index in self._errors:
            raise records.DataError(self._errors[index])
        try:
            image = self.split.images.load(index, self._image_size)
        except records.DataError as error:
            self._errors[index] = str(error)
            raise
        if self._cache is not None:
            # Pixels first: another thread may look at the flag at any time.
            self._cache[index] = image
            self._cached[index] = True
        return image


def image_batches(
    split: records.Split,
    *,
    image_size: tuple[int, int],
    batch_size: int,
    num_threads: int = 4,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields all images in annotation order as ((b, H, W, 3) uint8, their indices).

    The last batch is filled up with copies of its row 0, so that one compiled shape serves all.
    Threads decode up to two batches ahead. `shard`: (index, count) of this host, which gets (and
    decodes) rows index * b ... of each batch, with b = batch_size / count; the indices are
    those of the whole batch.

    Raises:
      records.DataError: an image cannot be read.
      remote.CopyError: a file of pictures cannot be had from its bucket.
    """
    chosen = list(_batches_of(np.arange(len(split.images)), batch_size, shard))
    with contextlib.closing(
        images.ahead(
            lambda index: split.images.load(index, image_size),
            [int(index) for own, _ in chosen for index in own],
            depth=2 * batch_size,
            num_threads=num_threads,
        )
    ) as loaded:
        for own, whole in chosen:
            pixels = np.empty((batch_size // shard[1], *image_size, 3), np.uint8)
            for row in range(len(own)):
                pixels[row] = next(loaded)
            pixels[len(own) :] = pixels[0]
            yield pixels, whole


def _batches_of(
    indices: np.ndarray, batch_size: int, shard: tuple[int, int]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of every batch: the elements that this host loads (one at least), and all."""
    host, hosts = shard
    if batch_size % hosts:
        raise ValueError(f"batch_size={batch_size} must be divisible by the {hosts} hosts")
    own = batch_size // hosts
    for start in range(0, len(indices), batch_size):
        whole = indices[start : start + batch_size]
        part = whole[host * own : (host + 1) * own]
        # A host whose part of the last batch is padding alone pads with the batch's first row.
        yield (part if len(part) else whole[:1]), whole


def caption_batches(
    split: records.Split,
    tokenizer: tokenizer_lib.Tokenizer,
    *,
    batch_size: int,
    lengths: Sequence[int] = (),
    shard: tuple[int, int] = (0, 1),
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields all captions as ((b, t) int32 ids, their indices).

    `lengths`: ascending; a batch has the least of them as its t that its captions need, if it can
    be filled. Default: all have `text_length`. The last batch of a length is filled up with copies
    of its row 0. `shard` as in `image_batches`.
    """
    ids = tokenizer.encode_batch(split.captions)
    lengths = lengths or (tokenizer.text_length,)
    for length, rows in batch_lib.group_captions(ids, lengths, batch_size):
        for own, whole in _batches_of(rows, batch_size, shard):
            batch = np.empty((batch_size // shard[1], length), np.int32)
            batch[: len(own)] = ids[own, :length]
            batch[len(own) :] = batch[0]
            yield batch, whole
