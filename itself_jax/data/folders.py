"""What lies on disk: entries whatever the case of their names, text files, pictures that are gone.

Folders may be local or remote (`gs://...`); each is listed once, because a question per file takes
minutes on network file systems.
"""

from __future__ import annotations

import concurrent.futures
import os
import pathlib
import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from etils import epath

from itself_jax.data import records, remote

_NUM_THREADS = 16  # folders listed at a time: remote ones answer slowly
_SHOWN = 12


class Located(NamedTuple):
    """Which pictures of an image folder are not where the annotation says."""

    missing: dict[int, str | None]  # index: another spelling of it that exists, if there is one
    outside: tuple[int, ...]  # links that lead out of the image folder, which are refused


def find(folder: epath.Path, wanted: Iterable[str]) -> list[epath.Path]:
    """Entries of `folder` called as one of `wanted`: in their order, the exact spelling first.

    Case and the signs "-", "_" and " " make no difference, so "CUHK-PEDES" is "cuhk_pedes" too.
    """
    entries = names(folder)
    found = []
    for name in wanted:
        alike = [entry for entry in entries if _loose(entry) == _loose(name)]
        found += [entry for entry in sorted(alike, key=lambda entry: (entry != name, entry))]
    return [folder / entry for entry in dict.fromkeys(found)]


def names(folder: epath.Path) -> list[str]:
    """Sorted names of a folder's entries; none when it is no folder."""
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except Exception:  # absent, not a folder, a NUL in its name; or a remote file system's own
        return []


def content(folder: epath.Path) -> str:
    """What a folder holds, in words, for an error message."""
    try:
        if not folder.exists():
            return "does not exist"
        if not folder.is_dir():
            return "is a file"
        entries = sorted(folder.iterdir())
    except Exception as error:  # remote file systems raise errors of their own
        return f"cannot be listed ({error})"
    if not entries:
        return "is empty"
    shown = [f"{entry.name}/" if entry.is_dir() else entry.name for entry in entries[:_SHOWN]]
    more = f" and {len(entries) - _SHOWN} more" if len(entries) > _SHOWN else ""
    return f"holds {', '.join(shown)}{more}"


def read_text(path: epath.Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark.

    Raises:
      records.DataError: the file cannot be read, or is no UTF-8 text.
    """
    try:
        data = path.read_bytes()
    except Exception as error:  # remote file systems raise errors of their own
        raise records.DataError(f"{path} cannot be read: {error}; restore it.") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise records.DataError(
            f"{path} cannot be read as UTF-8 text: {error.reason} in line {line}, at byte "
            f"{error.start}; save it as UTF-8."
        ) from error


def locate(root: epath.Path, paths: Sequence[str]) -> Located:
    """Looks which of `paths`, relative to `root`, exist below it.

    A link counts as the file it leads to; one that leads out of `root` is refused, whether it is
    the picture or a folder on the way. `root` itself may be a link.
    """
    pure = [pathlib.PurePosixPath(path) for path in paths]
    parents = sorted({path.parent for path in pure})
    with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS, "list") as pool:
        listed = pool.map(lambda parent: _list(root, parent), parents)
        folders = dict(zip(parents, listed, strict=True))
    missing = {}
    outside = []
    spellings = _Spellings(root)
    for index, path in enumerate(pure):
        folder = folders[path.parent]
        if path.name not in folder.names:
            missing[index] = spellings.other(paths[index])
        elif folder.outside or path.name in folder.outside_names:
            outside.append(index)
    return Located(missing, tuple(outside))


class _Folder(NamedTuple):
    names: frozenset[str]
    outside: bool  # the folder itself lies outside
    outside_names: frozenset[str]


def _list(root: epath.Path, parent: pathlib.PurePosixPath) -> _Folder:
    if not remote.is_local(root):
        return _Folder(frozenset(names(root / parent)), False, frozenset())
    found, outside_names = set(), set()
    try:
        base = os.path.realpath(root)
        outside = not _is_below(os.path.realpath(root / parent), base)
        with os.scandir(root / parent) as entries:
            for entry in entries:
                if not entry.is_symlink():
                    found.add(entry.name)
                elif os.path.exists(entry.path):
                    found.add(entry.name)
                    if not _is_below(os.path.realpath(entry.path), base):
                        outside_names.add(entry.name)
    except (OSError, ValueError):  # absent, not a folder, or a NUL in its name
        return _Folder(frozenset(), False, frozenset())
    return _Folder(frozenset(found), outside, frozenset(outside_names))


class _Spellings:
    """Finds a path whose names differ in case, accents' encoding or the kind of slash."""

    def __init__(self, root: epath.Path):
        self._root = root
        self._folded: dict[str, dict[str, str]] = {}  # folder: folded name: name

    def other(self, path: str) -> str | None:
        found = ""
        for part in pathlib.PurePosixPath(path.replace("\\", "/")).parts:
            if found not in self._folded:
                self._folded[found] = {_fold(name): name for name in names(self._root / found)}
            name = self._folded[found].get(_fold(part))
            if name is None:
                return None
            found = f"{found}/{name}" if found else name
        return found


def _is_below(path: str, base: str) -> bool:
    return path == base or path.startswith(base.rstrip(os.sep) + os.sep)


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _loose(name: str) -> str:
    return _fold(name).replace("-", "").replace("_", "").replace(" ", "")
