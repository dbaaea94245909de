"""Files that are whole or absent, even after a power cut: written beside their place, synced, and renamed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from kdpipe.configs.errors import KdpipeError
from kdpipe.configs.os_errors import NotAFile, explained, kind_of, told

PARTIAL_SUFFIX = ".partial"
LONG_NAME = 240  # bytes; file systems take 255, and a partial file has 9 more
NO_SYNC = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF}  # what file systems without it say

logger = logging.getLogger(__name__)
_unsynced: set[int] = set()  # devices of which it has been said


def partial_path(path: Path) -> Path:
    """The file beside `path` that holds its content until it is whole: `.NAME.partial`, or a digest for a name of nearly full length."""
    name = path.name if len(os.fsencode(path.name)) <= LONG_NAME else hashlib.sha256(os.fsencode(path.name)).hexdigest()
    return path.with_name(f".{name}{PARTIAL_SUFFIX}")


@contextmanager
def write_atomically(
    path: Path, partial: Path | None = None, kind: type[KdpipeError] | None = None
) -> Iterator[BinaryIO]:
    """
    An open file whose content becomes `path` when the block ends, durably; if the block raises, `path` stays as it was.

    `partial` is where the content lies until then, on the same file system (default: `partial_path(path)`). What the operating system
    refuses becomes a `KdpipeError` (see `os_errors.told` for `kind`) that names `path`, also where a library in the block has turned it
    into an error of its own.
    """
    partial = partial or partial_path(path)
    with explained("writing", path, kind):
        watched = None
        try:
            with partial.open("wb") as file:
                watched = _Watched(file)
                yield cast("BinaryIO", watched)
                file.flush()
                sync(file.fileno())
            partial.replace(path)
        except BaseException as err:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            if watched is not None and watched.refused is not None and not isinstance(err, OSError):
                raise told(watched.refused, "writing", path, kind) from err
            raise
        sync_folder(path.parent)


class _Watched:
    """An open file that keeps the error of a write: torch's writer raises a `RuntimeError` in its place."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.refused: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as err:
            self.refused = err
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def write_file(path: str | Path, content: str | bytes) -> None:
    """
    Make a file hold exactly this content, text in UTF-8: all of it, or the file stays as it was.

    A link is followed. What is no file (`/dev/stdout`, `/dev/null`) is written as it is. Raises `KdpipeError` where the operating system
    refuses.
    """
    data = content.encode() if isinstance(content, str) else content
    with explained("writing", path):
        place = Path(path).resolve()
        if place.exists() and not place.is_file():
            require_no_fifo(path)
            with Path(path).open("wb") as file:
                file.write(data)
            return
    with write_atomically(place) as file:
        file.write(data)


def try_to_write(place: Path, named: str | Path, doing: str) -> None:
    """
    Make the folders above `place`, and raise the `KdpipeError` that writing it would end in, if any; a file that is there stays as it is.

    `doing` and `named`, the path as the user wrote it, are for the message.
    """
    with explained(doing, named):
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists() and not place.is_file():
            require_no_fifo(named)
            return
        if place.exists() and not os.access(place, os.W_OK):  # it could be replaced, and is protected
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(named))
        trial = place.with_name(f".{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
        trial.touch()
        trial.unlink()


def make_folder(folder: Path) -> Path:
    """Create a folder and those above it, if there is none; returns it. Raises `KdpipeError` where the operating system refuses."""
    with explained("making the folder", folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def require_no_fifo(path: str | Path) -> None:
    """Raise `NotAFile` for a FIFO or a socket that is not this process's own: opening one may wait for ever."""
    found = kind_of(Path(path).stat().st_mode)
    if found in ("a FIFO", "a socket") and not _is_own(path):
        raise NotAFile(errno.ENXIO, f"it is {found}, not a file", str(path))


def _is_own(path: str | Path) -> bool:
    """Whether a path is a descriptor of this process, as in `--json /dev/stdout`."""
    return str(path).startswith(("/dev/fd/", "/dev/stdout", "/dev/stderr", "/proc/self/fd/"))


def open_file(path: str | Path, *, buffered: bool = True) -> BinaryIO:
    """A file, open for reading. Raises `NotAFile` at once for a FIFO, a socket or a device, which could block or never end."""

    def at_once(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NONBLOCK | os.O_CLOEXEC)

    file: BinaryIO = open(path, "rb", buffering=-1 if buffered else 0, opener=at_once)  # noqa: SIM115
    mode = os.fstat(file.fileno()).st_mode
    if not stat.S_ISREG(mode):
        file.close()
        raise NotAFile(errno.ENXIO, f"it is {kind_of(mode)}, not a file", str(path))
    return file


def publish(partial: Path, path: Path) -> None:
    """Move a finished file into place durably; for libraries that write to a name instead of an open file."""
    with explained("writing", path):
        with partial.open("rb") as file:
            sync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)


def sync(descriptor: int) -> None:
    """
    Make an open file or folder durable.

    Some network and FUSE file systems have no such call (`EINVAL`). It is then done without, and said once for each of them.
    """
    try:
        os.fsync(descriptor)
    except OSError as err:
        if err.errno not in NO_SYNC:
            raise
        device = os.fstat(descriptor).st_dev
        if device not in _unsynced:
            _unsynced.add(device)
            logger.warning(
                "note: this file system cannot be told to write to the disk at once (%s): a power cut may cost what was written last",
                err.strerror,
            )


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable: a renamed or new file may be gone after a power cut until then."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # a folder that may be written and not listed
        return
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: str | Path) -> str:
    """The sha256 of a file's content, in hexadecimal. Raises `NotAFile` for what is no file."""
    with open_file(path) as file:
        return hashlib.file_digest(cast("Any", file), "sha256").hexdigest()
