"""A tile's entry in the manifest, and the canonical JSON in which equal content has equal bytes (see FORMAT.md, JSON)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Annotated, Any

from pydantic import AfterValidator, Field, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass

from kdpipe.configs.node_names import why_unstorable

MAX_TILE_PX = 2**30  # the limit of a source image; a manifest that claims more would make the reader allocate it


def node_path(path: str) -> str:
    """A path that stays below the cache, unchanged; `ValueError` for any other."""
    for part in path.split("/"):
        why = "is empty" if not part else why_unstorable(part)
        if why:
            raise ValueError(f"{path!r} cannot lie in a cache: {part!r} {why}")
    return path


Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


# Dataclasses with slots, not models: a cache may have a million tiles, and each DataLoader worker holds all records.
@dataclass(frozen=True, slots=True)
class ImageDigest:
    """A source image's content: size in bytes and sha256."""

    size_bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256


@dataclass(frozen=True, slots=True)
class TileRecord:
    """A tile's size in pixels, the image it was computed from, and the digests of its two files."""

    id: Annotated[str, AfterValidator(node_path)]
    height: Annotated[int, Field(ge=1)]
    width: Annotated[int, Field(ge=1)]
    image: ImageDigest
    shard_bytes: Annotated[int, Field(ge=1)]
    shard_sha256: Sha256
    metadata_sha256: Sha256

    @model_validator(mode="after")
    def _refuse_absurd_sizes(self) -> TileRecord:
        if self.height * self.width > MAX_TILE_PX:
            raise ValueError(f"tile {self.id} of {self.height} x {self.width} px: a tile has at most {MAX_TILE_PX} px")
        return self

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


_PARSER = TypeAdapter(TileRecord)
_FIELDS = set(TileRecord.__slots__)
_IMAGE_FIELDS = set(ImageDigest.__slots__)


def parse_record(fields: Any, *, newer: bool) -> TileRecord:
    """
    The record with these fields; fields that a `newer` minor version added are ignored.

    Raises `ValueError` (or its subclass `pydantic.ValidationError`) for anything that is not a record.
    """
    record = _PARSER.validate_python(fields)
    unknown = sorted({*(fields.keys() - _FIELDS), *(fields["image"].keys() - _IMAGE_FIELDS)})
    if unknown and not newer:
        raise ValueError(f"unknown fields {unknown}")
    return record


def canonical(content: Any) -> bytes:
    """The bytes of a JSON file: sorted keys, one member a line, ASCII."""
    return (json.dumps(content, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False) + "\n").encode()


def compact(content: Any) -> str:
    """The JSON text that digests are taken of: sorted keys, no white space, ASCII."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def digest_of(content: Any) -> str:
    """The sha256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(compact(content).encode()).hexdigest()
