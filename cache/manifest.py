"""
The manifest: the recipe of a cache, and the digests of its source images and files.

Its fingerprint is the digest of the recipe and the source images. `manifest.json` is written last: a cache without it is not
finished. It lists the tiles itself up to `MAX_LISTED`, and of more has the digests of an index (see `index.files`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from kdpipe.cache.codec import error_bound
from kdpipe.cache.encoding import logits
from kdpipe.cache.index.columns import TileIndex
from kdpipe.cache.index.files import FOLDER, index_digests, index_files, read_index
from kdpipe.cache.index.records import (
    Sha256,
    TileRecord,
    canonical,
    compact,
    digest_of,
    node_path,
    parse_record,
    quoted,
    read_record,
)
from kdpipe.cache.recipe import AnyRecipe, CacheRecipe, LogitsRecipe, Record, is_none
from kdpipe.cache.storage.base import Storage
from kdpipe.cache.tile import group_metadata, group_paths, sha256
from kdpipe.configs.errors import CorruptCache, UnknownFormat

# Major versions: 2 holds logits, 4 soft targets, 5 those of many classes at 8 bits.
# Minor versions: 0 holds whole tiles, 1 recorded views; 2 holds either, and its
# recipe says how images are decoded and in which order temperature and class map are applied; 3 is any of them with a part of the tiles.
# 6 is any of all these, with more tiles than a manifest lists.
VERSIONS = ("2.0", "2.1", "2.2", "2.3", "4.0", "4.1", "4.2", "4.3", "5.2", "5.3", "6.0")
INDEXED = "6.0"
MAX_LISTED = 4096  # tiles in `manifest.json`, which then has a megabyte or two
UNRELEASED = (1, 3)  # soft targets as unreleased versions of kdpipe wrote them
MANIFEST_NAME = "manifest.json"
DELETE_MANIFEST = "restore it, or run `kdpipe precompute-teacher` again after deleting it: finished tiles are kept"


def _in_columns(tiles: Any) -> Any:
    return tiles if isinstance(tiles, TileIndex) else TileIndex.of(tiles)


class Manifest(Record):
    """The whole `manifest.json`, and the index that it has the digests of."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    format_version: str
    fingerprint: str
    recipe: AnyRecipe
    error_bound: float
    device: str
    libraries: dict[str, str]
    # By path, where the tiles are listed. All groups but the topmost have the same content, so that an indexed cache need not list them.
    groups: Annotated[dict[str, Sha256] | None, Field(exclude_if=is_none)] = None
    root_sha256: Annotated[Sha256 | None, Field(exclude_if=is_none)] = None
    index: Annotated[dict[str, Sha256] | None, Field(exclude_if=is_none)] = None
    # How many tiles the configuration has, where the cache was computed for some of them (`--limit`). Left out of a whole cache.
    partial_of: Annotated[int | None, Field(ge=1, exclude_if=is_none)] = None
    tiles: Annotated[TileIndex, BeforeValidator(_in_columns)]

    @property
    def is_indexed(self) -> bool:
        """Whether the tiles are in an index beside the manifest, not in it."""
        return self.index is not None

    def group_digests(self) -> Mapping[str, str]:
        """The sha256 of each group's `zarr.json` by the group's path, `""` for the topmost."""
        if self.groups is not None:
            return self.groups
        assert self.root_sha256 is not None, self.format_version
        of_others = sha256(group_metadata(FOLDER, self.recipe))
        return dict.fromkeys(group_paths(self.tiles.ids()), of_others) | {"": self.root_sha256}

    def probability_bound(self, temperature: float, num_classes: int) -> float:
        """
        The largest possible error of a soft target's entry.

        For logits it depends on the temperature and the number of student classes at which they are read.
        """
        if isinstance(self.recipe, LogitsRecipe):
            return logits.error_bound(self.recipe.bits, len(self.recipe.channels), num_classes, temperature)
        return self.error_bound

    @model_validator(mode="after")
    def _refuse_the_version_of_another_kind(self) -> Self:
        wanted = INDEXED if self.is_indexed else version_of(self.recipe, self.partial_of)
        if self.format_version.split(".")[0] != wanted.split(".")[0]:
            raise ValueError(f"format version {self.format_version} does not hold {self.recipe.kind}")
        if self.format_version in VERSIONS and self.format_version != wanted:
            raise ValueError(
                f"format version {self.format_version} does not hold this recipe, which is of version {wanted}"
            )
        for name, wanted_here in (("groups", not self.is_indexed), ("root_sha256", self.is_indexed)):
            if (getattr(self, name) is not None) != wanted_here:
                raise ValueError(f"the field {name!r} is {'missing' if wanted_here else 'none of this version'}")
        return self

    @model_validator(mode="after")
    def _refuse_paths_out_of_the_cache(self) -> Self:
        if self.partial_of is not None and self.partial_of <= len(self.tiles):
            raise ValueError(f"it holds {len(self.tiles)} tiles, which are no part of {self.partial_of}")
        if self.groups is None:  # an index is looked through by `verify-cache`, which has the time
            return self
        self.tiles.require_unique()
        for path in self.groups:
            if path and not f"{node_path(path)}/".startswith("tiles/"):
                raise ValueError(f"the group {path!r} is not one of tiles")
        arrays_in_arrays = [path for path in self.groups if self.tiles.find(path.removeprefix("tiles/"))]
        if arrays_in_arrays:
            raise ValueError(f"{arrays_in_arrays} are groups and tiles at once")
        return self


def manifest_of(
    recipe: CacheRecipe, tiles: Iterable[TileRecord], groups: Mapping[str, str], *, device: str, libraries: Mapping[str, str],
    partial_of: int | None = None,
) -> Manifest:  # fmt: skip
    """The manifest of a cache of these tiles, in this order, in the form that their number asks for; `groups` are digests by path."""
    index = TileIndex.of(tiles)
    is_indexed = len(index) > MAX_LISTED
    return Manifest(
        format_version=INDEXED if is_indexed else version_of(recipe, partial_of),
        fingerprint=fingerprint(recipe, index),
        recipe=recipe,
        error_bound=error_bound(recipe),
        device=device,
        libraries=dict(libraries),
        groups=None if is_indexed else dict(groups),
        root_sha256=groups[""] if is_indexed else None,
        index=index_digests(index) if is_indexed else None,
        partial_of=partial_of,
        tiles=index,
    )


def manifest_files(manifest: Manifest) -> Iterator[tuple[str, bytes]]:
    """The files that list the tiles and their content, in the order in which they are written: those of the index, `manifest.json`."""
    if manifest.is_indexed:
        yield from index_files(manifest.tiles)
    yield MANIFEST_NAME, dump_manifest(manifest)


def store_manifest(storage: Storage, manifest: Manifest) -> None:
    """Write the files that list the tiles, the manifest last; an older index is removed once no manifest vouches for it."""
    if manifest.is_indexed or storage.children(FOLDER):
        storage.remove(MANIFEST_NAME)
        storage.remove(FOLDER)
    for name, content in manifest_files(manifest):
        storage.write(name, content)


def version_of(recipe: CacheRecipe, partial_of: int | None) -> str:
    """The format version of a manifest that lists its tiles: its recipe's, and minor version 3 for a part of a configuration's tiles."""
    return recipe.format_version if partial_of is None else f"{recipe.major_version}.3"


def fingerprint(recipe: CacheRecipe, tiles: TileIndex) -> str:
    """The sha256 of everything that determines the values in the cache: the recipe, the tiles' ids and their images."""
    digest = hashlib.sha256(b'{"images":{')  # tile by tile, so that the text of a million tiles is never in memory
    for i, (tile_id, image_sha256) in enumerate(tiles.images()):
        digest.update(f'{"," * (i > 0)}{quoted(tile_id)}:"{image_sha256}"'.encode())
    digest.update(f'}},"recipe":{compact(recipe.model_dump())}}}'.encode())
    return digest.hexdigest()


def dump_manifest(manifest: Manifest) -> bytes:
    """The bytes of `manifest.json`: canonical JSON with a checksum of all other fields."""
    content = manifest.model_dump(exclude={"tiles"})
    if manifest.is_indexed:
        content["tiles"] = len(manifest.tiles)
        return canonical({**content, "checksum": digest_of(content)})
    content["tiles"] = []
    checksum, tiles = _Checksum(content), []
    for record in manifest.tiles:
        checksum.add(record.compact())
        tiles.append(record.canonical().encode())
    rest = canonical({**content, "checksum": checksum.hexdigest()})
    return rest.replace(_NO_TILES, _FIRST_TILE + b",\n".join(tiles) + _LAST_TILE) if tiles else rest


def parse_manifest(data: bytes, origin: str, storage: Storage, advice: str = DELETE_MANIFEST) -> Manifest:
    """
    The manifest in the bytes of the file `origin`, in this version of the format or a newer minor one, with its index in `storage`.

    Raises `UnknownFormat` for another major version, `CorruptCache`, which ends in `advice`, if any byte differs from what
    `dump_manifest` wrote or a field is invalid.
    """
    try:
        rest, listed = _split(data)
        content = json.loads(rest)
        newer = is_newer_minor(content["format_version"], origin)
        if canonical(content) != rest:
            raise ValueError(_LAYOUT)
        claimed = content.pop("checksum")
        index = content.get("index")
        if index is not None:
            if claimed != digest_of(content):
                raise ValueError(_CHECKSUM)
            try:
                content["tiles"] = read_index(storage, index, content["tiles"])
            except (ValueError, TypeError) as err:
                raise CorruptCache(f"{origin} has an index that is damaged: {reason_of(err)}; {advice}") from err
        else:
            checksum = _Checksum(content)
            tiles = TileIndex.of(_listed_tiles(_tiles_in(data, listed), checksum, newer=newer))
            if claimed != checksum.hexdigest():
                raise ValueError(_CHECKSUM)
            if len(tiles):
                content["tiles"] = tiles
        manifest = Manifest.model_validate(content, context={"newer": newer})
        if not manifest.is_indexed and manifest.fingerprint != fingerprint(manifest.recipe, manifest.tiles):
            raise ValueError("its fingerprint is not that of its recipe and images")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as err:
        raise CorruptCache(f"{origin} was changed after it was written: {reason_of(err)}; {advice}") from err
    return manifest


def _listed_tiles(texts: Iterable[bytes], checksum: _Checksum, *, newer: bool) -> Iterator[TileRecord]:
    """The records in the texts of a canonical manifest, which are added to its checksum."""
    for i, tile in enumerate(texts):
        plain = read_record(tile.decode(errors="replace"))
        if plain is not None:
            checksum.add(plain.compact())
            yield plain
            continue
        fields = json.loads(tile)
        if _canonical_tile(fields) != tile:
            raise ValueError(_LAYOUT)
        checksum.add(compact(fields))
        try:
            record = parse_record(fields, newer=newer)
        except ValueError as err:
            raise ValueError(reason_of(err, f"tiles.{i}.")) from err
        yield record


_LAYOUT = "it is not laid out as kdpipe writes it"
_CHECKSUM = "its content does not match its checksum"
# Around the tiles of a canonical manifest. JSON strings hold no raw newline, so these bytes occur nowhere else.
_NO_TILES, _FIRST_TILE, _LAST_TILE, _TILE_ENDS = b'\n "tiles": []', b'\n "tiles": [\n', b"\n ]", b"\n  }"


def _split(data: bytes) -> tuple[bytes, range]:
    """The manifest with an empty list of tiles, and the range of `data` with its tiles, which are then parsed one by one."""
    start = data.find(_FIRST_TILE)
    first = start + len(_FIRST_TILE)
    end = data.find(_LAST_TILE, first)
    if min(start, end) < 0:
        return data, range(0)
    return data[:start] + _NO_TILES + data[end + len(_LAST_TILE) :], range(first, end)


def _tiles_in(data: bytes, where: range) -> Iterator[bytes]:
    """The bytes of each tile in turn; `ValueError` where the layout is not canonical."""
    start = where.start
    while start < where.stop:
        end = data.find(_TILE_ENDS, start, where.stop) + len(_TILE_ENDS)
        if end < start or data[end : end + 2] not in (b",\n", b"\n "):
            raise ValueError(_LAYOUT)
        yield data[start:end]
        start = end + 2


class _Checksum:
    """The sha256 of a manifest's compact form, fed tile by tile."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        before = {key: value for key, value in content.items() if key < "tiles"}
        self._after = {key: value for key, value in content.items() if key > "tiles"}
        self._tiles = 0
        self._digest = hashlib.sha256(f'{compact(before)[:-1]},"tiles":['.encode())

    def add(self, tile: str) -> None:
        """A tile, in the compact form."""
        self._digest.update(f"{',' * (self._tiles > 0)}{tile}".encode())
        self._tiles += 1

    def hexdigest(self) -> str:
        self._digest.update(f"]{',' * bool(self._after)}{compact(self._after)[1:]}".encode())
        return self._digest.hexdigest()


def is_newer_minor(version: Any, origin: str) -> bool:
    """
    Whether a cache of this format version may have fields that this program does not know.

    Raises `UnknownFormat` for another major version, of which only the place of its version number is known, and `ValueError`
    for anything that is not a version.
    """
    newest_minors = {int(known.split(".")[0]): int(known.split(".")[1]) for known in VERSIONS}
    match = re.fullmatch(r"([1-9][0-9]{0,3})\.(0|[1-9][0-9]{0,3})", version) if isinstance(version, str) else None
    if match is None:
        raise ValueError(f"its format_version is {str(version)[:40]!r}, not MAJOR.MINOR")
    major, minor = map(int, match.groups())
    if major in UNRELEASED:
        raise UnknownFormat(
            f"{origin} has format version {version}, which only unreleased versions of kdpipe wrote and none reads any more: "
            "delete the cache, or choose another cache.path, and compute it anew with `kdpipe precompute-teacher`"
        )
    if major not in newest_minors:
        raise UnknownFormat(
            f"{origin} has format version {version}, and this kdpipe reads {', '.join(f'{known}.x' for known in newest_minors)}: "
            "install a kdpipe that reads it, or compute the cache again at another cache.path"
        )
    return minor > newest_minors[major]


def refuse_to_write(version: Any, origin: str) -> None:
    """Raise `UnknownFormat` unless this program writes exactly this version: a newer minor version is read, but never added to."""
    is_newer_minor(version, origin)
    if version not in VERSIONS:
        raise UnknownFormat(
            f"{origin} has format version {version}, which this kdpipe reads, but it writes {', '.join(VERSIONS)}: "
            "install the kdpipe that made it, or choose another cache.path"
        )


def reason_of(err: Exception, inside: str = "") -> str:
    """The cause of a parsing error in one short line; `inside` names the part of the file that was parsed."""
    if isinstance(err, ValidationError):
        first = err.errors(include_url=False)[0]
        # Without the tags of `AnyRecipe`.
        where = ".".join(str(part) for part in first["loc"] if part not in ("soft", "logits"))
        rest = f" (and {err.error_count() - 1} more)" if err.error_count() > 1 else ""
        return f"{(inside + where).rstrip('.') or 'it'}: {first['msg'].removeprefix('Value error, ')[:300]}{rest}"
    if isinstance(err, KeyError):
        return f"the field {err} is missing"
    return f"{inside.rstrip('.')}{': ' * bool(inside)}{err}"[:300]


def _canonical_tile(fields: Any) -> bytes:
    """A tile's text in the canonical manifest, indented by two levels."""
    return b"  " + canonical(fields).rstrip().replace(b"\n", b"\n  ")
