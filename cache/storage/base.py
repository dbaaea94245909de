"""The interface of a cache's storage, and the function that opens a storage by its path."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

from kdpipe.configs.errors import ConfigError, extra_text
from kdpipe.configs.outputs import output_path

LOCAL_SCHEMES = ("file://", "local://")  # not left to fsspec: it does not sync, and its writes can be half done


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

    def read(self, name: str) -> bytes:
        """The content of a file; `FileNotFoundError` if there is none, `CorruptCache` if something else is in its place."""

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
    The storage at a folder or an fsspec URL (`s3://bucket/cache.zarr`).

    Raises `ConfigError` for a URL that the installed fsspec cannot open, for a folder within a Python package, and for a path at which
    no cache can be (see `local.require_place`).
    """
    # Imported here: both modules import this one.
    if "://" in path and not path.startswith(LOCAL_SCHEMES):
        from kdpipe.cache.storage.remote import RemoteStorage

        try:
            return RemoteStorage(path)
        except (ValueError, ImportError) as err:  # an unknown protocol, or one whose package is not installed
            hint = f"; {extra_text('s3')}" if path.startswith("s3") and isinstance(err, ImportError) else ""
            raise ConfigError(f"cache.path: {path} cannot be opened: {err}{hint}") from err
    from kdpipe.cache.storage.local import LocalStorage, require_place

    for scheme in LOCAL_SCHEMES:
        path = path.removeprefix(scheme)
    folder = output_path(path, key="cache.path")
    require_place(folder)
    return LocalStorage(folder)
