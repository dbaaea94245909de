"""
The bytes of a pack, which are a function of its cache: a zip file of uncompressed members in a fixed order, without times or owners.

The members are followed by one more, `TABLE_NAME`, that says where each lies, so that a pack of a million tiles opens without its
directory being read: a row of `(key, offset, size)` for each member, little-endian uint64, ascending by key. The zip file's comment says
where the table lies. Layouts: PKWARE's APPNOTE 6.3.9, sections 4.3.7 to 4.3.16 and 4.5.3.
"""

from __future__ import annotations

import hashlib
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

TABLE_NAME = "pack.table"
ROW = np.dtype([("key", "<u8"), ("offset", "<u8"), ("size", "<u8")])
COMMENT = re.compile(rb"kdpipe pack 1: table of ([0-9]{1,12}) members at byte ([0-9]{1,20})\.\Z")
MOST_END_BYTES = 1024  # of the records at the end of a pack, with its comment

_HEADER = struct.Struct("<4s5H3L2H")  # of a member, before its name
_ENTRY = struct.Struct("<4s6H3L5H2L")  # of a member in the directory
_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR_64 = struct.Struct("<4sLQL")
_SIZES_64, _ENTRY_64 = struct.Struct("<2H2Q"), struct.Struct("<2H3Q")
_HEADER_MARK, _ENTRY_MARK = b"PK\x03\x04", b"PK\x01\x02"
_UTF8, _STORED, _1980 = 0x800, 0, (0, 0x21)  # 1 January 1980, midnight: the earliest time that zip knows
_PLAIN, _ZIP64 = 20, 45  # the versions of zip that a reader needs
_UNIX, _MODE = 3 << 8, 0o100644 << 16
LIMIT_16, LIMIT_32 = 0xFFFF, 0xFFFFFFFF


class Member(NamedTuple):
    """A file in a pack: its name, its size in bytes, the CRC32 of its content, and the offset of its header."""

    name: str
    size: int
    crc32: int
    offset: int


def header(name: str, size: int, crc32: int) -> bytes:
    """What lies before a member's content."""
    raw = name.encode()
    large = size >= LIMIT_32
    extra = _SIZES_64.pack(1, 16, size, size) if large else b""
    shown = LIMIT_32 if large else size
    fixed = _HEADER.pack(
        _HEADER_MARK, _ZIP64 if large else _PLAIN, _UTF8, _STORED, *_1980, crc32, shown, shown, len(raw), len(extra)
    )
    return fixed + raw + extra


def header_bytes(name: str, size: int) -> int:
    """The length of `header`."""
    return _HEADER.size + len(name.encode()) + (_SIZES_64.size if size >= LIMIT_32 else 0)


def read_header(data: bytes, name: str) -> tuple[int, int] | None:
    """The size and CRC32 in a header that begins `data`, if it is one of `name` as `header` writes it; else None."""
    if len(data) < _HEADER.size or data[:4] != _HEADER_MARK:
        return None
    crc32, size = _HEADER.unpack_from(data)[6:8]
    if size == LIMIT_32:
        start = _HEADER.size + len(name.encode())
        if len(data) < start + _SIZES_64.size:
            return None
        size = _SIZES_64.unpack_from(data, start)[2]
    written = header(name, size, crc32)
    return (size, crc32) if data[: len(written)] == written else None


def entry(member: Member) -> bytes:
    """A member's entry in the directory."""
    raw = member.name.encode()
    large = member.size >= LIMIT_32 or member.offset >= LIMIT_32
    extra = _ENTRY_64.pack(1, 24, member.size, member.size, member.offset) if large else b""
    size, offset = (LIMIT_32, LIMIT_32) if large else (member.size, member.offset)
    version = _ZIP64 if large else _PLAIN
    fixed = _ENTRY.pack(
        _ENTRY_MARK, _UNIX | version, version, _UTF8, _STORED, *_1980, member.crc32, size, size, len(raw), len(extra), 0, 0, 0,
        _MODE, offset,
    )  # fmt: skip
    return fixed + raw + extra


def end(members: int, directory_start: int, directory_bytes: int, table_rows: int, table_start: int) -> bytes:
    """What lies behind the directory. All counts include the table, but `table_rows`."""
    comment = f"kdpipe pack 1: table of {table_rows} members at byte {table_start}.".encode()
    found = b""
    if members >= LIMIT_16 or directory_start >= LIMIT_32 or directory_bytes >= LIMIT_32:
        found = _END_64.pack(
            b"PK\x06\x06", _END_64.size - 12, _UNIX | _ZIP64, _ZIP64, 0, 0, members, members, directory_bytes, directory_start
        )  # fmt: skip
        found += _LOCATOR_64.pack(b"PK\x06\x07", 0, directory_start + directory_bytes, 1)
        members, directory_start = min(members, LIMIT_16), min(directory_start, LIMIT_32)
        directory_bytes = min(directory_bytes, LIMIT_32)
    return (
        found
        + _END.pack(b"PK\x05\x06", 0, 0, members, members, directory_bytes, directory_start, len(comment))
        + comment
    )


def read_end(data: bytes) -> tuple[int, int] | None:
    """The number of rows and the start of the table, from the last bytes of a pack; None if they are not a pack's."""
    place = data.rfind(b"PK\x05\x06")
    if place < 0 or len(data) - place < _END.size:
        return None
    comment = COMMENT.match(data[place + _END.size :])
    return (int(comment[1]), int(comment[2])) if comment else None


def key(name: str) -> int:
    """The first 8 bytes of the sha256 of a member's name, little-endian."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def table(names: Iterable[str], offsets: NDArray[np.uint64], sizes: NDArray[np.uint64]) -> bytes:
    """The content of the member `TABLE_NAME`."""
    rows = np.empty(len(offsets), ROW)
    rows["key"] = np.fromiter(map(key, names), np.uint64, len(offsets))
    rows["offset"], rows["size"] = offsets, sizes
    return rows[np.lexsort((rows["offset"], rows["key"]))].tobytes()


def tail(
    names: Sequence[str],
    sizes: NDArray[np.uint64],
    checksums: Sequence[int],
    offsets: NDArray[np.uint64],
    position: int,
) -> Iterator[bytes]:
    """What follows the last of these members, at `position`: the table as one more member, the directory, and the end; in pieces."""
    rows = table(names, offsets, sizes)
    crc32 = zlib.crc32(rows)
    yield header(TABLE_NAME, len(rows), crc32)
    yield rows
    directory_start = position + header_bytes(TABLE_NAME, len(rows)) + len(rows)
    directory_bytes = 0
    members = map(Member, names, sizes.tolist(), checksums, offsets.tolist())
    for member in chain(members, [Member(TABLE_NAME, len(rows), crc32, position)]):
        found = entry(member)
        directory_bytes += len(found)
        yield found
    yield end(len(names) + 1, directory_start, directory_bytes, len(names), position)


def names_in_directory(data: bytes) -> Iterator[str]:
    """The names in a zip file's directory, of which `data` begins with the first entry; ends at anything else."""
    place = 0
    while data[place : place + 4] == _ENTRY_MARK and len(data) - place >= _ENTRY.size:
        fields = _ENTRY.unpack_from(data, place)
        start = place + _ENTRY.size
        yield data[start : start + fields[10]].decode(errors="replace")
        place = start + fields[10] + fields[11] + fields[12]
