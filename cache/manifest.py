"""
The manifest: what the numbers in a cache were made from, and what each tile's bytes are.

Everything that determines the values is in `Recipe`; the fingerprint is the digest of the recipe and of the source images.
`manifest.json` is written last: a cache without it is not finished.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from kdpipe.configs.errors import CorruptCache

FORMAT_VERSION = "1.0"
MANIFEST_NAME = "manifest.json"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class TeacherRecord(_Record):
    """One teacher: its weights, and how it was asked; the names are those of the config's keys where there is one."""

    checkpoint_sha256: str
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


class Recipe(_Record):
    """Everything that determines the values of a tile, given its image; class map rows are of the first teacher's kept classes."""

    teachers: list[TeacherRecord]
    bands: list[int]
    stretch: list[list[float]] | None
    classes: list[str]
    class_map: list[list[float]]
    temperature: float
    kind: Literal["soft"]
    bits: int
    chunk_px: int

    @property
    def teacher_classes(self) -> list[str]:
        """What the teachers answer in, in the order of the class map's rows."""
        first = self.teachers[0]
        return [name for channel, name in enumerate(first.classes) if channel not in first.drop_channels]

    def digest(self) -> str:
        """The sha256 of the recipe alone, which every tile carries."""
        return digest_of(self.model_dump())


class ImageDigest(_Record):
    """A source image's content: size in bytes and sha256."""

    size_bytes: int
    sha256: str


class TileRecord(_Record):
    """One tile: its size in pixels, the image it came from, and the digests of its two files."""

    id: str
    height: int
    width: int
    image: ImageDigest
    shard_bytes: int
    shard_sha256: str
    metadata_sha256: str


class Manifest(_Record):
    """The whole `manifest.json`."""

    format_version: str
    fingerprint: str
    recipe: Recipe
    error_bound: float
    device: str
    libraries: dict[str, str]
    groups: dict[str, str]
    tiles: list[TileRecord]


def fingerprint(recipe: Recipe, images: Mapping[str, ImageDigest]) -> str:
    """The sha256 of what determines every value in the cache: the recipe, and the tiles' ids and image contents."""
    return digest_of({"recipe": recipe.model_dump(), "images": {tile: image.sha256 for tile, image in images.items()}})


def dump_manifest(manifest: Manifest) -> bytes:
    """The bytes of `manifest.json`: sorted keys, and a checksum of all the rest as one more field."""
    content = manifest.model_dump()
    return _canonical({**content, "checksum": digest_of(content)})


def parse_manifest(data: bytes, origin: str) -> Manifest:
    """
    The manifest in the bytes of `origin`.

    Raises `CorruptCache` if any byte differs from what `dump_manifest` wrote, or if the format's version is unknown.
    """
    advice = "restore it, or run `kdpipe precompute-teacher` again after deleting it: finished tiles are kept"
    try:
        content = json.loads(data)
        if _canonical(content) != data:
            raise ValueError("it is not laid out as kdpipe writes it")
        checksum = content.pop("checksum")
        if checksum != digest_of(content):
            raise ValueError("its content does not match its checksum")
        version = content["format_version"]
        if version != FORMAT_VERSION:
            raise CorruptCache(
                f"{origin} has format version {version}; this kdpipe reads {FORMAT_VERSION}: install the one that fits"
            )
        manifest = Manifest.model_validate(content)
        if manifest.fingerprint != fingerprint(manifest.recipe, {tile.id: tile.image for tile in manifest.tiles}):
            raise ValueError("its fingerprint is not that of its recipe and images")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, ValidationError) as err:
        reason = f"{len(err.errors())} fields are not as they should be" if isinstance(err, ValidationError) else err
        raise CorruptCache(f"{origin} was changed after it was written: {reason}; {advice}") from err
    return manifest


def differences(recipe: Recipe, expected: Mapping[str, Any]) -> list[str]:
    """
    One line for each field of `expected` that the recipe answers otherwise, naming the field and both values.

    A teacher's fields are named `teacher.tta`, or `teachers.1.tta` where there are several.
    """
    found, wanted = _flat(recipe.model_dump()), _flat(expected)
    if found["teachers"] != wanted["teachers"]:  # their number: which is which cannot be said
        found, wanted = ({k: v for k, v in fields.items() if "." not in k} for fields in (found, wanted))
    return [
        f"{field}: the cache has {_short(found[field])}, the configuration says {_short(value)}"
        for field, value in wanted.items()
        if found[field] != value
    ]


def digest_of(content: Any) -> str:
    """The sha256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(
        json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
    ).hexdigest()


def summarise(names: Iterable[str], shown: int = 5) -> str:
    """`a, b, c and 7 more`: names for an error that must stay short."""
    listed = list(names)
    rest = len(listed) - shown
    return ", ".join(listed[:shown]) + (f" and {rest} more" if rest > 0 else "")


def _canonical(content: Any) -> bytes:
    return (json.dumps(content, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False) + "\n").encode()


def _flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's fields with those of its teachers beside them, and under `teachers` their number."""
    teachers = fields["teachers"]
    flat: dict[str, Any] = {"teachers": len(teachers)}
    for i, teacher in enumerate(teachers):
        key = "teacher" if len(teachers) == 1 else f"teachers.{i}"
        flat |= {f"{key}.{name}": value for name, value in teacher.items()}
    return flat | {name: value for name, value in fields.items() if name != "teachers"}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 160 else text[:157] + "..."
