"""
What the operating system says of a path, as an error that names the path, what was tried and what to do: the one place for that.

Whoever reads or writes a file puts the work into `explained`. What still arrives as an `OSError` at the command line is explained there.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kdpipe.configs.errors import ConfigError, DiskFull, KdpipeError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room on the disk, in the user's quota, or in one file
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

# What is at a path, or is not: the user named the wrong one, or has to change it. Looking again changes nothing.
_OF_THE_PATH = {
    errno.ENOENT: ("it does not exist", "correct the path"),
    errno.ENOTDIR: ("a folder on its way is a file", "correct the path"),
    errno.EISDIR: ("it is a folder, not a file", "name a file"),
    errno.EEXIST: (
        "something else is there, such as a file in the place of a folder",
        "move it, or choose another path",
    ),
    errno.ENOTEMPTY: ("the folder is not empty", "move what is in it, or choose another path"),
    errno.ELOOP: ("it is a link that leads back to itself, or a link where none is followed", "delete the link"),
    errno.ENAMETOOLONG: ("the name is too long for the file system", "choose a shorter one"),
    errno.EINVAL: ("the file system does not take that", "choose another path"),
    errno.ENXIO: ("it is no file: a socket, or a device that is not there", "name a file"),
    errno.ENODEV: ("it is a device that is not there", "name a file"),
    errno.EILSEQ: ("the name holds characters that the file system does not take", "rename it"),
    errno.ETXTBSY: ("it is a program that is running", "choose another path"),
    errno.EXDEV: ("it is on another file system", "choose another path"),
}
_REFUSED = {
    errno.EACCES: ("there is no permission", "change its permissions and those of the folders above it, or choose another path"),
    errno.EPERM: ("there is no permission", "change its permissions and those of the folders above it, or choose another path"),
    errno.EROFS: ("its file system is mounted read-only", "mount it for writing, or choose another path"),
    errno.EBUSY: ("it is in use, or a mount point", "end what uses it, or choose another path"),
}  # fmt: skip
_NO_ROOM = {
    errno.ENOSPC: ("its disk is full", "make room"),
    errno.EDQUOT: ("your quota of its disk is used up", "make room, or ask for a larger quota"),
    errno.EFBIG: (
        "the file would be larger than one may be there (`ulimit -f`, or the file system's own limit)",
        "raise the limit, or choose another disk",
    ),
}
_TOO_MANY = "raise the limit (`ulimit -n`), or lower train.workers"
_FAILED = {
    errno.EIO: ("its disk or mount failed", "check the disk and the mount"),
    errno.ESTALE: ("its network mount was lost", "mount it again"),
    errno.EMFILE: ("too many files are open", _TOO_MANY),
    errno.ENFILE: ("too many files are open on this machine", _TOO_MANY),
    errno.ENOLCK: ("its file system has no locks", "mount it with locks, or choose another path"),
    errno.EOPNOTSUPP: ("its file system cannot do that", "choose another path"),
}
_ELSE = "check the disk, the mount and the permissions"
OF_THE_PATH = frozenset(_OF_THE_PATH)


class NotAFile(OSError):
    """The path leads to a FIFO, a socket, a device or a folder, where a file was expected; its `errno` is ENXIO."""


def told(err: OSError, doing: str, path: object = None, kind: type[KdpipeError] | None = None) -> KdpipeError:
    """
    The error for what the operating system said while `doing` something (`writing`) with `path`, by default the error's own.

    Its class is `DiskFull` where there is no room, else `kind`, by default `ConfigError` for a wrong or forbidden path and `KdpipeError`
    for a disk that failed.
    """
    where = path if path is not None else _named(err)
    named = f" {where}" if where is not None else ""
    if isinstance(err, NotAFile):
        return (kind or ConfigError)(f"{doing}{named} was not tried: {err.strerror}; name a file")
    code = err.errno
    if code in _NO_ROOM:
        what, advice = _NO_ROOM[code]
        free = "" if code == errno.EFBIG else _free_text(where)
        return DiskFull(
            f"no room for{named or ' the output'}: {what} ({_text(err)}{free}); {advice} and run the same command again: what is finished "
            "is kept"
        )
    for table, default in ((_OF_THE_PATH, ConfigError), (_REFUSED, ConfigError), (_FAILED, KdpipeError)):
        if code in table:
            return (kind or default)(f"{doing}{named} failed, as {said(err)}: {table[code][1]}")
    return (kind or KdpipeError)(f"{doing}{named} failed ({_text(err)}): {_ELSE}, and run the same command again")


def said(err: OSError) -> str:
    """What an error says of its path, with the system's own words: `it is a folder, not a file (Is a directory)`."""
    if isinstance(err, NotAFile):
        return str(err.strerror)
    for table in (_OF_THE_PATH, _REFUSED, _NO_ROOM, _FAILED):
        if err.errno in table:
            return f"{table[err.errno][0]} ({_text(err)})"
    return _text(err)


@contextmanager
def explained(doing: str, path: object = None, kind: type[KdpipeError] | None = None) -> Iterator[None]:
    """Turn what the operating system says in the block into the error of `told`; errors without a number are passed on."""
    try:
        yield
    except OSError as err:
        if err.errno is None:
            raise
        raise told(err, doing, path, kind) from err


def special(path: str | os.PathLike[str]) -> str | None:
    """What is at a path if it is neither a file nor a folder: `a FIFO`, `a device`, `a socket`; None for those, or for nothing."""
    try:
        return kind_of(Path(path).stat().st_mode)
    except OSError:
        return None


def special_text(path: str | os.PathLike[str]) -> str:
    """For an error that says that there is no file: ` (it is a FIFO)`, and nothing where nothing is there."""
    found = special(path)
    return f" (it is {found})" if found else ""


def kind_of(mode: int) -> str | None:
    """The name of what `st_mode` describes, if it is neither a file nor a folder."""
    if stat.S_ISFIFO(mode):
        return "a FIFO"
    if stat.S_ISSOCK(mode):
        return "a socket"
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        return "a device"
    return None


def _free_text(path: object) -> str:
    try:
        folders = Path(str(path)).absolute().parents
        return f"; {shutil.disk_usage(next(folder for folder in folders if folder.is_dir())).free} bytes are free"
    except (OSError, StopIteration):
        return ""


def _named(err: OSError) -> object:
    names = [name for name in (err.filename, err.filename2) if isinstance(name, str | bytes | os.PathLike)]
    return os.fsdecode(names[-1]) if names else None


def _text(err: OSError) -> str:
    return err.strerror or type(err).__name__
