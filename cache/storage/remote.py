"""
The files of a cache on any file system that fsspec knows: asked again where the network fails, and never half believed.

There is one layer of retries, this one: those of s3fs and botocore, which would multiply with it, are switched off.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import io
import logging
import random
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from kdpipe.cache.storage.base import FileInfo
from kdpipe.configs.errors import CacheUnreachable

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

ATTEMPTS = (
    6  # with the waits between them, about 16 s of refused connections, or two minutes of silence, are ridden out
)
FIRST_WAIT_SECONDS = (
    0.5  # doubled after each failure, and shortened at random by up to a half so that workers spread out
)
CONNECT_SECONDS = 10
ANSWER_SECONDS = 20  # between two packets of an answer, not for the whole of it

OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory"}  # where a folder is a part of a name
S3 = {"s3", "s3a"}

# Refusals: the same request gets the same answer. All else may be the network's, and is tried again.
REFUSALS = {errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.EACCES, getattr(errno, "EREMCHG", errno.EINVAL)}
REFUSAL_TYPES = (PermissionError, ValueError, ImportError)
CREDENTIAL_ERRORS = {  # of botocore, which may not be installed
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound", "TokenRetrievalError",
}  # fmt: skip
BUGS = (TypeError, AttributeError, NameError, AssertionError, NotImplementedError, MemoryError)


class RemoteStorage:
    """
    A prefix on any file system that fsspec knows.

    Every call is tried `ATTEMPTS` times with growing waits, then raises `CacheUnreachable`; what a server refuses
    (credentials, permissions, an absent bucket) is not tried again. Pickled, it is its URL: each process connects anew.
    """

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self.url = url.rstrip("/")
        protocol = self.url.partition("://")[0]
        # An instance of its own: its settings are not for others, and listings kept from before would be stale.
        options = {
            "skip_instance_cache": True,
            "use_listings_cache": False,
            **(_s3_options() if protocol in S3 else {}),
        }
        self._fs, self._root = url_to_fs(self.url, **options)  # type: ignore[no-untyped-call]
        if protocol in S3:
            self._fs.retries = 1
        self._has_folders = protocol not in OBJECT_STORES
        if not self._has_folders and "/" not in self._root.strip("/"):
            raise ValueError(f"a name below the bucket is missing, such as {self.url}/cache.zarr")

    def __reduce__(self) -> tuple[type[RemoteStorage], tuple[str]]:
        return RemoteStorage, (self.url,)

    def read(self, name: str) -> bytes:
        """The content of a file; `FileNotFoundError` if there is none."""
        return self._try("reading", name, lambda: bytes(self._fs.cat_file(self._full(name))))

    def read_ranges(self, name: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """
        The bytes of a file in each `(start, length)`; a negative start counts from the end; fewer where the file ends.

        A request each, which do not wait for one another.
        """
        starts = [start for start, _ in spans]
        ends = [None if start < 0 and start + length == 0 else start + length for start, length in spans]
        paths = [self._full(name)] * len(spans)
        return self._try(
            "reading", name, lambda: list(map(bytes, self._fs.cat_ranges(paths, starts, ends, on_error="raise")))
        )

    def write(self, name: str, data: bytes | Iterable[bytes]) -> None:
        """
        Upload `data` as `name`; an object store shows the object once all of it has arrived.

        Pieces are joined in memory, so that each attempt sends the same: fsspec's own streams publish what they have when an
        error leaves them.
        """
        whole = data if isinstance(data, bytes) else _joined(data)

        def upload() -> None:
            if self._has_folders:
                self._fs.makedirs(self._full(name).rsplit("/", 1)[0], exist_ok=True)
            self._fs.pipe_file(self._full(name), whole)

        try:
            self._try("writing", name, upload)
        except FileNotFoundError as err:
            raise self._unreachable("writing", name, err, "there is no such place") from err

    def create(self, name: str, data: bytes) -> None:
        """
        Upload `data` as `name` if there is nothing of this name yet, else raise `FileExistsError`.

        On S3 one request (`If-None-Match: *`), so that of two who try at once one succeeds.
        """

        def upload() -> None:
            try:
                self._fs.pipe_file(self._full(name), data, mode="create")
            except OSError as err:
                if _server_code(err) in ("PreconditionFailed", "ConditionalRequestConflict"):
                    raise FileExistsError(self._full(name)) from err
                raise

        try:
            self._try("creating", name, upload)
        except FileExistsError:
            # An upload whose answer was lost is tried again, and then meets itself.
            if self.read(name) != data:
                raise
        except FileNotFoundError as err:
            raise self._unreachable("creating", name, err, "there is no such place") from err

    def info(self, name: str) -> FileInfo | None:
        """Size and time of a file by the server's clock, None if there is none."""
        try:
            return _file_info(self._try("looking at", name, lambda: dict(self._fs.info(self._full(name)))))
        except FileNotFoundError:
            return None

    def infos(self) -> Callable[[str], FileInfo | None]:
        """`info` of what one listing of the whole cache found."""
        try:
            listed = self._try("listing", "", lambda: dict(self._fs.find(self._root, detail=True)))
        except FileNotFoundError:
            listed = {}
        found = {path: _file_info(entry) for path, entry in listed.items()}
        return lambda name: found.get(self._full(name))

    def last_write(self) -> float | None:
        """None: no request tells that of a prefix."""
        return None

    def children(self, name: str) -> list[str]:
        """The names directly below a prefix, sorted; empty if there is nothing."""
        with contextlib.suppress(FileNotFoundError):
            found = self._try("listing", name, lambda: self._fs.ls(self._full(name), detail=False))
            return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in found)
        return []

    def remove(self, name: str) -> None:
        """
        Delete a file or all files below a prefix; nothing happens if there is none.

        One by one: fsspec's `rm` takes `[` in a name for a pattern, and on S3 passes over what the server did not delete.
        """
        for path in self._try("listing", name, lambda: self._fs.find(self._full(name))):
            with contextlib.suppress(FileNotFoundError):
                self._try("deleting", path.removeprefix(f"{self._root}/"), lambda path=path: self._fs.rm_file(path))  # type: ignore[misc]

    def free_bytes(self) -> int | None:
        """None: object stores have no limit to ask for."""
        return None

    def _full(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _try(self, doing: str, name: str, call: Callable[[], Answer]) -> Answer:
        """
        The call's answer, at last; `FileNotFoundError` and `FileExistsError` are answers as well.

        Whatever else a file system's library raises (each has exceptions of its own) becomes `CacheUnreachable`.
        """
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return call()
            except (FileNotFoundError, FileExistsError) as err:
                if _server_code(err) == "NoSuchBucket":
                    raise self._unreachable(doing, name, err, "there is no such bucket") from err
                raise
            except BUGS:
                raise
            except Exception as err:
                why = _why_refused(err)
                if why or attempt == ATTEMPTS:
                    raise self._unreachable(doing, name, err, why or f"{ATTEMPTS} attempts failed") from err
                if attempt == 1:
                    logger.warning("%s %s failed (%s); trying again", doing, self._shown(name), _text(err))
                time.sleep(FIRST_WAIT_SECONDS * 2 ** (attempt - 1) * random.uniform(0.5, 1))
        raise AssertionError("unreachable")

    def _unreachable(self, doing: str, name: str, err: Exception, why: str) -> CacheUnreachable:
        advice = {
            "there is no such bucket": "create the bucket, or correct cache.path",
            "there is no such place": "create the bucket or folder, or correct cache.path",
            "access was refused": "check that these credentials may list, read, write and delete there",
            "there are no credentials": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
        }.get(why, "check the network, the endpoint and the server")
        return CacheUnreachable(
            f"{doing} {self._shown(name)}: {why} ({_text(err)}); {advice}, and run the same command again: "
            "what is finished is kept"
        )

    def _shown(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url


def _joined(pieces: Iterable[bytes]) -> bytes:
    """Holds the bytes once: `b"".join` would hold all pieces beside them."""
    joined = io.BytesIO()
    for piece in pieces:
        joined.write(piece)
    return joined.getvalue()


def _file_info(entry: dict[str, Any]) -> FileInfo | None:
    """From what fsspec says of a file: the size under one name, the time under one that each file system has chosen itself."""
    if entry["type"] != "file":
        return None
    times = (entry[key] for key in ("LastModified", "last_modified", "mtime", "updated", "created") if key in entry)
    modified = next(times, None)
    if isinstance(modified, datetime.datetime):
        modified = modified.timestamp()
    return FileInfo(int(entry["size"]), modified if isinstance(modified, float | int) else None)


def _s3_options() -> dict[str, Any]:
    """Those of s3fs, with what fsspec's own configuration says of them on top."""
    from fsspec.config import conf

    config: dict[str, Any] = {"connect_timeout": CONNECT_SECONDS, "read_timeout": ANSWER_SECONDS}
    config["retries"] = {"total_max_attempts": 1}
    # More than one makes s3fs ask for the size before each whole object that it reads.
    return {"max_concurrency": 1, "config_kwargs": config | conf.get("s3", {}).get("config_kwargs", {})}


def _why_refused(err: Exception) -> str | None:
    """Why trying again is in vain, None where it may help."""
    if type(err).__name__ in CREDENTIAL_ERRORS:
        return "there are no credentials"
    if isinstance(err, PermissionError):
        return "access was refused"
    if isinstance(err, REFUSAL_TYPES) or (isinstance(err, OSError) and err.errno in REFUSALS):
        return "the server or its library refused"
    return None


def _server_code(err: BaseException) -> str | None:
    """The error's code as an S3 server names it, where one did."""
    response = getattr(err.__cause__, "response", None)
    return response.get("Error", {}).get("Code") if isinstance(response, dict) else None


def _text(err: Exception) -> str:
    return f"{type(err).__name__}: {err}" if str(err) else type(err).__name__
