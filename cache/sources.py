"""The images that tiles were computed from: what they hold, and whether they still hold it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from kdpipe.cache.records import ImageDigest, TileRecord


def digest_image(path: Path) -> ImageDigest:
    """The size in bytes and the sha256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return ImageDigest(size_bytes=file.tell(), sha256=digest.hexdigest())


def is_unchanged(path: Path, record: TileRecord, written: float | None, *, by_content: bool) -> bool:
    """
    Whether an image still holds what its tile was computed from.

    `written` is when the tile was finished (seconds since the epoch). Unless `by_content`, an image of the same size that
    was not modified since is taken as unchanged, as `make` would; any other is compared by its sha256.
    """
    try:
        stat = path.stat()
        if stat.st_size != record.image.size_bytes:
            return False
        if not by_content and written is not None and stat.st_mtime < written:
            return True
        return digest_image(path) == record.image
    except FileNotFoundError:
        return False
