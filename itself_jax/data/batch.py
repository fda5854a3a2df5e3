"""What the data pipeline hands to the compiled step. Needs NumPy alone."""

from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """One training batch: aligned pairs of a picture and a caption."""

    images: np.ndarray  # (b, H, W, 3) uint8
    erase: np.ndarray  # (b, 4) int32 top, left, height, width; height 0: nothing to erase
    captions: np.ndarray  # (b, t) int32 token ids
    pids: np.ndarray  # (b,) int32 identity labels 0..c-1
    epoch: np.ndarray  # () int32, from 1
