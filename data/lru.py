"""A cache of the most recently read arrays, up to a number of bytes: tiles are drawn again and again, and decoding is slow."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

from numpy.typing import NDArray


class Recent:
    """
    Read-only arrays by key. Beyond `limit_bytes`, the least recently used are dropped; the newest always stays.

    Thread-safe. Pickling keeps no arrays, so a DataLoader worker starts with an empty cache.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._arrays: OrderedDict[Hashable, NDArray[Any]] = OrderedDict()
        self._bytes = 0

    def get(self, key: Hashable, read: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """The array under `key`, or `read()` if there is none; errors of `read` propagate."""
        with self._lock:
            if key in self._arrays:
                self._arrays.move_to_end(key)
                return self._arrays[key]
        array = read()
        array.setflags(write=False)
        with self._lock:
            if key not in self._arrays:
                self._arrays[key] = array
                self._bytes += array.nbytes
            while self._bytes > self._limit_bytes and len(self._arrays) > 1:
                self._bytes -= self._arrays.popitem(last=False)[1].nbytes
        return array

    def __getstate__(self) -> dict[str, Any]:
        """The limit, without arrays."""
        return {"limit_bytes": self._limit_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["limit_bytes"])  # type: ignore[misc]
