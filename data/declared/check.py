"""
The check of all headers before the work begins: each tile by itself, the tiles against each other, and validation against training.

Headers are read by threads, a thousand tiles a second and more from a local disk. Nothing of a million headers is kept but what differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kdpipe.configs.errors import DataError
from kdpipe.configs.schema import Alpha
from kdpipe.data.declared.agreement import Agreement
from kdpipe.data.declared.header import Declared, read_declared
from kdpipe.data.declared.leaks import Place, copies, leak_findings, overlapping, place_of
from kdpipe.data.declared.opening import settings_held
from kdpipe.data.declared.tile import image_faults, mask_faults, pair_faults
from kdpipe.data.tiles import Tile

THREADS = 8  # a network drive answers many at once; on a local disk two are as fast
SHOWN = 3  # faults in one error
_AT_ONCE = 16  # tiles that a thread reads with one setting of GDAL
_AHEAD = 64  # such parts that are read ahead


@dataclass(frozen=True)
class Headers:
    """What a tile's image and mask declare; None where there is no mask, or where an error says why a file cannot be read."""

    tile: Tile
    image: Declared | None
    mask: Declared | None
    image_error: str | None = None
    mask_error: str | None = None

    def called(self, alpha: Alpha) -> Headers:
        """The same headers; bands of the image have the names that `header.called` gives them."""
        return self if self.image is None else replace(self, image=self.image.called(alpha))


@dataclass
class Findings:
    """What is certainly wrong (`faults`, of `refused` tiles), and what probably is (`notes`)."""

    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_headers(tiles: Sequence[Tile], advance: Callable[[], None] = lambda: None) -> Iterator[Headers]:
    """The headers of tiles, in their order; `advance` is called after each."""
    parts = [tiles[start : start + _AT_ONCE] for start in range(0, len(tiles), _AT_ONCE)]
    with ThreadPoolExecutor(THREADS) as threads:
        for start in range(0, len(parts), _AHEAD):
            for part in threads.map(_read, parts[start : start + _AHEAD]):
                for headers in part:
                    advance()
                    yield headers


def tile_faults(
    headers: Headers, bands: Sequence[int] | None, *, has_stretch: bool, of_colours: bool = False
) -> list[str]:
    """
    What is certainly wrong with one tile; without `bands`, its image is compared with its mask alone.

    An image that cannot be read is no fault here, as stage one goes on without it; `Headers.image_error` says why. A mask is.
    """
    tile, image, mask = headers.tile, headers.image, headers.mask
    faults = image_faults(tile.image, image, bands, has_stretch=has_stretch) if image and bands else []
    if headers.mask_error is not None:
        faults.append(headers.mask_error)
    if mask is not None and tile.mask is not None:
        faults += mask_faults(tile.mask, mask, of_colours=of_colours)
        if image is not None:
            faults += pair_faults(tile.image, image, tile.mask, mask)
    return faults


class Comparison:
    """Tiles against each other: those that are trained on, and those that are validated on."""

    def __init__(self, bands: Sequence[int] | None, chosen: bool, classes: int) -> None:
        self._agreement = Agreement(bands, chosen, classes)
        self._places: dict[bool, list[tuple[Path, Place]]] = {False: [], True: []}
        self._images: dict[bool, list[Path]] = {False: [], True: []}
        self._crs: dict[Any, Any] = {}  # each once: a million of them would take gigabytes

    def add(self, headers: Headers, *, is_val: bool) -> None:
        """Add a tile; files that could not be read are left out."""
        tile, image, mask = headers.tile, headers.image, headers.mask
        if mask is not None and tile.mask is not None:
            self._agreement.add_mask(tile.mask, mask)
        if image is None:
            return
        self._agreement.add_image(tile.image, image)
        self._images[is_val].append(tile.image)
        if (place := place_of(image)) is not None:
            crs = self._crs.setdefault(place.crs and place.crs.wkt, place.crs)
            self._places[is_val].append((tile.image, replace(place, crs=crs)))

    def findings(self) -> Findings:
        """What the tiles say against each other. Reads the training images that are of the size of a validation image, in part."""
        copied = copies(self._images[False], self._images[True])
        overlaps = overlapping(self._places[False], self._places[True])
        faults, notes = leak_findings(overlaps, copied, len(self._images[True]))
        return Findings(self._agreement.faults + faults, self._agreement.notes + notes)


def refuse(findings: Findings) -> None:
    """Raise `DataError` with the first of the faults, if there are any."""
    faults = findings.faults
    if faults:
        more = f"; and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise DataError("; ".join(faults[:SHOWN]) + more)


def _read(tiles: Sequence[Tile]) -> list[Headers]:
    with settings_held():
        return [headers_of(tile) for tile in tiles]


def headers_of(tile: Tile) -> Headers:
    """The headers of one tile."""
    image, image_error = _declared(tile.image)
    mask, mask_error = _declared(tile.mask) if tile.mask is not None else (None, None)
    return Headers(tile, image, mask, image_error, mask_error)


def _declared(path: Path) -> tuple[Declared | None, str | None]:
    try:
        return read_declared(path), None
    except DataError as err:
        return None, str(err)
