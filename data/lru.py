"""A cache of the most recently read arrays, up to a number of bytes: tiles are drawn again and again, and decoding is slow."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

from numpy.typing import NDArray

Arrays = tuple[NDArray[Any] | None, ...]


class Recent:
    """
    Read-only arrays by key. Beyond `limit_bytes`, the least recently used are dropped; the newest always stays.

    Thread-safe. Pickling keeps no arrays, so a DataLoader worker starts with an empty cache.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._arrays: OrderedDict[Hashable, Arrays] = OrderedDict()
        self._bytes = 0

    def get(self, key: Hashable, read: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """The array under `key`, or `read()` if there is none; errors of `read` propagate."""
        (array,) = self.get_all(key, lambda: (read(),))
        assert array is not None
        return array

    def get_all(self, key: Hashable, read: Callable[[], Arrays]) -> Arrays:
        """The arrays that are read and dropped together under `key`, some of them perhaps None; see `get`."""
        with self._lock:
            if key in self._arrays:
                self._arrays.move_to_end(key)
                return self._arrays[key]
        arrays = read()
        for array in arrays:
            if array is not None:
                array.setflags(write=False)
        with self._lock:
            if key not in self._arrays:
                self._arrays[key] = arrays
                self._bytes += _size_bytes(arrays)
            while self._bytes > self._limit_bytes and len(self._arrays) > 1:
                self._bytes -= _size_bytes(self._arrays.popitem(last=False)[1])
        return arrays

    def __getstate__(self) -> dict[str, Any]:
        """The limit, without arrays."""
        return {"limit_bytes": self._limit_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["limit_bytes"])  # type: ignore[misc]


def _size_bytes(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays if array is not None)
