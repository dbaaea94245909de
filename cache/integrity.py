"""
Whether a cache is whole and fresh: the findings of `verify-cache --level quick` and `full`.

`find_damage` decides which tiles `precompute-teacher --repair` computes again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from kdpipe.cache import codec, tile
from kdpipe.cache.documents import read_receipt, read_recipe
from kdpipe.cache.images import Source
from kdpipe.cache.index.records import TileRecord
from kdpipe.cache.known_images import KnownImages
from kdpipe.cache.manifest import MANIFEST_NAME, VERSIONS, Manifest, fingerprint
from kdpipe.cache.packing.check import fault_of
from kdpipe.cache.reader import open_tile, read_intact
from kdpipe.cache.recipe import CacheRecipe, LogitsRecipe, differences
from kdpipe.cache.shard import in_memory
from kdpipe.cache.storage.base import Storage
from kdpipe.cache.storage.packed import PackedStorage
from kdpipe.configs.errors import CorruptCache, UnknownFormat

READ_THREADS = 4  # hashing and decompression release the GIL


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: a short code for programs, the tile's id if it concerns one, and a sentence for people."""

    code: str
    tile: str | None
    message: str


def check_tiles_listed(manifest: Manifest, images: Mapping[str, Source], *, only_these: bool = False) -> list[Finding]:
    """Findings for tiles that are in the configuration but not in the cache and, unless these are `only_these`, vice versa."""
    cached = {record.id for record in manifest.tiles}
    findings = [
        Finding("missing-tile", tile_id, f"{image} is in the data, but its tile is not in the cache")
        for tile_id, image in images.items()
        if tile_id not in cached
    ]
    findings += [
        Finding("extra-tile", tile_id, "the tile is in the cache, but no image in the data has its id")
        for tile_id in sorted(cached - set(images) if not only_these else ())
    ]
    return findings


def check_manifest(storage: Storage, manifest: Manifest) -> list[Finding]:
    """
    Findings for a manifest that is consistent in itself but not with the rest of the cache: it was edited and signed again.

    `check_full` also compares the tiles' digests, sizes and images with their receipts. Nothing vouches for `device` and
    `libraries`.
    """
    wrong = []
    bound = codec.error_bound(manifest.recipe)
    if manifest.error_bound != bound:
        wrong.append(f"error_bound is {manifest.error_bound!r}, and its recipe gives {bound!r}")
    groups = set(tile.group_paths(manifest.tiles.ids()))
    if manifest.groups is not None and set(manifest.groups) != groups:
        odd = sorted(groups ^ set(manifest.groups))
        wrong.append(f"its groups are not those of its tiles: {odd[0] or 'the topmost'!r} is listed or lacking wrongly")
    if manifest.is_indexed:
        wrong += _faults_of_index(manifest)
    try:
        # The topmost group of a newer version may hold more; a damaged one is a finding of its own.
        if manifest.format_version in VERSIONS and _is_intact(storage, "", manifest.group_digests().get("")):
            found = read_recipe(storage, to_write=False)
            if found is not None and found != manifest.recipe:
                fields = differences(manifest.recipe, found.model_dump())
                wrong.append(f"its recipe is not that of {tile.METADATA_NAME}: {fields[0].partition(':')[0]} differs")
    except (CorruptCache, UnknownFormat) as err:
        wrong.append(f"it vouches for a topmost group that is not one ({err})")
    return [
        Finding("damaged-manifest", None, f"{MANIFEST_NAME} was changed and signed again: {what}") for what in wrong
    ]


def _faults_of_index(manifest: Manifest) -> Iterator[str]:
    """What an index that was read does not say of itself: it was edited, and its digests with it."""
    tiles = manifest.tiles
    try:
        tiles.require_unique()
        if manifest.fingerprint != fingerprint(manifest.recipe, tiles):
            yield "its fingerprint is not that of its recipe and images"
        both = [path for path in tile.group_paths(tiles.ids()) if tiles.find(path.removeprefix(f"{tile.TILES}/"))]
        if both:
            yield f"{both[:3]} are groups and tiles at once"
    except ValueError as err:
        yield f"its index has faults: {err}"


def check_quick(
    storage: Storage, manifest: Manifest, images: Mapping[str, Source], *, only_these: bool = False
) -> list[Finding]:
    """
    Findings from names, sizes and times alone: missing and extra tiles, missing files, changed images; of the tiles of `images` alone if
    these are `only_these`.

    Of the cache only metadata is read. An image is read where its size and time were not seen before (see `known_images`).
    """
    findings = check_tiles_listed(manifest, images, only_these=only_these) + check_manifest(storage, manifest)
    info = storage.infos()
    listed = [(images[record.id], record) for record in manifest.tiles if record.id in images]
    unchanged = KnownImages(storage).unchanged(listed)
    findings += [_damaged_group(path) for path in manifest.group_digests() if info(_group_file(path)) is None]
    for record in _looked_at(manifest, images, only_these=only_these):
        path = tile.tile_path(record.id)
        shard, receipt = info(f"{path}/{tile.SHARD_NAME}"), info(f"{path}/{tile.METADATA_NAME}")
        if shard is None or receipt is None:
            findings.append(Finding("damaged-tile", record.id, f"a file of {path} is missing"))
        elif shard.size != record.shard_bytes:
            size = f"{path}/{tile.SHARD_NAME} has {shard.size} bytes, not {record.shard_bytes}"
            findings.append(Finding("damaged-tile", record.id, size))
        if record.id in images and record.id not in unchanged:
            findings.append(_stale(record, images[record.id]))
    return findings


def check_full(
    storage: Storage,
    manifest: Manifest,
    images: Mapping[str, Source],
    on_tile: Callable[[], None] = lambda: None,
    *,
    only_these: bool = False,
) -> list[Finding]:
    """
    Findings from every byte: digests of files and source images, decoding of chunks, sums of pixels, and stray files.

    `on_tile` is called after each tile. `only_these` is that of `check_quick`.
    """
    edited, known = check_manifest(storage, manifest), KnownImages(storage)
    findings = check_tiles_listed(manifest, images, only_these=only_these) + edited
    for path, digest in manifest.group_digests().items():
        # The content that this version writes is known, so a digest cannot vouch for any other.
        written = tile.sha256(tile.group_metadata(path, manifest.recipe))
        is_known = manifest.format_version in VERSIONS and not edited
        if not _is_intact(storage, path, digest) or (is_known and digest != written):
            findings.append(_damaged_group(path))

    def check(record: TileRecord) -> list[Finding]:
        found = _check_content(storage, manifest.recipe, record) + _check_image(record, images, known)
        on_tile()
        return found

    with ThreadPoolExecutor(READ_THREADS) as threads:
        for found in threads.map(check, _looked_at(manifest, images, only_these=only_these)):
            findings += found
    known.save()
    if isinstance(storage, PackedStorage):
        fault = fault_of(storage, manifest)
        findings += [Finding("damaged-pack", None, fault)] if fault else []
    else:
        findings += _check_strays(storage, manifest)
    return findings


def _looked_at(manifest: Manifest, images: Mapping[str, Source], *, only_these: bool) -> Sequence[TileRecord]:
    return [record for record in manifest.tiles if record.id in images] if only_these else manifest.tiles


def _damaged_group(path: str) -> Finding:
    return Finding("damaged-group", None, f"{_group_file(path)} is missing or not what was written")


def _group_file(path: str) -> str:
    return f"{path}/{tile.METADATA_NAME}".lstrip("/")


def _is_intact(storage: Storage, group: str, digest: str | None) -> bool:
    """Whether a group's metadata matches the manifest's digest."""
    try:
        return tile.sha256(storage.read(_group_file(group))) == digest
    except (FileNotFoundError, CorruptCache):
        return False


def find_damage(
    storage: Storage,
    recipe: CacheRecipe,
    records: Iterable[TileRecord],
    images: Mapping[str, Source],
    on_tile: Callable[[], None] = lambda: None,
) -> tuple[dict[str, TileRecord], dict[str, str]]:
    """
    The records of the tiles that are whole, and by id the fault in the files or source image of the others; reads every byte.

    Unlike `check_full` this needs no manifest: `records` may come from the tiles' receipts. Where a record does not fit but the
    tile's receipt does, the record is wrong, as in an edited manifest, and the tile is whole with its receipt as record.
    """
    digest, known = recipe.digest(), KnownImages(storage)

    def wrong_with(record: TileRecord) -> list[Finding]:
        return _check_content(storage, recipe, record) or _check_image(record, images, known)

    def check(record: TileRecord) -> tuple[TileRecord, str | None]:
        found = wrong_with(record)
        if found and (receipt := read_receipt(storage, record.id, digest)) and not wrong_with(receipt):
            record, found = receipt, []
        on_tile()
        return record, found[0].message if found else None

    with ThreadPoolExecutor(READ_THREADS) as threads:
        checked = list(threads.map(check, records))
    known.save()
    whole = {record.id: record for record, cause in checked if cause is None}
    return whole, {record.id: cause for record, cause in checked if cause is not None}


def _check_content(storage: Storage, recipe: CacheRecipe, record: TileRecord) -> list[Finding]:
    """Findings for the two files of a tile: digests, receipt and values. Each file is read once."""
    try:
        metadata = read_intact(storage, record, tile.METADATA_NAME)
        file = read_intact(storage, record, tile.SHARD_NAME)
    except ValueError as err:
        return [Finding("damaged-tile", record.id, str(err))]
    receipt = tile.parse_receipt(metadata, record.id, recipe.digest())
    if receipt != record:
        foreign = "its metadata belongs to another tile, or to a tile made by another recipe"
        return [Finding("foreign-tile", record.id, foreign)]
    try:
        shard = open_tile(recipe, record, metadata, in_memory(file))
        if not isinstance(recipe, LogitsRecipe):
            tile.read_entropy_error(shard.attributes, record)
        tile.read_gaps(shard.attributes, record)
        if tile.SEAL in shard.attributes[tile.ATTRIBUTE] and not tile.is_sealed(metadata):
            raise ValueError(f"its metadata ({tile.METADATA_NAME}) was changed and vouched for again")
        stored = shard.read((0, 0, record.height, record.width), in_memory(file))
        try:
            codec.units(stored, recipe)
        except ValueError as err:
            raise ValueError(f"a chunk is missing, or {err}") from err
    except (ValueError, KeyError, TypeError, OverflowError) as err:
        return [Finding("damaged-tile", record.id, str(err))]
    return []


def _check_image(record: TileRecord, images: Mapping[str, Source], known: KnownImages) -> list[Finding]:
    """A finding for an image that has another content than the record says; reads it."""
    image = images.get(record.id)
    return [] if image is None or known.compare(image, record) else [_stale(record, image)]


def _stale(record: TileRecord, image: Source) -> Finding:
    return Finding("stale-tile", record.id, f"{image} is not the image that the tile was computed from")


def _check_strays(storage: Storage, manifest: Manifest) -> Iterator[Finding]:
    """Findings for files that are neither listed nor part of a finished tile that the configuration no longer has."""
    groups = tile.group_paths(manifest.tiles.ids())
    expected: dict[str, set[str]] = {path: {tile.METADATA_NAME} for path in groups}
    expected[""].add(MANIFEST_NAME)
    for name in manifest.index or ():
        parts = name.split("/")
        for end in range(len(parts)):
            expected.setdefault("/".join(parts[:end]), set()).add(parts[end])
    for path in groups:
        if path:
            expected[path.rpartition("/")[0]].add(path.rpartition("/")[2])
    for record in manifest.tiles:
        path = tile.tile_path(record.id)
        expected[path] = {tile.METADATA_NAME, tile.SHARD_NAME}
        expected[path.rpartition("/")[0]].add(path.rpartition("/")[2])
    digest = manifest.recipe.digest()
    for path, names in expected.items():
        for child in storage.children(path):
            name = f"{path}/{child}".lstrip("/")
            if child not in names and not _holds_finished_tiles(storage, name, digest):
                yield Finding("stray-file", None, f"{name} does not belong to the cache")


def _holds_finished_tiles(storage: Storage, path: str, digest: str) -> bool:
    """Whether a folder is a finished tile or a group of only such tiles, like the views of a tile that has left the data."""
    if read_receipt(storage, path.removeprefix(f"{tile.TILES}/"), digest):
        return True
    children = [child for child in storage.children(path) if child != tile.METADATA_NAME]
    return bool(children) and all(_holds_finished_tiles(storage, f"{path}/{child}", digest) for child in children)
