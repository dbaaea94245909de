"""
A tile's shard as bytes, and windows read from it, without zarr-python.

Around the (de)compression zarr-python takes ten times as long when reading, longer than the compression when writing, and its
event loop hangs after a fork.

Covers the one kind of shard that the format has, with the bytes that zarr-python writes: Zarr v3 `sharding_indexed` with the
index at the end, inner codecs `bytes`, `zstd`, `crc32c`
(https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/v1.0.html).

Shapes: C classes, H W the tile's pixels, h w a window's or chunk's. A chunk's place is its row and column in the grid of chunks.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from kdpipe.cache.spill import Spill

CRC_BYTES = 4
INDEX_ENTRY_BYTES = 16  # offset and size of a chunk, two little-endian uint64
DIGEST_BYTES = 16  # of a chunk: the first half of its sha256
MAX_CHUNKS = 2**20  # more than 2**30 px have in chunks of 256 px, even in a single row
MAX_CHUNK_VALUES = 2**28  # 256 x 256 px of 4,096 classes
ABSENT = 2**64 - 1  # the index entry of a chunk that was not written
BYTES = {"uint8": {"name": "bytes"}, "uint16": {"name": "bytes", "configuration": {"endian": "little"}}}
COMPRESSORS = [  # of this version and of earlier ones
    [{"name": "zstd", "configuration": {"level": level, "checksum": False}}, {"name": "crc32c"}] for level in (3, 7)
]

ReadRanges = Callable[[Sequence[tuple[int, int]]], list[bytes]]
"""Returns the bytes of the shard's file in each `(start, length)`; a negative start counts from its end."""


def in_memory(file: bytes) -> ReadRanges:
    """A `ReadRanges` of a file in memory."""

    def read_ranges(spans: Sequence[tuple[int, int]]) -> list[bytes]:
        starts = (start if start >= 0 else max(0, len(file) + start) for start, _ in spans)
        return [file[start : start + length] for start, (_, length) in zip(starts, spans, strict=True)]

    return read_ranges


@dataclass(frozen=True)
class Shard:
    """A tile's shard: its shape, the places of its chunks in the file, and the attributes of its metadata."""

    shape: tuple[int, int, int]
    chunk_px: tuple[int, int]
    dtype: np.dtype[Any]
    index: NDArray[np.uint64]  # (rows of chunks, columns of chunks, 2): offset and size
    attributes: dict[str, Any]
    digests: NDArray[np.uint8] | None = None  # (rows of chunks, columns of chunks, 16): as `chunk_digest` returns them

    def checksums(self, file: bytes) -> NDArray[np.uint32]:
        """The CRC32C of each chunk, uint32 `(rows, columns)` of chunks, from the bytes of the whole file; `read` compares them."""
        crcs = np.zeros(self.index.shape[:2], dtype=np.uint32)
        for place in np.ndindex(crcs.shape):
            end = sum(map(int, self.index[place]))
            crcs[place] = int.from_bytes(file[max(0, end - CRC_BYTES) : end], "little")
        return crcs

    def read(
        self,
        window: tuple[int, int, int, int],
        read_ranges: ReadRanges,
        checksums: NDArray[np.uint32] | None = None,
    ) -> NDArray[Any]:
        """
        The stored integers `(C, h, w)` of a window `(top, left, height, width)`; only its chunks are read, all in one call.

        Raises `ValueError` where a chunk is absent, does not match its digest or its checksum, or does not decode to its size.
        `checksums` are those of chunks that were compared with their digests before, zero for others, and are added to; a chunk with
        another one than there has been replaced since.
        """
        top, left, height, width = window
        chunk_h, chunk_w = self.chunk_px
        # In memory the classes of a row are adjacent, which halves the time of adding up rows.
        out_Chw = np.empty((height, self.shape[0], width), dtype=self.dtype).transpose(1, 0, 2)
        rows = range(top // chunk_h, (top + height - 1) // chunk_h + 1)
        columns = range(left // chunk_w, (left + width - 1) // chunk_w + 1)
        places = list(itertools.product(rows, columns))
        found = read_ranges([self._span(place) for place in places])
        # One buffer for all chunks: new memory costs as much as decoding.
        chunk_Chw = np.empty((self.shape[0], chunk_h, chunk_w), dtype=self.dtype)
        for place, data in zip(places, found, strict=True):
            self._decode(place, data, checksums, out_Chw=chunk_Chw)
            row, column = place
            y, x = row * chunk_h, column * chunk_w
            first_y, first_x = max(top, y), max(left, x)
            last_y, last_x = min(top + height, y + chunk_h), min(left + width, x + chunk_w)
            out_Chw[:, first_y - top : last_y - top, first_x - left : last_x - left] = chunk_Chw[
                :, first_y - y : last_y - y, first_x - x : last_x - x
            ]
        return out_Chw

    def _span(self, place: tuple[int, int]) -> tuple[int, int]:
        """Start and length of a chunk in the file."""
        start, size = self.index[place].tolist()
        if start == ABSENT:
            raise ValueError(f"{_name(place)} is absent")
        # A frame is hardly larger than its content; this keeps a damaged index from allocating what it declares.
        if size > 2 * math.prod((self.shape[0], *self.chunk_px)) * self.dtype.itemsize + 1024:
            raise ValueError(f"{_name(place)} should have {size} bytes, more than its values")
        return start, size

    def _decode(
        self, place: tuple[int, int], data: bytes, checksums: NDArray[np.uint32] | None, out_Chw: NDArray[Any]
    ) -> None:
        known, crc = 0 if checksums is None else int(checksums[place]), int.from_bytes(data[-CRC_BYTES:], "little")
        if known and crc != known:
            raise ValueError(f"{_name(place)} was replaced by another")
        frame = _checked(data, _name(place))
        if not known and self.digests is not None:  # a digest takes a twentieth of a crop's time, and is compared once
            if chunk_digest(data) != self.digests[place].tobytes():
                raise ValueError(f"{_name(place)} is not what was written")
            if checksums is not None:
                checksums[place] = crc
        declared = _frame_size(frame)
        if declared != out_Chw.nbytes:
            raise ValueError(f"{_name(place)} declares {declared} bytes, not those of {out_Chw.shape} values")
        try:
            Zstd().decode(frame, out=out_Chw)
        except RuntimeError as err:
            raise ValueError(f"{_name(place)} does not decode ({err})") from err


@dataclass(frozen=True)
class SpilledShard:
    """A shard whose chunks lie in a temporary file, in the order in which they were made."""

    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    index: NDArray[np.uint64]  # as in `Shard`
    spill: Spill
    spans: dict[tuple[int, int], tuple[int, int]]  # start and length in `spill`, in the order of the shard's file
    digests: bytes  # those of its chunks, row by row

    @property
    def size(self) -> int:
        """The number of bytes of the shard's file."""
        return int(self.index[..., 1].sum()) + self.index.nbytes + CRC_BYTES

    def pieces(self) -> Iterator[bytes]:
        """
        The bytes of the shard's file in order, one chunk at a time.

        Raises `CacheError` where the temporary file does not return what was put into it, lest a digest vouch for that.
        """
        for place, span in self.spans.items():
            frame = self.spill.take(*span)
            try:
                _checked(frame, _name(place))
            except ValueError as err:
                raise self.spill.failed(err) from err
            yield frame
        yield _with_checksum(self.index.tobytes())


def chunk_digest(data: bytes) -> bytes:
    """The digest of an encoded chunk, `DIGEST_BYTES` long."""
    return hashlib.sha256(data).digest()[:DIGEST_BYTES]


def encode_shard(units_CHW: NDArray[Any], chunk_px: tuple[int, int], level: int) -> tuple[bytes, bytes]:
    """
    The bytes of a shard, and the digests of its chunks, row by row.

    Chunks of zeros are stored too: an absent chunk could not be told from a lost one.
    `units_CHW` are the tile's integers, uint8 or uint16 `(C, H, W)`; `chunk_px` is the height and width of a chunk, `level` that
    of Zstandard.
    """
    zstd = Zstd(level=level)
    frames: dict[tuple[int, int], bytes] = {}
    for row, top in enumerate(range(0, units_CHW.shape[1], chunk_px[0])):
        frames.update(_encode_row(units_CHW[:, top : top + chunk_px[0]], row, chunk_px, zstd))
    order, index = _lay_out({place: len(frame) for place, frame in frames.items()})
    shard = b"".join([*(frames[place] for place in order), _with_checksum(index.tobytes())])
    return shard, b"".join(map(chunk_digest, frames.values()))


def spill_shard(
    rows_of_chunks: Iterable[NDArray[Any]], height: int, chunk_px: tuple[int, int], level: int, spill: Spill
) -> SpilledShard:
    """
    The shard that `encode_shard` makes, from rows of chunks `(C, h, W)` from the top, `height` px in all; one row is in memory.

    The file is not in the order of rows, so the chunks wait in `spill` until all are made; its errors are raised.
    """
    zstd, spans, digests = Zstd(level=level), {}, bytearray()
    for row, units_ChW in enumerate(rows_of_chunks):
        num_classes, rows, width = units_ChW.shape
        assert rows == min(chunk_px[0], height - row * chunk_px[0]), f"{rows} rows in row {row} of chunks"
        for place, frame in _encode_row(units_ChW, row, chunk_px, zstd):
            spans[place] = spill.put(frame), len(frame)
            digests += chunk_digest(frame)
    order, index = _lay_out({place: length for place, (_, length) in spans.items()})
    assert len(index) == -(-height // chunk_px[0]), f"{len(index)} rows of chunks for {height} px"
    spans = {place: spans[place] for place in order}
    return SpilledShard((num_classes, height, width), units_ChW.dtype, index, spill, spans, bytes(digests))


def _encode_row(
    units_ChW: NDArray[Any], row: int, chunk_px: tuple[int, int], zstd: Zstd
) -> Iterator[tuple[tuple[int, int], bytes]]:
    """The place of each chunk in row number `row`, and its bytes in the file."""
    num_classes, rows, width = units_ChW.shape
    chunk_h, chunk_w = chunk_px
    for column in range(-(-width // chunk_w)):
        values_Chw = units_ChW[:, :, column * chunk_w : (column + 1) * chunk_w]
        chunk_Chw = np.zeros((num_classes, chunk_h, chunk_w), dtype=units_ChW.dtype.newbyteorder("<"))
        chunk_Chw[:, :rows, : values_Chw.shape[2]] = values_Chw
        yield (row, column), _with_checksum(zstd.encode(chunk_Chw))


def _lay_out(sizes: dict[tuple[int, int], int]) -> tuple[list[tuple[int, int]], NDArray[np.uint64]]:
    """The order of the chunks in the file, and the index `(rows, columns, 2)`, from the size of each chunk in bytes."""
    last_row, last_column = max(sizes)
    index = np.empty((last_row + 1, last_column + 1, 2), dtype="<u8")
    assert len(sizes) == index[..., 0].size, f"{len(sizes)} chunks of {index.shape}"
    order, offset = sorted(sizes, key=_morton_code), 0
    for place in order:
        index[place] = offset, sizes[place]
        offset += sizes[place]
    return order, index


def _morton_code(place: tuple[int, int]) -> int:
    """The bits of row and column interleaved: zarr-python's order of chunks in a shard, which keeps neighbours close."""
    return sum(
        (place[axis] >> bit & 1) << (2 * bit + axis) for axis in (0, 1) for bit in range(max(place).bit_length())
    )


def index_span(grid: tuple[int, int]) -> tuple[int, int]:
    """Start, counted from the end, and length of the index in the file of a shard with so many rows and columns of chunks."""
    length = grid[0] * grid[1] * INDEX_ENTRY_BYTES + CRC_BYTES
    return -length, length


def open_shard(metadata: bytes, read_ranges: ReadRanges) -> Shard:
    """
    The shard with this `zarr.json`, without digests of its chunks; its index is read from the file.

    Raises `ValueError` where the metadata is not of the kind that the format has, or the index is damaged.
    """
    try:
        content = json.loads(metadata)
    except RecursionError as err:
        raise ValueError("its metadata is nested too deep") from err
    try:
        num_classes, height, width = content["shape"]
        (sharding,) = content["codecs"]
        inner = sharding["configuration"]
        known = [[BYTES[content["data_type"]], *compressors] for compressors in COMPRESSORS]
        if sharding["name"] != "sharding_indexed" or inner["index_location"] != "end" or inner["codecs"] not in known:
            raise ValueError(f"its codecs are not those of the format: {json.dumps(content['codecs'])[:300]}")
        num_channels, chunk_h, chunk_w = inner["chunk_shape"]
        numbers = (num_classes, height, width, num_channels, chunk_h, chunk_w)
        if any(type(number) is not int or number < 1 for number in numbers) or num_channels != num_classes:
            raise ValueError(f"its shape {content['shape']} and that of its chunks {inner['chunk_shape']} do not fit")
        if chunk_h > height or chunk_w > width or num_classes * chunk_h * chunk_w > MAX_CHUNK_VALUES:
            raise ValueError(f"its chunks of {inner['chunk_shape']} values are larger than the format has them")
        dtype = np.dtype(content["data_type"]).newbyteorder("<")
        attributes = content["attributes"]
        if not isinstance(attributes, dict):
            raise TypeError("attributes")
    except (KeyError, TypeError) as err:
        raise ValueError(f"its metadata is not that of a tile ({err!r:.200})") from err
    grid = (-(-height // chunk_h), -(-width // chunk_w))
    if grid[0] * grid[1] > MAX_CHUNKS:
        raise ValueError(f"its shape {content['shape']} is larger than any tile")
    index = np.frombuffer(_checked(read_ranges([index_span(grid)])[0], "the index"), dtype="<u8").reshape(*grid, 2)
    return Shard((num_classes, height, width), (chunk_h, chunk_w), dtype, index, attributes)


def _with_checksum(data: bytes) -> bytes:
    crc: int = google_crc32c.value(data)
    return data + crc.to_bytes(CRC_BYTES, "little")


def _checked(data: bytes, what: str) -> bytes:
    """`data` without the CRC32C at its end; `ValueError` where that does not match."""
    if len(data) <= CRC_BYTES:
        raise ValueError(f"{what} has only {len(data)} bytes")
    content = data[:-CRC_BYTES]
    if google_crc32c.value(content) != int.from_bytes(data[-CRC_BYTES:], "little"):
        raise ValueError(f"{what} does not match its checksum")
    return content


def _name(place: tuple[int, int]) -> str:
    return f"chunk {place[0]}, {place[1]}"


def _frame_size(frame: bytes) -> int | None:
    """
    The size in bytes that a Zstandard frame declares for its content, None if it declares none.

    Layout (https://www.rfc-editor.org/rfc/rfc8878#section-3.1.1): magic number, descriptor, window (absent in a single segment),
    dictionary id, size.
    """
    if frame[:4] != b"\x28\xb5\x2f\xfd" or len(frame) < 5:
        raise ValueError("a chunk is not a Zstandard frame")
    descriptor = frame[4]
    single_segment = descriptor >> 5 & 1
    start = 5 + (0 if single_segment else 1) + (0, 1, 2, 4)[descriptor & 3]
    length = (single_segment, 2, 4, 8)[descriptor >> 6]
    size = int.from_bytes(frame[start : start + length], "little") + (256 if length == 2 else 0)
    return size if length else None
