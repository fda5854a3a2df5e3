"""Files of a work directory, on a disk or in a bucket (`gs://BUCKET/FOLDER`, extra `gcs`).

A reader of such a file sees the old one or the new one, never half: on a disk it is written under
another name and renamed, in a bucket an object appears when it is complete.
"""

import contextlib
import io
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, BinaryIO

from etils import epath

from itself_jax.data import records, remote

Path = pathlib.Path | epath.Path


def place(path: Any) -> Path:
    """The path of what a user calls a directory, absolute.

    Raises:
      OSError: it begins as an address that is no file system's, such as `https://`.
    """
    if remote.is_local(path):
        return pathlib.Path(path).absolute()
    try:
        return remote.path(path)
    except records.DataError as error:
        raise OSError(
            f"{os.fspath(path)} is neither a local path nor a bucket's such as gs://BUCKET/FOLDER"
        ) from error


def write(path: Any, content: Callable[[BinaryIO], Any]) -> None:
    """Writes a file as a whole; its folder is made where it is missing.

    content: writes into the binary file that it is given.

    Raises:
      OSError: the disk is full, or the place cannot be written; nothing stays behind.
    """
    if not remote.is_local(path):
        buffer = io.BytesIO()
        content(buffer)
        with reaching(path):
            epath.Path(path).write_bytes(buffer.getvalue())
        return
    # Same folder, so that the rename stays within one file system; the process id keeps two runs
    # on one folder from writing the same temporary file.
    path = pathlib.Path(path)
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            content(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        cause = _os_error(error) if isinstance(error, Exception) else None
        if cause is None or cause is error:
            raise
        raise cause from error


def remove(folder: Path) -> None:
    """Removes a folder with everything in it, as far as that is possible."""
    if remote.is_local(folder):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        with contextlib.suppress(Exception):
            folder.rmtree()


@contextlib.contextmanager
def reaching(path: Any):
    """Turns the errors of a bucket's client, which are of its own kinds, into OSError."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if remote.is_local(path):
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        raise OSError(text[:300]) from error


def _os_error(error: BaseException | None) -> OSError | None:
    # On a full disk `np.savez` fails twice: closing its archive hides the OSError that it handles
    # behind a ValueError about an open handle.
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error
