"""The records of a cache's tiles in columns: 140 bytes a tile, so that a million of them open at once."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from kdpipe.cache.index.records import MAX_TILE_PX, ImageDigest, TileRecord, node_path

NUMBERS = ("height", "width", "image_bytes", "shard_bytes")
DIGESTS = ("image_sha256", "shard_sha256", "metadata_sha256")
DIGEST_BYTES = 32
NAMES = ("id", "id_end", "by_id", *NUMBERS, *DIGESTS)
PLAIN_BLOCK = 1 << 16  # tiles whose ids are looked at together
BLOCK = 1024  # records that are made at once while all are gone through
_Row = tuple[str, int, int, int, str, int, str, str]  # the fields of a record, those of its image after its size


class TileIndex(Sequence[TileRecord]):
    """
    The records of N tiles in the order of the configuration, found by place or by id.

    `columns` has by name of `NAMES`: `id` the ids in UTF-8, one after another, uint8; `id_end` (N,) where each ends in it; `by_id` (N,) the
    places of the tiles, sorted by the bytes of their ids; the `NUMBERS` (N,) and the `DIGESTS` (N, 32) uint8 of `TileRecord`. Numbers are
    of the smallest unsigned type that holds them. The columns may lie in a mapped file.
    """

    def __init__(self, columns: Mapping[str, NDArray[Any]]) -> None:
        self.columns = dict(columns)
        self._text = np.ascontiguousarray(self.columns["id"]).data
        self._ends, self._by_id = self.columns["id_end"], self.columns["by_id"]

    @classmethod
    def of(cls, records: Iterable[TileRecord]) -> TileIndex:
        """The index of these records, in their order."""
        text, ends, last, is_sorted = bytearray(), array("Q"), b"", True
        numbers: list[array[int]] = [array("Q") for _ in NUMBERS]
        digests = [bytearray() for _ in DIGESTS]
        for record in records:
            encoded = record.id.encode()
            is_sorted, last = is_sorted and encoded > last, encoded
            text += encoded
            ends.append(len(text))
            values = (record.height, record.width, record.image.size_bytes, record.shard_bytes)
            for column, value in zip(numbers, values, strict=True):
                column.append(value)
            for into, digest in zip(
                digests, (record.image.sha256, record.shard_sha256, record.metadata_sha256), strict=True
            ):
                into += bytes.fromhex(digest)
        columns = {
            "id": np.frombuffer(bytes(text), np.uint8),
            "id_end": _smallest(ends),
            "by_id": _smallest(range(len(ends)) if is_sorted else _order(bytes(text), ends)),
            **{name: _smallest(column) for name, column in zip(NUMBERS, numbers, strict=True)},
            **{
                name: np.frombuffer(bytes(column), np.uint8).reshape(-1, DIGEST_BYTES)
                for name, column in zip(DIGESTS, digests, strict=True)
            },
        }
        return cls(columns)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, place: int) -> TileRecord: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[TileRecord]: ...
    def __getitem__(self, place: int | slice) -> TileRecord | Sequence[TileRecord]:
        """A tile's record, or a list of them; `IndexError` where there is none."""
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        place = range(len(self))[place]
        return next(self._records(place, place + 1))

    def __iter__(self) -> Iterator[TileRecord]:
        for start in range(0, len(self), BLOCK):
            yield from self._records(start, min(start + BLOCK, len(self)))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, TileIndex):
            return all(np.array_equal(self.columns[name], other.columns[name]) for name in NAMES)
        if isinstance(other, Sequence):  # a record of each tile takes twice as long
            return len(self) == len(other) and all(
                mine == _row_of(its)
                for start in range(0, len(self), BLOCK)
                for mine, its in zip(
                    self._rows(start, min(start + BLOCK, len(self))), other[start : start + BLOCK], strict=True
                )
            )
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return TileIndex, (self.columns,)

    def __repr__(self) -> str:
        return f"TileIndex of {len(self)} tiles"

    def find(self, tile_id: str) -> TileRecord | None:
        """The record of the tile with this id, None if there is none; in log2(N) steps."""
        wanted, low, high = tile_id.encode(errors="surrogatepass"), 0, len(self)
        while low < high:
            middle = (low + high) // 2
            place = int(self._by_id[middle])
            found = self._id(place)
            if found == wanted:
                return self[place]
            low, high = (middle + 1, high) if found < wanted else (low, middle)
        return None

    def ids(self) -> Iterator[str]:
        """The ids of the tiles in order."""
        start, text = 0, self._text
        for block in range(0, len(self), BLOCK):
            for end in self._ends[block : block + BLOCK].tolist():
                yield bytes(text[start:end]).decode()
                start = end

    def images(self) -> Iterator[tuple[str, str]]:
        """The id and the image's sha256 of each tile, in the order of the ids' code points."""
        digests = self.columns["image_sha256"]
        for block in range(0, len(self), BLOCK):
            for place in self._by_id[block : block + BLOCK].tolist():
                yield self._id(place).decode(), digests[place].tobytes().hex()

    @property
    def pixels(self) -> int:
        """The pixels of all tiles."""
        return int((self.columns["height"].astype(np.uint64) * self.columns["width"]).sum())

    @property
    def shard_bytes(self) -> int:
        """The bytes of all tiles' shards."""
        return int(self.columns["shard_bytes"].sum(dtype=np.uint64))

    def require_consistent(self) -> None:
        """
        Raise `ValueError` where the columns do not fit each other, or an id is not a valid one.

        Whether two tiles have one id takes longer: see `require_unique`.
        """
        count = len(self)
        for name in NAMES[1:]:
            column = self.columns[name]
            shape = (count, DIGEST_BYTES) if name in DIGESTS else (count,)
            if column.shape != shape or column.dtype.kind != "u" or (name in DIGESTS and column.dtype != np.uint8):
                raise ValueError(f"{name} has shape {column.shape}, {column.dtype}, for {count} tiles")
        if not count:
            return
        ends = self._ends.astype(np.int64)
        if (np.diff(ends, prepend=0) < 1).any() or ends[-1] != len(self._text):
            raise ValueError("id_end does not part the ids")
        is_there = np.zeros(count, dtype=np.bool_)
        is_there[self._by_id[self._by_id < count]] = True
        if not is_there.all():
            raise ValueError("by_id does not name each tile once")
        sides = [self.columns[name].astype(np.uint64) for name in ("height", "width")]
        if (
            any((side < 1).any() or (side > MAX_TILE_PX).any() for side in sides)
            or (sides[0] * sides[1] > MAX_TILE_PX).any()
        ):
            raise ValueError(f"a tile has at least one pixel, and at most {MAX_TILE_PX}")
        if (self.columns["shard_bytes"] < 1).any():
            raise ValueError("a shard has at least one byte")
        for block in range(0, count, PLAIN_BLOCK):
            start, block_ends = (int(ends[block - 1]) if block else 0), ends[block : block + PLAIN_BLOCK]
            if not _are_plain(self.columns["id"][start : block_ends[-1]], block_ends - start):
                for begin, end in zip([start, *block_ends[:-1].tolist()], block_ends.tolist(), strict=True):
                    node_path(bytes(self._text[begin:end]).decode())

    def require_unique(self) -> None:
        """Raise `ValueError` where two tiles have one id, or `by_id` is not in the order of the ids."""
        last = b""
        for block in range(0, len(self), BLOCK):
            for place in self._by_id[block : block + BLOCK].tolist():
                found = self._id(place)
                if found == last:
                    raise ValueError("two tiles of one id")
                if found < last:
                    raise ValueError("by_id is not in the order of the ids")
                last = found

    def _id(self, place: int) -> bytes:
        start = int(self._ends[place - 1]) if place else 0
        return bytes(self._text[start : int(self._ends[place])])

    def _records(self, start: int, stop: int) -> Iterator[TileRecord]:
        for tile_id, height, width, image_bytes, image, shard_bytes, shard, metadata in self._rows(start, stop):
            yield TileRecord(tile_id, height, width, ImageDigest(image_bytes, image), shard_bytes, shard, metadata)

    def _rows(self, start: int, stop: int) -> Iterator[_Row]:
        ends = self._ends[start:stop].tolist()
        begin = int(self._ends[start - 1]) if start else 0
        heights, widths, images, shards = (self.columns[name][start:stop].tolist() for name in NUMBERS)
        of_image, of_shard, of_metadata = (self.columns[name][start:stop].tobytes().hex() for name in DIGESTS)
        size = 2 * DIGEST_BYTES
        for i, end in enumerate(ends):
            tile_id = bytes(self._text[begin:end]).decode()
            begin, at = end, slice(i * size, (i + 1) * size)
            yield tile_id, heights[i], widths[i], images[i], of_image[at], shards[i], of_shard[at], of_metadata[at]


def _row_of(record: TileRecord) -> _Row:
    image = record.image
    return (
        record.id, record.height, record.width, image.size_bytes, image.sha256, record.shard_bytes, record.shard_sha256,
        record.metadata_sha256,
    )  # fmt: skip


def _are_plain(text: NDArray[np.uint8], ends: NDArray[np.int64]) -> bool:
    """Whether ids that end at `ends` in `text` are valid ones of plain characters; others may be valid too."""
    if not _IS_PLAIN[text].all():
        return False
    is_start = np.zeros(len(text) + 1, dtype=np.bool_)  # of a part between two slashes
    is_start[0] = is_start[ends] = True
    is_start[1:] |= text == ord("/")
    starts = np.flatnonzero(is_start[:-1])
    padded = np.concatenate([text, np.zeros(len(_RESERVED), np.uint8)])
    is_empty = (padded[starts] == ord("/")).any() or (text[ends - 1] == ord("/")).any()
    reserved = starts
    for place, letter in enumerate(_RESERVED):
        reserved = reserved[padded[reserved + place] == letter]
    is_private = (padded[starts] == ord("_")) & (padded[starts + 1] == ord("_"))
    return not (is_empty or len(reserved) or is_private.any() or (padded[starts] == ord(".")).any())


_IS_PLAIN = np.zeros(256, dtype=np.bool_)
_IS_PLAIN[list(b"/_.-0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")] = True
_RESERVED = b"zarr.json"


def _smallest(values: Sequence[int]) -> NDArray[Any]:
    """The values in the smallest unsigned type that holds them all."""
    column: NDArray[Any] = np.asarray(values, dtype=np.uint64)
    return column.astype(np.min_scalar_type(int(column.max(initial=0))))


def _order(text: bytes, ends: Sequence[int]) -> list[int]:
    """The places of the ids, sorted by their bytes."""
    ids = [text[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    return sorted(range(len(ids)), key=ids.__getitem__)
