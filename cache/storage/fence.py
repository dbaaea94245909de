"""
Other processes that write for the holder of a cache's lock, and how they are kept out once it is gone.

The holder raises a fence beside the cache, a file with a token, and hands the token to its workers. A worker stores a tile only
while it holds the fence shared and finds that token in it. Whoever comes next, be it the same run or another one after this one
was killed, empties the fence, then waits until no worker holds it: from then on nobody stores anything any more.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kdpipe.cache.storage.base import Storage
from kdpipe.cache.storage.local import LocalStorage
from kdpipe.cache.storage.remote import RemoteStorage
from kdpipe.configs.errors import CacheLocked, ShutOut

SUFFIX = ".workers"
PATIENCE_SECONDS = 60.0  # for workers that are storing a tile: each needs a fraction of a second
POLL_SECONDS = 0.02


@contextmanager
def open_fence(storage: Storage) -> Iterator[str]:
    """
    A new fence, whose token workers need; after the block no worker stores a tile any more.

    Call it with the cache's lock held.
    """
    token = uuid.uuid4().hex
    if isinstance(storage, LocalStorage):
        _file(storage).write_text(token)
    else:
        _object(storage).write("", token.encode())
    try:
        yield token
    finally:
        shut_out_workers(storage)


def shut_out_workers(storage: Storage) -> None:
    """
    Take down the fence of an earlier run, if there is one, and wait for the workers that are storing a tile.

    Call it with the cache's lock held. Raises `CacheLocked` where a worker holds the fence for `PATIENCE_SECONDS`. On an object
    store there is nothing to wait for: an upload that a worker began before is not held up.
    """
    if not isinstance(storage, LocalStorage):
        _object(storage).remove("")
        return
    import fcntl

    try:
        file = _file(storage).open("r+")
    except FileNotFoundError:
        return
    with file:
        file.truncate(0)  # first: workers that come while we wait turn away
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if time.monotonic() > deadline:
                raise CacheLocked(
                    f"{storage.url}: a worker of an earlier run has been storing a tile for {PATIENCE_SECONDS:.0f} s and more (it "
                    f"holds {_file(storage)}); end that worker, and run the same command again"
                )
            time.sleep(POLL_SECONDS)
        _file(storage).unlink(missing_ok=True)


@contextmanager
def within_fence(storage: Storage, token: str) -> Iterator[None]:
    """
    The right to store tiles during the block, for a worker that was given `token`; raises `ShutOut` where it has it no longer.

    On an object store one request looks before the block, and nothing holds a new writer up during it.
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

    try:
        file = _file(storage).open("r")  # never made here: a worker raises no fence
    except FileNotFoundError:
        _require("", token, storage)
        raise AssertionError("unreachable") from None
    with file:
        fcntl.flock(file, fcntl.LOCK_SH)
        _require(file.read(), token, storage)
        yield


def _require(found: str, token: str, storage: Storage) -> None:
    if found != token:
        raise ShutOut(
            f"{storage.url}: the run that this worker computes for writes the cache no longer, and the worker stores nothing; "
            "start that run again"
        )


def _file(storage: LocalStorage) -> Path:
    return storage.folder.with_name(storage.folder.name + SUFFIX)


def _object(storage: Storage) -> RemoteStorage:
    return RemoteStorage(storage.url + SUFFIX)
