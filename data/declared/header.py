"""
The header of a raster: size, types, colours, nodata, masks, place, orientation and compression, as the file and its side files say.

No pixel is decoded. Not covered: whether a header fits what is asked of the file (the other modules here).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from kdpipe.configs.schema import Alpha
from kdpipe.data.declared.opening import opened

if TYPE_CHECKING:
    from rasterio.io import DatasetReader

NAMELESS = frozenset({"undefined", "gray", "palette"})  # GDAL's words for a band whose colour nobody named
_ORIENTATION = 274  # the tag in TIFF and EXIF
_PALETTE_COLOURS = 256  # of a class mask; tables of 16 bits would only cost time


@dataclass(frozen=True)
class Declared:
    """
    What a raster file says of itself.

    Attributes:
        driver: GDAL's name of the format, such as `GTiff`.
        height: in px.
        width: in px.
        dtypes: of each band.
        colours: the meaning of each band in GDAL's words: `red`, `alpha`, `palette`, `gray`, `nir`, `undefined`, …
        nodata: of each band, from the file or its `.aux.xml`; None where none is declared.
        masked: whether a mask of its own, in the file or in a `.msk` beside it, says which pixels hold data. An alpha band is no mask.
        scales: of each band, 1 where none is declared: value = scale * stored + offset.
        offsets: of each band, 0 where none is declared.
        crs: rasterio's CRS, None if the file names none.
        transform: from pixels to the CRS, an `Affine`; None if the file has none.
        orientation: EXIF's: 1 is upright, 2 to 8 are turned or mirrored. kdpipe reads pixels as they are stored.
        compression: GDAL's name, such as `DEFLATE`; None if uncompressed or not said.
        lossy: whether the compression may have changed values.
        colour_table: `(r, g, b, a)` of each value of the first band, at most 256; None if it has none.
    """

    driver: str
    height: int
    width: int
    dtypes: tuple[str, ...]
    colours: tuple[str, ...]
    nodata: tuple[float | None, ...]
    masked: bool
    scales: tuple[float, ...]
    offsets: tuple[float, ...]
    crs: Any
    transform: Any
    orientation: int
    compression: str | None
    lossy: bool
    colour_table: tuple[tuple[int, int, int, int], ...] | None

    @property
    def bands(self) -> int:
        """Number of bands, alpha included."""
        return len(self.dtypes)

    @property
    def dtype(self) -> str:
        """The type of the bands, or one that holds the values of all of them."""
        return self.dtypes[0] if len(set(self.dtypes)) == 1 else str(np.result_type(*self.dtypes))

    @property
    def alpha(self) -> int | None:
        """Number of the band that is called alpha, counted from 1; None if there is none."""
        return self.colours.index("alpha") + 1 if "alpha" in self.colours else None

    def called(self, alpha: Alpha) -> Declared:
        """The same header, in which bands have the names that `called` gives them."""
        return self if alpha == "opacity" else replace(self, colours=called(self.colours, alpha))

    @property
    def rgb(self) -> tuple[int, int, int] | None:
        """Numbers of the bands called red, green and blue, counted from 1; None unless all three are."""
        found = [self.colours.index(colour) + 1 for colour in ("red", "green", "blue") if colour in self.colours]
        return (found[0], found[1], found[2]) if len(found) == 3 else None


def called(colours: Sequence[str], alpha: Alpha) -> tuple[str, ...]:
    """The names of bands, of which `alpha` means nothing, `undefined`, where such a band is an ordinary one (`data.alpha: band`)."""
    return tuple("undefined" if colour == "alpha" and alpha == "band" else colour for colour in colours)


def read_declared(path: Path) -> Declared:
    """
    What the image or mask at `path` says of itself.

    Raises `DataError` if the file is missing, is not a PNG, JPEG or TIFF, or declares more than `opening.MAX_PIXELS`.
    """
    with opened(path, placed=True) as raster:
        return declared_by(raster, path)


def declared_by(raster: DatasetReader, path: Path | None = None) -> Declared:
    """What an open raster says of itself; without the `path` of a local file, the orientation of a PNG or TIFF is unknown, 1."""
    from rasterio.enums import MaskFlags

    structure = raster.tags(ns="IMAGE_STRUCTURE")
    colours = tuple(meaning.name for meaning in raster.colorinterp)
    compression = "JPEG" if raster.driver == "JPEG" else structure.get("COMPRESSION")
    flags = raster.mask_flag_enums[0] if raster.count else []
    transform = raster.transform
    return Declared(
        driver=raster.driver,
        height=raster.height,
        width=raster.width,
        dtypes=tuple(raster.dtypes),
        colours=colours,
        nodata=tuple(raster.nodatavals),
        masked=MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags,
        scales=tuple(raster.scales),
        offsets=tuple(raster.offsets),
        crs=raster.crs or None,
        transform=None if transform.is_identity else transform,
        orientation=_orientation(raster, path),
        compression=compression,
        lossy=_is_lossy(compression, structure),
        colour_table=_colour_table(raster) if colours[:1] == ("palette",) else None,
    )


def _is_lossy(compression: str | None, structure: dict[str, str]) -> bool:
    if compression is None:
        return False
    if "JPEG" in compression:  # also `YCbCr JPEG` and `JPEG2000`, whose lossless form GDAL marks as such
        return structure.get("COMPRESSION_REVERSIBILITY", "LOSSY").startswith("LOSSY")
    if "LERC" in compression:
        return float(structure.get("MAX_Z_ERROR", 0)) > 0
    return structure.get("COMPRESSION_REVERSIBILITY", "LOSSLESS").startswith("LOSSY")  # WebP and JPEG XL


def _colour_table(raster: DatasetReader) -> tuple[tuple[int, int, int, int], ...] | None:
    try:
        table = raster.colormap(1)
    except ValueError:  # the band is called a palette and has none
        return None
    return tuple(table[value] for value in range(min(len(table), _PALETTE_COLOURS)))


def _orientation(raster: DatasetReader, path: Path | None) -> int:
    """The orientation of an open file. GDAL reads that of JPEGs alone."""
    found: int | None = None
    if raster.driver == "JPEG":
        text = raster.tags().get("EXIF_Orientation", "1")
        found = int(text) if text.isdecimal() else None
    elif path is not None and raster.driver == "GTiff":
        with path.open("rb") as file:
            found = _tiff_orientation(file)
    elif path is not None and raster.driver == "PNG":
        found = _png_orientation(path)
    return found if found is not None and 1 <= found <= 8 else 1


def _png_orientation(path: Path) -> int | None:
    """The orientation in the chunk eXIf, if it stands before the pixels, as it nearly always does."""
    from io import BytesIO

    with path.open("rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"eXIf":
                return _tiff_orientation(BytesIO(file.read(length)))
            if kind in (b"IDAT", b"IEND"):
                return None
            file.seek(length + 4, 1)  # 4: the checksum
    return None


def _tiff_orientation(file: BinaryIO) -> int | None:
    """The orientation in the first directory of a TIFF or of EXIF, which has the structure of a TIFF; None if there is none."""
    mark = file.read(4)
    order = {b"II": "<", b"MM": ">"}.get(mark[:2])
    if order is None or len(mark) < 4:
        return None
    is_big = struct.unpack(order + "2xH", mark)[0] == 43
    try:
        if is_big:
            (offset,) = struct.unpack(order + "4xQ", file.read(12))
            file.seek(offset)
            (count,), entry, value_at = struct.unpack(order + "Q", file.read(8)), 20, 12
        else:
            (offset,) = struct.unpack(order + "I", file.read(4))
            file.seek(offset)
            (count,), entry, value_at = struct.unpack(order + "H", file.read(2)), 12, 8
    except struct.error:  # cut off; GDAL says so if it matters
        return None
    directory = file.read(min(count, 2**12) * entry)
    for start in range(0, len(directory) - entry + 1, entry):
        if struct.unpack_from(order + "H", directory, start)[0] == _ORIENTATION:
            value: int = struct.unpack_from(order + "H", directory, start + value_at)[0]
            return value
    return None
