"""Pictures: from file bytes to uint8 pixels of one size, as PIL makes them.

`Images` is how everything else sees the pictures of a corpus, wherever they lie; `ImageFiles` are
the benchmark's own files, `packed.PackedImages` a packed set's.
"""

from __future__ import annotations

import collections
import concurrent.futures
import io
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

import numpy as np
import simplejpeg
from etils import epath
from PIL import Image

from itself_jax.data import records

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

_JPEG = b"\xff\xd8\xff"  # what PIL tells a JPEG by


class Images(Protocol):
    """The pictures of a corpus or split, by index, in its order.

    Implementations may be pickled, for worker processes, and read from several threads.
    """

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Returns the picture's file, to name it in a message."""
        ...

    def load(self, index: int, size: tuple[int, int]) -> np.ndarray:
        """Returns the picture as (H, W, 3) uint8 RGB, C-contiguous, resized to `size` = (H, W).

        Raises:
          records.DataError: it cannot be read; the message names the file.
          remote.CopyError: a packed set's file of pictures cannot be had from its bucket.
        """
        ...

    def content(self, index: int) -> bytes:
        """Returns the bytes of the original file.

        Raises:
          records.DataError: they cannot be read; the message names the file.
          remote.CopyError: as `load`.
        """
        ...

    def subset(self, indices: Sequence[int]) -> Images:
        """Returns the pictures of these indices, in this order."""
        ...


class ImageFiles:
    """Pictures in their own files.

    Args:
      root: the image folder.
      names: each picture's path relative to `root`, with forward slashes.
    """

    def __init__(self, root: epath.PathLike, names: Sequence[str]):
        self._root = epath.Path(root)
        self._names = tuple(names)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return os.fspath(self._root / self._names[index])

    def load(self, index: int, size: tuple[int, int]) -> np.ndarray:
        return decode(self.content(index), self.name(index), size)

    def content(self, index: int) -> bytes:
        try:
            return (self._root / self._names[index]).read_bytes()
        except Exception as error:  # remote file systems raise errors of their own
            raise _unreadable(self.name(index), error) from error

    def subset(self, indices: Sequence[int]) -> ImageFiles:
        return ImageFiles(self._root, [self._names[index] for index in indices])


def ahead(
    function: Callable[[_Item], _Result], items: Iterable[_Item], *, depth: int, num_threads: int
) -> Iterator[_Result]:
    """Yields function(item) of every item, in order, computed up to `depth` items ahead.

    An exception appears where its result would.
    """
    pool = concurrent.futures.ThreadPoolExecutor(num_threads, "ahead")
    try:
        futures = (pool.submit(function, item) for item in items)
        waiting = collections.deque(itertools.islice(futures, depth))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(itertools.islice(futures, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)


def decode(content: bytes, name: str, size: tuple[int, int]) -> np.ndarray:
    """Returns the picture as (H, W, 3) uint8 RGB, resized straight to `size` = (H, W).

    Pixel for pixel PIL's `convert("RGB").resize((W, H), BILINEAR)` (which antialiases): no crop, no
    aspect keeping, no EXIF rotation, of an animation the first frame, as the reference does. Only
    a JPEG that ends too early is refused where PIL may fill the missing part with grey.

    Args:
      content: the file's bytes.
      name: the file, for messages.
      size: (H, W) in pixels.

    Raises:
      records.DataError: not an image, damaged, truncated, or more pixels than PIL's limit against
        decompression bombs; the message names the file.
    """
    height, width = size
    try:
        if not content:
            raise ValueError("the file is empty")
        # No names for what is between: each is freed before the next one takes its memory, which
        # saves a seventh of the time.
        return np.asarray(_decoded(content).resize((width, height), Image.Resampling.BILINEAR))
    except Image.DecompressionBombError as error:
        raise records.DataError(
            f"{name} is refused as a decompression bomb ({error}); replace the picture by a "
            "smaller one or remove its record from the annotation file."
        ) from error
    except Exception as error:
        # Damaged files make PIL raise OSError, SyntaxError, ValueError, struct.error and others.
        raise _unreadable(name, error) from error


def _decoded(content: bytes) -> Image.Image:
    return (_decode_jpeg(content) if content[:3] == _JPEG else None) or _decode_any(content)


def _decode_jpeg(content: bytes) -> Image.Image | None:
    """Returns the RGB picture, or None where PIL has to decide.

    Same library below (libjpeg-turbo), same settings as PIL's, without PIL's overhead.
    """
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(content)
        if height * width > 2 * (Image.MAX_IMAGE_PIXELS or np.inf):  # PIL's rule, for its error
            return None
        if colors in ("CMYK", "YCCK"):
            simplejpeg.decode_jpeg(content, "CMYK")  # only to see whether the data ends early
            return None
        return Image.fromarray(simplejpeg.decode_jpeg(content, "RGB"))
    except ValueError as error:
        if "premature end of data" in str(error):
            raise
        return None  # an unusual header, or a flaw that PIL may tolerate


def _decode_any(content: bytes) -> Image.Image:
    try:
        opened = Image.open(io.BytesIO(content))
    except Image.UnidentifiedImageError:  # its own text names a memory address
        raise ValueError("its content fits no image format") from None
    with opened as image:
        image.load()
        # PIL warns of a palette with transparencies, which do not change the RGB values.
        image.info.pop("transparency", None)
        return image.convert("RGB")


def _unreadable(name: str, error: Exception) -> records.DataError:
    return records.DataError(
        f"{name} cannot be read as an image ({type(error).__name__}: {error}); restore the file "
        "or remove its record from the annotation file."
    )
