"""What the data pipeline hands to the compiled programs. Needs NumPy alone."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """One training batch: aligned pairs of a picture and a caption."""

    images: np.ndarray  # (b, H, W, 3) uint8
    erase: np.ndarray  # (b, 4) int32 top, left, height, width; height 0: nothing to erase
    captions: np.ndarray  # (b, t) int32 token ids
    pids: np.ndarray  # (b,) int32 identity labels 0..c-1
    epoch: np.ndarray  # () int32, from 1


class Group(NamedTuple):
    """Captions that are encoded at one length: `rows` are their places among all, ascending."""

    length: int
    rows: np.ndarray


def group_captions(ids: np.ndarray, lengths: Sequence[int], batch_size: int) -> list[Group]:
    """Spreads captions over the lengths that they may be cut to.

    Each caption goes to the least length that holds it; but no length other than the last one in
    use gets a batch that is not full, so that as many batches are made as of a single length.

    Args:
      ids: (n, t) token ids; the largest of a row is its EOT, behind which come pads alone.
      lengths: ascending, the last one being t.
      batch_size: of the batches that the groups will be cut into.

    Returns:
      The groups that are not empty.

    Raises:
      ValueError: the last length is not t, so that a caption might fit none.
    """
    if lengths[-1] != ids.shape[1]:
        raise ValueError(f"lengths={tuple(lengths)} must end with that of the ids, {ids.shape[1]}")
    needed = ids.argmax(axis=1) + 1
    shortest = np.searchsorted(lengths, needed)  # the first length that holds the caption
    groups, waiting = [], np.zeros(0, np.int64)
    for i, length in enumerate(lengths):
        rows = np.concatenate([waiting, np.flatnonzero(shortest == i)])
        whole = len(rows) // batch_size * batch_size if (shortest > i).any() else len(rows)
        rows, waiting = rows[:whole], rows[whole:]
        if len(rows):
            groups.append(Group(int(length), np.sort(rows)))
    return groups
