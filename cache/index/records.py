"""A tile's entry in the manifest, and the canonical JSON in which equal content has equal bytes (see FORMAT.md, JSON)."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from json.encoder import encode_basestring_ascii
from typing import Annotated, Any

from pydantic import AfterValidator, Field, TypeAdapter

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
    """A source image's content: size in bytes and sha256. `parse_record` checks the fields, not the constructor."""

    size_bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256


@dataclass(frozen=True, slots=True)
class TileRecord:
    """
    A tile's size in pixels, the image it was computed from, and the digests of its two files.

    `parse_record` and `read_record` check the fields, not the constructor.
    """

    id: Annotated[str, AfterValidator(node_path)]
    height: Annotated[int, Field(ge=1)]
    width: Annotated[int, Field(ge=1)]
    image: ImageDigest
    shard_bytes: Annotated[int, Field(ge=1)]
    shard_sha256: Sha256
    metadata_sha256: Sha256

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def canonical(self) -> str:
        """Its text in a canonical manifest, indented by two levels: what `canonical` gives, in a fiftieth of the time."""
        return (
            f'  {{\n   "height": {self.height},\n   "id": {quoted(self.id)},\n   "image": {{\n    "sha256": "{self.image.sha256}",\n'
            f'    "size_bytes": {self.image.size_bytes}\n   }},\n   "metadata_sha256": "{self.metadata_sha256}",\n'
            f'   "shard_bytes": {self.shard_bytes},\n   "shard_sha256": "{self.shard_sha256}",\n   "width": {self.width}\n  }}'
        )

    def compact(self) -> str:
        """Its text in the compact form: what `compact` gives of its fields."""
        return (
            f'{{"height":{self.height},"id":{quoted(self.id)},"image":{{"sha256":"{self.image.sha256}","size_bytes":'
            f'{self.image.size_bytes}}},"metadata_sha256":"{self.metadata_sha256}","shard_bytes":{self.shard_bytes},"shard_sha256":'
            f'"{self.shard_sha256}","width":{self.width}}}'
        )


quoted = encode_basestring_ascii  # a string as canonical JSON

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
    if record.height * record.width > MAX_TILE_PX:
        raise ValueError(
            f"tile {record.id} of {record.height} x {record.width} px: a tile has at most {MAX_TILE_PX} px"
        )
    return record


# A record as `TileRecord.canonical` writes it, with an id of plain characters that is a valid one.
_PART = r"(?!zarr\.json[/\"])(?!__)[A-Za-z0-9_-][A-Za-z0-9_.-]*"
_PLAIN = re.compile(
    r'  \{\n   "height": ([1-9]\d{0,9}),\n   "id": "(PART(?:/PART)*)",\n   "image": \{\n    "sha256": "(HASH)",\n'
    r'    "size_bytes": (0|[1-9]\d{0,17})\n   \},\n   "metadata_sha256": "(HASH)",\n   "shard_bytes": ([1-9]\d{0,17}),\n'
    r'   "shard_sha256": "(HASH)",\n   "width": ([1-9]\d{0,9})\n  \}'.replace("PART", _PART).replace(
        "HASH", "[0-9a-f]{64}"
    ),
    re.ASCII,
)


def read_record(text: str) -> TileRecord | None:
    """The record that `TileRecord.canonical` wrote as `text`, if its id is plain and each field valid; None for any other text."""
    match = _PLAIN.fullmatch(text)
    if match is None:
        return None
    height, tile_id, image, image_bytes, metadata, shard_bytes, shard, width = match.groups()
    if int(height) * int(width) > MAX_TILE_PX:
        return None
    return TileRecord(
        tile_id, int(height), int(width), ImageDigest(int(image_bytes), image), int(shard_bytes), shard, metadata
    )


def canonical(content: Any) -> bytes:
    """The bytes of a JSON file: sorted keys, one member a line, ASCII."""
    return (json.dumps(content, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False) + "\n").encode()


def compact(content: Any) -> str:
    """The JSON text that digests are taken of: sorted keys, no white space, ASCII."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def digest_of(content: Any) -> str:
    """The sha256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(compact(content).encode()).hexdigest()
