"""
Statistics of a cache: class shares, entropy, confidence, sizes, and outlying tiles.

Out of core with dask.array: blocks of a tile are read, reduced and dropped, so that memory grows neither with the number of tiles nor
with their size. Threads are enough: kdpipe's reader of shards needs no event loop, and zstd and NumPy release the GIL.

Shapes: C classes, H W a tile's pixels.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kdpipe.cache.documents import read_manifest
from kdpipe.cache.encoding.logits import Softening
from kdpipe.cache.index.records import TileRecord
from kdpipe.cache.reader import SoftTargetCache
from kdpipe.cache.recipe import LogitsRecipe
from kdpipe.cache.storage.base import open_storage
from kdpipe.configs.errors import ConfigError, IncompleteCache, extra_text
from kdpipe.configs.files import write_file
from kdpipe.data.tiles import limited
from kdpipe.pipeline.text import csv_cell

if TYPE_CHECKING:
    import dask.array as da

BLOCK_PX = 512  # side of the block that a thread holds: whole inner chunks, some 40 MB with intermediates of 6 classes
THREADS = 4
TILES_AT_ONCE = 32  # tiles in one dask graph; a graph of all tiles would grow with the cache
BINS = 20
# Iglewicz and Hoaglin, How to Detect and Handle Outliers (1993): a modified z-score, 0.6745 (x - median) / MAD, beyond 3.5.
MAD_TO_SIGMA = 0.6745
OUTLIER_SCORE = 3.5
MIN_TILES = 8  # with fewer, the median deviation means nothing


@dataclass(frozen=True)
class TileStatistics:
    """One tile: sizes, mean entropy in nats, mean confidence (the largest probability), and shares by class."""

    tile: str
    height: int
    width: int
    shard_bytes: int
    entropy: float
    entropy_lost: float
    largest_entropy_lost: float
    confidence: float
    shares: list[float]
    argmax_shares: list[float]

    @property
    def pixels(self) -> int:
        """Pixels of the tile."""
        return self.height * self.width

    @property
    def bytes_per_pixel(self) -> float:
        """Bytes of its shard per pixel."""
        return self.shard_bytes / self.pixels


@dataclass(frozen=True)
class Outlier:
    """An outlying tile: the figure, its value there, the median of all tiles, and the modified z-score."""

    tile: str
    figure: str
    value: float
    median: float
    score: float


@dataclass(frozen=True)
class CacheStatistics:
    """
    Statistics of a cache; means are over pixels, entropies in nats.

    A cache of logits is described by the teacher's own classes at T 1, and its entropy lost to rounding is unknown (0).
    `entropy_histogram` counts pixels in `BINS` equal bins of 0..ln C, `confidence_histogram` in bins of 0..1. `largest_entropy_lost` is
    that of the worst block of 64 px. `without_spread` names figures in which more than half of the tiles agree, so that they have no
    outliers; a cache of fewer than `MIN_TILES` tiles has none at all. With `limit`, `tiles` are some of the `cached` ones.
    """

    kind: str
    classes: list[str]
    pixels: int
    shard_bytes: int
    error_bound: float
    entropy: float
    confidence: float
    entropy_lost: float
    largest_entropy_lost: float
    shares: list[float]
    argmax_shares: list[float]
    entropy_histogram: list[int]
    confidence_histogram: list[int]
    tiles: list[TileStatistics]
    outliers: list[Outlier]
    without_spread: list[str]
    limit: int | None = None
    cached: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; tiles as in the table."""
        plain = {key: value for key, value in vars(self).items() if key not in {"tiles", "outliers"}}
        return {
            **plain,
            "entropy_bins": [0.0, math.log(len(self.classes))],
            "confidence_bins": [0.0, 1.0],
            "bytes_per_pixel": self.shard_bytes / self.pixels,
            "outlier_score": OUTLIER_SCORE,
            "outliers": [vars(outlier) for outlier in self.outliers],
            "tiles": list(self.rows()),
        }

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row per tile: its figures, shares by class, and its largest outlier score (None for a tile that is no outlier)."""
        scores: dict[str, Outlier] = {}
        for outlier in self.outliers:  # the largest first
            scores.setdefault(outlier.tile, outlier)
        for tile in self.tiles:
            worst = scores.get(tile.tile)
            yield {
                "tile": tile.tile,
                "height": tile.height,
                "width": tile.width,
                "shard_bytes": tile.shard_bytes,
                "bytes_per_pixel": tile.bytes_per_pixel,
                "entropy": tile.entropy,
                "entropy_lost": tile.entropy_lost,
                "largest_entropy_lost": tile.largest_entropy_lost,
                "confidence": tile.confidence,
                **{f"share {name}": share for name, share in zip(self.classes, tile.shares, strict=True)},
                **{f"argmax {name}": share for name, share in zip(self.classes, tile.argmax_shares, strict=True)},
                "outlier_in": worst.figure if worst else None,
                "outlier_score": worst.score if worst else None,
            }


def open_as_predicted(path: str) -> SoftTargetCache:
    """The cache at a folder or URL; logits become probabilities of the teacher's own classes at T 1, without a configuration."""
    storage = open_storage(path)
    manifest = read_manifest(storage)
    if not isinstance(manifest.recipe, LogitsRecipe):
        return SoftTargetCache(storage, manifest)
    own_classes = np.eye(len(manifest.recipe.channels), dtype=np.float32)
    return SoftTargetCache(storage, manifest, Softening(1.0, own_classes))


def compute_statistics(
    cache: SoftTargetCache, on_tile: Callable[[], None] = lambda: None, limit: int | None = None
) -> CacheStatistics:
    """
    Statistics of all tiles of a cache that `open_as_predicted` opened, each block read once; `on_tile` is called after each tile.

    With `limit`, of so many tiles (see `tiles.limited`).

    Raises `CorruptCache` where a tile is damaged.
    """
    import dask

    manifest = cache.manifest
    if not manifest.tiles:
        raise IncompleteCache("the cache has no tiles to compute statistics of")
    classes = manifest.recipe.channels
    tiles: list[TileStatistics] = []
    histograms = np.zeros((2, BINS), dtype=np.int64)
    records = limited(manifest.tiles, limit)
    for start in range(0, len(records), TILES_AT_ONCE):
        batch = records[start : start + TILES_AT_ONCE]
        lazy = [_reductions(cache, record) for record in batch]
        for record, found in zip(batch, dask.compute(lazy, scheduler="threads", num_workers=THREADS)[0], strict=True):
            sums_C, argmax_C, entropy, confidence, by_entropy, by_confidence = found
            pixels = record.height * record.width
            histograms += np.stack([by_entropy, by_confidence])
            tiles.append(
                TileStatistics(
                    tile=record.id, height=record.height, width=record.width, shard_bytes=record.shard_bytes,
                    entropy=float(entropy) / pixels, entropy_lost=cache.entropy_error(record.id),
                    largest_entropy_lost=cache.largest_entropy_error(record.id),
                    confidence=float(confidence) / pixels,
                    shares=(sums_C / pixels).tolist(), argmax_shares=(argmax_C / pixels).tolist(),
                )
            )  # fmt: skip
            on_tile()
    weights = np.array([tile.pixels for tile in tiles], dtype=np.float64)
    outliers, without_spread = find_outliers(tiles, classes)

    def mean(figures: Sequence[Any]) -> Any:
        return (weights @ np.asarray(figures, dtype=np.float64) / weights.sum()).tolist()

    return CacheStatistics(
        kind=manifest.recipe.kind,
        classes=classes,
        pixels=int(weights.sum()),
        shard_bytes=sum(tile.shard_bytes for tile in tiles),
        error_bound=manifest.probability_bound(temperature=1, num_classes=len(manifest.recipe.channels)),
        entropy=mean([tile.entropy for tile in tiles]),
        confidence=mean([tile.confidence for tile in tiles]),
        entropy_lost=mean([tile.entropy_lost for tile in tiles]),
        largest_entropy_lost=max((tile.largest_entropy_lost for tile in tiles), key=abs),
        shares=mean([tile.shares for tile in tiles]),
        argmax_shares=mean([tile.argmax_shares for tile in tiles]),
        entropy_histogram=histograms[0].tolist(),
        confidence_histogram=histograms[1].tolist(),
        tiles=tiles,
        outliers=outliers,
        without_spread=without_spread,
        limit=limit,
        cached=len(manifest.tiles),
    )


def _blocks(cache: SoftTargetCache, record: TileRecord) -> da.Array:
    """
    A tile `(C, H, W)` as a lazy dask array in blocks of `BLOCK_PX`.

    Stored integers for soft targets, whose logarithms are looked up; float32 probabilities for logits.
    """
    import dask.array as da

    recipe = cache.manifest.recipe
    logits = isinstance(recipe, LogitsRecipe)

    def read(block_info: Any = None) -> NDArray[Any]:
        _, (top, bottom), (left, right) = block_info[None]["array-location"]
        window = (top, left, bottom - top, right - left)
        return cache.read(record.id, window) if logits else cache.read_units(record.id, window)

    dtype = np.dtype("float32") if logits else recipe.dtype
    sides = (da.core.normalize_chunks(BLOCK_PX, shape=(side,))[0] for side in (record.height, record.width))
    chunks = ((len(recipe.channels),), *sides)
    return da.map_blocks(read, chunks=chunks, dtype=dtype, meta=np.empty((0, 0, 0), dtype))


def _reductions(cache: SoftTargetCache, record: TileRecord) -> tuple[Any, ...]:
    """Lazy sums of probability and counts of argmax by class, sums of entropy and confidence, and histograms of both."""
    import dask.array as da

    blocks_CHW, recipe = _blocks(cache, record), cache.manifest.recipe
    num_classes, largest = len(recipe.channels), math.log(len(recipe.channels))
    if isinstance(recipe, LogitsRecipe):
        scale = 1
        terms_CHW = blocks_CHW.map_blocks(lambda p: -p * np.log(np.maximum(p, 1e-30)), dtype=np.float32)
        sums_C = blocks_CHW.sum(axis=(1, 2), dtype=np.float64)
    else:
        scale = recipe.levels
        levels = np.arange(scale + 1, dtype=np.float64) / scale
        terms = -levels * np.log(np.where(levels > 0, levels, 1))
        terms_CHW = blocks_CHW.map_blocks(lambda units: terms[units], dtype=np.float64)
        sums_C = blocks_CHW.sum(axis=(1, 2), dtype=np.uint64)
    entropy_HW = da.minimum(terms_CHW.sum(axis=0), largest)
    confidence_HW = da.minimum(blocks_CHW.max(axis=0) / scale, 1)
    return (
        sums_C / scale,
        da.bincount(blocks_CHW.argmax(axis=0).ravel(), minlength=num_classes),
        entropy_HW.sum(dtype=np.float64),
        confidence_HW.sum(dtype=np.float64),
        da.histogram(entropy_HW, bins=BINS, range=(0, largest))[0],
        da.histogram(confidence_HW, bins=BINS, range=(0, 1))[0],
    )


def find_outliers(tiles: Sequence[TileStatistics], classes: Sequence[str]) -> tuple[list[Outlier], list[str]]:
    """
    Outlying tiles, the farthest first, and the figures in which more than half of the tiles agree.

    A tile is an outlier if in entropy, confidence, bytes per pixel or a class's share its modified z-score, 0.6745 (x - median) / MAD,
    lies beyond ±3.5 (Iglewicz and Hoaglin, 1993). All tiles have the same weight, whatever their size.
    """
    if len(tiles) < MIN_TILES:
        return [], []
    figures = {
        "entropy": [tile.entropy for tile in tiles],
        "confidence": [tile.confidence for tile in tiles],
        "bytes_per_pixel": [tile.bytes_per_pixel for tile in tiles],
        **{f"share {name}": [tile.shares[i] for tile in tiles] for i, name in enumerate(classes)},
    }
    outliers, without_spread = [], []
    for figure, listed in figures.items():
        values = np.array(listed)
        median = np.median(values)
        spread = np.median(np.abs(values - median))
        if spread == 0:
            without_spread.append(figure)
            continue
        scores = MAD_TO_SIGMA * (values - median) / spread
        outliers += [
            Outlier(tiles[i].tile, figure, values[i].item(), median.item(), scores[i].item())
            for i in np.flatnonzero(np.abs(scores) > OUTLIER_SCORE).tolist()
        ]
    return sorted(outliers, key=lambda outlier: -abs(outlier.score)), without_spread


def write_table(statistics: CacheStatistics, path: Path) -> None:
    """
    Write one row per tile (see `CacheStatistics.rows`) as CSV or Parquet, by the suffix of `path`.

    Raises `ConfigError` for another ending, and for Parquet without pyarrow.
    """
    require_table_format(path)
    rows = list(statistics.rows())
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        table = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
        write_file(path, table.getvalue())
        return
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]) if rows else [])
    writer.writeheader()
    writer.writerows({name: csv_cell(value) for name, value in row.items()} for row in rows)
    write_file(path, text.getvalue())


def require_table_format(path: Path) -> None:
    """Raise `ConfigError` for a table that cannot be written; call it before any work."""
    from importlib.util import find_spec

    if path.suffix not in {".csv", ".parquet"}:
        raise ConfigError(f"--table {path}: expected a name that ends in .csv or .parquet")
    if path.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise ConfigError(f"--table {path}: Parquet needs pyarrow; {extra_text('parquet')}, or write .csv")
