"""
Every error that a user can cause or meet. The command line prints them as one paragraph and exits with `exit_code`.

    KdpipeError                     1
    ├── ConfigError                 2   a key, a value or a path in the configuration
    │   └── UnfilledConfig              `kdpipe init` left values in it for the user to say
    ├── DataError                   2   an image, a mask or a folder of them
    ├── CheckpointError             2   a file of weights
    ├── TrainingDiverged            1   a loss that is no longer a number
    ├── OutOfMemory                 1   the device, the machine or its shared memory cannot hold what a stage needs
    ├── Interrupted               130   the user pressed Ctrl-C, and the work stopped at a safe point
    ├── ClusterUnreachable          3   the dask scheduler does not answer, or has no workers
    └── CacheError                  3   a cache that must not be used as it is
        ├── IncompleteCache             not there, or not finished
        ├── StaleCache                  made from another teacher, class map, temperature, image, …
        ├── UnknownFormat               of a version of the format that this program does not read, or not write
        ├── CorruptCache                its bytes are not the ones that were written
        ├── CacheLocked                 another process is writing it
        ├── ShutOut                     the run that a worker computes for writes it no longer
        ├── CacheUnreachable            the server it lies on does not answer, or refuses
        └── DiskFull                    the disk cannot hold what is to be written
"""

from collections.abc import Iterable


class KdpipeError(Exception):
    """A user's mistake or a fault outside the program: one paragraph that says what was expected, found, and what to do."""

    exit_code = 1


class ConfigError(KdpipeError):
    """A configuration that cannot be used."""

    exit_code = 2


class UnfilledConfig(ConfigError):
    """A configuration that `kdpipe init` wrote and whose user has still to say what no file does; the message names keys and lines."""


class DataError(KdpipeError):
    """An image, a mask or a folder of them that cannot be used; the message names the file."""

    exit_code = 2


class CheckpointError(KdpipeError):
    """A file of weights that is missing, unreadable, unsafe or of another model."""

    exit_code = 2


class TrainingDiverged(KdpipeError):
    """The loss became infinite or NaN."""


class OutOfMemory(KdpipeError):
    """A device or the machine has no memory left for a stage; the message says the size tried and which keys to change."""


class Interrupted(KdpipeError):
    """The user asked to stop, and the work stopped at a point from which it can go on."""

    exit_code = 130


class ClusterUnreachable(KdpipeError):
    """The dask scheduler did not answer in time, or no worker came; the message says how long was waited."""

    exit_code = 3


class CacheError(KdpipeError):
    """A cache that must not be used as it is."""

    exit_code = 3


class IncompleteCache(CacheError):
    """The cache does not exist, or its last run did not finish."""


class StaleCache(CacheError):
    """The cache was made from something else than what is configured now; the message names the field."""


class UnknownFormat(CacheError):
    """The cache has another version of the format; the message says which, and which this program knows."""


class CorruptCache(CacheError):
    """The cache's bytes are not those that were written; the message names the tile."""


class CacheLocked(CacheError):
    """Another process is writing this cache; the message says which."""


class ShutOut(CacheError):
    """A worker's run has ended or was taken over by another, so that the worker must not store anything."""


class CacheUnreachable(CacheError):
    """The file system that the cache lies on did not answer after several attempts, or refused; the message says what was asked."""


class DiskFull(CacheError):
    """There is no room for what is to be written."""


def summarise(names: Iterable[str], shown: int = 5) -> str:
    """`a, b, c and 7 more`: names for an error that must stay short."""
    listed = list(names)
    rest = len(listed) - shown
    return ", ".join(listed[:shown]) + (f" and {rest} more" if rest > 0 else "")
