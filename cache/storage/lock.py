"""The lock that lets one process at a time write a cache; on a local disk the kernel releases it when the process dies."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

from kdpipe.cache.storage.base import Storage
from kdpipe.cache.storage.beside import beside, open_beside, unlink_same
from kdpipe.cache.storage.fence import shut_out_workers
from kdpipe.cache.storage.holder import describe, names_a_holder, this_process
from kdpipe.cache.storage.local import IN_FOLDER, LocalStorage, make_folders
from kdpipe.cache.storage.object_lock import object_lock
from kdpipe.cache.storage.packed import PackedStorage
from kdpipe.configs.errors import CacheError, CacheLocked, CacheUnreachable, ConfigError, NoLocks
from kdpipe.configs.os_errors import NO_LOCKS, explained, told


class Require(Protocol):
    """Raises `ShutOut` if a lock was lost."""

    def __call__(self, *, now: bool = False) -> None: ...


@contextmanager
def writer_lock(storage: Storage) -> Iterator[Require]:
    """
    Hold the cache for writing; raises `CacheLocked`, naming host, process and time, if another process holds it.

    Locally this is an advisory `flock` of the cache's folder itself: one lock by whichever path the cache is reached, and no file
    that could be deleted. A file beside the cache says who holds it. Object stores have no such lock: there an object beside the
    cache names the writer (see `object_lock`). It outlives a killed writer, and the next one on the same host takes it over.
    What is yielded raises `ShutOut` if the lock was lost; call it while writing, and with `now=True` before what two must not write.
    Workers of an earlier holder are shut out (see `fence`). Raises `ConfigError` for a file beside the cache that is not kdpipe's and
    for a pack, and `NoLocks` on a file system without them.
    """
    if isinstance(storage, PackedStorage):
        storage.refuse()
    with ExitStack() as held:
        require = _kept
        if isinstance(storage, LocalStorage):
            held.enter_context(folder_lock(storage.folder))
        else:
            require = held.enter_context(object_lock(storage.url)).require
        shut_out_workers(storage)
        yield require


def _kept(*, now: bool = False) -> None:
    """The kernel keeps the lock of a folder for as long as its process lives."""


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """
    Hold a folder on a local or mounted disk for writing, be it of a cache or of a run; see `writer_lock`.

    A folder that is missing is created with those above it; at the end, those that are empty are deleted again.
    """
    name = beside(folder, ".lock")
    with _locked_folder(folder, name), _named_holder(name):
        yield


@contextmanager
def _locked_folder(folder: Path, name: Path) -> Iterator[None]:
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    while True:
        with ExitStack() as descriptors:
            with explained("making the folder", folder, CacheUnreachable):
                opened = _opened_folder(folder)
            descriptors.callback(os.close, opened)
            try:
                _lock_at_once(opened, descriptors, folder, name)
            except NoLocks:
                _remove_empty(made)
                raise
            # The folder may have been deleted and made anew since it was opened: then this lock excludes nobody.
            try:
                is_same = os.path.samestat(folder.stat(), os.fstat(opened))
            except FileNotFoundError:
                continue
            if not is_same:
                continue
            try:
                yield
            finally:
                _remove_empty(made)
            return


def _remove_empty(folders: Iterable[Path]) -> None:
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _opened_folder(folder: Path) -> int:
    while True:
        try:
            return os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            make_folders(folder)


def _lock_at_once(opened: int, descriptors: ExitStack, folder: Path, name: Path) -> None:
    """Lock the open folder; `descriptors` closes what else is opened for it."""
    import fcntl

    at_once = fcntl.LOCK_EX | fcntl.LOCK_NB
    try:
        try:
            fcntl.flock(opened, at_once)
        except OSError as err:
            if err.errno != errno.EBADF:
                raise
            # NFS locks only files that are open for writing: a file in the folder, which is never deleted.
            inside = os.open(IN_FOLDER, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666, dir_fd=opened)
            descriptors.callback(os.close, inside)
            fcntl.flock(inside, at_once)
    except BlockingIOError as err:
        raise CacheLocked(
            f"{folder} is being written by {describe(_written_holder(name))}; wait until it is done, or stop it"
        ) from err
    except OSError as err:
        if err.errno not in NO_LOCKS:
            raise told(err, "locking", folder, CacheUnreachable) from err
        raise NoLocks(
            f"the file system of {folder} has no locks ({err.strerror}), without which two runs could write there at once: "
            "mount it with locks, or choose another path"
        ) from err


def _written_holder(name: Path) -> str:
    try:
        file = open_beside(name, names_a_holder)
    except (ConfigError, CacheError):
        return ""
    if file is None:
        return ""
    with file:
        return file.read()


@contextmanager
def _named_holder(path: Path) -> Iterator[None]:
    """The file beside the cache names this process during the block, where the folder above the cache may be written."""
    try:
        file = open_beside(path, names_a_holder, create=True)
    except CacheUnreachable:  # in a container, the cache may be all that may be written; the lock is the folder's
        yield
        return
    assert file is not None
    try:
        with explained("writing", path, CacheUnreachable):
            if os.fstat(file.fileno()).st_size:  # the name of a killed writer
                file.truncate(0)
            file.write(this_process())
            file.flush()
        yield
    finally:
        try:
            with explained("deleting", path, CacheUnreachable):
                unlink_same(path, file)
        finally:
            with contextlib.suppress(OSError):  # closing flushes again, to a disk that may still be full
                file.close()
