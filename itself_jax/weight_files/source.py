"""A file to read from piece by piece, and arrays that still lie in it."""

from __future__ import annotations

import math
import os
import pathlib
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# Whatever else a file may hold (complex, quantised, 8-bit floats) is refused by its name.
DTYPES = {
    **{name: np.dtype(name) for name in ("bool", "float16", "float32", "float64")},
    **{f"{sign}int{bits}": np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16)},
    **{f"{sign}int{bits}": np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (32, 64)},
    "bfloat16": BFLOAT16,
}
MAX_DIMENSIONS = 32
MAX_NAME = 1000

_WINDOW = 4 << 20  # bytes read at once where they are not the array itself
_AGAIN = "copy or download the file anew"


class WeightFileError(RuntimeError):
    """A weight file could not be read or written; the message is one sentence for the user."""


class Source:
    """A regular file. It is opened for every piece, so nothing stays open or mapped.

    Mapped pages would count as memory for as long as they are mapped, and a file that is cut while
    it is mapped kills the process.

    Raises:
      WeightFileError: it does not exist, is no file, or may not be read.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        try:
            # Without O_NONBLOCK a named pipe would be waited for, until somebody writes to it.
            number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                status = os.fstat(number)
            finally:
                os.close(number)
        except (OSError, ValueError) as error:
            raise WeightFileError(f"{path} cannot be read: {reason(error)}.") from error
        if not stat.S_ISREG(status.st_mode):
            raise WeightFileError(
                f"{path} is not a regular file: give a file of weights, or a folder with one."
            )
        self.size = status.st_size
        self._stamp = (status.st_ino, status.st_size, status.st_mtime_ns)

    def read(self, start: int, count: int) -> bytes:
        """Returns the bytes from `start`; fewer where the file ends."""
        if start < 0 or count <= 0 or start >= self.size:
            return b""
        content = bytearray(min(count, self.size - start))
        self.fill(start, memoryview(content))
        return bytes(content)

    def fill(self, start: int, target: memoryview) -> None:
        """Fills `target` with the bytes from `start`.

        Raises:
          WeightFileError: the file ends before, cannot be read, or was changed meanwhile.
        """
        if start < 0 or start + len(target) > self.size:
            self.refuse(f"ends at byte {self.size}, but bytes up to {start + len(target)} are read")
        try:
            with open(self.path, "rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                if (status.st_ino, status.st_size, status.st_mtime_ns) != self._stamp:
                    self.refuse("was changed while it was read", "try again when it is complete")
                file.seek(start)
                done = 0
                while done < len(target):
                    count = file.readinto(target[done:])
                    if not count:
                        self.refuse(f"ended unexpectedly at byte {start + done}")
                    done += count
        except OSError as error:
            raise WeightFileError(f"{self.path} cannot be read: {reason(error)}.") from error

    def pieces(self, start: int, count: int) -> Iterator[memoryview]:
        """Yields the bytes from `start` in windows that share one buffer."""
        buffer = memoryview(bytearray(min(count, _WINDOW)))
        for at in range(start, start + count, _WINDOW):
            piece = buffer[: min(_WINDOW, start + count - at)]
            self.fill(at, piece)
            yield piece

    def refuse(self, what: str, advice: str = _AGAIN) -> NoReturn:
        raise WeightFileError(f"{self.path} {what}: {advice}.")


class Tensor:
    """An array that still lies in a file.

    Attributes:
      shape: its shape.
      dtype: as stored, in the byte order of this machine.
    """

    __slots__ = ("shape", "dtype", "_load")

    def __init__(
        self, shape: tuple[int, ...], dtype: np.dtype, load: Callable[[], np.ndarray]
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self._load = load

    def __repr__(self) -> str:
        return f"Tensor({self.dtype.name}{list(self.shape)})"

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The array in its own memory, C-contiguous, with the stored dtype.

        Raises:
          WeightFileError: the file is damaged, was changed, or cannot be read any more.
        """
        return self._load()


def read_strided(
    source: Source,
    start: int,
    dtype: np.dtype,
    shape: tuple[int, ...],
    strides: Sequence[int] | None = None,
    *,
    swapped: bool = False,
) -> np.ndarray:
    """Copies a view of numbers that lie in a file from byte `start`.

    Memory beyond the result stays below `_WINDOW`, however far the view reaches.

    Args:
      source: the file; the view must lie inside, which the caller has checked.
      start: byte of its first element.
      dtype: of the elements.
      shape: of the view.
      strides: of the view, in elements and not negative; None: C-contiguous.
      swapped: the other byte order than this machine's.
    """
    array = np.empty(shape, dtype)
    if array.size:
        if strides is None or _is_contiguous(shape, strides):
            source.fill(start, memoryview(array.reshape(-1).view(np.uint8)))
        else:
            _gather(source, start, array, tuple(strides))
    return checked(source, start, array, swapped=swapped)


def checked(source: Source, start: int, array: np.ndarray, *, swapped: bool) -> np.ndarray:
    """The array as it came from byte `start`, in this machine's byte order.

    Raises:
      WeightFileError: a truth value is neither 0 nor 1.
    """
    if array.dtype == np.bool_ and (array.view(np.uint8) > 1).any():
        source.refuse(f"is damaged: a truth value behind byte {start} is neither 0 nor 1")
    return array.byteswap(inplace=True) if swapped else array


def _is_contiguous(shape: Sequence[int], strides: Sequence[int]) -> bool:
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _gather(source: Source, start: int, out: np.ndarray, strides: tuple[int, ...]) -> None:
    """Halves the view until the bytes it spans fit a window, then copies them."""
    reach = [(size - 1) * stride for size, stride in zip(out.shape, strides, strict=True)]
    count = (sum(reach) + 1) * out.itemsize
    if count <= _WINDOW:
        flat = np.frombuffer(source.read(start, count), out.dtype)
        steps = tuple(stride * out.itemsize for stride in strides)
        out[...] = np.lib.stride_tricks.as_strided(flat, out.shape, steps, writeable=False)
        return
    axis = reach.index(max(reach))
    half = out.shape[axis] // 2
    before = (slice(None),) * axis
    _gather(source, start, out[(*before, slice(None, half))], strides)
    start += half * strides[axis] * out.itemsize
    _gather(source, start, out[(*before, slice(half, None))], strides)


def check_shape(source: Source, name: str, shape: Any, itemsize: int) -> tuple[int, ...]:
    """Returns `shape` as a tuple of sizes that NumPy can hold.

    Raises:
      WeightFileError: it is none.
    """
    if not isinstance(shape, tuple | list) or len(shape) > MAX_DIMENSIONS:
        source.refuse(f"gives {name} a shape that is none ({show(shape)})")
    total = itemsize
    for size in shape:
        if type(size) is not int or size < 0:
            source.refuse(f"gives {name} the shape {show(shape)}")
        total *= max(size, 1)
    if total >= 1 << 62:
        source.refuse(f"gives {name} the impossible shape {show(shape)}")
    return tuple(shape)


def check_name(source: Source, name: Any) -> str:
    """Returns the name of an array.

    Raises:
      WeightFileError: it is no string, empty, very long, or has control characters.
    """
    if not is_name(name):
        source.refuse(
            f"names an array {show(name)}",
            f"names are strings of 1 to {MAX_NAME} printable characters",
        )
    return name


def is_name(name: Any) -> bool:
    return isinstance(name, str) and 0 < len(name) <= MAX_NAME and name.isprintable()


def show(value: Any) -> str:
    """A value from a file, fit for a message: short, printable, without walking into it."""
    if isinstance(value, str | bytes):
        text = repr(value[:100])
        return text if len(value) <= 100 else f"{text}…"
    if value is None or type(value) in (bool, float):
        return repr(value)
    if type(value) is int:
        return str(value) if abs(value) < 1 << 128 else "a number of more than 128 bits"
    if type(value) in (tuple, list):
        flat = all(type(item) in (int, bool, float, str) for item in value)
        if flat and len(value) <= 8:
            return f"[{', '.join(show(item) for item in value)}]"
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def bare(name: Any) -> str:
    """The name of something, fit for a message and without quotes."""
    return repr(name[:100])[1:-1] if isinstance(name, str) else show(name)


def reason(error: BaseException) -> str:
    """Why a call of the operating system failed, without its path."""
    number = getattr(error, "errno", None)
    return os.strerror(number) if number else str(error)
