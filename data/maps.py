"""
Writing maps as tiled, compressed GeoTIFFs with overviews. A map is whole or absent.

It is written beside its place as `.NAME.partial`, then synced and renamed as the last of its files. Class names are in its tags, and in
`NAME.aux.xml` beside it, where GIS programs look for them; GeoTIFF itself has no place for them.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from numpy.typing import NDArray

from kdpipe.configs.errors import DataError, KdpipeError
from kdpipe.configs.files import partial_path, publish
from kdpipe.data.scenes import Georeference, open_quietly

BLOCK_PX = 512  # side of a block of the file
SMALLEST_OVERVIEW_PX = 256
# A probability p is stored as round(254 p), which leaves 255 for no data; half a step is 0.002. The scale in the file says so.
PROBABILITY_STEPS, NO_PROBABILITY = 254, 255


@dataclass(frozen=True)
class Layer:
    """
    The content of one file: descriptions of its `bands`, dtype, value for no data, and resampling of its overviews.

    A map of class indices has `classes` and their `colours`, uint8 `(C, 3)`. A stored value times `scale` is the true one.
    """

    bands: Sequence[str]
    dtype: str
    nodata: int
    resampling: str
    classes: Sequence[str] = ()
    colours: Sequence[Sequence[int]] = ()
    scale: float | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


def class_layer(
    classes: Sequence[str], colours: Sequence[Sequence[int]], nodata: int, tags: Mapping[str, str]
) -> Layer:
    """A map of class indices, in 16 bits if the largest index or `nodata` needs them."""
    dtype = "uint8" if max(len(classes) - 1, nodata) <= np.iinfo(np.uint8).max else "uint16"
    return Layer(
        ["class"], dtype, nodata, "mode", classes, colours, tags={"classes": json.dumps(list(classes)), **tags}
    )


def probability_layer(bands: Sequence[str], tags: Mapping[str, str]) -> Layer:
    """Probabilities in steps of 1 / 254, one band each."""
    return Layer(bands, "uint8", NO_PROBABILITY, "average", scale=1 / PROBABILITY_STEPS, tags=tags)


def as_bytes(probs: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Probabilities as stored, uint8: `round(254 p)`."""
    stored: NDArray[np.uint8] = np.rint(probs * PROBABILITY_STEPS).astype(np.uint8)
    return stored


class RowWriter:
    """Takes rows from top to bottom and writes whole rows of blocks, because a block that is written twice is stored twice."""

    def __init__(self, raster: Any) -> None:
        self._raster, self._top = raster, 0
        self._waiting: list[NDArray[Any]] = []

    def write(self, rows_BHW: NDArray[Any]) -> None:
        """Take the next rows, `(bands, h, W)` in the layer's dtype."""
        self._waiting.append(rows_BHW)
        if sum(rows.shape[1] for rows in self._waiting) >= BLOCK_PX:
            together = np.concatenate(self._waiting, axis=1)
            whole = together.shape[1] // BLOCK_PX * BLOCK_PX
            self._put(together[:, :whole])
            self._waiting = [together[:, whole:]]

    def finish(self) -> None:
        """Write the remaining rows."""
        if self._waiting:
            self._put(np.concatenate(self._waiting, axis=1))
            self._waiting = []

    def _put(self, rows_BHW: NDArray[Any]) -> None:
        from rasterio.windows import Window

        height, width = rows_BHW.shape[1:]
        if height:
            window = Window(0, self._top, width, height)  # type: ignore[no-untyped-call, unused-ignore]
            self._raster.write(rows_BHW, window=window)
            self._top += height


@contextmanager
def new_map(file: Path, layer: Layer, height: int, width: int, place: Georeference) -> Iterator[RowWriter]:
    """
    A writer of a map that appears at `file` when the block ends; an exception leaves nothing.

    Raises `KdpipeError` if the map cannot be written, `DataError` if another process is writing it.
    """
    partial = partial_path(file)
    with _locked(partial), _explained(file):
        raster = _create(partial, layer, height, width, place)
        try:
            writer = RowWriter(raster)
            yield writer
            writer.finish()
        finally:
            raster.close()
        factors = _overview_factors(height, width)
        _add_overviews(partial, layer.resampling, factors)
        _require_whole(partial, layer, factors)
        names = file.with_name(f"{file.name}.aux.xml")
        names.unlink(missing_ok=True)  # of an earlier map of this name
        if layer.classes:
            names.write_text(_category_names(layer.classes), encoding="utf-8")
        publish(partial, file)


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Create `partial` and lock it against other processes; it is deleted afterwards, unless it was renamed."""
    try:
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as err:
        raise KdpipeError(f"cannot write {partial}: {err.strerror}") from err
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            raise DataError(f"another process is writing {partial}: wait for it, or choose another --out") from err
        try:
            yield
        finally:
            partial.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _create(partial: Path, layer: Layer, height: int, width: int, place: Georeference) -> Any:
    profile: dict[str, Any] = {
        "driver": "GTiff",
        "height": height,
        "width": width,
        "count": len(layer.bands),
        "dtype": layer.dtype,
        "nodata": layer.nodata,
        "tiled": True,
        "blockxsize": BLOCK_PX,
        "blockysize": BLOCK_PX,
        "compress": "deflate",
        "predictor": 1 if layer.classes else 2,  # neighbouring probabilities are similar; class indices have no order
        "interleave": "band",
        "bigtiff": "if_safer",
    }
    profile |= {
        key: value for key in ("crs", "transform", "gcps", "rpcs") if (value := getattr(place, key)) is not None
    }
    raster = open_quietly(partial, "w", **profile)
    raster.update_tags(**layer.tags)
    for band, description in enumerate(layer.bands, start=1):
        raster.set_band_description(band, description)
    if layer.scale is not None:
        raster.scales = [layer.scale] * len(layer.bands)
    if layer.colours:
        table = {index: (*map(int, colour), 255) for index, colour in enumerate(layer.colours)}
        raster.write_colormap(1, {**table, layer.nodata: (0, 0, 0, 0)})
    return raster


def _overview_factors(height: int, width: int) -> list[int]:
    factors: list[int] = []
    while max(height, width) / 2 ** len(factors) > SMALLEST_OVERVIEW_PX:
        factors.append(2 ** (len(factors) + 1))
    return factors


def _add_overviews(partial: Path, resampling: str, factors: list[int]) -> None:
    from rasterio.enums import Resampling

    if factors:
        with open_quietly(partial, "r+") as raster:
            raster.build_overviews(factors, Resampling[resampling])


def _require_whole(partial: Path, layer: Layer, factors: list[int]) -> None:
    """
    Raise `OSError` unless the file holds all its blocks, overviews included.

    On a full disk, GDAL may close a file without an error although its last blocks are missing; they would read as no data.
    """
    size = partial.stat().st_size
    with open_quietly(partial) as raster:
        # Compared by number, as factors are rounded: for a side of 1000 px, 32 is reported as 31.
        if len(raster.overviews(1)) != len(factors) or raster.nodata != layer.nodata:
            raise OSError(errno.ENOSPC, "its overviews were not written completely")
        for level, factor in ((None, 1), *enumerate(factors)):
            rows, columns = (math.ceil(math.ceil(side / factor) / BLOCK_PX) for side in raster.shape)
            for band, row, column in product(raster.indexes, range(rows), range(columns)):
                offset, length = (
                    raster.get_tag_item(f"BLOCK_{what}_{column}_{row}", "TIFF", bidx=band, ovr=level)
                    for what in ("OFFSET", "SIZE")
                )
                if offset is None or int(offset) + int(length) > size:
                    raise OSError(errno.ENOSPC, f"its block {column}, {row} was not written completely")


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    """Turn errors of GDAL and of the system while writing `file` into a `KdpipeError`."""
    from rasterio._err import CPLE_BaseError  # what closing a file raises is no RasterioError
    from rasterio.errors import RasterioError

    try:
        yield
    except (RasterioError, CPLE_BaseError, OSError) as err:
        reason = getattr(err, "strerror", None) or err.__cause__ or err
        raise KdpipeError(f"cannot write the map {file}: {reason}; check free space and permissions") from err


def _category_names(classes: Sequence[str]) -> str:
    names = "".join(f"<Category>{escape(name)}</Category>" for name in classes)
    return f'<PAMDataset><PAMRasterBand band="1"><CategoryNames>{names}</CategoryNames></PAMRasterBand></PAMDataset>\n'
