"""Reading a cache by tile and window; damage raises instead of returning wrong numbers."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from kdpipe.cache import codec, tile
from kdpipe.cache.documents import partial_text, read_manifest
from kdpipe.cache.encoding import logits
from kdpipe.cache.encoding.logits import Softening
from kdpipe.cache.encoding.simplex import mean_over_pixels, mean_over_window
from kdpipe.cache.index.columns import TileIndex
from kdpipe.cache.index.files import read_index
from kdpipe.cache.index.records import TileRecord
from kdpipe.cache.manifest import (
    Manifest,
)
from kdpipe.cache.recipe import CacheRecipe, LogitsRecipe
from kdpipe.cache.shard import ReadRanges, Shard, in_memory, index_span, open_shard
from kdpipe.cache.storage.ahead import in_order
from kdpipe.cache.storage.base import Storage, open_storage
from kdpipe.configs.errors import CacheError, ConfigError, CorruptCache, IncompleteCache

if TYPE_CHECKING:
    from kdpipe.cache.writer import OwnCache

Window = tuple[int, int, int, int]

WHAT = {tile.METADATA_NAME: "metadata", tile.SHARD_NAME: "shard"}
MAX_KEPT_RECORDS = 8192
MAX_OPEN_TILES = 256  # most recently read tiles whose shard index (a few kB each) is kept in memory


class SoftTargetCache:
    """
    A finished cache, read lazily as soft targets; a cache of logits needs a `Softening` for that.

    Whatever is read of a tile is compared with its digests, which the manifest vouches for, so that a damaged, swapped or
    replaced tile raises `CorruptCache` instead of returning wrong numbers. A window reads the chunks that it touches. Instances
    can be pickled (each process opens the files for itself). A remote cache does not survive `fork`: start workers by spawn or
    forkserver.
    """

    def __init__(self, storage: Storage, manifest: Manifest, softening: Softening | None = None) -> None:
        if softening is not None:
            _refuse_softening(manifest.recipe, softening, storage.url)
        self.manifest = manifest
        self._softening = softening
        self._storage = storage
        self._start_anew()

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], softening: Softening | None = None, *, partial: bool = False
    ) -> SoftTargetCache:
        """
        The finished cache at a folder or fsspec URL; pass a `softening` to read logits as soft targets.

        Raises `IncompleteCache` if it does not exist, is not finished or, unless `partial`, holds only the tiles of a trial (`--limit`);
        `CorruptCache` if its manifest was changed, `UnknownFormat` for a format that this version does not read, and `ConfigError` if
        `softening` does not fit.
        """
        storage = open_storage(os.fspath(path))
        manifest = read_manifest(storage)
        if manifest.partial_of is not None and not partial:
            raise IncompleteCache(
                f"{storage.url} is the cache of a trial: {partial_text(manifest)}; run `kdpipe precompute-teacher` without --limit, "
                "which goes on from it, or open it with SoftTargetCache.open(path, partial=True)"
            )
        return cls(storage, manifest, softening)

    @staticmethod
    @contextmanager
    def create(
        path: str | os.PathLike[str], classes: Sequence[str], *, kind: Literal["soft", "logits"] = "soft", bits: int = 8,
        temperature: float = 1.0, made_by: Mapping[str, str] | None = None,
    ) -> Iterator[OwnCache]:  # fmt: skip
        """
        A cache for a program of your own to fill, locked until the block ends, and finished there unless it raises.

        `classes` name the channels in order. `temperature` is recorded: soft targets are stored as they are given. `made_by` is whatever
        determines your values, such as the digest of a file of weights: a cache that says otherwise is not gone on with. Raises
        `StaleCache` for that, and `CacheLocked` while another process writes the cache.
        """
        from kdpipe.cache.writer import OwnCache, open_writer, own_recipe

        recipe = own_recipe(classes, kind=kind, bits=bits, temperature=temperature, made_by=made_by or {})
        with open_writer(open_storage(os.fspath(path)), recipe, device="own", libraries={}) as writer:
            own = OwnCache(writer)
            yield own
            own.finish()

    @property
    def tile_ids(self) -> list[str]:
        """The ids of the tiles, in the order of the configuration."""
        return list(self.manifest.tiles.ids())

    def size(self, tile_id: str) -> tuple[int, int]:
        """Height and width of a tile in pixels."""
        record = self._record(tile_id)
        return record.height, record.width

    def entropy_error(self, tile_id: str, window: Window | None = None) -> float:
        """
        `H(p) - H(decoded p)` in nats, the mean over the pixels of a window; losses add it back to the soft targets' entropy.

        Stored in blocks of 64 px (see `simplex.entropy_error`); zero for logits. `window` and errors are those of `read`.
        """
        record = self._record(tile_id)
        inside = _checked(record, window)
        return mean_over_window(self._entropy_error_blocks(record, inside), inside)

    def entropy_error_over(self, tile_id: str, pixels_HW: NDArray[np.bool_]) -> float:
        """`entropy_error` as the mean over the pixels of a tile that are True in `pixels_HW`; 0 if none is."""
        record = self._record(tile_id)
        assert pixels_HW.shape == (record.height, record.width), f"{pixels_HW.shape} for {record}"
        return mean_over_pixels(self._entropy_error_blocks(record), pixels_HW)

    def image_sha256(self, tile_id: str) -> str:
        """The sha256 of the image that a tile was computed from: that of its file, or of a recorded view's pixels."""
        return self._record(tile_id).image.sha256

    def largest_entropy_error(self, tile_id: str) -> float:
        """The `entropy_error` of the block where it is farthest from zero, in nats."""
        blocks = self._entropy_error_blocks(self._record(tile_id)).ravel()
        return float(blocks[np.abs(blocks).argmax()])

    def read(self, tile_id: str, window: Window | None = None) -> NDArray[np.float32]:
        """
        Soft targets, float32 `(C, H, W)`, that sum to one over axis 0.

        `window` is `(top, left, height, width)` in pixels within the tile; only the chunks that it touches are decoded.
        Raises `KeyError` for an unknown tile, `ValueError` for a window outside of it, `CorruptCache` for damage, and
        `ConfigError` for logits without a `Softening`.
        """
        recipe = self.manifest.recipe
        if isinstance(recipe, LogitsRecipe) and self._softening is None:
            raise ConfigError(
                f"{self._storage.url} holds logits, and soft targets need a temperature and a class map: open it with "
                "SoftTargetCache.open(path, Softening(temperature, class_map)), or use read_logits"
            )
        return codec.soft_targets(self.read_units(tile_id, window), recipe, self._softening)

    def gaps(self, tile_id: str, window: Window | None = None) -> NDArray[np.bool_] | None:
        """
        Which pixels have no target, bool `(H, W)`, so that `read` says nothing of them; None if all have one.

        Predictions that another program made may lack pixels. `window` and errors are those of `read`.
        """
        record = self._record(tile_id)
        top, left, height, width = _checked(record, window)
        try:
            gaps_HW = tile.read_gaps(self._shard(record, (top, left, height, width)).attributes, record)
        except (KeyError, TypeError, ValueError, OverflowError) as err:
            raise self._unusable(tile_id, str(err)) from err
        return None if gaps_HW is None else gaps_HW[top : top + height, left : left + width]

    def read_logits(self, tile_id: str, window: Window | None = None) -> NDArray[np.float32]:
        """
        The teacher's logits, float32 `(C_t, H, W)`, shifted so that the largest of each pixel is zero.

        `window` and errors are those of `read`; `ConfigError` for a cache of soft targets.
        """
        recipe = self.manifest.recipe
        if not isinstance(recipe, LogitsRecipe):
            raise ConfigError(
                f"{self._storage.url} holds soft targets, from which logits cannot be recovered: compute a cache with "
                "cache.kind: logits"
            )
        return logits.decode(self.read_units(tile_id, window), recipe.bits)

    def read_units(self, tile_id: str, window: Window | None = None) -> NDArray[Any]:
        """
        The integers of all channels, uint8 or uint16 `(C, H, W)`.

        Those of soft targets sum to the recipe's `levels`; the largest of logits is `2**bits - 1`. `window` and errors are those
        of `read`.
        """
        record = self._record(tile_id)
        top, left, height, width = _checked(record, window)
        recipe = self.manifest.recipe
        start = codec.first_row(recipe, top)
        inside = start, left, top + height - start, width
        shard = self._shard(record, inside)
        try:
            stored = shard.read(inside, self._chunks_reader(record), self._checksums[tile_id])
        except (ValueError, RuntimeError, FileNotFoundError, CorruptCache) as err:
            raise self._unusable(tile_id, f"its chunks cannot be decoded ({err})") from err
        try:
            return codec.units(stored, recipe, (start, left))[:, top - start :]
        except ValueError as err:
            raise self._unusable(tile_id, f"a chunk is missing, or {err}") from err

    def __getstate__(self) -> dict[str, Any]:
        """The state without open files: the process that unpickles opens its own, and maps the index anew."""
        without = {"tiles": TileIndex.of([])} if self.manifest.is_indexed else {}
        manifest = self.manifest.model_copy(update=without)
        return {
            "storage": self._storage,
            "manifest": manifest,
            "softening": self._softening,
            "count": len(self.manifest.tiles),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        manifest, storage = state["manifest"], state["storage"]
        if manifest.is_indexed:
            try:
                tiles = read_index(storage, manifest.index, state["count"])
            except ValueError as err:
                raise IncompleteCache(
                    f"{storage.url} was written again since it was opened ({err}); open it again"
                ) from err
            manifest = manifest.model_copy(update={"tiles": tiles})
        self.__init__(storage, manifest, state["softening"])  # type: ignore[misc]

    def _start_anew(self) -> None:
        self._pid: int | None = None
        self._records: dict[str, TileRecord] = {}  # those last asked for, as an index takes a search for each
        self._shards: OrderedDict[str, Shard] = OrderedDict()
        # Checksums of the chunks that have been compared with their digests, or whose whole shard has, zero for others. Later reads are
        # checked against them. 4 bytes per chunk, kept for the life of the object.
        self._checksums: dict[str, NDArray[np.uint32]] = {}
        self._just_read = (
            "",
            b"",
        )  # the id and the shard of a tile that was read whole, until its first chunks are taken

    def _record(self, tile_id: str) -> TileRecord:
        record = self._records.get(tile_id)
        if record is None:
            record = self.manifest.tiles.find(tile_id)
            if record is None:
                raise KeyError(f"no tile {tile_id!r} in {self._storage.url}")
            if len(self._records) >= MAX_KEPT_RECORDS:
                self._records.clear()
            self._records[tile_id] = record
        return record

    def _shard(self, record: TileRecord, window: Window | None = None) -> Shard:
        """The tile's shard; the first time, its metadata are compared with their digest. `window` is what will be read of it."""
        self._refuse_fork()
        shard = self._shards.pop(record.id, None)
        if shard is None:
            try:
                shard = self._open_shard(record, window)
            except (ValueError, FileNotFoundError) as err:
                raise self._unusable(record.id, str(err)) from err
        self._shards[record.id] = shard
        if len(self._shards) > MAX_OPEN_TILES:
            self._shards.popitem(last=False)
        return shard

    def _open_shard(self, record: TileRecord, window: Window | None) -> Shard:
        """
        The tile's shard from its files; `ValueError` for any difference from the manifest.

        The shard is read whole where most of it is wanted, or only a digest of the whole is there; else its index alone.
        """
        storage, grid = self._storage, tile.chunk_grid(record)
        takes_most = window is not None and 2 * _touched(window) > grid[0] * grid[1]
        reads: list[Callable[[], bytes]] = [
            lambda: read_intact(storage, record, tile.METADATA_NAME),
            lambda: _stored(storage, record, tile.SHARD_NAME, None if takes_most else index_span(grid)),
        ]
        metadata, data = in_order(lambda read: read(), reads, min(storage.at_once, len(reads)))
        file, is_new = data if takes_most else None, record.id not in self._checksums
        if takes_most and is_new:  # else its chunks are compared with the checksums that were kept
            _intact(data, record, tile.SHARD_NAME)

        def index_of(
            spans: Sequence[tuple[int, int]],
        ) -> list[bytes]:  # of a tile with other chunks, the index is asked for again
            is_here = takes_most or list(spans) == [index_span(grid)]
            return (in_memory(data) if is_here else self._ranges_reader(record))(spans)

        shard = open_tile(self.manifest.recipe, record, metadata, index_of)
        if is_new:
            if shard.digests is None:
                file = file or read_intact(storage, record, tile.SHARD_NAME)
            self._checksums[record.id] = (
                np.zeros(shard.index.shape[:2], np.uint32) if file is None else shard.checksums(file)
            )
        if file is not None:
            self._just_read = record.id, file
        return shard

    def _entropy_error_blocks(self, record: TileRecord, window: Window | None = None) -> NDArray[np.float64]:
        if isinstance(self.manifest.recipe, LogitsRecipe):
            return np.zeros(tile.entropy_grid(record))
        try:
            return tile.read_entropy_error(self._shard(record, window).attributes, record)
        except (KeyError, TypeError, ValueError, OverflowError) as err:
            raise self._unusable(record.id, f"its entropy_error does not fit its size ({err!r:.100})") from err

    def _chunks_reader(self, record: TileRecord) -> ReadRanges:
        """What reads a tile's chunks: from memory where the shard has just been read, so that no byte is asked for twice."""
        tile_id, file = self._just_read
        self._just_read = "", b""
        return in_memory(file) if tile_id == record.id else self._ranges_reader(record)

    def _ranges_reader(self, record: TileRecord) -> ReadRanges:
        return partial(self._storage.read_ranges, f"{tile.tile_path(record.id)}/{tile.SHARD_NAME}")

    def _refuse_fork(self) -> None:
        """Raise `CacheError` for a remote cache in a forked process: the event loop of its file system did not survive."""
        if self._storage.survives_fork:
            return
        if self._pid is None:
            self._pid = os.getpid()
        elif self._pid != os.getpid():
            raise CacheError(
                f"{self._storage.url} was read in process {self._pid} and then forked, and its connections hang after a fork: "
                "start DataLoader workers with multiprocessing_context='spawn' or 'forkserver'"
            )

    def _unusable(self, tile_id: str, cause: str) -> CacheError:
        """The error for a tile that cannot be read: `IncompleteCache` if a writer has begun to change it, else `CorruptCache`."""
        url = self._storage.url
        try:
            now = read_manifest(self._storage).tiles.find(tile_id)
        except IncompleteCache:
            return IncompleteCache(
                f"tile {tile_id} of {url} cannot be read ({cause}): a run has begun to write the cache since it was opened, and "
                "has not finished; open it again once `kdpipe precompute-teacher` is done"
            )
        except CacheError:  # a damaged manifest says nothing about the tile
            now = self._record(tile_id)
        if now != self._record(tile_id):
            return CorruptCache(
                f"tile {tile_id} of {url} was written again since the cache was opened ({cause}); open the cache again"
            )
        return CorruptCache(f"tile {tile_id} of {url} is damaged: {cause}; {self._storage.repair}")


def _checked(record: TileRecord, window: Window | None) -> Window:
    """The window, or the whole tile for None; `ValueError` if it is not within the tile."""
    top, left, height, width = window or (0, 0, record.height, record.width)
    if min(top, left) < 0 or min(height, width) < 1 or top + height > record.height or left + width > record.width:
        raise ValueError(f"window {window} is not within tile {record.id} of {record.height} × {record.width} px")
    return top, left, height, width


def _refuse_softening(recipe: CacheRecipe, softening: Softening, url: str) -> None:
    """Raise `ConfigError` if the cache holds soft targets, or the class map does not fit its channels."""
    if not isinstance(recipe, LogitsRecipe):
        raise ConfigError(f"{url} holds soft targets of temperature {recipe.temperature:g}, which cannot be changed")
    if len(softening.class_map) != len(recipe.channels):
        raise ConfigError(
            f"the class map has {len(softening.class_map)} rows, and {url} {len(recipe.channels)} channels: {recipe.channels}"
        )


def read_intact(storage: Storage, record: TileRecord, name: str) -> bytes:
    """The bytes of one of a tile's two files; `ValueError`, naming the cause, where they do not match its digest."""
    return _intact(_stored(storage, record, name), record, name)


def _intact(data: bytes, record: TileRecord, name: str) -> bytes:
    digest = record.metadata_sha256 if name == tile.METADATA_NAME else record.shard_sha256
    if tile.sha256(data) != digest:
        raise ValueError(f"its {WHAT[name]} ({name}) is not what was written")
    return data


def _stored(storage: Storage, record: TileRecord, name: str, span: tuple[int, int] | None = None) -> bytes:
    """The bytes of one of a tile's two files, or of a span of it; `ValueError`, naming the cause, where they cannot be read."""
    path = f"{tile.tile_path(record.id)}/{name}"
    try:
        return storage.read(path) if span is None else storage.read_ranges(path, [span])[0]
    except FileNotFoundError as err:
        raise ValueError(f"its {WHAT[name]} ({name}) is missing") from err
    except CorruptCache as err:
        raise ValueError(f"its {WHAT[name]} ({name}) cannot be read ({err})") from err


def _touched(window: Window) -> int:
    """How many chunks a window touches."""
    top, left, height, width = window
    bottom, right = top + height - 1, left + width - 1
    return (bottom // tile.CHUNK_PX - top // tile.CHUNK_PX + 1) * (right // tile.CHUNK_PX - left // tile.CHUNK_PX + 1)


def open_tile(recipe: CacheRecipe, record: TileRecord, metadata: bytes, read_ranges: ReadRanges) -> Shard:
    """A tile's shard; `ValueError` where it is damaged, or its shape or type is not that of recipe and record."""
    shard = open_shard(metadata, read_ranges)
    shard = replace(shard, digests=tile.read_chunk_digests(shard.attributes, shard.index.shape[:2]))
    wanted = (len(recipe.channels), record.height, record.width), recipe.dtype
    if (shard.shape, shard.dtype) != wanted:
        raise ValueError(f"it has shape {shard.shape}, {shard.dtype}, and the manifest says {wanted}")
    return shard
