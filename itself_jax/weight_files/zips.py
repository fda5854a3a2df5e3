"""The entries of a zip file: where their bytes lie.

Not `zipfile`: it wants a file to be kept open, takes whatever the directory claims, and decides
itself what is read into memory. Here an entry is a range of bytes of the file, checked against all
others.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple, NoReturn

from itself_jax.weight_files import source as source_lib

MAGIC = b"PK\x03\x04"
MAX_ENTRIES = 100_000
MAX_DIRECTORY = 32 << 20

_STORED, _DEFLATED = 0, 8
_MAX_RATIO = 1032  # what deflate can reach
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")


class Entry(NamedTuple):
    """One file in a zip file."""

    source: source_lib.Source
    name: str
    start: int  # of its bytes in the file
    stored: int  # bytes in the file
    size: int  # bytes when unpacked
    crc: int
    deflated: bool

    def read(self, limit: int) -> bytes:
        """Returns its bytes, unpacked and checked.

        Raises:
          WeightFileError: there are more than `limit`, or they are damaged.
        """
        if self.size > limit:
            self._refuse(f"has {self.size} bytes, more than the {limit} that belong there")
        return b"".join(bytes(piece) for piece in self.checked_pieces())

    def verify(self) -> None:
        """Compares the bytes with their checksum.

        Raises:
          WeightFileError: they are damaged.
        """
        for _ in self.checked_pieces():
            pass

    def checked_pieces(self) -> Iterator[memoryview | bytes]:
        """Like `pieces`, and compares them with their checksum behind the last."""
        crc = 0
        for piece in self.pieces():
            crc = zlib.crc32(piece, crc)
            yield piece
        # torch can be told to compute no checksums; it then writes zeros.
        if self.crc not in (0, crc):
            self._refuse("does not match its checksum")

    def pieces(self) -> Iterator[memoryview | bytes]:
        """Yields the bytes, unpacked; a piece is valid until the next."""
        if not self.deflated:
            yield from self.source.pieces(self.start, self.stored)
            return
        unpacker, left = zlib.decompressobj(-15), self.size
        try:
            for packed in self.source.pieces(self.start, self.stored):
                rest = bytes(packed)
                while rest and not unpacker.eof:
                    piece = unpacker.decompress(rest, 1 << 20)
                    rest = unpacker.unconsumed_tail
                    left -= len(piece)
                    if left < 0:
                        self._refuse(f"unpacks to more than its {self.size} bytes")
                    yield piece
        except zlib.error as error:
            self._refuse(f"cannot be unpacked ({error})")
        if left or not unpacker.eof:
            self._refuse(f"unpacks to {self.size - left} bytes instead of {self.size}")

    def _refuse(self, what: str) -> NoReturn:
        self.source.refuse(f"is damaged: its entry {source_lib.show(self.name)} {what}")


def entries(source: source_lib.Source) -> dict[str, Entry]:
    """Returns the entries by name, in the order of the directory; folders are left out.

    Raises:
      WeightFileError: the directory is cut off, damaged, or too large; an entry is encrypted,
        packed in an unusual way, occurs twice, leads out of the archive, or overlaps another.
    """
    found: dict[str, Entry] = {}
    taken: list[tuple[int, int]] = []  # where entries lie, headers included
    directory, end = _directory(source)
    at = 0
    while at < len(directory):
        at, header, entry = _entry(source, directory, at, end)
        if entry.name in found:
            source.refuse(f"has two entries {source_lib.show(entry.name)}")
        if len(taken) >= MAX_ENTRIES:
            source.refuse(f"has more than {MAX_ENTRIES} entries", "give a file of weights")
        found[entry.name] = entry
        taken.append((header, entry.start + entry.stored))
    taken.sort()
    for (_, before), (after, _) in zip(taken, taken[1:], strict=False):
        if after < before:
            source.refuse("is damaged: two of its entries overlap")
    return {name: entry for name, entry in found.items() if not name.endswith("/")}


def _directory(source: source_lib.Source) -> tuple[bytes, int]:
    """Returns the central directory and where it starts."""
    tail_start = max(0, source.size - _END.size - 0xFFFF)
    tail = source.read(tail_start, source.size - tail_start)
    at = tail.rfind(b"PK\x05\x06")
    while at >= 0:
        if at + _END.size <= len(tail):
            end = _END.unpack_from(tail, at)
            if at + _END.size + end[7] == len(tail):
                break
        at = tail.rfind(b"PK\x05\x06", 0, at)
    else:
        source.refuse("is a zip file that is cut off: the directory at its end is missing")
    _, disk, first_disk, here, count, size, start, _ = end
    before_end = tail_start + at
    locator = source.read(before_end - _LOCATOR.size, _LOCATOR.size)
    if locator[:4] == b"PK\x06\x07" and len(locator) == _LOCATOR.size:
        _, _, place, disks = _LOCATOR.unpack(locator)
        record = source.read(place, _END64.size)
        if len(record) < _END64.size or record[:4] != b"PK\x06\x06" or disks > 1:
            source.refuse("is damaged: the end of its zip directory is not where it should be")
        _, _, _, _, disk, first_disk, here, count, size, start = _END64.unpack(record)
        before_end = place
    if disk or first_disk or here != count:
        source.refuse("is one part of a zip file in several parts", "give a whole file")
    if size > MAX_DIRECTORY or count > MAX_ENTRIES:
        source.refuse(
            f"has a zip directory of {size} bytes and {count} entries, more than weights need",
            "give a file of weights",
        )
    if start + size != before_end:
        source.refuse("is damaged: its zip directory is not where it should be")
    return source.read(start, size), start


def _entry(
    source: source_lib.Source, directory: bytes, at: int, end: int
) -> tuple[int, int, Entry]:
    """Returns where the directory's next entry is, where this one's header is, and this one."""
    if at + _ENTRY.size > len(directory) or directory[at : at + 4] != b"PK\x01\x02":
        source.refuse("is damaged: its zip directory cannot be read")
    fields = _ENTRY.unpack_from(directory, at)
    _, _, _, flags, method, _, _, crc, stored, size, name_size, extra_size, note_size = fields[:13]
    header = fields[16]
    at += _ENTRY.size
    raw_name = directory[at : at + name_size]
    extra = directory[at + name_size : at + name_size + extra_size]
    at += name_size + extra_size + note_size
    if at > len(directory):
        source.refuse("is damaged: its zip directory cannot be read")
    size, stored, header = _long_sizes(source, extra, size, stored, header)
    name = _name(source, raw_name, flags)
    shown = source_lib.show(name)
    if flags & 0x2041:
        source.refuse(f"has an encrypted entry {shown}", "unpack it and save it without a password")
    if method not in (_STORED, _DEFLATED):
        source.refuse(f"packs its entry {shown} in a way (method {method}) that weights never use")
    if (method == _STORED and stored != size) or size > stored * _MAX_RATIO:
        source.refuse(f"is damaged: its entry {shown} has {stored} bytes that stand for {size}")
    local = source.read(header, _LOCAL.size + name_size)
    if len(local) < _LOCAL.size + name_size or local[:4] != MAGIC:
        source.refuse(f"is damaged: its entry {shown} is not where the directory says")
    _, _, local_flags, local_method, _, _, _, local_stored, local_size, n, x = _LOCAL.unpack_from(
        local
    )
    sizes = (local_stored, local_size)
    known = local_flags & 8 or 0xFFFFFFFF in sizes or sizes == (stored, size)
    if local[_LOCAL.size :] != raw_name or n != name_size or local_method != method or not known:
        source.refuse(f"is damaged: its entry {shown} says otherwise than the directory")
    start = header + _LOCAL.size + n + x
    if start + stored > end:
        source.refuse(f"is damaged: its entry {shown} reaches beyond the data")
    return at, header, Entry(source, name, start, stored, size, crc, method == _DEFLATED)


def _long_sizes(
    source: source_lib.Source, extra: bytes, size: int, stored: int, header: int
) -> tuple[int, int, int]:
    """Replaces what did not fit 32 bits by the values of the zip64 field."""
    values = [size, stored, header]
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            field = extra[at + 4 : at + 4 + length]
            for i, value in enumerate(values):
                if value == 0xFFFFFFFF:
                    if len(field) < 8:
                        source.refuse("is damaged: an entry of its zip directory has no size")
                    values[i], field = int.from_bytes(field[:8], "little"), field[8:]
            break
        at += 4 + length
    return values[0], values[1], values[2]


def _name(source: source_lib.Source, raw: bytes, flags: int) -> str:
    try:
        name = raw.decode("utf-8" if flags & 0x800 else "cp437")
    except UnicodeDecodeError:
        source.refuse(f"is damaged: its zip directory has an entry {source_lib.show(raw)}")
    strange = name.startswith("/") or "\\" in name or ".." in name.split("/")
    if strange or not name.isprintable() or not name:
        source.refuse(
            f"has an entry {source_lib.show(name)}, which would lie outside of it",
            "do not trust this file",
        )
    return name
