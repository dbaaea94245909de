"""A cache in one zip file that `kdpipe pack` wrote, on a disk or an object store; it is only read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from kdpipe.cache.storage import zip_format
from kdpipe.cache.storage.base import FileInfo, Storage
from kdpipe.cache.storage.local import LocalStorage
from kdpipe.configs.errors import ConfigError, CorruptCache

SUFFIX = ".zip"


class PackedStorage:
    """
    The members of a pack; see `Storage` for what each method promises. Whatever would write raises `ConfigError`.

    `place` holds the pack under `name`. On a disk the table of members is mapped, and all processes share it; of a remote pack each
    process reads it once, 24 bytes a member. Nothing vouches for the table: who reads compares digests, and `member` its header.
    """

    repair = "copy the pack again, or pack the cache again"

    def __init__(self, url: str, place: Storage, name: str) -> None:
        self.url = url
        self.survives_fork = place.survives_fork
        self._place = place
        self._name = name
        self._rows: NDArray[Any] | None = None
        self._bytes = 0
        self._opening = threading.Lock()  # or every thread of the first reads would ask for the table

    @property
    def at_once(self) -> int:
        return self._place.at_once

    def __reduce__(self) -> tuple[type[PackedStorage], tuple[str, Storage, str]]:
        return PackedStorage, (self.url, self._place, self._name)

    def read(self, name: str) -> bytes:
        offset, size = self._member(name)
        before = zip_format.header_bytes(name, size)
        (data,) = self._place.read_ranges(self._name, [(offset, before + size)])
        self._require_header(name, size, data)
        if len(data) < before + size:
            raise CorruptCache(f"{self.url} ends within its member {name}")
        return data[before:]

    def mapped(self, name: str) -> memoryview:
        if not isinstance(self._place, LocalStorage):
            return memoryview(self.read(name))
        offset, size = self._member(name)
        before = zip_format.header_bytes(name, size)
        self._require_header(name, size, self.piece(offset, before))
        return self._place.mapped(self._name)[offset + before : offset + before + size]

    def read_ranges(self, name: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        # The header is not read: the caller compares every chunk with a digest.
        offset, size = self._member(name)
        first = offset + zip_format.header_bytes(name, size)
        wanted = []
        for start, length in spans:
            begin = start if start >= 0 else max(0, size + start)
            wanted.append((first + begin, max(0, min(length, size - begin))))
        return self._place.read_ranges(self._name, wanted)

    def info(self, name: str) -> FileInfo | None:
        try:
            return FileInfo(self._member(name)[1], self.last_write())
        except FileNotFoundError:
            return None

    def infos(self) -> Callable[[str], FileInfo | None]:
        return self.info

    def last_write(self) -> float | None:
        found = self._place.info(self._name)
        return found.modified if found else None

    def children(self, name: str) -> list[str]:
        try:
            names = self.names()
        except FileNotFoundError:
            return []
        folder = f"{name}/" if name else ""
        return sorted({each[len(folder) :].partition("/")[0] for each in names if each.startswith(folder)})

    def names(self) -> list[str]:
        """The names of all members, in their order, from the zip file's directory; without the table's."""
        rows, start = self._end()
        before_bytes = zip_format.header_bytes(zip_format.TABLE_NAME, rows * zip_format.ROW.itemsize)
        directory = start + before_bytes + rows * zip_format.ROW.itemsize
        data = self.piece(directory, self.size() - directory)
        return [each for each in zip_format.names_in_directory(data) if each != zip_format.TABLE_NAME]

    def size(self) -> int:
        """The length of the pack in bytes; `FileNotFoundError` if there is none."""
        found = self._place.info(self._name)
        if found is None:
            raise FileNotFoundError(f"there is no file {self.url}")
        return found.size

    def piece(self, start: int, length: int) -> bytes:
        """Bytes of the pack itself."""
        (data,) = self._place.read_ranges(self._name, [(start, length)])
        return data

    def write(self, name: str, data: bytes | Iterable[bytes]) -> None:
        self.refuse()

    def remove(self, name: str) -> None:
        self.refuse()

    def free_bytes(self) -> int | None:
        return None

    def refuse(self) -> NoReturn:
        """Raise the `ConfigError` for whoever would write."""
        folder = Path(self.url.rpartition("/")[2]).with_suffix("")
        raise ConfigError(
            f"{self.url} is a pack, which is only read: make a folder of it with `kdpipe unpack {self.url} {folder}`, and set "
            "cache.path to that"
        )

    def _member(self, name: str) -> tuple[int, int]:
        """Offset of the header, and size of the content, of a member; `FileNotFoundError` if there is none."""
        rows = self._table()
        key = np.uint64(zip_format.key(name))
        first, last = np.searchsorted(rows["key"], key), np.searchsorted(rows["key"], key, side="right")
        places = [(int(row["offset"]), int(row["size"])) for row in rows[first:last]]
        if len(places) > 1:  # two names with one key
            places = [place for place in places if sum(place) <= self._bytes and self._is_header(name, *place)]
        if not places:
            raise FileNotFoundError(f"{self.url} has no member {name}")
        offset, size = places[0]
        if offset + size > self._bytes:
            raise CorruptCache(f"{self.url} has a table that says that {name} lies beyond its end")
        return offset, size

    def _is_header(self, name: str, offset: int, size: int) -> bool:
        (data,) = self._place.read_ranges(self._name, [(offset, zip_format.header_bytes(name, size))])
        found = zip_format.read_header(data, name)
        return found is not None and found[0] == size

    def _require_header(self, name: str, size: int, data: bytes) -> None:
        found = zip_format.read_header(data, name)
        if found is None or found[0] != size:
            raise CorruptCache(f"{self.url} has something else where its table says that {name} is")

    def _table(self) -> NDArray[Any]:
        with self._opening:
            if self._rows is None:
                count, start = self._end()
                start += zip_format.header_bytes(zip_format.TABLE_NAME, count * zip_format.ROW.itemsize)
                if isinstance(self._place, LocalStorage):
                    self._rows = np.memmap(self._place.folder / self._name, zip_format.ROW, "r", start, (count,))
                else:
                    self._rows = np.frombuffer(self.piece(start, count * zip_format.ROW.itemsize), zip_format.ROW)
            return self._rows

    def _end(self) -> tuple[int, int]:
        """The number of members in the table, and the offset of its header."""
        size = self.size()
        count = min(size, zip_format.MOST_END_BYTES)
        data = self.piece(size - count, count)
        place = zip_format.read_end(data)
        if place is None:
            raise CorruptCache(
                f"{self.url} is not what `kdpipe pack` wrote, or its end is missing: copy it again, or pack the cache again"
            )
        rows, start = place
        self._bytes = size
        if start + rows * zip_format.ROW.itemsize > size:
            raise CorruptCache(f"{self.url} is shorter than it says: copy it again")
        return rows, start
