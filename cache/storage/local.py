"""A cache in a folder of a local or mounted disk, whose writes survive a power cut."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from kdpipe.cache.storage.base import REPAIR, FileInfo
from kdpipe.configs.errors import CacheUnreachable, ConfigError, CorruptCache
from kdpipe.configs.files import PARTIAL_SUFFIX, open_file, sync_folder, write_atomically
from kdpipe.configs.os_errors import OF_THE_PATH, explained, said, told

IN_FOLDER = (
    f".lock{PARTIAL_SUFFIX}"  # the file that is locked where a folder cannot be (see `lock`); readers ignore its name
)


WAITS_SECONDS = (0.05, 0.5)  # before a second and a third attempt to read

Result = TypeVar("Result")


def require_place(folder: Path) -> None:
    """Raise `ConfigError` where no cache can be: at a file or a path that the system refuses, and in the root or the home folder itself."""
    home = os.path.realpath(os.path.expanduser("~"))  # noqa: PTH111  `Path.home` raises where there is none
    if folder in (Path(folder.anchor), Path(home)):
        what = "your home folder" if folder != Path(folder.anchor) else "the root of the file system"
        raise ConfigError(
            f"cache.path: {folder} is {what}: name a folder of its own in it, such as {folder / 'cache.zarr'}"
        )
    try:
        found = _patiently(lambda: os.stat(folder), folder)  # noqa: PTH116  as below
    except FileNotFoundError:
        return
    except OSError as err:
        raise told(err, "cache.path: looking for", folder, ConfigError) from err
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(
            f"cache.path: {folder} is a file, and a cache is a folder: choose another path; the file was not touched"
        )


class LocalStorage:
    """A folder on a local or mounted disk; see `Storage` for what each method promises."""

    survives_fork = True
    repair = REPAIR
    at_once = 1

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = str(folder)
        self._real = os.path.realpath(folder)

    def read(self, name: str) -> bytes:
        path = self._path(name)

        def read() -> bytes:
            with open_file(path, buffered=False) as file:
                return file.read()

        return _content(read, path)

    def mapped(self, name: str) -> memoryview:
        path = self._path(name)

        def map_it() -> memoryview:
            with open_file(path, buffered=False) as file:
                size = os.fstat(file.fileno()).st_size
                return memoryview(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size else b"")

        return _content(map_it, path)

    def read_ranges(self, name: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        path = f"{self.url}/{name}"
        if os.path.islink(path):  # noqa: PTH114  `_path` of every file would take a tenth of a crop's time, and the folder was looked at
            self._path(name)

        def read() -> list[bytes]:
            with open_file(path, buffered=False) as file:
                size = os.fstat(file.fileno()).st_size
                return [
                    os.pread(file.fileno(), length, start if start >= 0 else max(0, size + start))
                    for start, length in spans
                ]

        return _content(read, path)

    def write(self, name: str, data: bytes | Iterable[bytes]) -> None:
        """
        Make `name` hold exactly `data`, or all its pieces, atomically and durably; one piece at a time is in memory.

        A folder in the place of a file, or a file in the place of a folder, is damage and is deleted.
        Raises `DiskFull` and leaves no partial file where the disk is full, and `CacheUnreachable` where the system refuses.
        """
        # At the top of the cache, so that one listing finds what killed runs left; unique among machines that share the disk.
        partial = self.folder / f".{uuid.uuid4().hex}{PARTIAL_SUFFIX}"
        with explained("writing", self.folder / name, CacheUnreachable):
            path = self._own_path(name)
            with _making_room:
                self._make_way(path)
                make_folders(path.parent)
        with write_atomically(path, partial, CacheUnreachable) as file:
            for piece in [data] if isinstance(data, bytes) else data:
                file.write(piece)

    def info(self, name: str) -> FileInfo | None:
        path = f"{self.url}/{name}"
        try:
            found = _patiently(lambda: os.stat(path), path)  # noqa: PTH116  a Path for each of 100,000 tiles costs more than the call
        except OSError:  # it is not there, or is no file
            return None
        return FileInfo(found.st_size, found.st_mtime) if stat.S_ISREG(found.st_mode) else None

    def infos(self) -> Callable[[str], FileInfo | None]:
        def info(name: str) -> FileInfo | None:
            try:
                found = os.stat(f"{self.url}/{name}")  # noqa: PTH116  as above
            except FileNotFoundError:
                return None
            except OSError:  # perhaps of a disk that answers the second time
                return self.info(name)
            return FileInfo(found.st_size, found.st_mtime) if stat.S_ISREG(found.st_mode) else None

        return info

    def last_write(self) -> float | None:
        """The time of the topmost folder, which changes at every write because `write` puts its partial file there."""
        with contextlib.suppress(OSError):
            return self.folder.stat().st_mtime
        return None

    def children(self, name: str) -> list[str]:
        path = self._path(name)
        try:
            return _patiently(lambda: sorted(os.listdir(path)), path)  # noqa: PTH208  only names are needed
        except OSError:  # it is not there, or is no folder
            return []

    def remove(self, name: str) -> None:
        with explained("deleting", self.folder / name, CacheUnreachable):
            path = self._own_path(name)
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    path.unlink()
            if path.parent.is_dir():
                sync_folder(path.parent)

    def free_bytes(self) -> int | None:
        with explained("looking at the disk of", self.folder, CacheUnreachable):
            return shutil.disk_usage(next(p for p in (self.folder, *self.folder.parents) if p.exists())).free

    def _path(self, name: str) -> Path:
        """The path of a file to read, write or list; `CorruptCache` if it, or a link on the way, leads out of the cache."""
        path = os.path.join(self.folder, name)  # noqa: PTH118  a tenth of a Path's time, once a read
        real = os.path.realpath(path)
        if real != self._real and not real.startswith(self._real + os.sep):
            raise CorruptCache(
                f"{path} leads out of the cache, to {real}: nothing is read or written there; delete the link and run "
                "`kdpipe precompute-teacher --repair`"
            )
        return Path(path)

    def _own_path(self, name: str) -> Path:
        """The path of a file to write or delete; `CorruptCache` if a folder on the way is a link, even to one of the cache's own."""
        path = self._path(name)
        for folder in path.parents:
            if folder == self.folder:
                break
            if folder.is_symlink():
                raise CorruptCache(
                    f"{folder} is a link, and nothing is written or deleted through one; delete the link, and run the same command "
                    "again"
                )
        return path

    def _make_way(self, path: Path) -> None:
        """Delete a folder in the place of a file, and files in the place of folders above it, but nothing above the cache."""
        if path.is_dir():
            shutil.rmtree(path)
        for folder in path.parents:
            if folder == self.folder:
                break
            if folder.is_file():
                folder.unlink()


def _content(read: Callable[[], Result], path: Path | str) -> Result:
    """What `read` returns; `FileNotFoundError` if nothing is at the path, and `CorruptCache` if something is that is no file."""
    try:
        return _patiently(read, path)
    except FileNotFoundError:
        raise
    except NotADirectoryError as err:  # a file in the place of a folder above it
        raise FileNotFoundError(err.errno, err.strerror, str(path)) from err
    except OSError as err:
        raise CorruptCache(f"{path} cannot be read: {said(err)}") from err


def _patiently(look: Callable[[], Result], path: Path | str) -> Result:
    """
    What `look` returns; its `OSError` if that says what is at the path: nothing, or something of the wrong kind.

    Any other error, such as EIO, ESTALE, EMFILE or EACCES, says nothing of what is stored there. It is tried again, and then becomes
    `CacheUnreachable`.
    """
    for wait in (*WAITS_SECONDS, None):
        try:
            return look()
        except OSError as err:
            if err.errno in OF_THE_PATH:
                raise
            if wait is None:
                raise CacheUnreachable(
                    f"{path} cannot be read ({err.strerror}), after {len(WAITS_SECONDS) + 1} attempts; this says nothing of what is "
                    "stored there: check the disk, the mount, permissions and the limit of open files, and run the same command again"
                ) from err
            time.sleep(wait)
    raise AssertionError("unreachable")


# Held by one thread at a time. A second one would take a folder that is created but not yet synced for a durable one, or delete
# what is in the way of both a second time.
_making_room = threading.Lock()


def make_folders(folder: Path) -> None:
    """Create a folder and those above it, each made durable in its parent before anything is put into it."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)
