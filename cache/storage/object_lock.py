"""
The lock of a cache on an object store: an object beside it that names the writer.

It is created, taken over and deleted by conditional requests, where the server has them (S3's `If-None-Match` and `If-Match`), so that of
several writers one succeeds. It does not expire. A writer looks at it again while it writes, and stops once it names another: somebody
deleted it, or took the writer for dead.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextlib import contextmanager

from kdpipe.cache.storage.holder import describe, hold, is_dead, let_go, this_process
from kdpipe.cache.storage.remote import RemoteStorage
from kdpipe.configs.errors import CacheLocked, CacheUnreachable, ShutOut

TRIES = 5  # a lock that is given back just now is tried again
WAIT_SECONDS = 0.2
LOOK_SECONDS = 10.0  # between two looks at the lock while tiles are stored


class Held:
    """A lock that this process has taken."""

    def __init__(self, lock: RemoteStorage, cache: str, mine: str) -> None:
        self._lock, self._cache, self._mine = lock, cache, mine
        self._looked = time.monotonic()

    def require(self, *, now: bool = False) -> None:
        """Raise `ShutOut` if the lock names another writer or is gone; looks at most every `LOOK_SECONDS`, or `now`."""
        if not now and time.monotonic() - self._looked < LOOK_SECONDS:
            return
        found = _holder(self._lock)
        if found != self._mine:
            who = f"is held by {describe(found)}" if found else "was deleted"
            raise ShutOut(
                f"{self._cache}: its lock {who}, so this run stores nothing more; what it has stored is kept. Make sure that one run "
                "writes the cache, and start it again"
            )
        self._looked = time.monotonic()


@contextmanager
def object_lock(cache: str) -> Iterator[Held]:
    """Hold the lock of the cache at a URL; raises `CacheLocked`, naming the holder, if another writer has it."""
    lock = RemoteStorage(f"{cache}.lock")
    mine = this_process()
    _take(lock, cache, mine)
    hold(mine)
    try:
        yield Held(lock, cache, mine)
    except BaseException:
        # The first error is reported; a lock that cannot be deleted is taken over by the next run.
        with contextlib.suppress(CacheUnreachable):
            lock.remove_same("", mine.encode())
        raise
    finally:
        let_go(mine)
    lock.remove_same("", mine.encode())


def _take(lock: RemoteStorage, cache: str, mine: str) -> None:
    for _ in range(TRIES):
        found = lock.tagged("")
        if found is None:
            with contextlib.suppress(FileExistsError):  # another was faster
                lock.create("", mine.encode())
        else:
            content, tag = found
            holder = content.decode(errors="replace")
            if not is_dead(holder):
                raise CacheLocked(
                    f"{cache} is being written by {describe(holder)}; wait until it is done, or, if that process is gone, delete {lock.url}"
                )
            lock.replace("", mine.encode(), tag)
        # A server without conditional requests lets two writers write it: the last one has it.
        if _holder(lock) == mine:
            return
        time.sleep(WAIT_SECONDS)
    raise CacheLocked(
        f"{cache} is being written by others, whose lock changed hands {TRIES} times while this run asked for it; wait until they are done"
    )


def _holder(lock: RemoteStorage) -> str:
    try:
        return lock.read("").decode(errors="replace")
    except FileNotFoundError:  # released since
        return ""
