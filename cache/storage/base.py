"""
The files of a cache: a local folder with writes that survive power loss, or any fsspec URL.

A write is whole or absent, never half: locally a temporary file is synced, renamed, and its folder synced; object stores
publish an object when its upload completes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from kdpipe.configs.errors import CacheError, ConfigError, CorruptCache, DiskFull
from kdpipe.configs.outputs import output_path

PARTIAL_SUFFIX = (
    ".partial"  # of what is being written: it lies at the top of the cache, and moves to its place once whole
)
FULL = (errno.ENOSPC, errno.EDQUOT)  # no room on the disk, or in the user's share of it
LOCAL_SCHEMES = ("file://", "local://")  # fsspec's own local files are not synced, and a write there can be half done


class FileInfo(NamedTuple):
    """A file's size in bytes, and when it was last written, in seconds since the epoch; None where that is not known."""

    size: int
    modified: float | None


class Storage(Protocol):
    """
    What the cache needs of the place it lies in; names are relative, with `/` between parts.

    A remote one raises `CacheUnreachable` from every method once its attempts are used up.
    """

    url: str

    def read(self, name: str) -> bytes:
        """The content of a file; `FileNotFoundError` if there is none."""

    def read_ranges(self, name: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of a file in each `(start, length)`; a negative start counts from the end; fewer where the file ends."""

    def write(self, name: str, data: bytes | Iterable[bytes]) -> None:
        """Make `name` hold exactly `data`, which may come in pieces, atomically and durably; what getting a piece raises is raised."""

    def info(self, name: str) -> FileInfo | None:
        """Size and time of a file, None if there is none."""

    def infos(self) -> Callable[[str], FileInfo | None]:
        """`info` for whoever asks of most files of the cache: a store lists a thousand with one request."""

    def last_write(self) -> float | None:
        """A time that moves whenever any file of the cache is written; None where that is not known."""

    def children(self, name: str) -> list[str]:
        """The names of the files and folders directly below a folder, sorted; empty if it does not exist."""

    def remove(self, name: str) -> None:
        """Delete a file or a folder with all it holds; nothing happens if there is none."""

    def free_bytes(self) -> int | None:
        """What still fits, None where there is no limit to ask for."""


def open_storage(path: str) -> Storage:
    """
    The storage at a folder or an fsspec URL (`s3://bucket/cache.zarr`).

    Raises `ConfigError` for a URL that fsspec, as it is installed, cannot open, and for a folder within a Python package.
    """
    if "://" in path and not path.startswith(LOCAL_SCHEMES):
        from kdpipe.cache.storage.remote import RemoteStorage  # which needs this module's protocol

        try:
            return RemoteStorage(path)
        except (ValueError, ImportError) as err:  # an unknown protocol, or one whose package is not installed
            hint = " (pip install 'kdpipe[s3]')" if path.startswith("s3") and isinstance(err, ImportError) else ""
            raise ConfigError(f"cache.path: {path} cannot be opened: {err}{hint}") from err
    for scheme in LOCAL_SCHEMES:
        path = path.removeprefix(scheme)
    return LocalStorage(output_path(path, key="cache.path"))


class LocalStorage:
    """A folder on a local or mounted disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = str(folder)
        self._real = os.path.realpath(folder)

    def _path(self, name: str) -> Path:
        """The path of a name to read, write or list; `CorruptCache` if a link in the cache, or the name itself, leads out of it."""
        path = os.path.join(self.folder, name)  # noqa: PTH118  once a read: a tenth of a Path
        real = os.path.realpath(path)
        if real != self._real and not real.startswith(self._real + os.sep):
            raise CorruptCache(
                f"{path} leads out of the cache, to {real}: nothing is read or written there; delete the link and run "
                "`kdpipe precompute-teacher --repair`"
            )
        return Path(path)

    def read(self, name: str) -> bytes:
        """The content of a file; `FileNotFoundError` if there is none."""
        return self._path(name).read_bytes()

    def read_ranges(self, name: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """
        The bytes of a file in each `(start, length)`; a negative start counts from the end; fewer where the file ends.

        Links are followed wherever they lead, unlike in `read`, by which the same file has been read whole and compared: the
        check would take a tenth of a crop's time, and no byte is believed that is not of that file.
        """
        with open(f"{self.url}/{name}", "rb", buffering=0) as file:  # noqa: PTH123  a Path takes as long as the reading
            size = os.fstat(file.fileno()).st_size
            return [
                os.pread(file.fileno(), length, start if start >= 0 else max(0, size + start))
                for start, length in spans
            ]

    def write(self, name: str, data: bytes | Iterable[bytes]) -> None:
        """
        Make `name` hold exactly `data`, atomically and durably; of pieces, one at a time is in memory.

        A folder in the place of a file, or a file in that of a folder, is damage, and makes way.
        Raises `DiskFull` and leaves no partial file where the disk is full.
        """
        path = self._path(name)
        # All in one folder, so that one listing finds what a killed run left, however many tiles there are.
        partial = self.folder / f".{uuid.uuid4().hex}{PARTIAL_SUFFIX}"  # processes of several machines have one number
        try:
            with _making_room:
                self._make_way(path)
                _make_folders(path.parent)
            with partial.open("wb") as file:
                for piece in [data] if isinstance(data, bytes) else data:
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except (OSError, CacheError) as err:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            if isinstance(err, OSError) and err.errno in FULL:
                size = f"{len(data)} bytes" if isinstance(data, bytes) else "all bytes"
                raise DiskFull(
                    f"no room for {size} of {path} (free: {self.free_bytes()} bytes); "
                    "make room and run the same command again: what is finished is kept"
                ) from err
            raise
        _sync_folder(path.parent)

    def _make_way(self, path: Path) -> None:
        """Delete what is of the wrong kind at the place of a file, or of a folder above it; nothing beyond the cache."""
        if path.is_dir():
            shutil.rmtree(path)
        for folder in path.parents:
            if folder == self.folder:
                break
            if folder.is_file():
                folder.unlink()

    def info(self, name: str) -> FileInfo | None:
        """Size and time of a file, None if there is none."""
        try:
            found = os.stat(f"{self.url}/{name}")  # noqa: PTH116  a Path of each of 100,000 tiles costs more than the call
        except (FileNotFoundError, NotADirectoryError):
            return None
        return FileInfo(found.st_size, found.st_mtime) if stat.S_ISREG(found.st_mode) else None

    def infos(self) -> Callable[[str], FileInfo | None]:
        """`info`: a disk is asked file by file."""
        return self.info

    def last_write(self) -> float | None:
        """When a file last came into the topmost folder or left it: every write passes through it (see `write`)."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return self.folder.stat().st_mtime
        return None

    def children(self, name: str) -> list[str]:
        """The names of the files and folders directly below a folder, sorted; empty if it does not exist."""
        try:
            return sorted(os.listdir(self._path(name)))  # noqa: PTH208  names are all that is asked for
        except (FileNotFoundError, NotADirectoryError):
            return []

    def remove(self, name: str) -> None:
        """Delete a file or a folder with all it holds; nothing happens if there is none."""
        path = self._path(name)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        if path.parent.is_dir():
            _sync_folder(path.parent)

    def free_bytes(self) -> int | None:
        """The free space of the disk that holds, or will hold, the folder."""
        return shutil.disk_usage(next(p for p in (self.folder, *self.folder.parents) if p.exists())).free


# One thread at a time: another one would take a folder that is made and not synced yet for a durable one, and delete a second time
# what is in the way of both.
_making_room = threading.Lock()


def _make_folders(folder: Path) -> None:
    """Create a folder and those above it, each one durable in its parent before anything is put into it."""
    for path in _missing_from_the_top(folder):
        path.mkdir(exist_ok=True)
        _sync_folder(path.parent)


def _missing_from_the_top(folder: Path) -> Iterator[Path]:
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    yield from reversed(missing)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
