"""The digests of the images that tiles are computed from, and whether an image has changed since."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from kdpipe.cache.records import ImageDigest, TileRecord
from kdpipe.configs.errors import DataError
from kdpipe.configs.files import file_sha256


class Crop(Protocol):
    """An image that is not a file, but can be made from files again at any time."""

    @property
    def files(self) -> Sequence[Path]:
        """All files that it is made from."""
        ...

    def pixels(self) -> NDArray[Any]:
        """The image, uint8 `(band, row, column)`; `DataError` if it cannot be made."""
        ...


Source = Path | Crop


def digest_image(path: Path) -> ImageDigest:
    """The size in bytes and the sha256 of a file."""
    return ImageDigest(size_bytes=path.stat().st_size, sha256=file_sha256(path))


def digest_crop(crop: Crop, pixels: NDArray[Any]) -> ImageDigest:
    """The total size in bytes of the files that a crop is made from, and the sha256 of its pixels."""
    return ImageDigest(size_bytes=sum(file.stat().st_size for file in crop.files), sha256=digest_pixels(pixels))


def digest_pixels(pixels: NDArray[Any]) -> str:
    """The sha256 of an image's pixels, uint8 `(band, row, column)` in C order."""
    return hashlib.sha256(pixels.data if pixels.flags.c_contiguous else pixels.tobytes()).hexdigest()


def is_unchanged(source: Source, record: TileRecord, written: float | None, *, by_content: bool) -> bool:
    """
    Whether an image is still the one that its tile was computed from.

    `written` is when the tile was finished, in seconds since the epoch. Unless `by_content`, an image of the same size that was
    not modified since then counts as unchanged, as in `make`; any other is compared by its sha256. A crop is judged by the size
    and times of all its files, and compared by the pixels that they give now.
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
    except (FileNotFoundError, DataError):  # DataError: the crop can no longer be made
        return False
