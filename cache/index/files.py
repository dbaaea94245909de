"""
The columns of a cache's tiles as Zarr arrays, one chunk each, which are mapped where they lie on a disk (see FORMAT.md, The index).

    index/zarr.json         group
    index/height/zarr.json  array metadata
    index/height/0          its values, uncompressed; `0.0` where it has two axes
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdpipe.cache.index.columns import DIGESTS, NAMES, TileIndex
from kdpipe.cache.index.records import canonical
from kdpipe.cache.storage.ahead import in_order
from kdpipe.cache.storage.base import Storage
from kdpipe.cache.tile import METADATA_NAME, sha256
from kdpipe.configs.errors import CorruptCache

FOLDER = "index"
TYPES = {f"uint{bits}" for bits in (8, 16, 32, 64)}


def index_files(tiles: TileIndex) -> Iterator[tuple[str, bytes]]:
    """The name of each file of the index and its content."""
    yield f"{FOLDER}/{METADATA_NAME}", canonical({"zarr_format": 3, "node_type": "group", "attributes": {}})
    for name in NAMES:
        column = tiles.columns[name]
        yield f"{FOLDER}/{name}/{METADATA_NAME}", _array_metadata(name, column.shape, column.dtype.name)
        yield _values_name(name), column.astype(column.dtype.newbyteorder("<"), copy=False).tobytes()


def index_digests(tiles: TileIndex) -> dict[str, str]:
    """The sha256 of each file of the index by its name."""
    return {name: sha256(content) for name, content in index_files(tiles)}


def read_index(storage: Storage, digests: Mapping[str, str], count: int) -> TileIndex:
    """
    The index of `count` tiles, after its files' `digests` have been compared; mapped where the storage can.

    Raises `ValueError`, naming the file, for any difference, and where its columns do not fit each other.
    """
    names = [f"{FOLDER}/{METADATA_NAME}"]
    for name in NAMES:
        names += [f"{FOLDER}/{name}/{METADATA_NAME}", _values_name(name)]
    if sorted(digests) != sorted(names):
        raise ValueError(f"its index has the files {sorted(digests)!s:.200}, not those of the format")

    def read(name: str) -> memoryview:
        try:
            data = storage.mapped(name)
        except FileNotFoundError as err:
            raise ValueError(f"{name} is missing") from err
        except CorruptCache as err:
            raise ValueError(f"{name} cannot be read ({err})") from err
        if sha256(data) != digests[name]:
            raise ValueError(f"{name} is not what was written")
        return data

    found = dict(zip(names, in_order(read, names, storage.at_once), strict=True))
    index = TileIndex({name: _column(name, found) for name in NAMES})
    if len(index) != count:
        raise ValueError(f"its index holds {len(index)} tiles, not {count}")
    index.require_consistent()
    return index


def _column(name: str, files: Mapping[str, memoryview]) -> NDArray[Any]:
    """A column's values; `ValueError` where its metadata is not what is written for its shape and type, or its values do not fill it."""
    metadata = bytes(files[f"{FOLDER}/{name}/{METADATA_NAME}"])
    try:
        content = json.loads(metadata)
        shape, dtype = tuple(content["shape"]), content["data_type"]
        if dtype not in TYPES or metadata != _array_metadata(name, shape, dtype):
            raise ValueError(f"{FOLDER}/{name}/{METADATA_NAME} is not that of the format")
        values = np.frombuffer(files[_values_name(name)], np.dtype(dtype).newbyteorder("<"))
        return values.reshape(shape)
    except (KeyError, TypeError, RecursionError) as err:
        raise ValueError(f"{FOLDER}/{name}/{METADATA_NAME} is not that of the format ({err!r:.100})") from err


def _values_name(name: str) -> str:
    return f"{FOLDER}/{name}/{'0.0' if name in DIGESTS else '0'}"


def _array_metadata(name: str, shape: tuple[int, ...], dtype: str) -> bytes:
    codec: dict[str, Any] = {"name": "bytes"}
    if dtype != "uint8":
        codec["configuration"] = {"endian": "little"}
    axes = ["byte"] if name == "id" else ["tile", "byte"] if name in DIGESTS else ["tile"]
    return canonical(
        {
            "attributes": {},
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shape)}},
            "chunk_key_encoding": {"name": "v2", "configuration": {"separator": "."}},
            "codecs": [codec],
            "data_type": dtype,
            "dimension_names": axes,
            "fill_value": 0,
            "node_type": "array",
            "shape": list(shape),
            "storage_transformers": [],
            "zarr_format": 3,
        }
    )
