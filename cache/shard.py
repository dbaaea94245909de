"""
Windows out of a shard, without zarr-python: its event loop takes ten times as long as the decoding, and hangs after a fork.

Reads what `layout.encode_tile` has zarr-python write, and nothing else: Zarr v3 `sharding_indexed` with the index at the end,
inner codecs `bytes`, `zstd`, `crc32c` (https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/v1.0.html).

Shapes: C classes, H W the tile's pixels, h w a window's.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numcodecs.checksum32 import CRC32C
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

CRC_BYTES = 4
INDEX_ENTRY_BYTES = 16  # offset and size of a chunk, two little-endian uint64
ABSENT = 2**64 - 1  # what an index says of a chunk that was not written
BYTES = {"uint8": {"name": "bytes"}, "uint16": {"name": "bytes", "configuration": {"endian": "little"}}}
COMPRESSORS = [
    {"name": "zstd", "configuration": {"level": 3, "checksum": False}},
    {"name": "crc32c"},
]

ReadRange = Callable[[int, int], bytes]
"""`(start, length)` to those bytes of the shard's file; a negative start counts from its end."""


@dataclass(frozen=True)
class Shard:
    """A tile's shard: its shape, where its chunks lie in the file, and the attributes beside it."""

    shape: tuple[int, int, int]
    chunk_px: tuple[int, int]
    dtype: np.dtype[Any]
    index: NDArray[np.uint64]  # (rows of chunks, columns of chunks, 2): offset and size
    attributes: dict[str, Any]

    def read(self, window: tuple[int, int, int, int], read_range: ReadRange) -> NDArray[Any]:
        """
        The stored integers `(C, h, w)` of `(top, left, height, width)`; only the chunks that it touches are read.

        Raises `ValueError` where a chunk is absent, does not match its checksum, or does not decode to its size.
        """
        top, left, height, width = window
        chunk_h, chunk_w = self.chunk_px
        out_Chw = np.empty((self.shape[0], height, width), dtype=self.dtype)
        rows = range(top // chunk_h, (top + height - 1) // chunk_h + 1)
        columns = range(left // chunk_w, (left + width - 1) // chunk_w + 1)
        for row, column in itertools.product(rows, columns):
            chunk_Chw = self._chunk(row, column, read_range)
            y, x = row * chunk_h, column * chunk_w
            first_y, first_x = max(top, y), max(left, x)
            last_y, last_x = min(top + height, y + chunk_h), min(left + width, x + chunk_w)
            out_Chw[:, first_y - top : last_y - top, first_x - left : last_x - left] = chunk_Chw[
                :, first_y - y : last_y - y, first_x - x : last_x - x
            ]
        return out_Chw

    def _chunk(self, row: int, column: int, read_range: ReadRange) -> NDArray[Any]:
        start, size = (int(value) for value in self.index[row, column])
        if start == ABSENT:
            raise ValueError(f"chunk {row}, {column} is absent")
        data = Zstd().decode(_checked(read_range(start, size), f"chunk {row}, {column}"))
        shape = (self.shape[0], *self.chunk_px)
        chunk_Chw = np.frombuffer(data, dtype=self.dtype)
        if chunk_Chw.size != np.prod(shape):
            raise ValueError(f"chunk {row}, {column} has {chunk_Chw.size} values, not {shape}")
        return chunk_Chw.reshape(shape)


def open_shard(metadata: bytes, read_range: ReadRange) -> Shard:
    """
    A shard from the bytes of its `zarr.json` and its file.

    Raises `ValueError` where the metadata is not of the kind that the format writes, or the index is damaged.
    """
    content = json.loads(metadata)
    try:
        num_classes, height, width = content["shape"]
        (sharding,) = content["codecs"]
        inner = sharding["configuration"]
        codecs = [BYTES[content["data_type"]], *COMPRESSORS]
        if sharding["name"] != "sharding_indexed" or inner["index_location"] != "end" or inner["codecs"] != codecs:
            raise ValueError(f"its codecs are not those of the format: {json.dumps(content['codecs'])[:300]}")
        _, chunk_h, chunk_w = inner["chunk_shape"]
        dtype = np.dtype(content["data_type"]).newbyteorder("<")
        attributes = content["attributes"]
    except (KeyError, TypeError) as err:
        raise ValueError(f"its metadata is not that of a tile ({err!r})") from err
    grid = (-(-height // chunk_h), -(-width // chunk_w))
    index_bytes = grid[0] * grid[1] * INDEX_ENTRY_BYTES + CRC_BYTES
    index = np.frombuffer(_checked(read_range(-index_bytes, index_bytes), "the index"), dtype="<u8")
    return Shard((num_classes, height, width), (chunk_h, chunk_w), dtype, index.reshape(*grid, 2), attributes)


def _checked(data: bytes, what: str) -> Any:
    """The bytes before a CRC32C, compared with it."""
    if len(data) <= CRC_BYTES:
        raise ValueError(f"{what} has only {len(data)} bytes")
    try:
        return CRC32C(location="end").decode(data)  # type: ignore[no-untyped-call]
    except RuntimeError as err:
        raise ValueError(f"{what} does not match its checksum") from err
