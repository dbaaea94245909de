"""The digests of the images that tiles are computed from, and whether an image has changed since."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from kdpipe.cache.index.records import ImageDigest, TileRecord
from kdpipe.configs.errors import DataError
from kdpipe.configs.files import file_sha256
from kdpipe.configs.os_errors import NotAFile, explained


class Crop(Protocol):
    """Content that is not one file, but can be made from files again at any time."""

    @property
    def files(self) -> Sequence[Path]:
        """All files that it is made from."""
        ...

    def has(self, digest: ImageDigest) -> bool:
        """Whether the files give the content of this digest now; `DataError` if they give none."""
        ...


Source = Path | Crop


def digest_image(path: Path) -> ImageDigest:
    """The size in bytes and the sha256 of a file."""
    return ImageDigest(size_bytes=path.stat().st_size, sha256=file_sha256(path))


def digest_crop(files: Sequence[Path], pixels: NDArray[Any]) -> ImageDigest:
    """The total size in bytes of the `files` that a crop is made from, and the sha256 of its pixels."""
    return ImageDigest(size_bytes=sum(file.stat().st_size for file in files), sha256=digest_pixels(pixels))


def digest_pixels(pixels: NDArray[Any]) -> str:
    """The sha256 of an image's pixels, uint8 `(band, row, column)` in C order."""
    return hashlib.sha256(pixels.data if pixels.flags.c_contiguous else pixels.tobytes()).hexdigest()


def files_of(source: Source) -> Sequence[Path]:
    """All files that an image is made from."""
    return [source] if isinstance(source, Path) else source.files


def same_content(source: Source, record: TileRecord) -> bool:
    """
    Whether an image is the one that its tile was computed from, by its sha256; a crop's is that of what its files give now.

    False for an image that is missing or can no longer be made. Raises `DataError` where the system refuses to read it.
    """
    try:
        if not isinstance(source, Path):
            return source.has(record.image)
        with explained("reading", source, DataError):
            return source.stat().st_size == record.image.size_bytes and digest_image(source) == record.image
    except DataError as err:  # the crop can no longer be made, or nothing is there
        if isinstance(source, Path) and not isinstance(
            err.__cause__, FileNotFoundError | NotADirectoryError | NotAFile
        ):
            raise
        return False
