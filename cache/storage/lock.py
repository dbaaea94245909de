"""The lock that lets one process at a time write a cache; on a local disk the kernel releases it when the process dies."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from kdpipe.cache.storage.base import FULL, Storage
from kdpipe.cache.storage.fence import shut_out_workers
from kdpipe.cache.storage.local import LocalStorage
from kdpipe.cache.storage.remote import RemoteStorage
from kdpipe.configs.errors import CacheLocked, CacheUnreachable, DiskFull

_held: set[bytes] = set()  # the object locks of this process


@contextmanager
def writer_lock(storage: Storage) -> Iterator[None]:
    """
    Hold the cache for writing; raises `CacheLocked`, naming host, process and time, if another process holds it.

    Locally this is an advisory `flock` of a file beside the cache. Object stores have no such lock: there an object beside the
    cache names the writer, and is only created if there is none. It outlives a killed writer, and the next one on the same host
    takes it over. Two writers that take over the same dead lock at the same moment may both believe that they hold it.
    Workers of an earlier holder are shut out (see `fence`).
    """
    if isinstance(storage, LocalStorage):
        lock = _file_lock(storage.folder.with_name(storage.folder.name + ".lock"), storage.url)
    else:
        lock = _object_lock(storage.url)
    with lock:
        shut_out_workers(storage)
        yield


@contextmanager
def _file_lock(path: Path, cache: str) -> Iterator[None]:
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            file.seek(0)
            holder = file.read()
            file.close()
            raise CacheLocked(
                f"{cache} is being written by {_describe(holder)}; wait until it is done, or stop it"
            ) from err
        # The last holder may have deleted the file after we opened it: then this lock excludes nobody.
        if path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino:
            break
        file.close()
    try:
        _name_holder(file, path)
        yield
    finally:
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # closing flushes again, to a disk that may still be full
            file.close()


def _name_holder(file: TextIO, path: Path) -> None:
    """Write into the lock's file who holds it."""
    try:
        if os.fstat(file.fileno()).st_size:  # the name of a killed writer
            file.truncate(0)
        file.write(_this_process())
        file.flush()
    except OSError as err:
        if err.errno in FULL:
            raise DiskFull(
                f"no room for {path}, which says who writes the cache; make room and run the same command again"
            ) from err
        raise


@contextmanager
def _object_lock(cache: str) -> Iterator[None]:
    lock = RemoteStorage(f"{cache}.lock")
    mine = _this_process().encode()
    try:
        lock.create("", mine)
    except FileExistsError as err:
        holder = _holder(lock)
        if not _is_dead(holder):
            raise CacheLocked(
                f"{cache} is being written by {_describe(holder)}; wait until it is done, or, if that process is gone, "
                f"delete {lock.url}"
            ) from err
        lock.remove("")
        try:
            lock.create("", mine)
        except FileExistsError:
            raise CacheLocked(
                f"{cache} is being written by {_describe(_holder(lock))}, which was faster; wait until it is done"
            ) from err
    _held.add(mine)
    try:
        yield
    except BaseException:
        # The first error is reported; a lock that cannot be deleted is taken over by the next run.
        with contextlib.suppress(CacheUnreachable):
            _release(lock, mine)
        raise
    finally:
        _held.discard(mine)
    _release(lock, mine)


def _holder(lock: RemoteStorage) -> str:
    try:
        return lock.read("").decode(errors="replace")
    except FileNotFoundError:  # released since
        return ""


def _release(lock: RemoteStorage, mine: bytes) -> None:
    """Delete the lock unless it is no longer ours: a user may have deleted it, and another process taken it."""
    if _holder(lock).encode() == mine:
        lock.remove("")


def _this_process() -> str:
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    # The token distinguishes runs of the same second in containers, where every process has number 1.
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since, "token": uuid.uuid4().hex})


def _describe(holder: str) -> str:
    try:
        content = json.loads(holder)
        return f"process {content['pid']} on {content['host']} since {content['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _is_dead(holder: str) -> bool:
    """Whether the holder ran on this host and has ended; nothing is known about processes of other hosts."""
    try:
        content = json.loads(holder)
        if content["host"] != socket.gethostname():
            return False
        os.kill(content["pid"], 0)
    except ProcessLookupError:
        return True
    except (ValueError, KeyError, TypeError, PermissionError):
        return False
    # In a container every run is process 1: a lock with our number that we do not hold belongs to an earlier run.
    return bool(content["pid"] == os.getpid()) and holder.encode() not in _held
