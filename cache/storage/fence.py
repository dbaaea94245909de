"""
How worker processes write a cache for the holder of its lock, and are shut out once the holder is gone.

The holder creates a fence, a file beside the cache that contains a token, and gives the token to its workers. A worker stores a
tile only while it holds a shared lock of the fence and finds its token in it. The next run (or the same one, after it was
killed and started again) empties the fence and waits until no worker holds it: from then on no old worker stores anything.
"""

from __future__ import annotations

import contextlib
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from kdpipe.cache.storage.base import Storage
from kdpipe.cache.storage.beside import beside, open_beside, unlink_same
from kdpipe.cache.storage.local import LocalStorage
from kdpipe.cache.storage.remote import RemoteStorage
from kdpipe.configs.errors import CacheLocked, CacheUnreachable, ShutOut
from kdpipe.configs.os_errors import explained

SUFFIX = ".workers"
PATIENCE_SECONDS = 60.0  # for workers that are storing a tile, which takes a fraction of a second
POLL_SECONDS = 0.02


@contextmanager
def open_fence(storage: Storage) -> Iterator[str]:
    """
    The token of a new fence, which workers need to store tiles; after the block they are shut out.

    Call it with the cache's lock held.
    """
    token = uuid.uuid4().hex
    if isinstance(storage, LocalStorage):
        path = beside(storage.folder, SUFFIX)
        file = open_beside(path, _is_a_token, create=True)
        assert file is not None
        with explained("writing", path, CacheUnreachable), file:
            file.truncate(0)
            file.write(token)
    else:
        _object(storage).write("", token.encode())
    try:
        yield token
    finally:
        shut_out_workers(storage)


def shut_out_workers(storage: Storage) -> None:
    """
    Delete the fence of an earlier run, if there is one, after waiting for workers that are storing a tile.

    Call it with the cache's lock held. Raises `CacheLocked` if a worker holds the fence for `PATIENCE_SECONDS`. On an object
    store there is nothing to wait for: an upload that a worker has begun is not stopped.
    """
    if not isinstance(storage, LocalStorage):
        _object(storage).remove("")
        return
    import fcntl

    path = beside(storage.folder, SUFFIX)
    file = open_beside(path, _is_a_token)
    if file is None:
        return
    with explained("shutting out the workers by", path, CacheUnreachable), file:
        file.truncate(0)  # first, so that workers that arrive during the wait are turned away
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if time.monotonic() > deadline:
                raise CacheLocked(
                    f"{storage.url}: a worker of an earlier run has been storing a tile for {PATIENCE_SECONDS:.0f} s and more (it "
                    f"holds {path}); end that worker, and run the same command again"
                )
            time.sleep(POLL_SECONDS)
        unlink_same(path, file)


@contextmanager
def within_fence(storage: Storage, token: str) -> Iterator[None]:
    """
    Permission for a worker with this token to store tiles during the block; raises `ShutOut` if its run is over.

    On an object store the token is checked once before the block; a new writer is not held up during it.
    """
    if not isinstance(storage, LocalStorage):
        try:
            found = _object(storage).read("").decode(errors="replace")
        except FileNotFoundError:
            found = ""
        _require(found, token, storage)
        yield
        return
    import fcntl

    file = open_beside(beside(storage.folder, SUFFIX), _is_a_token)
    if file is None:
        raise _shut_out(storage)
    with file:
        with explained("locking", file.name, CacheUnreachable):
            fcntl.flock(file, fcntl.LOCK_SH)
            found = file.read()
        _require(found, token, storage)
        yield


def _require(found: str, token: str, storage: Storage) -> None:
    if found != token:
        raise _shut_out(storage)


def _shut_out(storage: Storage) -> ShutOut:
    return ShutOut(
        f"{storage.url}: the run that this worker computes for no longer writes the cache, so the worker stores nothing; "
        "start that run again"
    )


def _is_a_token(text: str) -> bool:
    return re.fullmatch("[0-9a-f]{1,32}", text) is not None


def _object(storage: Storage) -> RemoteStorage:
    return RemoteStorage(storage.url + SUFFIX)
