"""
The files of a cache and their content: groups, and the shard and metadata of each tile (see FORMAT.md).

    <cache>/zarr.json                        group; its attributes hold the recipe
    <cache>/tiles/<folder>/<stem>/0.0.0      one tile: one shard with all its inner chunks
    <cache>/tiles/<folder>/<stem>/zarr.json  the tile's array metadata and receipt, written after the shard
    <cache>/manifest.json                    written last
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdpipe.cache import codec
from kdpipe.cache.encoding.simplex import ENTROPY_BLOCK_PX
from kdpipe.cache.index.records import ImageDigest, TileRecord, canonical, compact, parse_record
from kdpipe.cache.recipe import CacheRecipe
from kdpipe.cache.shard import DIGEST_BYTES, SpilledShard, encode_shard, spill_shard
from kdpipe.cache.spill import Spill

# A crop of 512 px touches at most 9 chunks. Smaller chunks compress worse; with larger ones, more pixels are read in vain.
CHUNK_PX = 256
TILES = "tiles"
SHARD_NAME = "0.0.0"
METADATA_NAME = "zarr.json"
ATTRIBUTE = "kdpipe"
SEAL = "receipt_sha256"  # the digest of the metadata's bytes without its own digits
CHUNK_DIGESTS = "chunk_sha256"
# Smaller and read faster than level 3, at every training step; writing it, once, takes 2 to 4 % of stage one (docs/size.md).
ZSTD_LEVEL = 7
ENTROPY_UNIT = 1e-6  # nats; as integers they are short, and far finer than the blocks' own resolution


Encoded = (
    tuple[NDArray[Any], NDArray[np.float64] | None] | tuple[NDArray[Any], NDArray[np.float64] | None, NDArray[np.bool_]]
)
"""A tile's integers and lost entropy, as `codec.encode` returns them, and where a target is missing, bool `(H, W)`, if any is."""


def tile_path(tile_id: str) -> str:
    """The folder of a tile, relative to the cache."""
    return f"{TILES}/{tile_id}"


def group_paths(tile_ids: Iterable[str]) -> list[str]:
    """Every folder that is a Zarr group, sorted: the cache itself (`""`), `tiles`, and those between `tiles` and the tiles."""
    groups = {"", TILES}
    for tile_id in tile_ids:
        group = tile_path(tile_id).rpartition("/")[0]
        while group not in groups:
            groups.add(group)
            group = group.rpartition("/")[0]
    return sorted(groups)


def group_metadata(path: str, recipe: CacheRecipe) -> bytes:
    """The `zarr.json` of a group; that of the cache itself holds the recipe and the rule for decoding."""
    attributes: dict[str, Any] = {}
    if path == "":
        attributes[ATTRIBUTE] = {
            "format_version": recipe.format_version,
            "decoding": codec.decoding(recipe),
            "recipe": recipe.model_dump(),
        }
    return canonical({"zarr_format": 3, "node_type": "group", "attributes": attributes})


def encode_bands(
    bands: Iterable[NDArray[np.float32]], recipe: CacheRecipe, height: int, width: int, spill: Spill
) -> tuple[SpilledShard, NDArray[np.float64] | None]:
    """
    The shard of a tile whose values come in bands `(C, h, W)` from the top, and its entropy error as `codec.encode` returns it.

    Only one band is in memory; the shard lies in `spill`, whose errors are raised.
    """
    lost: list[NDArray[np.float64] | None] = []

    def rows_of_chunks() -> Iterator[NDArray[Any]]:
        for units_ChW, lost_in_row in codec.encode_bands(bands, recipe, height):
            lost.append(lost_in_row)
            yield units_ChW

    shard = spill_shard(rows_of_chunks(), height, _chunk_px(height, width), ZSTD_LEVEL, spill)
    blocks = [lost_in_row for lost_in_row in lost if lost_in_row is not None]
    return shard, np.concatenate(blocks) if blocks else None


def encode_tile(
    units_CHW: NDArray[Any],
    tile_id: str,
    image: ImageDigest,
    recipe: CacheRecipe,
    entropy_error: NDArray[np.float64] | None,
    gaps_HW: NDArray[np.bool_] | None = None,
) -> tuple[bytes, bytes, TileRecord]:
    """
    The bytes of a tile's shard, the bytes of its metadata, and its record.

    `units_CHW` and `entropy_error` come from `codec.encode`; `gaps_HW` is True in pixels without a target. The digest is taken of the
    shard in memory, so that it vouches for the bytes that were meant to be written.
    """
    shard, digests = encode_shard(units_CHW, _chunk_px(*units_CHW.shape[1:]), ZSTD_LEVEL)
    made = encode_receipt(units_CHW, len(shard), sha256(shard), digests, tile_id, image, recipe, entropy_error, gaps_HW)
    return shard, *made


def encode_receipt(
    units: NDArray[Any] | SpilledShard,
    shard_bytes: int,
    shard_sha256: str,
    chunk_digests: bytes,
    tile_id: str,
    image: ImageDigest,
    recipe: CacheRecipe,
    entropy_error: NDArray[np.float64] | None,
    gaps_HW: NDArray[np.bool_] | None = None,
) -> tuple[bytes, TileRecord]:
    """
    The bytes of a tile's metadata, and its record.

    `units` are integers as in `encode_tile`, or a shard from `encode_bands`; `chunk_digests` are in the order of `encode_shard`.
    """
    num_classes, height, width = units.shape
    recipe_sha256 = recipe.digest()
    metadata = json.loads(_array_metadata((num_classes, height, width), units.dtype.str, _chunk_px(height, width)))
    receipt = {
        "tile": tile_id,
        "recipe_sha256": recipe_sha256,
        "image": asdict(image),
        "shard_bytes": shard_bytes,
        "shard_sha256": shard_sha256,
        SEAL: "",
    }
    as_bytes: Callable[[Any], bytes] = canonical
    if recipe.has_chunk_digests:
        receipt[CHUNK_DIGESTS], as_bytes = chunk_digests.hex(), _one_line
    if entropy_error is not None:
        receipt["entropy_error"] = np.rint(entropy_error / ENTROPY_UNIT).astype(int).tolist()
    if gaps_HW is not None and gaps_HW.any():
        receipt["gaps"] = _runs_of(gaps_HW)
    metadata["attributes"] = {ATTRIBUTE: receipt}
    receipt[SEAL] = sha256(as_bytes(metadata))
    metadata_bytes = as_bytes(metadata)
    record = parse_receipt(metadata_bytes, tile_id, recipe_sha256)
    assert record is not None, receipt
    return metadata_bytes, record


def is_sealed(metadata: bytes) -> bool:
    """Whether a tile's metadata matches the digest in itself, which vouches for it while there is no manifest."""
    match = re.search(rb'"%s": ?"([0-9a-f]{64})"' % SEAL.encode(), metadata)
    return match is not None and sha256(metadata.replace(match[1], b"")) == match[1].decode()


def parse_receipt(metadata: bytes, tile_id: str, recipe_digest: str) -> TileRecord | None:
    """The record of a finished tile from its metadata; None if that is not a receipt of this tile and recipe."""
    try:
        content = json.loads(metadata)
        receipt = content["attributes"][ATTRIBUTE]
        if receipt["tile"] != tile_id or receipt["recipe_sha256"] != recipe_digest:
            return None
        _, height, width = content["shape"]
        fields = {"id": tile_id, "height": height, "width": width, "metadata_sha256": sha256(metadata)}
        copied = {name: receipt[name] for name in ("image", "shard_bytes", "shard_sha256")}
        return parse_record(fields | copied, newer=False)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def read_entropy_error(attributes: Mapping[str, Any], record: TileRecord) -> NDArray[np.float64]:
    """The entropy error of each block in nats, from the attributes of a tile's metadata; `ValueError` if the shape is wrong."""
    blocks = np.asarray(attributes[ATTRIBUTE]["entropy_error"], dtype=np.float64) * ENTROPY_UNIT
    if blocks.shape != entropy_grid(record):
        raise ValueError(f"{blocks.shape} blocks, not {entropy_grid(record)}")
    return blocks


def read_chunk_digests(attributes: Mapping[str, Any], grid: tuple[int, int]) -> NDArray[np.uint8] | None:
    """
    The digests of a tile's chunks, uint8 `(rows, columns, 16)`, from the attributes of its metadata; None if it has none.

    Raises `ValueError` where they are not as many as the chunks in `grid`, rows and columns.
    """
    receipt = attributes.get(ATTRIBUTE)
    if not isinstance(receipt, dict) or CHUNK_DIGESTS not in receipt:
        return None
    try:
        digests = np.frombuffer(bytes.fromhex(receipt[CHUNK_DIGESTS]), np.uint8)
        return digests.reshape(*grid, DIGEST_BYTES)
    except (TypeError, ValueError) as err:
        raise ValueError(f"its {CHUNK_DIGESTS} do not fit its {grid[0]} × {grid[1]} chunks") from err


def read_gaps(attributes: Mapping[str, Any], record: TileRecord) -> NDArray[np.bool_] | None:
    """Which pixels have no target, bool `(H, W)`, from the attributes of a tile's metadata; None if all have one. `ValueError` if wrong."""
    if "gaps" not in attributes[ATTRIBUTE]:
        return None
    runs = np.asarray(attributes[ATTRIBUTE]["gaps"])
    if (
        runs.ndim != 1
        or runs.dtype.kind != "i"
        or runs.min(initial=0) < 0
        or runs.sum() != record.height * record.width
    ):
        raise ValueError(f"its gaps do not fill {record.height} x {record.width} px")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(record.height, record.width)


def _runs_of(gaps_HW: NDArray[np.bool_]) -> list[int]:
    """The lengths of runs of pixels, row after row: with a target, without, with, …"""
    flat = gaps_HW.ravel()
    starts = np.flatnonzero(np.diff(flat)) + 1
    runs: list[int] = np.diff([0, *starts.tolist(), flat.size]).tolist()
    return [0, *runs] if flat[0] else runs


def entropy_grid(record: TileRecord) -> tuple[int, int]:
    """Rows and columns of a tile's blocks of entropy error."""
    return -(-record.height // ENTROPY_BLOCK_PX), -(-record.width // ENTROPY_BLOCK_PX)


def chunk_grid(record: TileRecord) -> tuple[int, int]:
    """Rows and columns of a tile's chunks, as they are written."""
    chunk_h, chunk_w = _chunk_px(record.height, record.width)
    return -(-record.height // chunk_h), -(-record.width // chunk_w)


def _one_line(metadata: Mapping[str, Any]) -> bytes:
    """The compact form: two thirds of the canonical one, which has a line for each number."""
    return (compact(metadata) + "\n").encode()


def sha256(data: bytes | memoryview) -> str:
    """The sha256 of bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


@lru_cache(maxsize=1024)
def _array_metadata(shape: tuple[int, int, int], dtype: str, chunk_px: tuple[int, int]) -> bytes:
    """The `zarr.json` that zarr-python writes for such a tile, so that any Zarr reader reads what `encode_shard` makes."""
    import zarr
    from zarr.codecs import Crc32cCodec, ZstdCodec
    from zarr.storage import MemoryStore

    num_classes, height, width = shape
    files: dict[str, Any] = {}
    zarr.create_array(
        MemoryStore(files),
        shape=shape,
        dtype=dtype,
        chunks=(num_classes, *chunk_px),
        shards=(num_classes, _round_up(height, chunk_px[0]), _round_up(width, chunk_px[1])),
        compressors=[ZstdCodec(level=ZSTD_LEVEL), Crc32cCodec()],
        filters=(),
        fill_value=0,
        dimension_names=("class", "row", "column"),
        chunk_key_encoding={"name": "v2", "separator": "."},
    )
    metadata: bytes = files[METADATA_NAME].to_bytes()
    return metadata


def _chunk_px(height: int, width: int) -> tuple[int, int]:
    """Height and width of a tile's inner chunks."""
    return min(CHUNK_PX, height), min(CHUNK_PX, width)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
