"""
Reads from S3 through obstore, where it is installed: a tenth of the processor time of s3fs, and as many requests at once as asked for.

Only reads: s3fs writes, lists and locks, and knows the credentials, the endpoint and the region, which are taken from it.
"""

from __future__ import annotations

import datetime
import importlib
from collections.abc import Callable, Sequence
from typing import Any

# Settings of fsspec for s3fs that are carried over. With any other, s3fs alone is used.
KNOWN = {
    "endpoint_url",
    "key",
    "secret",
    "token",
    "anon",
    "config_kwargs",
    "skip_instance_cache",
    "use_listings_cache",
    "max_concurrency",
}
KNOWN_OF_CONFIG = {"connect_timeout", "read_timeout", "retries"}
CREDENTIALS_LIVE = datetime.timedelta(minutes=5)  # until they are asked for again; botocore renews them
PAST_THE_END = ("Wanted range starting at", "status code: 416")  # in the error of a range that begins there
GAP_BYTES = 1 << 18  # between two ranges that are asked for as one


class S3Reader:
    """Objects of one bucket, by their keys. Errors are `FileNotFoundError` and obstore's own, whose first line names the request."""

    def __init__(self, obstore: Any, store: Any) -> None:
        self._obstore = obstore
        self._store = store

    def read(self, key: str) -> bytes:
        """The content of an object."""
        return bytes(self._obstore.get(self._store, key).bytes())

    def read_ranges(self, key: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """
        The bytes of an object in each `(start, length)`, as `Storage.read_ranges` promises.

        Neighbours are asked for at once, and a range that is empty not at all.
        """
        found = [b""] * len(spans)
        for number in (number for number, (start, length) in enumerate(spans) if start < 0 < length):
            start, length = spans[number]
            wanted = self._obstore.get(self._store, key, options={"range": {"suffix": -start}})
            found[number] = bytes(wanted.bytes())[:length]
        for group in _groups(
            [(start, length, number) for number, (start, length) in enumerate(spans) if start >= 0 < length]
        ):
            first, end = group[0][0], max(start + length for start, length, _ in group)
            data = memoryview(self._range(key, first, end))
            for start, length, number in group:
                found[number] = bytes(data[start - first : start - first + length])
        return found

    def _range(self, key: str, start: int, end: int) -> bytes:
        try:
            return bytes(self._obstore.get_range(self._store, key, start=start, end=end))
        except self._obstore.exceptions.GenericError as err:
            if any(sign in str(err) for sign in PAST_THE_END):
                return b""
            raise


def _groups(spans: list[tuple[int, int, int]]) -> list[list[tuple[int, int, int]]]:
    """Ranges `(start, length, number)` in order, those with small gaps together."""
    groups: list[list[tuple[int, int, int]]] = []
    end = 0
    for span in sorted(spans):
        if groups and span[0] - end <= GAP_BYTES:
            groups[-1].append(span)
        else:
            groups.append([span])
        end = max(end, span[0] + span[1]) if len(groups[-1]) > 1 else span[0] + span[1]
    return groups


def open_reader(fs: Any, bucket: str, *, connect_seconds: float, answer_seconds: float) -> S3Reader | None:
    """
    A reader with the settings of an `S3FileSystem`; None where obstore is not installed, or a setting is one that it is not given.

    Asks for credentials, which may take a request of botocore's own. Raises what s3fs raises where there are none.
    """
    from fsspec.asyn import sync
    from fsspec.config import conf

    given = conf.get("s3", {})
    if given.keys() - KNOWN or given.get("config_kwargs", {}).keys() - KNOWN_OF_CONFIG:
        return None
    try:
        obstore = importlib.import_module("obstore")
        stores = importlib.import_module("obstore.store")
    except ImportError:
        return None
    fs.connect()
    where = fs._s3.meta
    credentials = _credentials(fs, sync)
    if not where.region_name or not (credentials or fs.anon):
        return None
    timeouts = given.get("config_kwargs", {})
    store = stores.S3Store(
        bucket,
        endpoint=where.endpoint_url,
        region=where.region_name,
        client_options={
            "allow_http": where.endpoint_url.startswith("http://"),
            "connect_timeout": datetime.timedelta(seconds=timeouts.get("connect_timeout", connect_seconds)),
            "read_timeout": datetime.timedelta(seconds=timeouts.get("read_timeout", answer_seconds)),
            "timeout": datetime.timedelta(days=1),  # of a whole answer, however slow the line
        },
        retry_config={"max_retries": 0},  # ours is the only layer of retries
        **({"skip_signature": True} if fs.anon else {"credential_provider": credentials}),
    )
    return S3Reader(obstore, store)


def _credentials(fs: Any, sync: Callable[..., Any]) -> Callable[[], dict[str, Any]] | None:
    """What returns the credentials that s3fs uses; None where it has none."""
    if fs.key and fs.secret:
        fixed = {"access_key_id": fs.key, "secret_access_key": fs.secret, "token": fs.token, "expires_at": None}
        return lambda: fixed
    found = sync(fs.loop, fs.session.get_credentials)
    if found is None:
        return None

    def ask() -> dict[str, Any]:
        now = sync(fs.loop, found.get_frozen_credentials)
        return {
            "access_key_id": now.access_key,
            "secret_access_key": now.secret_key,
            "token": now.token,
            "expires_at": datetime.datetime.now(datetime.UTC) + CREDENTIALS_LIVE,
        }

    return ask
