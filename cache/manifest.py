"""
The manifest: what the numbers in a cache were made from, and what each tile's bytes are.

Everything that determines the values is in `Recipe`; the fingerprint is the digest of the recipe and of the source images.
`manifest.json` is written last: a cache without it is not finished.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from kdpipe.cache.records import ImageDigest, Sha256, TileRecord, node_path, parse_record
from kdpipe.cache.simplex import levels_of, storage_type, total
from kdpipe.configs.errors import CorruptCache, UnknownFormat

# Of soft targets as they were, of logits, of soft targets; by major version of whole tiles and of recorded views: another major
# version cannot be read, recorded views can by a reader of whole tiles.
READ_VERSIONS = ("1.0", "1.1", "2.0", "2.1", "3.0", "3.1")
WRITTEN_VERSIONS = READ_VERSIONS[2:]
MANIFEST_NAME = "manifest.json"


class _Record(BaseModel):
    """Closed, except in a manifest of a newer minor version: what that adds is kept, so that digests come out the same."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="after")
    def _refuse_unknown_fields(self, info: ValidationInfo) -> Self:
        if self.model_extra and not (info.context or {}).get("newer"):
            raise ValueError(f"unknown fields {sorted(self.model_extra)}")
        return self


class TeacherRecord(_Record):
    """One teacher: its weights, and how it was asked; the names are those of the config's keys where there is one."""

    checkpoint_sha256: Sha256
    architecture: str
    encoder: str
    classes: list[str]
    drop_channels: list[int]
    weight: float
    normalize_mean: list[float]
    normalize_std: list[float]
    precision: Literal["fp32", "bf16", "fp16"]
    tta: str
    scales: list[float]
    window: int | None


class ViewsRecord(_Record):
    """How recorded views are drawn of the tiles; the names are those of the config's keys."""

    crop: int
    scales: list[float]
    max_class_share: float
    mosaic: float
    photometric: float
    ignore_index: int


class _Recipe(_Record):
    """What determines the values of a tile, given its image, whatever is stored of the teacher's answer."""

    teachers: Annotated[list[TeacherRecord], Field(min_length=1)]
    bands: list[int]
    stretch: list[list[float]] | None
    kind: Literal["soft", "logits"]
    bits: int
    chunk_px: int
    # Left out where the teacher saw whole tiles: minor version 0 does not know it, and its digests must stay what they are.
    views: Annotated[ViewsRecord | None, Field(exclude_if=lambda views: views is None)] = None
    major_version: ClassVar[int]

    @property
    def teacher_classes(self) -> list[str]:
        """What the teachers answer in, in the order of the class map's rows."""
        first = self.teachers[0]
        return [name for channel, name in enumerate(first.classes) if channel not in first.drop_channels]

    @property
    def format_version(self) -> str:
        """Of a cache with this recipe."""
        return f"{self.major_version}.{int(self.views is not None)}"

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the stored integers."""
        return storage_type(self.bits)

    def digest(self) -> str:
        """The sha256 of the recipe alone, which every tile carries."""
        return digest_of(self.model_dump())


class _SoftRecipe(_Recipe):
    """Everything that determines soft targets; class map rows are of the first teacher's kept classes."""

    classes: Annotated[list[str], Field(min_length=2)]
    class_map: list[list[float]]
    temperature: float
    kind: Literal["soft"]

    @property
    def channels(self) -> list[str]:
        """The names of the arrays' axis 0."""
        return self.classes


class Recipe(_SoftRecipe):
    """Of soft targets whose integers sum to `levels`, one of them left unsaid (see `rest.py`)."""

    bits: Literal[4, 6, 8, 16]
    levels: int
    major_version = 3

    @model_validator(mode="after")
    def _refuse_other_levels(self) -> Self:
        fewest = levels_of(self.bits, len(self.classes))
        if self.levels != fewest:
            raise ValueError(f"{self.bits} bits of {len(self.classes)} classes have {fewest} levels, not {self.levels}")
        return self


class FirstRecipe(_SoftRecipe):
    """Of soft targets as format 1 has them, all of whose integers are stored; only read."""

    bits: Literal[8, 16]
    major_version = 1

    @property
    def levels(self) -> int:
        """What the integers of a pixel sum to."""
        return total(self.bits)


class LogitsRecipe(_Recipe):
    """Everything that determines logits: temperature, class map and the student's classes come when they are read."""

    kind: Literal["logits"]
    bits: Literal[8, 16]
    major_version = 2

    @property
    def channels(self) -> list[str]:
        """The names of the arrays' axis 0."""
        return self.teacher_classes


def _major_version(fields: Any) -> str | None:
    """Which format's recipe it is: soft targets have `levels` since format 3."""
    if isinstance(fields, _Recipe):
        return str(fields.major_version)
    kind = fields.get("kind") if isinstance(fields, Mapping) else None
    if kind == "soft":
        return "3" if "levels" in fields else "1"
    return "2" if kind == "logits" else None


CacheRecipe = Recipe | FirstRecipe | LogitsRecipe
_Tagged = Annotated[
    Annotated[Recipe, Tag("3")] | Annotated[FirstRecipe, Tag("1")] | Annotated[LogitsRecipe, Tag("2")],
    Discriminator(_major_version),
]
_ANY_RECIPE: TypeAdapter[CacheRecipe] = TypeAdapter(_Tagged)


def parse_recipe(fields: Any) -> CacheRecipe:
    """The recipe of its kind; `ValidationError` for what is none."""
    return _ANY_RECIPE.validate_python(fields)


class Manifest(_Record):
    """The whole `manifest.json`."""

    format_version: str
    fingerprint: str
    recipe: _Tagged
    error_bound: float
    device: str
    libraries: dict[str, str]
    groups: dict[str, Sha256]
    tiles: list[TileRecord]

    @model_validator(mode="after")
    def _refuse_the_version_of_another_kind(self) -> Self:
        wanted = self.recipe.format_version
        if self.format_version.split(".")[0] != wanted.split(".")[0]:
            raise ValueError(f"format version {self.format_version} does not hold {self.recipe.kind}")
        if self.format_version in READ_VERSIONS and self.format_version != wanted:
            what = "whole tiles" if self.recipe.views is None else "recorded views"
            raise ValueError(f"format version {self.format_version} does not hold {what}")
        return self

    @model_validator(mode="after")
    def _refuse_paths_out_of_the_cache(self) -> Self:
        ids = [tile.id for tile in self.tiles]
        if len(set(ids)) < len(ids):
            raise ValueError("two tiles of one id")
        for path in self.groups:
            if path and not f"{node_path(path)}/".startswith("tiles/"):
                raise ValueError(f"the group {path!r} is not one of tiles")
        arrays_in_arrays = [path for path in self.groups if path.removeprefix("tiles/") in set(ids)]
        if arrays_in_arrays:
            raise ValueError(f"{arrays_in_arrays} are groups and tiles at once")
        return self


def fingerprint(recipe: CacheRecipe, images: Mapping[str, ImageDigest]) -> str:
    """The sha256 of what determines every value in the cache: the recipe, and the tiles' ids and image contents."""
    digest = hashlib.sha256(b'{"images":{')  # tile by tile: what is digested of a million tiles is never held at once
    for i, tile in enumerate(sorted(images)):
        digest.update(f"{',' * (i > 0)}{_compact(tile)}:{_compact(images[tile].sha256)}".encode())
    digest.update(f'}},"recipe":{_compact(recipe.model_dump())}}}'.encode())
    return digest.hexdigest()


def dump_manifest(manifest: Manifest) -> bytes:
    """The bytes of `manifest.json`: sorted keys, and a checksum of all the rest as one more field."""
    content = {**manifest.model_dump(exclude={"tiles"}), "tiles": []}
    checksum, tiles = _Checksum(content), []
    for record in manifest.tiles:
        fields = record.as_dict()
        checksum.add(fields)
        tiles.append(_canonical_tile(fields))
    rest = _canonical({**content, "checksum": checksum.hexdigest()})
    return rest.replace(_NO_TILES, _FIRST_TILE + b",\n".join(tiles) + _LAST_TILE) if tiles else rest


def parse_manifest(data: bytes, origin: str) -> Manifest:
    """
    The manifest in the bytes of `origin`, of this version of the format or of a newer minor one.

    Raises `UnknownFormat` for another major version, `CorruptCache` if any byte differs from what `dump_manifest` wrote or a
    field is not as it should be.
    """
    advice = "restore it, or run `kdpipe precompute-teacher` again after deleting it: finished tiles are kept"
    try:
        rest, tiles = _split(data)
        content = json.loads(rest)
        newer = is_newer_minor(content["format_version"], origin)
        if _canonical(content) != rest:
            raise ValueError(_LAYOUT)
        claimed = content.pop("checksum")
        checksum, records = _Checksum(content), []
        for i, tile in enumerate(_tiles_in(data, tiles)):
            fields = json.loads(tile)
            if _canonical_tile(fields) != tile:
                raise ValueError(_LAYOUT)
            checksum.add(fields)
            try:
                records.append(parse_record(fields, newer=newer))
            except ValueError as err:
                raise ValueError(reason_of(err, f"tiles.{i}.")) from err
        if claimed != checksum.hexdigest():
            raise ValueError("its content does not match its checksum")
        if records:
            content["tiles"] = records
        manifest = Manifest.model_validate(content, context={"newer": newer})
        if manifest.fingerprint != fingerprint(manifest.recipe, {tile.id: tile.image for tile in manifest.tiles}):
            raise ValueError("its fingerprint is not that of its recipe and images")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
        raise CorruptCache(f"{origin} was changed after it was written: {reason_of(err)}; {advice}") from err
    return manifest


_LAYOUT = "it is not laid out as kdpipe writes it"
# Where the list of tiles stands in a canonical manifest. No string holds a raw newline, so these are found nowhere else.
_NO_TILES, _FIRST_TILE, _LAST_TILE, _TILE_ENDS = b'\n "tiles": []', b'\n "tiles": [\n', b"\n ]", b"\n  }"


def _split(data: bytes) -> tuple[bytes, range]:
    """A manifest with an empty list of tiles, and where in `data` its tiles are: so they are parsed one by one, not held twice."""
    start = data.find(_FIRST_TILE)
    first = start + len(_FIRST_TILE)
    end = data.find(_LAST_TILE, first)
    if min(start, end) < 0:
        return data, range(0)
    return data[:start] + _NO_TILES + data[end + len(_LAST_TILE) :], range(first, end)


def _tiles_in(data: bytes, where: range) -> Iterator[bytes]:
    """The bytes of one tile after the other; `ValueError` where they are not laid out as they are written."""
    start = where.start
    while start < where.stop:
        end = data.find(_TILE_ENDS, start, where.stop) + len(_TILE_ENDS)
        if end < start or data[end : end + 2] not in (b",\n", b"\n "):
            raise ValueError(_LAYOUT)
        yield data[start:end]
        start = end + 2


class _Checksum:
    """The digest of a manifest's compact form, to which its tiles are added one by one."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        before = {key: value for key, value in content.items() if key < "tiles"}
        self._after = {key: value for key, value in content.items() if key > "tiles"}
        self._tiles = 0
        self._digest = hashlib.sha256(f'{_compact(before)[:-1]},"tiles":['.encode())

    def add(self, tile: Mapping[str, Any]) -> None:
        self._digest.update(f"{',' * (self._tiles > 0)}{_compact(tile)}".encode())
        self._tiles += 1

    def hexdigest(self) -> str:
        self._digest.update(f"]{',' * bool(self._after)}{_compact(self._after)[1:]}".encode())
        return self._digest.hexdigest()


def is_newer_minor(version: Any, origin: str) -> bool:
    """
    Whether a cache of this format version may have fields that this program does not know.

    Raises `UnknownFormat` for another major version: nothing is known of it but where its version stands, and `ValueError`
    for what is no version.
    """
    # The last of a major version stays: the newest.
    known_minors = {int(known.split(".")[0]): int(known.split(".")[1]) for known in READ_VERSIONS}
    match = re.fullmatch(r"([1-9][0-9]{0,3})\.(0|[1-9][0-9]{0,3})", version) if isinstance(version, str) else None
    if match is None:
        raise ValueError(f"its format_version is {str(version)[:40]!r}, not MAJOR.MINOR")
    major, minor = map(int, match.groups())
    if major not in known_minors:
        raise UnknownFormat(
            f"{origin} has format version {version}, and this kdpipe reads {'.x and '.join(map(str, known_minors))}.x: "
            "install a kdpipe that reads it, or compute the cache again at another cache.path"
        )
    return minor > known_minors[major]


def refuse_to_write(version: Any, origin: str) -> None:
    """Raise `UnknownFormat` unless a cache has one of the very versions that this program writes: others may be read, never added to."""
    is_newer_minor(version, origin)
    if version not in WRITTEN_VERSIONS:
        raise UnknownFormat(
            f"{origin} has format version {version}, which this kdpipe reads, but it writes {', '.join(WRITTEN_VERSIONS)}: "
            "install the kdpipe that made it, or choose another cache.path"
        )


def reason_of(err: Exception, inside: str = "") -> str:
    """What is wrong with a file, in one short line, from the error of parsing it or what lies `inside` it."""
    if isinstance(err, ValidationError):
        first = err.errors(include_url=False)[0]
        where = ".".join(
            str(part) for part in first["loc"] if part not in ("1", "2", "3")
        )  # tags that pydantic puts there
        rest = f" (and {err.error_count() - 1} more)" if err.error_count() > 1 else ""
        return f"{(inside + where).rstrip('.') or 'it'}: {first['msg'].removeprefix('Value error, ')[:300]}{rest}"
    if isinstance(err, KeyError):
        return f"the field {err} is missing"
    return f"{inside.rstrip('.')}{': ' * bool(inside)}{err}"[:300]


def differences(recipe: CacheRecipe, expected: Mapping[str, Any]) -> list[str]:
    """
    One line for each field of `expected` that the recipe answers otherwise, naming the field and both values.

    So does a field that only a newer kdpipe knows: whatever it is, it determines the values.
    A teacher's fields are named `teacher.tta`, or `teachers.1.tta` where there are several.
    """
    found, wanted = _flat(recipe.model_dump()), _flat(expected)
    known = {*Recipe.model_fields, *TeacherRecord.model_fields, *ViewsRecord.model_fields, "teacher_view"}
    unknown = [
        f"{field}: the cache has {_short(value)}, and this kdpipe does not know that field: install the one that wrote the cache"
        for field, value in found.items()
        if field.rpartition(".")[2] not in known
    ]
    if found["teachers"] != wanted["teachers"]:  # their number: which is which cannot be said
        found, wanted = ({k: v for k, v in fields.items() if "." not in k} for fields in (found, wanted))
    return unknown + [
        f"{field}: the cache has {_short(found[field])}, the configuration says {_short(value)}"
        for field, value in wanted.items()
        if field in found  # those of another kind of cache have nothing to be compared with
        and found[field] != value
    ]


def digest_of(content: Any) -> str:
    """The sha256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(_compact(content).encode()).hexdigest()


def summarise(names: Iterable[str], shown: int = 5) -> str:
    """`a, b, c and 7 more`: names for an error that must stay short."""
    listed = list(names)
    rest = len(listed) - shown
    return ", ".join(listed[:shown]) + (f" and {rest} more" if rest > 0 else "")


def _canonical(content: Any) -> bytes:
    return (json.dumps(content, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False) + "\n").encode()


def _canonical_tile(fields: Any) -> bytes:
    """A tile as it stands in the canonical manifest, two levels deep."""
    return b"  " + _canonical(fields).rstrip().replace(b"\n", b"\n  ")


def _compact(content: Any) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def _flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """
    A recipe's fields with those of its teachers and of its views beside them, under `teachers` the number of these, and under
    `teacher_view` what they saw.
    """
    teachers = fields["teachers"]
    flat: dict[str, Any] = {"teachers": len(teachers)}
    for i, teacher in enumerate(teachers):
        key = "teacher" if len(teachers) == 1 else f"teachers.{i}"
        flat |= {f"{key}.{name}": value for name, value in teacher.items()}
    views = fields.get("views")
    flat["teacher_view"] = "tile" if views is None else "crop"
    flat |= {f"views.{name}": value for name, value in (views or {}).items()}
    return flat | {name: value for name, value in fields.items() if name not in ("teachers", "views")}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 160 else text[:157] + "..."
