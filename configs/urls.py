"""URLs of caches: which are refused, and how a password or key in one is kept from every output."""

from __future__ import annotations

import re
from pathlib import Path

LOCAL_SCHEMES = ("file://", "local://")  # not left to fsspec: it does not sync, and its writes can be half done

_READ_ONLY = (
    "can only be read: use the address by which it can be written, such as s3://, or download the cache into a folder"
)
_NO_STORE = {
    "http": _READ_ONLY,
    "https": _READ_ONLY,
    "ftp": "shows files that are half written, and sends passwords in the clear: use sftp://, or a folder",
    "ftps": "shows files that are half written: use sftp://, or a folder",
    "data": "is no place for files: name a folder, or a URL such as s3://bucket/caches/mine.zarr",
    **dict.fromkeys(
        ("zip", "tar", "libarchive", "reference", "github", "git", "generic", "dir", "jupyter", "jlab", "pyscript"),
        "cannot be written file by file: name a folder, or a URL such as s3://bucket/caches/mine.zarr",
    ),
    **dict.fromkeys(
        ("simplecache", "filecache", "blockcache", "cached"),
        "shows copies that may be old: name the place itself",
    ),
}  # fmt: skip
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")
_ONE_SLASH = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/(?!/)")
_PASSWORD = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)[^\s@:'\"]*:[^\s'\"]*@")  # a key may hold slashes
_QUERY = re.compile(r"(?P<url>[A-Za-z][A-Za-z0-9+.-]*://[^\s?'\"]*\?)(?P<query>[^\s'\"#]+)")
_VALUE = re.compile(r"=[^&;,)\s]*")


def hide_secrets(text: str) -> str:
    """The text with users and passwords, and values of query strings, in its URLs replaced by `…`: `s3://…@host/x?X-Amz-Signature=…`."""
    if "://" not in text:
        return text
    text = _PASSWORD.sub(lambda found: f"{found['scheme']}…@", text)
    return _QUERY.sub(
        lambda found: found["url"] + (_VALUE.sub("=…", found["query"]) if "=" in found["query"] else "…"), text
    )


def is_url(path: str) -> bool:
    """Whether a path is left to fsspec."""
    return "://" in path and not path.startswith(LOCAL_SCHEMES)


def local_folder(path: str) -> Path:
    """The folder that a path or a local URL names; not for a path that `is_url`."""
    for scheme in LOCAL_SCHEMES:
        path = path.removeprefix(scheme)
    return Path(path).expanduser()


def refuse_address(path: str) -> None:
    """
    Raise `ValueError` for a path or URL at which no cache can be; the message shows no password.

    That is a URL without a scheme or a place, of a scheme that cannot hold a cache, one with a password or key in it, and one that has
    lost a slash.
    """
    shown = hide_secrets(path)
    if not path.strip():
        raise ValueError("the path is empty: name a folder, or a URL such as s3://bucket/caches/mine.zarr")
    lost = _ONE_SLASH.match(path)
    if lost:
        raise ValueError(
            f"{shown} has one slash after {lost['scheme']}:, and a URL has two: write {lost['scheme']}://…"
        )
    if "://" not in path:
        return
    scheme, _, place = path.partition("://")
    if "::" in scheme or not _SCHEME.fullmatch(scheme):
        raise ValueError(
            f"{shown} is no URL of one place: name a folder, or a URL such as s3://bucket/caches/mine.zarr"
        )
    if not place.strip("/"):
        raise ValueError(
            f"{shown} names no place: is a variable in it empty? Expected such as {scheme}://bucket/caches/mine.zarr"
        )
    if scheme.lower() in _NO_STORE:
        raise ValueError(f"{shown}: {scheme}:// {_NO_STORE[scheme.lower()]}")
    if shown != path:
        raise ValueError(
            f"{shown} has a password or key in it, which would be stored and shown: take it out, and give it to fsspec in its own "
            f"place, as the environment variable FSSPEC_{scheme.upper()}_PASSWORD or a file in ~/.config/fsspec (docs/remote.md)"
        )
    if path.startswith(LOCAL_SCHEMES) and not place.startswith(("/", "~")):
        machine = place.partition("/")[0]
        raise ValueError(f"{shown} names the machine {machine!r}: write {scheme}:///folder, or the folder alone")
