"""The images that tiles were computed from: what they hold, and whether they still hold it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from kdpipe.cache.records import ImageDigest, TileRecord
from kdpipe.configs.errors import DataError


class Crop(Protocol):
    """An image that is no file, but can be made of files again at any time."""

    @property
    def files(self) -> Sequence[Path]:
        """All that it is made of."""
        ...

    def pixels(self) -> NDArray[Any]:
        """The image, uint8 `(band, row, column)`; `DataError` where it cannot be made."""
        ...


Source = Path | Crop


def digest_image(path: Path) -> ImageDigest:
    """The size in bytes and the sha256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return ImageDigest(size_bytes=file.tell(), sha256=digest.hexdigest())


def digest_crop(crop: Crop, pixels: NDArray[Any]) -> ImageDigest:
    """The size in bytes of the files that a crop is made of, all together, and the sha256 of its pixels."""
    return ImageDigest(size_bytes=sum(file.stat().st_size for file in crop.files), sha256=digest_pixels(pixels))


def digest_pixels(pixels: NDArray[Any]) -> str:
    """The sha256 of an image's values, uint8 `(band, row, column)`, in that order."""
    return hashlib.sha256(pixels.data if pixels.flags.c_contiguous else pixels.tobytes()).hexdigest()


def is_unchanged(source: Source, record: TileRecord, written: float | None, *, by_content: bool) -> bool:
    """
    Whether an image still holds what its tile was computed from.

    `written` is when the tile was finished (seconds since the epoch). Unless `by_content`, an image of the same size that
    was not modified since is taken as unchanged, as `make` would; any other is compared by its sha256. So is a crop, by the
    files that it is made of, all together; it is compared by the pixels that they give now.
    """
    try:
        stats = [file.stat() for file in ([source] if isinstance(source, Path) else source.files)]
        same_size = sum(stat.st_size for stat in stats) == record.image.size_bytes
        if isinstance(source, Path) and not same_size:
            return False
        older = written is not None and all(stat.st_mtime < written for stat in stats)
        if same_size and older and not by_content:
            return True
        if isinstance(source, Path):
            return digest_image(source) == record.image
        return digest_pixels(source.pixels()) == record.image.sha256
    except (FileNotFoundError, DataError):  # the latter for what can no longer be made into a crop
        return False
