"""Tiles of validation that are in training too: copies of a file, and tiles that lie on training tiles."""

from __future__ import annotations

import filecmp
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdpipe.configs.files import open_file
from kdpipe.data.declared.header import Declared

SAMPLE_BYTES = 4096  # of a file, from its middle, where pixels are
MOST_OF_VAL = 0.5  # copies among the validation tiles from which their scores mean nothing
MOST_COMPARED = 20  # files of one size whose samples are equal too, such as tiles of nothing but nodata
MOST_CELLS = (
    1000  # of a grid of the largest validation tile; larger training scenes are compared with every validation tile
)
LEAST_SHARE = 0.01  # of a tile's area; less is the seam of a grid


@dataclass(frozen=True)
class Place:
    """An image's bounds in a CRS, in its units: `left <= right`, `bottom <= top`."""

    crs: Any
    left: float
    bottom: float
    right: float
    top: float


def place_of(image: Declared) -> Place | None:
    """The bounds of an image; None where it has no place, or is turned against the axes of its CRS."""
    if image.transform is None:
        return None
    a, b, c, d, e, f = image.transform[:6]
    if b or d:
        return None
    xs, ys = sorted((c, c + a * image.width)), sorted((f, f + e * image.height))
    return Place(image.crs, xs[0], ys[0], xs[1], ys[1])


def overlapping(
    train: Sequence[tuple[Path, Place]], val: Sequence[tuple[Path, Place]]
) -> list[tuple[Path, Path, float]]:
    """
    The validation images that lie on training images, each with the one that covers most of it, and that share of its area.

    Only places in one CRS are compared. Takes time in proportion to the tiles, as long as few lie on each other.
    """
    if not train or not val:
        return []
    side = max(max(place.right - place.left, place.top - place.bottom) for _, place in val)
    grid = _Grid(side)
    for path, place in train:
        grid.add(path, place)
    found = []
    for path, place in val:
        covering = max(grid.near(place), key=lambda other: _shared(place, other[1]), default=None)
        if covering is not None and (share := _shared(place, covering[1])) > LEAST_SHARE:
            found.append((path, covering[0], share))
    return found


def copies(train: Sequence[Path], val: Sequence[Path]) -> list[tuple[Path, Path]]:
    """
    The validation files that are byte for byte a training file, each with that one.

    Sizes are compared first, then a sample of the bytes of files of equal size, then all bytes. Files that cannot be read are left out.
    """
    if not train or not val:
        return []
    by_size: dict[int, list[Path]] = {}
    for path in val:
        if (size := _size(path)) is not None:
            by_size.setdefault(size, []).append(path)
    alike: dict[tuple[int, bytes], list[Path]] = {}
    for path in train:
        size = _size(path)
        if size is not None and size in by_size and (sample := _sample(path, size)):
            alike.setdefault((size, sample), []).append(path)
    found = []
    for size, paths in by_size.items():
        for path in paths:
            candidates = alike.get((size, _sample(path, size)), [])[:MOST_COMPARED]
            other = next((other for other in candidates if filecmp.cmp(path, other, shallow=False)), None)
            if other is not None:
                found.append((path, other))
    return sorted(found)


def leak_findings(
    overlaps: Sequence[tuple[Path, Path, float]], copied: Sequence[tuple[Path, Path]], val: int
) -> tuple[list[str], list[str]]:
    """The faults and the notes of `overlapping` and `copies`, for `val` validation tiles."""
    faults, notes = [], []
    if copied:
        path, other = copied[0]
        are = "are" if len(copied) > 1 else "is"
        text = (
            f"{len(copied)} of {val} validation images {are} byte for byte a training image, such as {path} and {other}"
        )
        if len(copied) > MOST_OF_VAL * val:
            faults.append(f"{text}; scores on training tiles mean nothing: validate on other scenes")
        else:
            notes.append(f"{text}; scores count them as if they were new")
    if overlaps:
        path, other, share = max(overlaps, key=lambda found: found[2])
        lie = "lie" if len(overlaps) > 1 else "lies"
        notes.append(
            f"{len(overlaps)} of {val} validation images {lie} on training images in place, such as {path}, {100 * share:.0f} % of "
            f"which {other} covers: unless they show another time, scores on them mean little"
        )
    return faults, notes


class _Grid:
    """Places by the cells of a grid that they touch."""

    def __init__(self, side: float) -> None:
        self._side = side
        self._crs: list[Any] = []
        self._cells: dict[tuple[int, int, int], list[tuple[Path, Place]]] = {}
        self._large: list[tuple[Path, Place]] = []

    def add(self, path: Path, place: Place) -> None:
        """Add a place."""
        xs, ys = self._spans(place)
        if len(xs) * len(ys) > MOST_CELLS:  # before any list of them: a mosaic of a country over tiles of 40 m has 10⁸
            self._large.append((path, place))
            return
        for cell in self._touched(place):
            self._cells.setdefault(cell, []).append((path, place))

    def near(self, place: Place) -> list[tuple[Path, Place]]:
        """The added places in cells that `place` touches, some of them more than once."""
        large = [other for other in self._large if other[1].crs == place.crs]
        return [other for cell in self._touched(place) for other in self._cells.get(cell, [])] + large

    def _touched(self, place: Place) -> list[tuple[int, int, int]]:
        number = next((i for i, crs in enumerate(self._crs) if crs is place.crs or crs == place.crs), None)
        if number is None:
            number = len(self._crs)
            self._crs.append(place.crs)
        xs, ys = self._spans(place)
        return [(number, x, y) for x in xs for y in ys]

    def _spans(self, place: Place) -> tuple[range, range]:
        """The columns and rows of the grid that a place touches."""
        xs = range(math.floor(place.left / self._side), math.floor(place.right / self._side) + 1)
        ys = range(math.floor(place.bottom / self._side), math.floor(place.top / self._side) + 1)
        return xs, ys


def _shared(place: Place, other: Place) -> float:
    """The share of a place's area that another one covers, 0..1."""
    width = min(place.right, other.right) - max(place.left, other.left)
    height = min(place.top, other.top) - max(place.bottom, other.bottom)
    area = (place.right - place.left) * (place.top - place.bottom)
    return max(width, 0.0) * max(height, 0.0) / area if area else 0.0


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _sample(path: Path, size: int) -> bytes:
    try:
        with open_file(path) as file:
            file.seek(max(0, size // 2 - SAMPLE_BYTES // 2))
            return file.read(SAMPLE_BYTES)
    except OSError:
        return b""
