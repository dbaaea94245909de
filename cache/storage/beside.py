"""
The files that a local cache has beside its folder: who writes it (`.lock`), its workers (`.workers`), its costs (`.costs.json`).

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
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | (os.O_CREAT if create else 0)  # a FIFO would block
    try:
        descriptor = os.open(path, flags, 0o666)
    except FileNotFoundError:
        return None
    except OSError as err:
        if err.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.EMLINK):
            raise foreign(path) from err
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise foreign(path)
    file = os.fdopen(descriptor, "r+", encoding="utf-8", errors="replace")
    found = file.read(MOST_BYTES + 1)
    if found and (len(found) > MOST_BYTES or not is_ours(found)):
        file.close()
        raise foreign(path)
    file.seek(0)
    return file


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
