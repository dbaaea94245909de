"""Is a cache whole and fresh: the findings of `verify-cache --level quick` and `full`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from kdpipe.cache import layout
from kdpipe.cache.manifest import MANIFEST_NAME, Manifest, TileRecord
from kdpipe.cache.reader import SoftTargetCache, damage
from kdpipe.cache.sources import is_unchanged
from kdpipe.cache.storage import Storage
from kdpipe.configs.errors import CorruptCache

READ_THREADS = 4  # hashing and decompression release the GIL


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: a short code for programs, the tile if it is about one, and a sentence for people."""

    code: str
    tile: str | None
    message: str


def check_tiles_listed(manifest: Manifest, images: Mapping[str, Path]) -> list[Finding]:
    """Findings for tiles that the configuration has and the cache lacks, and the other way round."""
    cached = {record.id for record in manifest.tiles}
    findings = [
        Finding("missing-tile", tile, f"{image} is in the data, but its tile is not in the cache")
        for tile, image in images.items()
        if tile not in cached
    ]
    findings += [
        Finding("extra-tile", tile, "the tile is in the cache, but no image in the data has its id")
        for tile in sorted(cached - set(images))
    ]
    return findings


def check_quick(storage: Storage, manifest: Manifest, images: Mapping[str, Path]) -> list[Finding]:
    """Findings from names, sizes and times alone: lists, missing files, changed images. Reads no pixel."""
    findings = check_tiles_listed(manifest, images)
    for record in manifest.tiles:
        path = layout.tile_path(record.id)
        size = storage.size(f"{path}/{layout.SHARD_NAME}")
        written = storage.modified(f"{path}/{layout.METADATA_NAME}")
        if size is None or storage.size(f"{path}/{layout.METADATA_NAME}") is None:
            findings.append(Finding("damaged-tile", record.id, f"a file of {path} is missing"))
        elif size != record.shard_bytes:
            findings.append(
                Finding(
                    "damaged-tile", record.id, f"{path}/{layout.SHARD_NAME} has {size} bytes, not {record.shard_bytes}"
                )
            )
        findings += _check_image(record, images, written, by_content=False)
    return findings


def check_full(
    storage: Storage, manifest: Manifest, images: Mapping[str, Path], on_tile: Callable[[], None] = lambda: None
) -> list[Finding]:
    """
    Findings from every byte: each file's digest, each chunk decoded, each pixel's sum, each source image's content, and
    files that do not belong. `on_tile` is called once a tile is checked.
    """
    findings = check_tiles_listed(manifest, images)
    for path, digest in manifest.groups.items():
        name = f"{path}/{layout.METADATA_NAME}".lstrip("/")
        try:
            intact = layout.sha256(storage.read(name)) == digest
        except FileNotFoundError:
            intact = False
        if not intact:
            findings.append(Finding("damaged-group", None, f"{name} is missing or not what was written"))
    cache = SoftTargetCache(storage, manifest)

    def check(record: TileRecord) -> list[Finding]:
        found = _check_content(storage, cache, record) + _check_image(record, images, None, by_content=True)
        on_tile()
        return found

    with ThreadPoolExecutor(READ_THREADS) as threads:
        for found in threads.map(check, manifest.tiles):
            findings += found
    findings += _check_strays(storage, manifest)
    return findings


def find_damage(
    storage: Storage,
    records: Iterable[TileRecord],
    images: Mapping[str, Path],
    on_tile: Callable[[], None] = lambda: None,
) -> dict[str, str]:
    """
    What is wrong with the files or the source image of each tile, by id, whole tiles left out: every byte is read.

    Unlike `check_full` this needs no manifest: `records` may come from the tiles' own receipts.
    """

    def check(record: TileRecord) -> tuple[str, str | None]:
        cause = damage(storage, record)
        if cause is None and _check_image(record, images, None, by_content=True):
            cause = f"{images[record.id]} is not the image that it was computed from"
        on_tile()
        return record.id, cause

    with ThreadPoolExecutor(READ_THREADS) as threads:
        return {tile: cause for tile, cause in threads.map(check, records) if cause}


def _check_content(storage: Storage, cache: SoftTargetCache, record: TileRecord) -> list[Finding]:
    cause = damage(storage, record)
    if cause:
        return [Finding("damaged-tile", record.id, cause)]
    receipt = layout.parse_receipt(
        storage.read(f"{layout.tile_path(record.id)}/{layout.METADATA_NAME}"), record.id, cache.manifest.recipe.digest()
    )
    known = set(TileRecord.model_fields)  # a newer minor version may have more in the manifest
    if receipt is None or receipt.model_dump() != record.model_dump(include=known):
        return [
            Finding(
                "foreign-tile", record.id, "its metadata is that of another tile, or of a tile made by another recipe"
            )
        ]
    try:
        cache.read_units(record.id)
    except CorruptCache as err:
        return [Finding("damaged-tile", record.id, str(err))]
    return []


def _check_image(
    record: TileRecord, images: Mapping[str, Path], written: float | None, *, by_content: bool
) -> list[Finding]:
    image = images.get(record.id)
    if image is None or is_unchanged(image, record, written, by_content=by_content):
        return []
    return [Finding("stale-tile", record.id, f"{image} is not the image that the tile was computed from")]


def _check_strays(storage: Storage, manifest: Manifest) -> Iterator[Finding]:
    """What lies in the cache and is neither listed nor a finished tile that the configuration no longer names."""
    expected: dict[str, set[str]] = {path: {layout.METADATA_NAME} for path in manifest.groups}
    expected[""].add(MANIFEST_NAME)
    for path in manifest.groups:
        if path:
            expected[path.rpartition("/")[0]].add(path.rpartition("/")[2])
    for record in manifest.tiles:
        path = layout.tile_path(record.id)
        expected[path] = {layout.METADATA_NAME, layout.SHARD_NAME}
        expected[path.rpartition("/")[0]].add(path.rpartition("/")[2])
    for path, names in expected.items():
        for child in storage.children(path):
            if child not in names:
                name = f"{path}/{child}".lstrip("/")
                yield Finding("stray-file", None, f"{name} does not belong to the cache")
