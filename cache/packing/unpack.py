"""A folder of a pack, or of the packs that a cache was parted into."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from kdpipe.cache import tile
from kdpipe.cache.documents import read_manifest, read_recipe
from kdpipe.cache.index.records import TileRecord
from kdpipe.cache.manifest import MANIFEST_NAME, Manifest, dump_manifest, manifest_of, refuse_to_write, store_manifest
from kdpipe.cache.packing.pack import SUFFIX, Bar, damaged, no_bar
from kdpipe.cache.reader import read_intact
from kdpipe.cache.recipe import differences
from kdpipe.cache.storage.base import Storage, open_storage
from kdpipe.cache.storage.lock import Require, writer_lock
from kdpipe.cache.storage.packed import PackedStorage
from kdpipe.cache.writer import sweep
from kdpipe.configs.errors import ConfigError, CorruptCache, StaleCache

WRITE_THREADS = 8
AT_ONCE = 256  # tiles


@dataclass
class Unpacked:
    """What `unpack` wrote: the cache, its tiles, how many of them were there already, and of how many it holds a part, if it does."""

    cache: str
    tiles: int
    kept: int
    partial_of: int | None


def unpack(
    packs: Sequence[str | os.PathLike[str]],
    path: str | os.PathLike[str],
    *,
    bar: Bar = no_bar,
) -> Unpacked:
    """
    Write the cache of a pack, or of several that `pack` made of one cache, as a folder or at a URL; a killed run goes on.

    The tiles have the order of the packs' names, which is that of the cache they were made of: of all its parts it is the same cache, byte
    for byte. Every digest is compared before a file is written. Raises `ConfigError` for what is no pack, for parts of different caches,
    and for a place that holds another cache; `CorruptCache` for damage.
    """
    sources = [
        _opened(pack) for pack in sorted((os.fspath(pack) for pack in packs), key=lambda name: (len(name), name))
    ]
    manifests = [read_manifest(source) for source in sources]
    manifest = _joined(manifests, sources)
    storage = open_storage(os.fspath(path))
    with writer_lock(storage) as require:
        there = _there(storage, manifest)
        if there:
            return Unpacked(storage.url, len(manifest.tiles), len(manifest.tiles), manifest.partial_of)
        sweep(storage)
        where = {path: source for its, source in zip(manifests, sources, strict=True) for path in its.group_digests()}
        for group, digest in sorted(manifest.group_digests().items()):
            name, source = f"{group}/{tile.METADATA_NAME}".lstrip("/"), where[group]
            content = source.read(name)
            if tile.sha256(content) != digest:
                raise CorruptCache(f"{source.url} is damaged: {name} is not what was written")
            storage.write(name, content)
        with bar(len(manifest.tiles)) as on_tile:
            kept = sum(
                _copy_tiles(source, its.tiles, storage, require, on_tile)
                for source, its in zip(sources, manifests, strict=True)
            )
        require(now=True)
        store_manifest(storage, manifest)
    return Unpacked(storage.url, len(manifest.tiles), kept, manifest.partial_of)


def _opened(pack: str) -> PackedStorage:
    source = open_storage(pack) if pack.endswith(SUFFIX) else None
    if not isinstance(source, PackedStorage):
        raise ConfigError(f"{pack} is no pack: give the NAME.zarr.zip that `kdpipe pack` wrote")
    return source


def _joined(manifests: Sequence[Manifest], sources: Sequence[PackedStorage]) -> Manifest:
    """The manifest of the cache that the packs are parts of, or of as much of it as they hold."""
    first = manifests[0]
    for manifest, source in zip(manifests, sources, strict=True):
        refuse_to_write(manifest.format_version, f"{source.url}/{MANIFEST_NAME}")
        changed = differences(first.recipe, manifest.recipe.model_dump())
        if changed:
            raise ConfigError(f"{sources[0].url} and {source.url} are not of one cache: {'; '.join(changed)}")
        if manifest.partial_of != first.partial_of:
            raise ConfigError(
                f"{sources[0].url} and {source.url} are not of one cache: they are parts of another number of tiles"
            )
    if len(manifests) == 1:
        return first
    tiles = [record for manifest in manifests for record in manifest.tiles]
    ids = {record.id for record in tiles}
    if len(ids) < len(tiles) or first.partial_of is None or len(tiles) > first.partial_of:
        raise ConfigError("these packs share tiles, so they are not the parts of one cache: give each part once")
    partial_of = None if len(tiles) == first.partial_of else first.partial_of
    groups = {path: digest for manifest in manifests for path, digest in manifest.group_digests().items()}
    return manifest_of(
        first.recipe, tiles, groups, device=first.device, libraries=first.libraries, partial_of=partial_of
    )


def _there(storage: Storage, manifest: Manifest) -> bool:
    """Whether the whole cache is there already; raises `StaleCache` or `ConfigError` where another one is."""
    recipe = read_recipe(storage)
    advice = "choose another folder, or delete it"
    if recipe is None and set(storage.children("")) - {tile.TILES}:
        raise ConfigError(f"{storage.url} holds something that is no cache: {advice}")
    if recipe is not None and recipe != manifest.recipe:
        raise StaleCache(f"{storage.url} holds a cache of another recipe: {advice}")
    try:
        found = storage.read(MANIFEST_NAME)
    except FileNotFoundError:
        return False
    if found != dump_manifest(manifest):
        raise StaleCache(f"{storage.url} holds a finished cache already, of other tiles: {advice}")
    return True


def _copy_tiles(
    source: PackedStorage,
    tiles: Sequence[TileRecord],
    storage: Storage,
    require: Require,
    on_tile: Callable[[], object],
) -> int:
    """Write the tiles that are not there yet; returns how many were."""

    def copy(record: TileRecord) -> bool:
        if _is_there(storage, record):
            return True
        try:
            shard = read_intact(source, record, tile.SHARD_NAME)
            metadata = read_intact(source, record, tile.METADATA_NAME)
        except ValueError as err:
            raise damaged(source, record, err) from err
        path = tile.tile_path(record.id)
        require()
        storage.write(f"{path}/{tile.SHARD_NAME}", shard)
        storage.write(f"{path}/{tile.METADATA_NAME}", metadata)  # last: with it the tile is finished
        return False

    kept, left = 0, iter(tiles)
    with ThreadPoolExecutor(WRITE_THREADS) as threads:
        while batch := list(islice(left, AT_ONCE)):
            for was_there in threads.map(copy, batch):
                kept += was_there
                on_tile()
    return kept


def _is_there(storage: Storage, record: TileRecord) -> bool:
    path = tile.tile_path(record.id)
    shard = storage.info(f"{path}/{tile.SHARD_NAME}")
    if shard is None or shard.size != record.shard_bytes:
        return False
    try:
        read_intact(storage, record, tile.METADATA_NAME)
        read_intact(storage, record, tile.SHARD_NAME)
    except ValueError:
        return False
    return True
