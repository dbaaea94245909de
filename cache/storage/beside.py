"""
The files that a local cache has beside its folder: who writes it (`.lock`), its workers (`.workers`), its costs (`.costs.json`), and the
images that are known to be its own (`.images`).

Anybody may have put another file, or a link, at such a name. It is then refused: nothing that is not kdpipe's is followed, emptied,
overwritten or deleted.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from kdpipe.configs.errors import CacheUnreachable, ConfigError
from kdpipe.configs.os_errors import explained

MOST_BYTES = 4096  # of a file that is kdpipe's


def beside(folder: Path, suffix: str) -> Path:
    """The path of a cache's file beside its folder."""
    return folder.with_name(folder.name + suffix)


def open_beside(path: Path, is_ours: Callable[[str], bool], *, create: bool = False) -> TextIO | None:
    """
    The file, open for reading and writing at its start; None if there is none, unless it is to be created, empty.

    Raises `ConfigError` if it is a link or anything but a file, or if it has content that is not kdpipe's, as `is_ours` says;
    `CacheUnreachable` where the system refuses, `DiskFull` where there is no room.
    """
    with explained("opening", path, CacheUnreachable):
        return _opened(path, is_ours, create=create)


def _opened(path: Path, is_ours: Callable[[str], bool], *, create: bool) -> TextIO | None:
    try:
        descriptor = _descriptor(path, os.O_RDWR | (os.O_CREAT if create else 0))
    except FileNotFoundError:
        return None
    file = os.fdopen(descriptor, "r+", encoding="utf-8", errors="replace")
    found = file.read(MOST_BYTES + 1)
    if found and (len(found) > MOST_BYTES or not is_ours(found)):
        file.close()
        raise foreign(path)
    file.seek(0)
    return file


def read_beside(path: Path, magic: bytes) -> bytes:
    """What follows `magic` in the file; nothing if there is no file. Raises as `open_beside` does."""
    with explained("reading", path, CacheUnreachable):
        try:
            descriptor = _descriptor(path, os.O_RDONLY)
        except FileNotFoundError:
            return b""
        with os.fdopen(descriptor, "rb") as file:
            _require_ours(path, file.read(len(magic)), magic)
            return file.read()


def append_beside(path: Path, magic: bytes, data: bytes, kept: bytes, most_bytes: int | None) -> None:
    """
    Append to the file, which begins with `magic`. Where it would have more than `most_bytes`, it is begun anew with what is to be `kept`.

    Its content is a row of records of equal size: one that was cut short is dropped, which `data` must be a multiple of `len(magic)` for.
    Raises as `open_beside` does.
    """
    with explained("writing", path, CacheUnreachable):
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(_descriptor(path, os.O_RDWR | os.O_CREAT), "r+b") as file:
            _require_ours(path, file.read(len(magic)), magic)
            end = file.seek(0, os.SEEK_END)
            start = end - end % len(magic) if most_bytes is None or end + len(data) <= most_bytes else 0
            file.truncate(start)
            file.seek(start)
            file.write(data if start else magic + (kept if end >= len(magic) else b"") + data)


def _descriptor(path: Path, flags: int) -> int:
    """An open file, not a link and nothing else than a file; `ConfigError` for those."""
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)  # a FIFO would block
    except OSError as err:
        if err.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.EMLINK):
            raise foreign(path) from err
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise foreign(path)
    return descriptor


def _require_ours(path: Path, found: bytes, magic: bytes) -> None:
    if not magic.startswith(found):
        raise foreign(path)


def foreign(path: Path) -> ConfigError:
    """The error for a file beside the cache that is not kdpipe's."""
    return ConfigError(
        f"{path} is not kdpipe's, and kdpipe keeps a file of that name there; nothing was changed: move it, or choose another path"
    )


def unlink_same(path: Path, file: TextIO) -> None:
    """Delete the file if the path still leads to this open one: another process may have put its own there."""
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(path.lstat(), os.fstat(file.fileno())):
            path.unlink()
