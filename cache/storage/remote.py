"""
A cache on any file system that fsspec knows, such as S3: requests are repeated when the network fails.

This is the only layer of retries: those of s3fs and botocore, which would multiply with it, are switched off.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import io
import logging
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from kdpipe.cache.storage.base import REPAIR, FileInfo
from kdpipe.cache.storage.s3_reader import S3Reader, open_reader
from kdpipe.configs.errors import CacheUnreachable
from kdpipe.configs.urls import hide_secrets

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# With the waits in between, this rides out about 16 s of refused connections, or two minutes of silence.
ATTEMPTS = 6
FIRST_WAIT_SECONDS = 0.5  # doubled after each failure, and shortened at random by up to a half to spread workers out
CONNECT_SECONDS = 10
ANSWER_SECONDS = 20  # between two packets of a response

FSSPEC_AT_ONCE, OBSTORE_AT_ONCE = 16, 64  # requests; more gain nothing: a processor then makes them no faster

OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "memory"}  # where folders are only parts of names
S3 = {"s3", "s3a"}
UNKNOWN = ("NotImplemented", "InvalidArgument", "InvalidRequest")  # codes of a server that does not know the condition
UNMET = (
    "PreconditionFailed",
    "ConditionalRequestConflict",
    "412",
)  # the codes of a condition that did not hold; some only give the status

# Refusals: repeating the request changes nothing. Any other error may be due to the network, and the request is repeated.
REFUSALS = {errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.EACCES, getattr(errno, "EREMCHG", errno.EINVAL)}
REFUSAL_TYPES = (PermissionError, ValueError, ImportError)
CREDENTIAL_ERRORS = {  # names, as botocore may not be installed
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound", "TokenRetrievalError",
}  # fmt: skip
OBSTORE_REFUSALS = {"PermissionDeniedError", "UnauthenticatedError"}  # names, as obstore may not be installed
BUGS = (TypeError, AttributeError, NameError, AssertionError, NotImplementedError, MemoryError)


class RemoteStorage:
    """
    A prefix on any file system that fsspec knows; see `Storage` for what each method promises.

    Every request is tried `ATTEMPTS` times with growing waits before `CacheUnreachable` is raised; refusals (credentials,
    permissions, a missing bucket) are not repeated. It is pickled as its URL: each process opens its own connections.
    """

    survives_fork = False  # the event loop of its file system does not
    repair = REPAIR

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self.url = url.rstrip("/")
        protocol = self.url.partition("://")[0]
        # Not fsspec's shared instance: its settings are not ours, and its cached listings would be stale.
        options = {
            "skip_instance_cache": True,
            "use_listings_cache": False,
            **(_s3_options() if protocol in S3 else {}),
        }
        try:
            self._fs, self._root = url_to_fs(self.url, **options)  # type: ignore[no-untyped-call]
        except (ValueError, ImportError, *BUGS):
            raise
        except Exception as err:  # file systems that connect at once
            self._root = ""
            raise self._unreachable("opening", "", err, _why_refused(err) or "there is no connection") from err
        self._is_s3 = protocol in S3
        self._reader: S3Reader | None = None
        self._has_looked = self._has_read = False
        self._opening = threading.Lock()
        if self._is_s3:
            self._fs.retries = 1
        self._has_folders = protocol not in OBJECT_STORES
        if not self._has_folders and "/" not in self._root.strip("/"):
            raise ValueError(f"a name below the bucket is missing, such as {self.url}/cache.zarr")

    def __reduce__(self) -> tuple[type[RemoteStorage], tuple[str]]:
        return RemoteStorage, (self.url,)

    def read(self, name: str) -> bytes:
        def by_s3fs() -> bytes:
            return bytes(self._fs.cat_file(self._full(name)))

        return self._try("reading", name, lambda: self._by(lambda reader, key: reader.read(key), name, by_s3fs))

    def mapped(self, name: str) -> memoryview:
        return memoryview(self.read(name))

    def read_ranges(self, name: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        def by_s3fs() -> list[bytes]:
            # One request for each range, all at the same time.
            starts = [start for start, _ in spans]
            ends = [None if start < 0 and start + length == 0 else start + length for start, length in spans]
            paths = [self._full(name)] * len(spans)
            return list(map(bytes, self._fs.cat_ranges(paths, starts, ends, on_error="raise")))

        return self._try(
            "reading", name, lambda: self._by(lambda reader, key: reader.read_ranges(key, spans), name, by_s3fs)
        )

    @property
    def at_once(self) -> int:
        return OBSTORE_AT_ONCE if self._opened_reader() is not None else FSSPEC_AT_ONCE

    def _by(self, read: Callable[[S3Reader, str], Result], name: str, by_s3fs: Callable[[], Result]) -> Result:
        """What obstore reads, where it is installed; s3fs reads the rest, and names what is missing or refused."""
        reader = self._opened_reader()
        if reader is None:
            return by_s3fs()
        try:
            found = read(reader, self._full(name).partition("/")[2])
        except FileNotFoundError:
            return by_s3fs()
        except Exception as err:
            if type(err).__name__ in OBSTORE_REFUSALS or not self._has_read:  # perhaps a setting that only s3fs knows
                self._do_without(err)
                return by_s3fs()
            raise ConnectionError(str(err).splitlines()[0].removeprefix("Generic S3 error: ")) from err
        self._has_read = True
        return found

    def _opened_reader(self) -> S3Reader | None:
        with self._opening:
            if self._is_s3 and not self._has_looked:
                self._has_looked = True
                bucket = self._full("").partition("/")[0]
                try:
                    self._reader = open_reader(
                        self._fs, bucket, connect_seconds=CONNECT_SECONDS, answer_seconds=ANSWER_SECONDS
                    )
                except Exception as err:  # whatever it is, s3fs meets it too, and names it
                    self._do_without(err)
        return self._reader

    def _do_without(self, err: Exception) -> None:
        self._reader = None
        said = str(err).partition("\n")[0] or type(err).__name__
        logger.info(
            "%s is read through s3fs alone, which is slower, as obstore cannot (%s)", self.url, hide_secrets(said)
        )

    def write(self, name: str, data: bytes | Iterable[bytes]) -> None:
        """
        Upload `data` as `name`; an object store shows the object once it is complete.

        Pieces are joined in memory, so that every attempt sends the same bytes: fsspec's own streams publish an incomplete object
        when an error closes them.
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
        Upload `data` as `name`; `FileExistsError` if the name exists.

        On S3 this is a single request (`If-None-Match: *`), so that only one of two simultaneous attempts succeeds.
        """
        try:
            self._conditionally("creating", name, lambda: self._fs.pipe_file(self._full(name), data, mode="create"))
        except FileExistsError:
            # An upload whose response was lost is repeated, and then finds its own object.
            if not self._holds(name, data):
                raise
        except FileNotFoundError as err:
            raise self._unreachable("creating", name, err, "there is no such place") from err

    def tagged(self, name: str) -> tuple[bytes, str | None] | None:
        """The content of an object and the tag of this or an earlier version of it (its `ETag`), None on other stores; None if absent."""
        try:
            entry = self._try("looking at", name, lambda: dict(self._fs.info(self._full(name))))
            return self.read(name), entry.get("ETag") if self._is_s3 else None
        except FileNotFoundError:
            return None

    def replace(self, name: str, data: bytes, tag: str | None) -> None:
        """
        Upload `data` as `name` if the object there still has the `tag`; else do nothing.

        Without a tag, and on a server without such conditions, it is replaced whatever it is.
        """
        if tag is not None:
            try:
                self._conditionally("replacing", name, lambda: self._fs.pipe_file(self._full(name), data, IfMatch=tag))
            except (FileExistsError, FileNotFoundError):
                return
            except NotImplementedError:
                tag = None
        if tag is None:
            self.write(name, data)

    def remove_same(self, name: str, data: bytes) -> None:
        """Delete an object that holds `data`, and no other; on S3 that is one request, which also a change at that moment stops."""
        found = self.tagged(name)
        if found is None or found[0] != data:
            return
        tag = found[1]
        if tag is not None:
            where = dict(zip(("Bucket", "Key"), self._fs.split_path(self._full(name)), strict=False))
            try:
                self._conditionally("deleting", name, lambda: self._fs.call_s3("delete_object", **where, IfMatch=tag))
            except (FileExistsError, FileNotFoundError):
                return
            except NotImplementedError:
                tag = None
        if tag is None:
            self.remove(name)

    def _conditionally(self, doing: str, name: str, call: Callable[[], object]) -> None:
        """Make a request with a condition; `FileExistsError` where it does not hold, `NotImplementedError` where the server has none."""

        def request() -> None:
            try:
                call()
            except OSError as err:
                code = _server_code(err)
                if code in UNMET:
                    raise FileExistsError(self._full(name)) from err
                if code in UNKNOWN:
                    raise NotImplementedError(code) from err
                raise

        self._try(doing, name, request)

    def _holds(self, name: str, data: bytes) -> bool:
        try:
            return self.read(name) == data
        except FileNotFoundError:
            return False

    def info(self, name: str) -> FileInfo | None:
        try:
            return _file_info(self._try("looking at", name, lambda: dict(self._fs.info(self._full(name)))))
        except FileNotFoundError:
            return None

    def infos(self) -> Callable[[str], FileInfo | None]:
        try:
            listed = self._try("listing", "", lambda: dict(self._fs.find(self._root, detail=True)))
        except FileNotFoundError:
            listed = {}
        found = {path: _file_info(entry) for path, entry in listed.items()}
        return lambda name: found.get(self._full(name))

    def last_write(self) -> float | None:
        """None: no request returns the time of a prefix."""
        return None

    def children(self, name: str) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            found = self._try("listing", name, lambda: self._fs.ls(self._full(name), detail=False))
            return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in found)
        return []

    def remove(self, name: str) -> None:
        """
        Delete a file or all files below a prefix; do nothing if there is none.

        One request for each: fsspec's `rm` reads `[` in a name as a pattern, and on S3 ignores files that the server did not delete.
        """
        for path in self._try("listing", name, lambda: self._fs.find(self._full(name))):
            with contextlib.suppress(FileNotFoundError):
                self._try("deleting", path.removeprefix(f"{self._root}/"), lambda path=path: self._fs.rm_file(path))  # type: ignore[misc]

    def free_bytes(self) -> int | None:
        return None

    def _full(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _try(self, doing: str, name: str, call: Callable[[], Result]) -> Result:
        """
        The result of `call`, after at most `ATTEMPTS` attempts; `FileNotFoundError` and `FileExistsError` are passed on.

        Any other exception (each file system's library has its own) becomes `CacheUnreachable`.
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
    """All pieces as one object; unlike `b"".join`, never with all pieces beside it in memory."""
    joined = io.BytesIO()
    for piece in pieces:
        joined.write(piece)
    return joined.getvalue()


def _file_info(entry: dict[str, Any]) -> FileInfo | None:
    """Size and time from fsspec's entry of a file, where each file system has its own name for the time; None for a folder."""
    if entry["type"] != "file":
        return None
    times = (entry[key] for key in ("LastModified", "last_modified", "mtime", "updated", "created") if key in entry)
    modified = next(times, None)
    if isinstance(modified, datetime.datetime):
        modified = modified.timestamp()
    return FileInfo(int(entry["size"]), modified if isinstance(modified, float | int) else None)


def _s3_options() -> dict[str, Any]:
    """Options for s3fs; the user's fsspec configuration takes precedence."""
    from fsspec.config import conf

    config: dict[str, Any] = {"connect_timeout": CONNECT_SECONDS, "read_timeout": ANSWER_SECONDS}
    config["retries"] = {"total_max_attempts": 1}
    # With more, s3fs asks for the size before each object that it reads whole.
    return {"max_concurrency": 1, "config_kwargs": config | conf.get("s3", {}).get("config_kwargs", {})}


def _why_refused(err: Exception) -> str | None:
    """Why repeating the request is useless, None if it may help."""
    if type(err).__name__ in CREDENTIAL_ERRORS:
        return "there are no credentials"
    if isinstance(err, PermissionError):
        return "access was refused"
    if isinstance(err, REFUSAL_TYPES) or (isinstance(err, OSError) and err.errno in REFUSALS):
        return "the server or its library refused"
    return None


def _server_code(err: BaseException) -> str | None:
    """The error code in an S3 server's response, None if there was none."""
    response = getattr(err.__cause__, "response", None)
    return response.get("Error", {}).get("Code") if isinstance(response, dict) else None


def _text(err: Exception) -> str:
    return hide_secrets(f"{type(err).__name__}: {err}") if str(err) else type(err).__name__
