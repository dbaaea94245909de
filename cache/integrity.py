"""Is a cache whole and fresh: the findings of `verify-cache --level quick` and `full`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from kdpipe.cache import codec as values
from kdpipe.cache import tile as layout
from kdpipe.cache.images import Source, is_unchanged
from kdpipe.cache.manifest import MANIFEST_NAME, Manifest
from kdpipe.cache.reader import in_memory, open_tile, read_intact, read_receipt, read_recipe
from kdpipe.cache.recipe import CacheRecipe, LogitsRecipe, differences
from kdpipe.cache.records import TileRecord
from kdpipe.cache.storage.base import Storage
from kdpipe.configs.errors import CorruptCache, UnknownFormat

READ_THREADS = 4  # hashing and decompression release the GIL


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: a short code for programs, the tile if it is about one, and a sentence for people."""

    code: str
    tile: str | None
    message: str


def check_tiles_listed(manifest: Manifest, images: Mapping[str, Source]) -> list[Finding]:
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


def check_manifest(storage: Storage, manifest: Manifest) -> list[Finding]:
    """
    What a manifest that is whole in itself claims against the rest of the cache: one that was edited and signed again.

    Its tiles' digests, sizes and images are compared with their receipts in `check_full`. Nobody can tell what `device` and
    `libraries` were.
    """
    wrong = []
    bound = values.error_bound(manifest.recipe)
    if manifest.error_bound != bound:
        wrong.append(f"error_bound is {manifest.error_bound!r}, and its recipe gives {bound!r}")
    groups = set(layout.group_paths([record.id for record in manifest.tiles]))
    if set(manifest.groups) != groups:
        odd = sorted(groups ^ set(manifest.groups))
        wrong.append(f"its groups are not those of its tiles: {odd[0] or 'the topmost'!r} is listed or lacking wrongly")
    try:
        # The topmost group of another version may say more; one that is damaged itself is a finding of its own.
        if manifest.format_version == manifest.recipe.format_version and _is_intact(storage, manifest, ""):
            found = read_recipe(storage, to_write=False)
            if found is not None and found != manifest.recipe:
                fields = differences(manifest.recipe, found.model_dump())
                wrong.append(f"its recipe is not that of {layout.METADATA_NAME}: {fields[0].partition(':')[0]} differs")
    except (CorruptCache, UnknownFormat) as err:
        wrong.append(f"it vouches for a topmost group that is none ({err})")
    return [
        Finding("damaged-manifest", None, f"{MANIFEST_NAME} was changed and signed again: {what}") for what in wrong
    ]


def check_quick(storage: Storage, manifest: Manifest, images: Mapping[str, Source]) -> list[Finding]:
    """Findings from names, sizes and times alone: lists, missing files, changed images. Reads no pixel."""
    findings = check_tiles_listed(manifest, images) + check_manifest(storage, manifest)
    info = storage.infos()
    for path in manifest.groups:
        name = _group_file(path)
        if info(name) is None:
            findings.append(Finding("damaged-group", None, f"{name} is missing or not what was written"))
    for record in manifest.tiles:
        path = layout.tile_path(record.id)
        shard, receipt = info(f"{path}/{layout.SHARD_NAME}"), info(f"{path}/{layout.METADATA_NAME}")
        if shard is None or receipt is None:
            findings.append(Finding("damaged-tile", record.id, f"a file of {path} is missing"))
        elif shard.size != record.shard_bytes:
            findings.append(
                Finding(
                    "damaged-tile",
                    record.id,
                    f"{path}/{layout.SHARD_NAME} has {shard.size} bytes, not {record.shard_bytes}",
                )
            )
        findings += _check_image(record, images, receipt and receipt.modified, by_content=False)
    return findings


def check_full(
    storage: Storage, manifest: Manifest, images: Mapping[str, Source], on_tile: Callable[[], None] = lambda: None
) -> list[Finding]:
    """
    Findings from every byte: each file's digest, each chunk decoded, each pixel's sum, each source image's content, and
    files that do not belong. `on_tile` is called once a tile is checked.
    """
    edited = check_manifest(storage, manifest)
    findings = check_tiles_listed(manifest, images) + edited
    for path in manifest.groups:
        # What this version writes is known, so that no digest can vouch for anything else.
        written = layout.sha256(layout.group_metadata(path, manifest.recipe))
        is_known = manifest.format_version == manifest.recipe.format_version and not edited
        if not _is_intact(storage, manifest, path) or (is_known and manifest.groups[path] != written):
            findings.append(Finding("damaged-group", None, f"{_group_file(path)} is missing or not what was written"))

    def check(record: TileRecord) -> list[Finding]:
        found = _check_content(storage, manifest.recipe, record) + _check_image(record, images, None, by_content=True)
        on_tile()
        return found

    with ThreadPoolExecutor(READ_THREADS) as threads:
        for found in threads.map(check, manifest.tiles):
            findings += found
    findings += _check_strays(storage, manifest)
    return findings


def _group_file(path: str) -> str:
    return f"{path}/{layout.METADATA_NAME}".lstrip("/")


def _is_intact(storage: Storage, manifest: Manifest, group: str) -> bool:
    """Whether a group's metadata is there and what the manifest vouches for."""
    try:
        return layout.sha256(storage.read(_group_file(group))) == manifest.groups.get(group)
    except (OSError, CorruptCache):  # the latter for a link that leads out of the cache
        return False


def find_damage(
    storage: Storage,
    recipe: CacheRecipe,
    records: Iterable[TileRecord],
    images: Mapping[str, Source],
    on_tile: Callable[[], None] = lambda: None,
) -> tuple[dict[str, TileRecord], dict[str, str]]:
    """
    The records of the tiles that are whole, and what is wrong with the files or the source image of each other: every byte is read.

    Unlike `check_full` this needs no manifest: `records` may come from the tiles' own receipts. Where a record does not fit, but
    the tile's receipt does, it is the record that is wrong, as in an edited manifest: that tile is whole by its receipt.
    """
    digest = recipe.digest()

    def wrong_with(record: TileRecord) -> list[Finding]:
        return _check_content(storage, recipe, record) or _check_image(record, images, None, by_content=True)

    def check(record: TileRecord) -> tuple[TileRecord, str | None]:
        found = wrong_with(record)
        if found and (receipt := read_receipt(storage, record.id, digest)) and not wrong_with(receipt):
            record, found = receipt, []
        on_tile()
        return record, found[0].message if found else None

    with ThreadPoolExecutor(READ_THREADS) as threads:
        checked = list(threads.map(check, records))
    whole = {record.id: record for record, cause in checked if cause is None}
    return whole, {record.id: cause for record, cause in checked if cause is not None}


def _check_content(storage: Storage, recipe: CacheRecipe, record: TileRecord) -> list[Finding]:
    """Both files of a tile by digest, receipt, and value; each is read once."""
    try:
        metadata = read_intact(storage, record, layout.METADATA_NAME)
        file = read_intact(storage, record, layout.SHARD_NAME)
    except (ValueError, CorruptCache) as err:  # the latter for a link that leads out of the cache
        return [Finding("damaged-tile", record.id, str(err))]
    receipt = layout.parse_receipt(metadata, record.id, recipe.digest())
    if receipt != record:
        return [
            Finding(
                "foreign-tile", record.id, "its metadata is that of another tile, or of a tile made by another recipe"
            )
        ]
    try:
        shard = open_tile(recipe, record, metadata, in_memory(file))
        if not isinstance(recipe, LogitsRecipe):
            layout.read_entropy_error(shard.attributes, record)
        if layout.SEAL in shard.attributes[layout.ATTRIBUTE] and not layout.is_sealed(metadata):
            raise ValueError(f"its metadata ({layout.METADATA_NAME}) was changed and vouched for again")
        stored = shard.read((0, 0, record.height, record.width), in_memory(file))
        try:
            values.units(stored, recipe)
        except ValueError as err:
            raise ValueError(f"a chunk is missing, or {err}") from err
    except (ValueError, KeyError, TypeError, OverflowError) as err:
        return [Finding("damaged-tile", record.id, str(err))]
    return []


def _check_image(
    record: TileRecord, images: Mapping[str, Source], written: float | None, *, by_content: bool
) -> list[Finding]:
    image = images.get(record.id)
    if image is None or is_unchanged(image, record, written, by_content=by_content):
        return []
    return [Finding("stale-tile", record.id, f"{image} is not the image that the tile was computed from")]


def _check_strays(storage: Storage, manifest: Manifest) -> Iterator[Finding]:
    """What lies in the cache and is neither listed nor a finished tile that the configuration no longer names."""
    groups = layout.group_paths([record.id for record in manifest.tiles])
    expected: dict[str, set[str]] = {path: {layout.METADATA_NAME} for path in groups}
    expected[""].add(MANIFEST_NAME)
    for path in groups:
        if path:
            expected[path.rpartition("/")[0]].add(path.rpartition("/")[2])
    for record in manifest.tiles:
        path = layout.tile_path(record.id)
        expected[path] = {layout.METADATA_NAME, layout.SHARD_NAME}
        expected[path.rpartition("/")[0]].add(path.rpartition("/")[2])
    digest = manifest.recipe.digest()
    for path, names in expected.items():
        for child in storage.children(path):
            name = f"{path}/{child}".lstrip("/")
            if child not in names and not _holds_finished_tiles(storage, name, digest):
                yield Finding("stray-file", None, f"{name} does not belong to the cache")


def _holds_finished_tiles(storage: Storage, path: str, digest: str) -> bool:
    """Whether a folder is a finished tile, or a group of nothing but finished ones, such as the views of a tile that is gone."""
    if read_receipt(storage, path.removeprefix(f"{layout.TILES}/"), digest):
        return True
    children = [child for child in storage.children(path) if child != layout.METADATA_NAME]
    return bool(children) and all(_holds_finished_tiles(storage, f"{path}/{child}", digest) for child in children)
