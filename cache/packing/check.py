"""Whether each byte of a pack is what `pack` would write for its contents."""

from __future__ import annotations

import zlib
from array import array

import numpy as np

from kdpipe.cache.manifest import Manifest
from kdpipe.cache.packing.pack import members_of
from kdpipe.cache.storage import zip_format
from kdpipe.cache.storage.packed import PackedStorage

BLOCK_BYTES = 1 << 23


def fault_of(storage: PackedStorage, manifest: Manifest) -> str | None:
    """
    What is wrong with the bytes around the members' contents, in one sentence, or with a content's checksum; None where nothing is.

    All of the pack is read, once, in order. The contents' digests are for others to compare (see `integrity`).
    """
    stream = _Stream(storage)
    names: list[str] = []
    sizes, offsets, checksums = array("Q"), array("Q"), array("I")
    for name, _ in members_of(manifest):
        position = stream.position
        found = zip_format.read_header(stream.peek(zip_format.header_bytes(name, zip_format.LIMIT_32)), name)
        if found is None:
            return f"at byte {position} should be the member {name}, and is not, or not as kdpipe writes it"
        size, crc32 = found
        stream.take(zip_format.header_bytes(name, size))
        if stream.checksum(size) != crc32:
            return f"the content of {name} does not match its checksum"
        names.append(name)
        sizes.append(size)
        offsets.append(position)
        checksums.append(crc32)
    written = zip_format.tail(
        names, np.array(sizes, np.uint64), checksums, np.array(offsets, np.uint64), stream.position
    )
    for piece in written:
        position = stream.position
        if stream.take(len(piece)) != piece:
            return f"its table or directory is damaged, near byte {position}"
    return f"something follows its end, at byte {stream.position}" if stream.peek(1) else None


class _Stream:
    """The bytes of a pack from its start, read in blocks."""

    def __init__(self, storage: PackedStorage) -> None:
        self._storage = storage
        self._size = storage.size()
        self._block = memoryview(b"")
        self._read = 0
        self.position = 0

    def peek(self, count: int) -> bytes:
        """The next bytes, fewer at the end."""
        left = self._size - self._read
        if len(self._block) < count and left > 0:
            more = self._storage.piece(self._read, min(left, max(BLOCK_BYTES, count)))
            self._read += len(more)
            self._block = memoryview(bytes(self._block) + more)
        return bytes(self._block[:count])

    def take(self, count: int) -> bytes:
        """The next bytes, fewer at the end, and go on behind them."""
        found = self.peek(count)
        self._block = self._block[len(found) :]
        self.position += len(found)
        return found

    def checksum(self, count: int) -> int:
        """The CRC32 of the next bytes, fewer at the end; go on behind them."""
        crc32 = 0
        while count and (piece := self.take(min(count, BLOCK_BYTES))):
            crc32 = zlib.crc32(piece, crc32)
            count -= len(piece)
        return crc32
