"""Resolving the configured stretch to one `(low, high)` per band, the same for all tiles of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdpipe.configs import schema
from kdpipe.configs.errors import DataError, count_text
from kdpipe.data.rasters import read_bands
from kdpipe.data.tiles import Tile, list_tiles, without_limit

# Values per band over all tiles, however many bands are read: 4 Mi float64 of 3 bands are 100 MB, of 12 bands 400 MB. The standard
# error of the rank of a 2 % quantile among 4 Mi independent values is 0.007 %, far below the difference between one choice of
# percentiles and the next.
SAMPLE_VALUES = 2**22
MIN_VALUES_PER_TILE = 16  # a million tiles still fit: 16 M values a band


def resolve_stretch(data: schema.Data, tiles: Sequence[Tile]) -> list[tuple[float, float]] | None:
    """
    A `(low, high)` for each of `data.bands` in the files' own units, or None if 8-bit values are taken as they are.

    Percentiles are taken over all `tiles` together (with `data.limit`, over all that there are without it), on the same regular grid of
    pixels in each call, in memory bounded by `SAMPLE_VALUES`, without nodata and non-finite values. Every image is read once.

    Raises `DataError` if an image cannot be read, no value is left, or a band is constant between the percentiles.
    """
    if data.stretch is None:
        return None
    if isinstance(data.stretch, schema.FixedRange):
        return data.stretch.pairs(len(data.bands))
    if data.limit is not None:
        tiles = list_tiles(without_limit(data), "train")
    assert tiles, "percentiles of no tiles"
    per_tile = max(SAMPLE_VALUES // len(tiles), MIN_VALUES_PER_TILE)
    samples = [sampled_bands(tile.image, data.bands, per_tile, data.alpha) for tile in tiles]
    pairs: list[tuple[float, float]] = []
    for band, sample in zip(data.bands, zip(*samples, strict=True), strict=True):
        values = np.concatenate(sample)
        if values.size == 0:
            raise DataError(
                f"band {band} holds only nodata in all {count_text(len(tiles), 'images')}, such as {tiles[0].image}"
            )
        low, high = np.percentile(values, data.stretch.percentiles).tolist()
        if not low < high:
            raise DataError(
                f"band {band} is {low:g} from percentile {data.stretch.percentiles[0]:g} to {data.stretch.percentiles[1]:g} of "
                f"the {count_text(len(tiles), 'images')}, such as {tiles[0].image}, and cannot be stretched: choose other data.bands, or a "
                "data.stretch.range"
            )
        pairs.append((low, high))
    return pairs


def sampled_bands(
    path: Path, bands: Sequence[int], at_most: int, alpha: schema.Alpha = "opacity"
) -> list[NDArray[np.float64]]:
    """
    Values of each band at the pixels of `sample_grid`, float64, without nodata and non-finite values.

    Raises `DataError` as `read_bands` does.
    """
    values_BHW, nodata_BHW = read_bands(path, bands, alpha)
    rows, columns = sample_grid(values_BHW.shape[1], values_BHW.shape[2], at_most)
    grid = np.ix_(np.arange(len(bands)), rows, columns)
    values, usable = values_BHW[grid].astype(np.float64), ~nodata_BHW[grid]
    return [band[np.isfinite(band) & kept] for band, kept in zip(values, usable, strict=True)]


def sample_grid(height: int, width: int, at_most: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Evenly spaced row and column indices, int64, of at most `at_most` pixels, or of all pixels if there are fewer."""
    if height * width <= at_most:
        return np.arange(height), np.arange(width)
    num_rows = min(max(1, round((at_most * height / width) ** 0.5)), height, at_most)
    num_columns = min(max(1, at_most // num_rows), width)
    rows = (2 * np.arange(num_rows) + 1) * height // (2 * num_rows)
    columns = (2 * np.arange(num_columns) + 1) * width // (2 * num_columns)
    return rows, columns
