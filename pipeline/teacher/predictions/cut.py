"""The part of a large raster that lies where a tile does: on the same grid, so that no value is resampled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kdpipe.configs.errors import DataError
from kdpipe.data.declared.drivers import drivers_for
from kdpipe.data.declared.header import Declared, declared_by, read_declared
from kdpipe.data.declared.opening import GDAL_OPTIONS, explained
from kdpipe.data.declared.plausible import require_plausible
from kdpipe.data.declared.tile import crs_text, moved
from kdpipe.data.decoders import quiet_reader

if TYPE_CHECKING:
    from rasterio.io import DatasetReader

CUT_FROM = (".tif", ".tiff", ".vrt", ".img")
OFF_GRID_PX = 0.02  # corners of a tile that lie farther from the raster's grid are no rounding of its georeference
_OPTIONS = GDAL_OPTIONS | {"GDAL_CACHEMAX": 256}  # MB, enough for a row of blocks


@dataclass(frozen=True)
class Stored:
    """Values of a tile as stored, `(C, H, W)`, which of its pixels have one, and the scale and offset of each channel."""

    values_CHW: NDArray[Any]
    known_HW: NDArray[np.bool_]
    scales: tuple[float, ...]
    offsets: tuple[float, ...]


@dataclass(frozen=True)
class _Overlap:
    """Rows and columns that a tile and a raster share, in the raster and in the tile."""

    there: tuple[slice, slice]
    here: tuple[slice, slice]


def cut(image: Path, rasters: Sequence[Path]) -> Stored:
    """
    The values of the tile `image` in large `rasters`; where several overlap, of the first that has one.

    Raises `DataError` where an image has no georeference, a raster another CRS or grid, rasters differ in their bands, or none covers
    any pixel of the tile.
    """
    tile = read_declared(image)
    found: Stored | None = None
    for path in rasters:
        with _opened(path) as raster:
            overlap = _overlap(image, tile, path, declared_by(raster))
            if overlap is None:
                continue
            if found is None:
                shape = raster.count, tile.height, tile.width
                known_HW = np.zeros(shape[1:], dtype=np.bool_)
                dtype = np.result_type(*raster.dtypes)
                found = Stored(np.zeros(shape, dtype=dtype), known_HW, tuple(raster.scales), tuple(raster.offsets))
            there = (raster.count, np.result_type(*raster.dtypes), tuple(raster.scales), tuple(raster.offsets))
            if there != (len(found.values_CHW), found.values_CHW.dtype, found.scales, found.offsets):
                raise DataError(
                    f"{path} holds {raster.count} bands of {there[1]}, scaled by {sorted(set(raster.scales))}, and {rasters[0]} others: "
                    "predictions of one tile must agree in bands, type and scale"
                )
            _fill(found, raster, overlap)
            if found.known_HW.all():
                break
    if found is None:
        raise DataError(
            f"{image} lies outside of {_listed(rasters)}, by their own georeferences: no prediction covers it"
        )
    return found


def covers(image: Path, rasters: Sequence[Path]) -> bool:
    """Whether one of the rasters covers a pixel of a tile, by the headers alone; raises `DataError` as `cut` does, not for the image."""
    try:
        tile = read_declared(image)
    except DataError:  # stage one names it
        return True
    for path in rasters:
        with _opened(path) as raster:
            if _overlap(image, tile, path, declared_by(raster)) is not None:
                return True
    return False


def known_of(values_CHW: NDArray[Any], missing_CHW: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which pixels have a prediction, bool `(H, W)`: those where a channel is neither declared nodata nor NaN."""
    absent_CHW = missing_CHW | np.isnan(values_CHW) if values_CHW.dtype.kind == "f" else missing_CHW
    known_HW: NDArray[np.bool_] = ~np.logical_and.reduce(absent_CHW, axis=0)
    return known_HW


def _fill(found: Stored, raster: DatasetReader, overlap: _Overlap) -> None:
    from rasterio.windows import Window

    (rows, columns), here = overlap.there, overlap.here
    window = Window.from_slices(rows, columns)  # type: ignore[no-untyped-call]
    values_ChW = raster.read(window=window)
    missing_ChW = np.stack(
        [_is_nodata(values_hW, nodata) for values_hW, nodata in zip(values_ChW, raster.nodatavals, strict=True)]
    )
    missing_ChW |= _masked(raster, window)
    known_hW = known_of(values_ChW, missing_ChW) & ~found.known_HW[here]
    found.values_CHW[:, *here][:, known_hW] = values_ChW[:, known_hW]
    found.known_HW[here] |= known_hW


def _is_nodata(values_HW: NDArray[Any], nodata: float | None) -> NDArray[np.bool_]:
    if nodata is None:
        return np.zeros(values_HW.shape, dtype=np.bool_)
    with np.errstate(over="ignore"):  # a nodata beyond float32 is -inf there
        is_nodata_HW: NDArray[np.bool_] = np.isnan(values_HW) if np.isnan(nodata) else values_HW == nodata
    return is_nodata_HW


def _masked(raster: DatasetReader, window: Any) -> NDArray[np.bool_]:
    """Where a mask of the file, which is not a band, hides pixels."""
    from rasterio.enums import MaskFlags

    flags = raster.mask_flag_enums[0]
    if MaskFlags.per_dataset not in flags or MaskFlags.alpha in flags:
        return np.zeros((1, 1), dtype=np.bool_)
    return np.asarray(raster.read_masks(1, window=window) == 0)


def _overlap(image: Path, tile: Declared, path: Path, raster: Declared) -> _Overlap | None:
    for file, declared in ((image, tile), (path, raster)):
        if declared.transform is None:
            raise DataError(
                f"{file} has no georeference, and a tile is cut from a large raster by its place: give it one, or name a folder with a "
                "prediction for each tile"
            )
    if tile.crs is not None and raster.crs is not None and tile.crs != raster.crs:
        raise DataError(
            f"{path} is in {crs_text(raster)}, and the tile {image} in {crs_text(tile)}: predictions are not resampled, so warp them "
            "to the CRS and grid of the tiles (`gdalwarp -r near`)"
        )
    corners = np.array([(0, 0), (tile.width, 0), (0, tile.height), (tile.width, tile.height)], dtype=np.float64)
    seen = moved(~raster.transform, moved(tile.transform, corners))
    left, top = np.rint(seen[0]).astype(int).tolist()
    off = np.abs(seen - (corners + np.array([left, top])))
    if not np.isfinite(seen).all() or off.max() > OFF_GRID_PX:
        x, y = seen[0]
        raise DataError(
            f"the tile {image} does not lie on the grid of {path}: its corner is at column {x:.3f}, row {y:.3f} of it, and its pixels have "
            f"{_pixel_text(tile)} against {_pixel_text(raster)}. Predictions are not resampled: make them on the grid of the tiles"
        )
    top_0, left_0 = max(0, top), max(0, left)
    bottom, right = min(raster.height, top + tile.height), min(raster.width, left + tile.width)
    if top_0 >= bottom or left_0 >= right:
        return None
    return _Overlap(
        (slice(top_0, bottom), slice(left_0, right)),
        (slice(top_0 - top, bottom - top), slice(left_0 - left, right - left)),
    )


@contextmanager
def _opened(path: Path) -> Iterator[DatasetReader]:
    import rasterio

    with (
        rasterio.Env(**_OPTIONS),  # type: ignore[no-untyped-call]
        explained(path, "not a raster"),
        quiet_reader(placed=True)(path, driver=drivers_for(str(path))) as raster,
    ):
        require_plausible(path, raster, whole=False)
        yield raster


def _pixel_text(declared: Declared) -> str:
    a, b, _, d, e, _ = declared.transform[:6]
    turned = f", turned by ({b:g}, {d:g})" if b or d else ""
    return f"{a:.10g} x {e:.10g}{turned}"


def _listed(rasters: Sequence[Path]) -> str:
    return ", ".join(map(str, rasters[:3])) + (f" and {len(rasters) - 3} more" if len(rasters) > 3 else "")
