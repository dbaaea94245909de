"""A temporary file for the chunks of a scene: they come row by row, are stored in another order, and may be more than memory holds."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kdpipe.cache.storage.base import FULL, Storage
from kdpipe.cache.storage.local import LocalStorage
from kdpipe.configs.errors import CacheError, DiskFull
from kdpipe.configs.files import PARTIAL_SUFFIX


class Spill:
    """
    Bytes that are put one after another and taken in any order. The file has no name, so that it goes with a process that is killed.

    Every error is a `CacheError`, `DiskFull` where there is no room: an `OSError` would be taken for one of the scene's image.
    """

    def __init__(self, storage: Storage) -> None:
        local = isinstance(storage, LocalStorage)
        # In a local cache: its disk has to hold the shard anyway, and may be the only large one.
        self._folder = storage.folder if isinstance(storage, LocalStorage) else Path(tempfile.gettempdir())
        self._advice = "make room" if local else "make room, or set TMPDIR to a folder on a larger disk,"
        self._size = 0
        with self._reported():
            # A file system without nameless files gives it a name for a moment: one that the next run sweeps.
            self._file = tempfile.TemporaryFile(  # noqa: SIM115  closed by `close`
                buffering=0, dir=self._folder, prefix=".", suffix=PARTIAL_SUFFIX
            )

    def put(self, data: bytes) -> int:
        """Append `data`; where it starts."""
        start, left = self._size, memoryview(data)
        with self._reported():
            while left:
                left = left[self._file.write(left) :]
        self._size += len(data)
        return start

    def take(self, start: int, length: int) -> bytes:
        """The bytes from `start` on; fewer where the file ends."""
        with self._reported():
            return os.pread(self._file.fileno(), length, start)

    def close(self) -> None:
        """Give the room back."""
        with contextlib.suppress(OSError):  # all that was needed of it has been read
            self._file.close()

    def failed(self, why: object) -> CacheError:
        """The error to raise where the file does not give what it was given."""
        return CacheError(
            f"the temporary file of a scene's chunks in {self._folder} failed ({why}); run the same command again: what is finished is kept"
        )

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except OSError as err:
            if err.errno not in FULL:
                raise self.failed(err) from err
            raise DiskFull(
                f"no room for a scene's chunks in {self._folder}, of which {self._size} bytes are there (free: "
                f"{shutil.disk_usage(self._folder).free} bytes); {self._advice} and run the same command again: what is finished is kept"
            ) from err
