"""Writing a cache: tile by tile, in any order, from any thread, and again after any interruption."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdpipe.cache import tile as layout
from kdpipe.cache.codec import encode, error_bound
from kdpipe.cache.images import Source, is_unchanged
from kdpipe.cache.manifest import MANIFEST_NAME, Manifest, dump_manifest, fingerprint, parse_manifest, refuse_to_write
from kdpipe.cache.reader import read_receipt, read_recipe
from kdpipe.cache.recipe import CacheRecipe, differences
from kdpipe.cache.records import ImageDigest, TileRecord
from kdpipe.cache.shard import SpilledShard
from kdpipe.cache.storage.base import FileInfo, Storage
from kdpipe.cache.storage.lock import writer_lock
from kdpipe.configs.errors import CorruptCache, StaleCache
from kdpipe.configs.files import PARTIAL_SUFFIX


def finished_tiles(
    storage: Storage, recipe: CacheRecipe, images: Mapping[str, Source], manifest: Manifest | None
) -> dict[str, TileRecord]:
    """
    The tiles of `images` (id to source image) that are in the cache, whole, and computed from the image as it is now.

    `manifest` is that of a complete cache (see `whole_manifest`); the receipts of tiles that it does not list are read one by
    one. Raises `StaleCache`, naming the fields, if the cache was made by another recipe.
    """
    found = read_recipe(storage)
    if found is None:
        if set(storage.children("")) - set(partial_files(storage)):  # a run killed at its first write leaves those
            raise CorruptCache(
                f"{storage.url} holds files, but no {layout.METADATA_NAME} that says they are a cache of soft targets; "
                "if they are one of this configuration, run `kdpipe precompute-teacher --repair`, else choose another cache.path"
            )
        return {}
    refuse_stale(storage, found, recipe)
    known = {tile.id: tile for tile in manifest.tiles} if manifest and manifest.recipe == found else {}
    digest = recipe.digest()
    info = storage.infos()
    finished = {}
    for tile_id, image in images.items():
        record = known.get(tile_id)
        if record is None or not _is_finished(info, record, image):
            # Not listed, or by a manifest that is not this cache's: what was paid for is not lost for that.
            record = read_receipt(storage, tile_id, digest)
            if record is None or not _is_finished(info, record, image):
                continue
        finished[tile_id] = record
    return finished


def finished_tile(storage: Storage, tile_id: str, image: Source, recipe_digest: str) -> TileRecord | None:
    """The record of one tile if it is finished, as in `finished_tiles`, without a look at any other."""
    record = read_receipt(storage, tile_id, recipe_digest)
    return record if record is not None and _is_finished(storage.info, record, image) else None


def _is_finished(info: Callable[[str], FileInfo | None], record: TileRecord, image: Source) -> bool:
    """Whether a tile's files are there, the shard in its size, and its image has not changed since."""
    path = layout.tile_path(record.id)
    shard, receipt = info(f"{path}/{layout.SHARD_NAME}"), info(f"{path}/{layout.METADATA_NAME}")
    if shard is None or receipt is None or shard.size != record.shard_bytes:
        return False
    return is_unchanged(image, record, receipt.modified, by_content=False)


def whole_manifest(storage: Storage) -> Manifest | None:
    """
    The manifest, None if there is none or it is damaged: the tiles' receipts say the same, only more slowly.

    Raises `UnknownFormat` if the cache is of another version than is written.
    """
    try:
        manifest = parse_manifest(storage.read(MANIFEST_NAME), MANIFEST_NAME)
    except (FileNotFoundError, IsADirectoryError, CorruptCache):
        return None
    refuse_to_write(manifest.format_version, f"{storage.url}/{MANIFEST_NAME}")
    return manifest


def partial_files(storage: Storage) -> list[str]:
    """What killed runs left of files that they were writing; those of a run that goes on, too."""
    return [name for name in storage.children("") if name.endswith(PARTIAL_SUFFIX)]


def sweep(storage: Storage) -> None:
    """Delete what killed runs left. Call it with the lock held."""
    for name in partial_files(storage):
        storage.remove(name)


def restore_root(storage: Storage, recipe: CacheRecipe, tile_ids: list[str]) -> bool:
    """
    Write the topmost group's metadata again where it is damaged or lost; whether that was done.

    Only for the configured `recipe`, and only where the manifest or a tile's receipt vouches that it is the cache's, and no
    tile for what is there: else that is left, to be refused or found stale. Call it with the lock held.
    """

    def tiles_vouch_for(recipe: CacheRecipe) -> bool:
        digest = recipe.digest()
        return any(read_receipt(storage, tile_id, digest) for tile_id in tile_ids)

    wanted = layout.group_metadata("", recipe)
    try:
        if storage.read(layout.METADATA_NAME) == wanted:
            return False
        there = read_recipe(storage)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, CorruptCache):
        there = None
    if there is not None and there != recipe and tiles_vouch_for(there):
        return False
    manifest = whole_manifest(storage)
    if (manifest is None or manifest.recipe != recipe) and not tiles_vouch_for(recipe):
        return False
    storage.write(layout.METADATA_NAME, wanted)
    return True


def refuse_stale(storage: Storage, found: CacheRecipe, recipe: CacheRecipe) -> None:
    """Raise `StaleCache` with every field in which the two recipes differ, if any."""
    changed = differences(found, recipe.model_dump())
    if changed:
        raise StaleCache(
            f"{storage.url} was made from something else than what is configured: {'; '.join(changed)}. "
            "Set the configuration back, choose another cache.path, or delete the cache"
        )


@contextmanager
def open_writer(
    storage: Storage, recipe: CacheRecipe, *, device: str, libraries: Mapping[str, str]
) -> Iterator[CacheWriter]:
    """
    A writer that holds the cache's lock until the block ends; what killed runs left is swept.

    Raises `CacheLocked` if another process writes it, `StaleCache` if it was made by another recipe.
    """
    with writer_lock(storage):
        sweep(storage)
        yield CacheWriter(storage, recipe, device=device, libraries=libraries)


def store_tile(
    storage: Storage,
    tile_id: str,
    encoded: tuple[NDArray[Any] | SpilledShard, NDArray[np.float64] | None],
    image: ImageDigest,
    recipe: CacheRecipe,
) -> TileRecord:
    """
    Put one tile in an empty place and return its record: first the shard, then the receipt.

    `encoded` is what `values.encode` or `layout.encode_bands` made of it. Once this returns, the tile survives a power cut.
    """
    units, entropy_error = encoded
    path = layout.tile_path(tile_id)
    if isinstance(units, SpilledShard):
        digest = hashlib.sha256()
        storage.write(f"{path}/{layout.SHARD_NAME}", _hashed(units.pieces(), digest))
        vouched = units.size, digest.hexdigest()
        metadata, record = layout.encode_receipt(units, *vouched, tile_id, image, recipe, entropy_error)
    else:
        shard, metadata, record = layout.encode_tile(units, tile_id, image, recipe, entropy_error)
        storage.write(f"{path}/{layout.SHARD_NAME}", shard)
    storage.write(f"{path}/{layout.METADATA_NAME}", metadata)
    return record


def _hashed(pieces: Iterable[bytes], digest: hashlib._Hash) -> Iterator[bytes]:
    """The pieces, each of which `digest` is fed as it is passed on: one reading of the temporary file is enough."""
    for piece in pieces:
        digest.update(piece)
        yield piece


class CacheWriter:
    """Writes tiles; get one from `open_writer`."""

    def __init__(self, storage: Storage, recipe: CacheRecipe, *, device: str, libraries: Mapping[str, str]) -> None:
        self.storage = storage
        self.recipe = recipe
        self._device = device
        self._libraries = dict(libraries)
        found = read_recipe(storage)
        if found is None:
            self._write_groups([])
        else:
            refuse_stale(storage, found, recipe)

    def begin(self) -> None:
        """Take back the cache's completion before tiles are written: readers refuse it until `finish`."""
        self.storage.remove(MANIFEST_NAME)

    def write(self, tile_id: str, values_CHW: NDArray[np.float32], image: ImageDigest) -> TileRecord:
        """
        Store one tile and return its record; once this returns, the tile survives a power cut. Safe from several threads.

        `values_CHW` is float32 `(C, H, W)`: logits, or soft targets, which sum to one over axis 0, by the recipe's kind. `image`
        is the content it was computed from.
        """
        return self.write_encoded(tile_id, encode(values_CHW, self.recipe), image)

    def write_encoded(
        self, tile_id: str, encoded: tuple[NDArray[Any] | SpilledShard, NDArray[np.float64] | None], image: ImageDigest
    ) -> TileRecord:
        """As `write`, of what `values.encode` or `layout.encode_bands` made."""
        if self.storage.children(layout.tile_path(tile_id)):
            self._clear(tile_id)
        return store_tile(self.storage, tile_id, encoded, image, self.recipe)

    def prepare(self, missing: Collection[str], tile_ids: list[str]) -> None:
        """
        Make the place ready for workers that store the `missing` ones of `tile_ids` with `store_tile` alone.

        They only ever add: two that compute the same tile, as when one was thought dead, put the same bytes in its place, and
        neither takes anything away from the other.
        """
        self._write_groups(tile_ids)
        by_folder: dict[str, set[str]] = {}
        for tile_id in missing:
            folder, _, name = layout.tile_path(tile_id).rpartition("/")
            by_folder.setdefault(folder, set()).add(name)
        for folder, names in by_folder.items():
            for name in names.intersection(self.storage.children(folder)):
                self._clear(f"{folder}/{name}".removeprefix(f"{layout.TILES}/"))

    def _clear(self, tile_id: str) -> None:
        """The receipt of an older version must not vouch for the new shard; whatever a killed run left goes as well."""
        path = layout.tile_path(tile_id)
        self.storage.remove(f"{path}/{layout.METADATA_NAME}")
        self.storage.remove(path)

    def finish(self, records: list[TileRecord]) -> Manifest:
        """Declare the cache complete with these tiles, in this order: everything else first, the manifest last."""
        groups = self._write_groups([record.id for record in records])
        manifest = Manifest(
            format_version=self.recipe.format_version,
            fingerprint=fingerprint(self.recipe, {record.id: record.image for record in records}),
            recipe=self.recipe,
            error_bound=error_bound(self.recipe),
            device=self._device,
            libraries=self._libraries,
            groups=groups,
            tiles=records,
        )
        self.storage.write(MANIFEST_NAME, dump_manifest(manifest))
        return manifest

    def _write_groups(self, tile_ids: list[str]) -> dict[str, str]:
        digests = {}
        for path in layout.group_paths(tile_ids):
            metadata = layout.group_metadata(path, self.recipe)
            self.storage.write(f"{path}/{layout.METADATA_NAME}".lstrip("/"), metadata)
            digests[path] = layout.sha256(metadata)
        return digests
