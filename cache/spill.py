"""A temporary file for the chunks of a scene, which are made in another order than they are stored, and may not fit in memory."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kdpipe.cache.storage.base import Storage
from kdpipe.cache.storage.local import LocalStorage
from kdpipe.configs.errors import CacheError, DiskFull
from kdpipe.configs.files import PARTIAL_SUFFIX
from kdpipe.configs.os_errors import FULL


class Spill:
    """
    A file to which bytes are appended, and from which they are read in any order; it has no name, and goes with a killed process.

    Every error is a `CacheError`, `DiskFull` where there is no room: an `OSError` would be blamed on the scene's image.
    """

    def __init__(self, storage: Storage) -> None:
        local = isinstance(storage, LocalStorage)
        # The disk of a local cache has to hold the shard anyway, and may be the only large one.
        self._folder = storage.folder if isinstance(storage, LocalStorage) else Path(tempfile.gettempdir())
        self._advice = "make room" if local else "make room, or set TMPDIR to a folder on a larger disk,"
        self._size = 0
        with self._reported():
            # On a file system without nameless files it has a name for a moment: one that the next run sweeps.
            self._file = tempfile.TemporaryFile(  # noqa: SIM115  closed by `close`
                buffering=0, dir=self._folder, prefix=f".{uuid.uuid4().hex}", suffix=PARTIAL_SUFFIX
            )

    def put(self, data: bytes) -> int:
        """Append `data`; returns the offset where it starts."""
        start, left = self._size, memoryview(data)
        with self._reported():
            while left:
                left = left[self._file.write(left) :]
        self._size += len(data)
        return start

    def take(self, start: int, length: int) -> bytes:
        """`length` bytes from the offset `start`; fewer where the file ends."""
        with self._reported():
            return os.pread(self._file.fileno(), length, start)

    def close(self) -> None:
        """Delete the file."""
        with contextlib.suppress(OSError):  # everything needed has been read
            self._file.close()

    def failed(self, why: object) -> CacheError:
        """The error to raise where the file does not return what was put into it."""
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
                f"no room for a scene's chunks in {self._folder} ({self._size} bytes written, "
                f"{shutil.disk_usage(self._folder).free} free); {self._advice} and run the same command again: what is finished is kept"
            ) from err
