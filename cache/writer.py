"""Writing a cache, tile by tile: in any order, from any thread, and going on after any interruption."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kdpipe.cache import tile
from kdpipe.cache.codec import encode
from kdpipe.cache.documents import read_receipt, read_recipe, whole_manifest
from kdpipe.cache.encoding.many_classes import levels_of
from kdpipe.cache.encoding.row_deltas import KEY_ROW_PX
from kdpipe.cache.images import Source, digest_image, same_content
from kdpipe.cache.index.columns import TileIndex
from kdpipe.cache.index.records import ImageDigest, TileRecord, node_path
from kdpipe.cache.known_images import KnownImages
from kdpipe.cache.manifest import (
    MANIFEST_NAME,
    Manifest,
    manifest_of,
    store_manifest,
)
from kdpipe.cache.recipe import CacheRecipe, differences, parse_recipe
from kdpipe.cache.shard import SpilledShard
from kdpipe.cache.storage.ahead import in_order
from kdpipe.cache.storage.base import FileInfo, Storage
from kdpipe.cache.storage.local import IN_FOLDER
from kdpipe.cache.storage.lock import Require, writer_lock
from kdpipe.configs.errors import CorruptCache, StaleCache
from kdpipe.configs.files import PARTIAL_SUFFIX


def finished_tiles(
    storage: Storage, recipe: CacheRecipe, images: Mapping[str, Source], manifest: Manifest | None
) -> dict[str, TileRecord]:
    """
    The tiles of `images` (id to source image) that are in the cache, whole, and computed from the image as it is now.

    `manifest` is the result of `whole_manifest`; the receipts of tiles that it does not list are read.
    Raises `StaleCache`, naming the fields, if the cache was made by another recipe, and `CorruptCache` if it is not a cache.
    """
    found = read_recipe(storage)
    if found is None:
        if set(storage.children("")) - {
            *partial_files(storage),
            IN_FOLDER,
        }:  # a run killed at its first write leaves those
            raise CorruptCache(
                f"{storage.url} holds files, but no {tile.METADATA_NAME} that says they are a cache; if they are the cache of this "
                "configuration, run `kdpipe precompute-teacher --repair`, else choose another cache.path"
            )
        return {}
    refuse_stale(storage, found, recipe)
    if found != recipe:  # no tile is there yet
        return {}
    known = manifest.tiles if manifest and manifest.recipe == found else TileIndex.of([])
    digest = recipe.digest()
    info, known_images = storage.infos(), KnownImages(storage)
    listed = {record.id: record for record in known if record.id in images}
    stored = {tile_id: listed[tile_id] for tile_id in images if tile_id in listed and _is_stored(info, listed[tile_id])}
    unchanged = known_images.unchanged((images[tile_id], record) for tile_id, record in stored.items())
    finished = {tile_id: stored[tile_id] for tile_id in unchanged}
    # The manifest lacks the others, or its records do not fit; the tiles' receipts may still vouch for them.
    unknown = [
        tile_id
        for tile_id in images
        if tile_id not in finished and info(f"{tile.tile_path(tile_id)}/{tile.METADATA_NAME}")
    ]
    receipts = in_order(lambda tile_id: read_receipt(storage, tile_id, digest), unknown, storage.at_once)
    others = {
        tile_id: record
        for tile_id, record in zip(unknown, receipts, strict=True)
        if record is not None and record != stored.get(tile_id) and _is_stored(info, record)
    }
    unchanged = known_images.unchanged((images[tile_id], record) for tile_id, record in others.items())
    finished |= {tile_id: others[tile_id] for tile_id in unchanged}
    return {tile_id: finished[tile_id] for tile_id in images if tile_id in finished}


def finished_tile(storage: Storage, tile_id: str, image: Source, recipe_digest: str) -> TileRecord | None:
    """The record of one tile if it is finished (see `finished_tiles`), else None."""
    record = read_receipt(storage, tile_id, recipe_digest)
    is_finished = record is not None and _is_stored(storage.info, record) and same_content(image, record)
    return record if is_finished else None


def _is_stored(info: Callable[[str], FileInfo | None], record: TileRecord) -> bool:
    """Whether a tile's files exist, and the shard has its size."""
    path = tile.tile_path(record.id)
    shard, receipt = info(f"{path}/{tile.SHARD_NAME}"), info(f"{path}/{tile.METADATA_NAME}")
    return shard is not None and receipt is not None and shard.size == record.shard_bytes


def partial_files(storage: Storage) -> list[str]:
    """The names of files that are being written, or were when a run was killed: exactly those that kdpipe gives, and no folders."""
    names = (name for name in storage.children("") if _PARTIAL.fullmatch(name))
    return [name for name in names if storage.info(name) is not None]


# As `LocalStorage.write` and, with eight more characters, `spill` name them.
_PARTIAL = re.compile(rf"\.[0-9a-f]{{32}}(?:[0-9a-z_]{{8}})?{re.escape(PARTIAL_SUFFIX)}")


def sweep(storage: Storage) -> None:
    """Delete the partial files of killed runs. Call it with the lock held."""
    for name in partial_files(storage):
        storage.remove(name)


def restore_root(storage: Storage, recipe: CacheRecipe, tile_ids: list[str]) -> bool:
    """
    Write the topmost group's metadata again if it is damaged or lost; returns whether it did.

    Only if the manifest or a tile's receipt vouches for the configured `recipe`, and no tile for the one in the metadata:
    otherwise the metadata is left alone, to be refused or found stale. Call it with the lock held.
    """

    def tiles_vouch_for(recipe: CacheRecipe) -> bool:
        digest = recipe.digest()
        return any(read_receipt(storage, tile_id, digest) for tile_id in tile_ids)

    wanted = tile.group_metadata("", recipe)
    try:
        if storage.read(tile.METADATA_NAME) == wanted:
            return False
        there = read_recipe(storage)
    except (FileNotFoundError, CorruptCache):
        there = None
    if there is not None and there != recipe and tiles_vouch_for(there):
        return False
    manifest = whole_manifest(storage)
    if (manifest is None or manifest.recipe != recipe) and not tiles_vouch_for(recipe):
        return False
    storage.write(tile.METADATA_NAME, wanted)
    return True


def refuse_stale(storage: Storage, found: CacheRecipe, recipe: CacheRecipe) -> None:
    """Raise `StaleCache` with every field in which the two recipes differ, if any; a cache without a tile may be begun anew."""
    changed = differences(found, recipe.model_dump())
    if changed and _holds_a_tile(storage, tile.TILES):
        raise StaleCache(
            f"{storage.url} was made with another configuration: {'; '.join(changed)}. "
            "Restore the configuration, choose another cache.path, or delete the cache"
        )


def _holds_a_tile(storage: Storage, folder: str) -> bool:
    """Whether any file but a group's metadata lies below a folder of the cache."""
    for name in storage.children(folder):
        path = f"{folder}/{name}"
        if storage.info(path) is None:
            if _holds_a_tile(storage, path):
                return True
        elif name != tile.METADATA_NAME:
            return True
    return False


@contextmanager
def open_writer(
    storage: Storage, recipe: CacheRecipe, *, device: str, libraries: Mapping[str, str]
) -> Iterator[CacheWriter]:
    """
    A writer that holds the cache's lock until the block ends; the partial files of killed runs are deleted.

    Raises `CacheLocked` if another process writes the cache, `StaleCache` if it was made by another recipe.
    """
    with writer_lock(storage) as require:
        sweep(storage)
        yield CacheWriter(storage, recipe, device=device, libraries=libraries, require=require)


def store_tile(
    storage: Storage,
    tile_id: str,
    encoded: tile.Encoded | tuple[SpilledShard, NDArray[np.float64] | None],
    image: ImageDigest,
    recipe: CacheRecipe,
) -> TileRecord:
    """
    Store one tile in an empty place, first the shard, then the receipt; returns its record.

    `encoded` is the result of `codec.encode` or `tile.encode_bands`. Once this returns, the tile survives a power cut.
    """
    (units, entropy_error), gaps_HW = encoded[:2], encoded[2] if len(encoded) == 3 else None
    path = tile.tile_path(tile_id)
    if isinstance(units, SpilledShard):
        digest = hashlib.sha256()
        storage.write(f"{path}/{tile.SHARD_NAME}", _hashed(units.pieces(), digest))
        vouched = units.size, digest.hexdigest(), units.digests
        metadata, record = tile.encode_receipt(units, *vouched, tile_id, image, recipe, entropy_error)
    else:
        shard, metadata, record = tile.encode_tile(units, tile_id, image, recipe, entropy_error, gaps_HW)
        storage.write(f"{path}/{tile.SHARD_NAME}", shard)
    storage.write(f"{path}/{tile.METADATA_NAME}", metadata)
    return record


def _hashed(pieces: Iterable[bytes], digest: hashlib._Hash) -> Iterator[bytes]:
    """The pieces, unchanged; each also updates `digest`, so that the temporary file is read only once."""
    for piece in pieces:
        digest.update(piece)
        yield piece


def own_recipe(
    classes: Sequence[str],
    *,
    kind: Literal["soft", "logits"],
    bits: int,
    temperature: float,
    made_by: Mapping[str, str],
) -> CacheRecipe:
    """The recipe of a cache that a program of the user's own fills with values of `classes`; `made_by` is what it says of itself."""
    names, identity = list(classes), np.eye(len(classes)).tolist()
    teacher = {
        "made_by": dict(made_by), "classes": names, "drop_channels": [], "weight": 1.0, "normalize_mean": [], "normalize_std": [],
        "precision": "fp32", "tta": "none", "scales": [1.0], "window": None,
    }  # fmt: skip
    common = {
        "teachers": [teacher],
        "bands": [],
        "stretch": None,
        "kind": kind,
        "bits": bits,
        "chunk_px": tile.CHUNK_PX,
    }
    if kind == "logits":
        return parse_recipe(common)
    mapped = {
        "classes": names,
        "class_map": identity,
        "temperature": temperature,
        "temperature_applied": "after class_map",
    }
    return parse_recipe(common | mapped | {"levels": levels_of(bits, len(names)), "key_row_px": KEY_ROW_PX})


class OwnCache:
    """A cache that a program of the user's own fills; `SoftTargetCache.create` opens one. Its methods are thread-safe."""

    def __init__(self, writer: CacheWriter) -> None:
        self._writer = writer
        self._records: dict[str, TileRecord] = {}
        writer.begin()

    def is_written(self, tile_id: str, image: str | os.PathLike[str] | None = None) -> bool:
        """Whether an earlier run has written this tile, of this image; it is then part of the finished cache."""
        record = read_receipt(self._writer.storage, node_path(tile_id), self._writer.recipe.digest())
        if record is None or record.image != _digest_of(image) or not _is_stored(self._writer.storage.info, record):
            return False
        self._records[tile_id] = record
        return True

    def write(
        self, tile_id: str, values_CHW: NDArray[np.floating[Any]], image: str | os.PathLike[str] | None = None
    ) -> None:
        """
        Store one tile; once this returns, it survives a power cut.

        `values_CHW` `(C, H, W)` are soft targets that sum to one over axis 0, or logits, by the cache's kind. With `image`, the file that
        they were computed from, its digest is kept. Raises `ValueError` for other values and for a name that cannot lie in a cache.
        """
        node_path(tile_id)
        channels = len(self._writer.recipe.channels)
        if values_CHW.ndim != 3 or len(values_CHW) != channels or not np.isfinite(values_CHW).all():
            raise ValueError(f"{tile_id}: expected finite values of shape ({channels}, H, W), found {values_CHW.shape}")
        values = np.ascontiguousarray(values_CHW, dtype=np.float32)
        self._records[tile_id] = self._writer.write(tile_id, values, _digest_of(image))

    def finish(self) -> Manifest:
        """Complete the cache with the tiles that were written, or found by `is_written`; it can be read from then on."""
        return self._writer.finish([self._records[tile_id] for tile_id in sorted(self._records)])


def _digest_of(image: str | os.PathLike[str] | None) -> ImageDigest:
    return ImageDigest(0, tile.sha256(b"")) if image is None else digest_image(Path(image))


class CacheWriter:
    """A writer of tiles; `open_writer` returns one."""

    def __init__(
        self, storage: Storage, recipe: CacheRecipe, *, device: str, libraries: Mapping[str, str], require: Require
    ) -> None:
        self._require = require
        self.storage = storage
        self.recipe = recipe
        self._device = device
        self._libraries = dict(libraries)
        found = read_recipe(storage)
        self._is_new = found != recipe
        if found is not None:
            refuse_stale(storage, found, recipe)

    def begin(self) -> None:
        """Before tiles are written: record the recipe, and delete the manifest, so that readers refuse the cache until `finish`."""
        self._require(now=True)
        if self._is_new:
            self._write_groups([])
        self.storage.remove(MANIFEST_NAME)

    def write(self, tile_id: str, values_CHW: NDArray[np.float32], image: ImageDigest) -> TileRecord:
        """
        Store one tile and return its record; once this returns, the tile survives a power cut. Thread-safe.

        `values_CHW` is float32 `(C, H, W)`: logits, or soft targets that sum to one over axis 0, as the recipe says. `image` is
        the content that it was computed from.
        """
        return self.write_encoded(tile_id, encode(values_CHW, self.recipe), image)

    def write_encoded(
        self,
        tile_id: str,
        encoded: tile.Encoded | tuple[SpilledShard, NDArray[np.float64] | None],
        image: ImageDigest,
    ) -> TileRecord:
        """Store one tile as `write` does, from the result of `codec.encode` or `tile.encode_bands`, perhaps with the tile's gaps."""
        self._require()
        if self.storage.children(tile.tile_path(tile_id)):
            self._clear(tile_id)
        return store_tile(self.storage, tile_id, encoded, image, self.recipe)

    def prepare(self, missing: Collection[str], tile_ids: list[str]) -> None:
        """
        Clear the places of the `missing` ones of `tile_ids`, so that workers can fill them with `store_tile` alone.

        Workers only ever add files: if two compute the same tile, because one was thought dead, both write the same bytes.
        """
        self._write_groups(tile_ids)
        by_folder: dict[str, set[str]] = {}
        for tile_id in missing:
            folder, _, name = tile.tile_path(tile_id).rpartition("/")
            by_folder.setdefault(folder, set()).add(name)
        for folder, names in by_folder.items():
            for name in names.intersection(self.storage.children(folder)):
                self._clear(f"{folder}/{name}".removeprefix(f"{tile.TILES}/"))

    def _clear(self, tile_id: str) -> None:
        """Delete what an older version or a killed run left; the receipt goes first, lest it vouch for the new shard."""
        path = tile.tile_path(tile_id)
        self.storage.remove(f"{path}/{tile.METADATA_NAME}")
        self.storage.remove(path)

    def finish(self, records: list[TileRecord], partial_of: int | None = None) -> Manifest:
        """
        Complete the cache with these tiles, in this order: write the groups, then the manifest, which is returned.

        With `partial_of`, the manifest says that these are some of so many tiles.
        """
        self._require(now=True)
        groups = self._write_groups([record.id for record in records])
        manifest = manifest_of(
            self.recipe, records, groups, device=self._device, libraries=self._libraries, partial_of=partial_of
        )
        self._require(now=True)
        store_manifest(self.storage, manifest)
        return manifest

    def _write_groups(self, tile_ids: list[str]) -> dict[str, str]:
        """Write every group's metadata; returns its sha256 by path."""
        digests = {}
        for path in tile.group_paths(tile_ids):
            metadata = tile.group_metadata(path, self.recipe)
            self.storage.write(f"{path}/{tile.METADATA_NAME}".lstrip("/"), metadata)
            digests[path] = tile.sha256(metadata)
        return digests
