"""Reading what describes a cache and its tiles: the manifest, the recipe, and the tiles' receipts."""

from __future__ import annotations

import json

from kdpipe.cache import tile
from kdpipe.cache.index.records import TileRecord
from kdpipe.cache.manifest import (
    DELETE_MANIFEST,
    MANIFEST_NAME,
    Manifest,
    is_newer_minor,
    parse_manifest,
    reason_of,
    refuse_to_write,
)
from kdpipe.cache.recipe import CacheRecipe, parse_recipe
from kdpipe.cache.storage.base import Storage
from kdpipe.cache.storage.packed import PackedStorage
from kdpipe.configs.errors import CorruptCache, IncompleteCache, count_text


def partial_text(manifest: Manifest) -> str:
    """How many of a configuration's tiles a cache holds, where `--limit` chose them."""
    return f"it holds {len(manifest.tiles)} of {count_text(manifest.partial_of or 0, 'tiles')}, as --limit asked"


def read_manifest(storage: Storage) -> Manifest:
    """The manifest of a finished cache; `IncompleteCache` if there is none, `CorruptCache` if it was changed."""
    is_pack = isinstance(storage, PackedStorage)
    advice = storage.repair if is_pack else DELETE_MANIFEST
    try:
        data = storage.read(MANIFEST_NAME)
    except FileNotFoundError as err:
        if is_pack:
            raise IncompleteCache(f"{err}; correct the path, or make it with `kdpipe pack`") from err
        state = "is not finished" if storage.children("") else "does not exist"
        raise IncompleteCache(
            f"the cache {storage.url} {state}; run `kdpipe precompute-teacher` with the same configuration"
        ) from err
    except CorruptCache as err:
        raise CorruptCache(f"{storage.url}/{MANIFEST_NAME} cannot be read ({err}); {advice}") from err
    try:
        return parse_manifest(data, f"{storage.url}/{MANIFEST_NAME}", storage, advice)
    except CorruptCache:
        if not is_pack and _is_being_written(storage, data):
            raise IncompleteCache(
                f"the cache {storage.url} is being written: open it again once `kdpipe precompute-teacher` is done"
            ) from None
        raise


def _is_being_written(storage: Storage, manifest: bytes) -> bool:
    """Whether the manifest is no longer what it was, so that the index that was found belongs to another."""
    try:
        return storage.read(MANIFEST_NAME) != manifest
    except FileNotFoundError:
        return True
    except CorruptCache:
        return False


def whole_manifest(storage: Storage) -> Manifest | None:
    """
    The manifest; None if it is missing or damaged: the tiles' receipts hold the same, but take longer to read.

    Raises `UnknownFormat` if the cache has another format version than this program writes.
    """
    try:
        manifest = parse_manifest(storage.read(MANIFEST_NAME), MANIFEST_NAME, storage)
    except (FileNotFoundError, CorruptCache):
        return None
    refuse_to_write(manifest.format_version, f"{storage.url}/{MANIFEST_NAME}")
    return manifest


def read_recipe(storage: Storage, *, to_write: bool = True) -> CacheRecipe | None:
    """
    The recipe in the topmost group's attributes; None where there is no group.

    Raises `CorruptCache` if it is unreadable, and `UnknownFormat` for a format version that this program cannot read (with
    `to_write`: cannot write).
    """
    origin = f"{storage.url}/{tile.METADATA_NAME}"
    advice = "restore it, run `kdpipe precompute-teacher --repair`, or choose another cache.path"
    try:
        data = storage.read(tile.METADATA_NAME)
    except FileNotFoundError:
        return None
    except CorruptCache as err:
        raise CorruptCache(f"{origin} is not the metadata of a cache ({err}); {advice}") from err
    try:
        content = json.loads(data)["attributes"][tile.ATTRIBUTE]
        (refuse_to_write if to_write else is_newer_minor)(content["format_version"], origin)
        return parse_recipe(content["recipe"])
    except (ValueError, KeyError, TypeError, RecursionError) as err:
        raise CorruptCache(f"{origin} is not the metadata of a cache ({reason_of(err)}); {advice}") from err


def read_receipt(storage: Storage, tile_id: str, recipe_digest: str) -> TileRecord | None:
    """A finished tile's record from its receipt; None if that is missing, damaged, or of another tile or recipe."""
    try:
        metadata = storage.read(f"{tile.tile_path(tile_id)}/{tile.METADATA_NAME}")
    except (FileNotFoundError, CorruptCache):
        return None
    return tile.parse_receipt(metadata, tile_id, recipe_digest) if tile.is_sealed(metadata) else None
