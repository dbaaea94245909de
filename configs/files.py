"""Files that are whole or absent, even after a power cut: written beside their place, synced, and renamed."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

PARTIAL_SUFFIX = ".partial"


def partial_path(path: Path) -> Path:
    """The file beside `path` that holds its content until it is whole: `.NAME.partial`."""
    return path.with_name(f".{path.name}{PARTIAL_SUFFIX}")


@contextmanager
def write_atomically(path: Path, partial: Path | None = None) -> Iterator[BinaryIO]:
    """
    An open file whose content becomes `path` when the block ends, durably; if the block raises, `path` stays as it was.

    `partial` is where the content lies until then, on the same file system (default: `partial_path(path)`).
    """
    partial = partial or partial_path(path)
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def publish(partial: Path, path: Path) -> None:
    """Move a finished file into place durably; for libraries that write to a name instead of an open file."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable: a renamed or new file may be gone after a power cut until then."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: str | Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
