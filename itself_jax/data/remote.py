"""Data roots in buckets, such as `gs://BUCKET/FOLDER`: what they are, and local copies of files.

Whatever is read once is read where it lies. The pictures of a packed set are read at random and in
every epoch, so `copy` brings their files here first. Recent releases of ArrayRecord open `gs://`
themselves, but with a client and credentials of their own, which ask anew for every picture and
wait in C++, for more than ten minutes, where nobody answers.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import pathlib
import queue
import threading
from collections.abc import Iterator

from etils import epath

from itself_jax.data import records

_BLOCK = 8 << 20  # bytes asked for at a time
_PATIENCE = 300  # seconds for one of them


class CopyError(RuntimeError):
    """A file of a bucket cannot be had; the message names it and says what to do.

    It is no `records.DataError`, for which training takes another picture: thousands lie in a file.
    """


def path(root: epath.PathLike) -> epath.Path:
    """Returns the path of what a user calls a data root, `~` expanded.

    Raises:
      records.DataError: it begins as an address that is no file system's, such as `https://`.
    """
    if not is_local(root):
        # It logs, with a traceback, what it then raises.
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    try:
        return epath.Path(root).expanduser()
    except KeyError:  # epath's answer to a scheme that it does not know
        scheme = os.fspath(root).partition("://")[0]
        raise records.DataError(
            f"{root} is no path of a data set: {scheme}:// cannot be read; use a local path or a "
            "bucket's, such as gs://BUCKET/FOLDER."
        ) from None


def is_local(path: epath.PathLike) -> bool:
    return "://" not in os.fspath(path)


def user_cache() -> pathlib.Path:
    """This user's folder for what can be made again; XDG_CACHE_HOME moves it."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(cache).expanduser() / "itself_jax"


def place(sha256: str) -> pathlib.Path:
    """Returns where the copy of the file with this checksum lies, or will lie.

    Copies are called by their content, so what is packed anew can never be taken for what was
    there before.
    """
    return user_cache() / "packed" / sha256


def copy(path: epath.Path, *, size: int, sha256: str) -> pathlib.Path:
    """Returns a local copy of a file, made unless it is there already.

    A copy gets its name when it is complete and has been compared with the checksum; later only its
    size is looked at. Of several processes and threads, one copies and the others wait for it.

    Args:
      path: of the remote file.
      size: its bytes.
      sha256: its checksum, in hexadecimal.

    Raises:
      CopyError: the file cannot be read or is not the one of this checksum, or the copy cannot be
        written. Nothing that takes room stays then.
    """
    whole = place(sha256)
    if _has(whole, size):
        return whole
    part = whole.with_name(f"{whole.name}.part")
    with _writing(path, whole.parent, size):
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # a process that dies lets go of it
            if _has(whole, size):  # made while this one waited
                part.unlink(missing_ok=True)
                return whole
            try:
                file.truncate(0)
                digest = hashlib.sha256()
                for block in _blocks(path):
                    digest.update(block)
                    file.write(block)
                if digest.hexdigest() != sha256:
                    raise CopyError(
                        f"{path} is damaged: what is read from it does not have the checksum of "
                        "the manifest beside it; try again, then copy the file anew, or delete "
                        "its folder and pack again."
                    )
                file.flush()
                os.fsync(file.fileno())
                part.replace(whole)
            except BaseException:
                # Deleted, it would part those who wait for this file from those who come later.
                os.ftruncate(file.fileno(), 0)
                raise
    return whole


def _has(copy: pathlib.Path, size: int) -> bool:
    try:
        return copy.stat().st_size == size
    except OSError:
        return False


def _blocks(path: epath.Path) -> Iterator[bytes]:
    """Yields the content of a file; a thread of its own reads one block ahead.

    The thread is left behind when it has no answer: gcsfs, for one, waits without a limit for a
    connection that has gone silent, and nothing can stop its call.
    """
    blocks: queue.Queue[bytes | Exception] = queue.Queue(1)

    def read() -> None:
        try:
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    blocks.put(block)
            blocks.put(b"")
        except Exception as error:  # remote file systems raise errors of their own
            blocks.put(error)

    threading.Thread(target=read, name=f"copy {path}", daemon=True).start()
    while True:
        try:
            block = blocks.get(timeout=_PATIENCE)
        except queue.Empty:
            raise _unreadable(path, f"no answer for {_PATIENCE} s") from None
        if isinstance(block, Exception):
            raise _unreadable(path, f"{type(block).__name__}: {block}") from block
        if not block:
            return
        yield block


def _unreadable(path: epath.Path, reason: str) -> CopyError:
    return CopyError(
        f"{path} cannot be copied from its bucket ({reason}); see that it is there and that the "
        "bucket can be reached, then start the same command again."
    )


@contextlib.contextmanager
def _writing(path: epath.Path, folder: pathlib.Path, size: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CopyError(
            f"{path} ({size / 1e6:.0f} MB) cannot be copied to {folder} ({error}); make room there "
            "or set XDG_CACHE_HOME to another folder, then start the same command again."
        ) from error
