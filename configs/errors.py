"""
Every error that a user can meet. The command line prints its message as one paragraph and exits with `exit_code`.

    KdpipeError                     1
    ├── ConfigError                 2   a key, a value or a path in the configuration
    │   └── UnfilledConfig              values that `kdpipe init` left for the user to fill in
    ├── DataError                   2   an image, a mask or a folder of them
    ├── CheckpointError             2   a file of weights
    ├── TrainingDiverged            1   a loss that became infinite or NaN
    ├── OutOfMemory                 1   too little memory on the device, on the machine or in its shared memory
    ├── Interrupted               130   the user pressed Ctrl-C, and the work stopped at a safe point
    ├── ClusterUnreachable          3   the dask scheduler does not answer, or has no workers
    └── CacheError                  3   a cache that must not be used as it is
        ├── IncompleteCache             missing or unfinished
        ├── StaleCache                  made from another teacher, class map, temperature, image, …
        ├── UnknownFormat               a version of the format that this program cannot read or write
        ├── CorruptCache                bytes that differ from those written
        ├── CacheLocked                 another process is writing it, or a run's folder
        ├── NoLocks                     on a file system without locks
        ├── ShutOut                     a worker whose run no longer owns the cache
        ├── CacheUnreachable            a server that does not answer, or refuses
        └── DiskFull                    no room on the disk
"""

from collections.abc import Iterable


class KdpipeError(Exception):
    """A user's mistake or a fault outside the program. The message says what was expected, what was found, and what to do."""

    exit_code = 1


class ConfigError(KdpipeError):
    """The configuration is unusable; the message names the key."""

    exit_code = 2


class UnfilledConfig(ConfigError):
    """A configuration in which `kdpipe init` left values to fill in; the message names keys and lines."""


class DataError(KdpipeError):
    """An image, a mask or a folder of them is unusable; the message names the file."""

    exit_code = 2


class CheckpointError(KdpipeError):
    """A file of weights is missing, unreadable, unsafe or from another model."""

    exit_code = 2


class TrainingDiverged(KdpipeError):
    """The loss became infinite or NaN."""


class OutOfMemory(KdpipeError):
    """The device or the machine has too little memory for a stage; the message names the size tried and the keys to change."""


class Interrupted(KdpipeError):
    """The user asked to stop, and the work stopped at a point that it can resume from."""

    exit_code = 130


class ClusterUnreachable(KdpipeError):
    """The dask scheduler did not answer in time, or no worker arrived; the message gives the time waited."""

    exit_code = 3


class CacheError(KdpipeError):
    """A cache that must not be used as it is."""

    exit_code = 3


class IncompleteCache(CacheError):
    """The cache does not exist, or stage one did not finish it."""


class StaleCache(CacheError):
    """The cache was made from something else than is configured now; the message names the field."""


class UnknownFormat(CacheError):
    """The cache has another format version; the message names it and the versions that this program knows."""


class CorruptCache(CacheError):
    """The cache's bytes differ from those written; the message names the tile."""


class CacheLocked(CacheError):
    """Another process is writing the cache, or the folder of a run; the message names it."""


class NoLocks(CacheError):
    """The file system has no locks, without which two processes could write at once."""


class ShutOut(CacheError):
    """The run of a worker has ended or was taken over, so the worker must not store anything."""


class CacheUnreachable(CacheError):
    """The cache's file system did not answer after several attempts, or refused; the message names the request."""


class DiskFull(CacheError):
    """The disk has no room for the cache."""


def count_text(count: int, nouns: str) -> str:
    """A number and a noun that is given in the plural: `2 tiles`, `1 tile`, `1 class`, `1 entry`."""
    if count != 1:
        return f"{count} {nouns}"
    for plural, singular in (("ies", "y"), ("sses", "ss"), ("xes", "x"), ("ches", "ch"), ("s", "")):
        if nouns.endswith(plural):
            return f"1 {nouns.removesuffix(plural)}{singular}"
    return f"1 {nouns}"


def summarise(names: Iterable[str], shown: int = 5) -> str:
    """The names as `a, b, c and 7 more`, for an error message that must stay short."""
    listed = list(names)
    rest = len(listed) - shown
    return ", ".join(listed[:shown]) + (f" and {rest} more" if rest > 0 else "")


def extra_text(extra: str) -> str:
    """What to do where a package of kdpipe's optional `extra` is missing. Not by kdpipe's name: no index of packages has it."""
    return f"install kdpipe's extra `{extra}`: `pip install '.[{extra}]'` in its clone"
