"""The interface of a cache's storage, and the function that opens a storage by its path."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

from kdpipe.configs.errors import ConfigError, extra_text
from kdpipe.configs.outputs import output_path
from kdpipe.configs.urls import is_url, local_folder, refuse_address

REPAIR = "`kdpipe precompute-teacher --repair` computes only the damaged tiles again"


class FileInfo(NamedTuple):
    """A file's size in bytes, and the time of its last write in seconds since the epoch, None if unknown."""

    size: int
    modified: float | None


class Storage(Protocol):
    """
    A place for the files of a cache; names are relative to it, with `/` between parts.

    Every method that reads raises `CacheUnreachable` once its attempts are used up, and so does every method of remote storage.
    """

    url: str
    survives_fork: bool  # whether a process forked from one that has read from it can read on
    repair: str  # what to do about a damaged tile, for the end of an error

    @property
    def at_once(self) -> int:
        """How many reads from threads are faster than one after another."""

    def read(self, name: str) -> bytes:
        """The content of a file; `FileNotFoundError` if there is none, `CorruptCache` if something else is in its place."""

    def mapped(self, name: str) -> memoryview:
        """What `read` returns; on a disk it is mapped, so that processes share it and no memory is taken for what is not looked at."""

    def read_ranges(self, name: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of a file in each `(start, length)`; a negative start counts from the end; fewer bytes past the end."""

    def write(self, name: str, data: bytes | Iterable[bytes]) -> None:
        """Make `name` hold exactly `data`, or all its pieces, atomically and durably; errors of the iterable are passed on."""

    def info(self, name: str) -> FileInfo | None:
        """Size and time of a file, None if there is none."""

    def infos(self) -> Callable[[str], FileInfo | None]:
        """A function like `info`, for callers that need most files: an object store lists a thousand in one request."""

    def last_write(self) -> float | None:
        """A time that changes whenever a file of the cache is written; None if unknown."""

    def children(self, name: str) -> list[str]:
        """The names of the files and folders directly below a folder, sorted; empty if it does not exist."""

    def remove(self, name: str) -> None:
        """Delete a file, or a folder with all its content; do nothing if there is none."""

    def free_bytes(self) -> int | None:
        """The free space in bytes, None if there is no limit to ask for."""


def open_storage(path: str) -> Storage:
    """
    The storage at a folder, a pack (`cache.zarr.zip`), or an fsspec URL of either (`s3://bucket/cache.zarr`).

    Raises `ConfigError` for a URL or path at which no cache can be (see `urls.refuse_address` and `local.require_place`), for a URL that
    the installed fsspec cannot open, and for a folder within a Python package.
    """
    # Imported here: these modules import this one.
    try:
        refuse_address(path)
    except ValueError as err:
        raise ConfigError(f"cache.path: {err}") from err
    if is_url(path):
        from kdpipe.cache.storage.packed import SUFFIX, PackedStorage
        from kdpipe.cache.storage.remote import RemoteStorage

        try:
            remote = RemoteStorage(path)
            return PackedStorage(remote.url, remote, "") if remote.url.endswith(SUFFIX) else remote
        except (ValueError, ImportError) as err:  # an unknown protocol, or one whose package is not installed
            hint = f"; {extra_text('s3')}" if path.startswith("s3") and isinstance(err, ImportError) else ""
            raise ConfigError(f"cache.path: {path} cannot be opened: {err}{hint}") from err
    from kdpipe.cache.storage.local import LocalStorage, require_place
    from kdpipe.cache.storage.packed import SUFFIX, PackedStorage

    folder = output_path(local_folder(path), key="cache.path")
    if folder.suffix == SUFFIX and not folder.is_dir():
        return PackedStorage(str(folder), LocalStorage(folder.parent), folder.name)
    require_place(folder)
    return LocalStorage(folder)
