"""Shards have the bytes of zarr-python and are read to the same values; any damage is an error."""

import json
import os
from functools import partial

import numpy as np
import pytest
import zarr
from helpers import golden_cache

from kdpipe.cache import tile
from kdpipe.cache.encoding.simplex import encode, entropy_error
from kdpipe.cache.index.records import ImageDigest
from kdpipe.cache.reader import in_memory
from kdpipe.cache.shard import open_shard
from kdpipe.cache.storage.local import LocalStorage

SIZES = [(1, 1), (64, 700), (256, 256), (257, 511), (600, 300)]


def encoded(height, width, bits=8, num_classes=3):
    rng = np.random.default_rng([height, width, bits])
    probs = rng.dirichlet(np.ones(num_classes), size=(height, width)).transpose(2, 0, 1).astype(np.float32)
    recipe = golden_cache.recipe(bits)
    units = encode(probs, recipe.levels)
    image = ImageDigest(size_bytes=1, sha256="0" * 64)
    return *tile.encode_tile(units, "T/a", image, recipe, entropy_error(probs, units, recipe.levels))[:2], units


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    """Tiles on disk by size and bits: the storage, zarr's array, and the metadata."""
    made = {}
    for bits in (8, 16):
        for height, width in SIZES:
            folder = tmp_path_factory.mktemp("tile")
            shard, metadata, _ = encoded(height, width, bits)
            (folder / "0.0.0").write_bytes(shard)
            (folder / "zarr.json").write_bytes(metadata)
            made[height, width, bits] = LocalStorage(folder), zarr.open_array(folder, mode="r"), metadata
    return made


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("size", SIZES)
def test_every_window_has_the_values_that_zarr_reads(tiles, size, bits):
    storage, array, metadata = tiles[*size, bits]
    rng = np.random.default_rng(bits)

    read_ranges = partial(storage.read_ranges, "0.0.0")
    shard = open_shard(metadata, read_ranges)
    for _ in range(25):
        top, left = (int(rng.integers(side)) for side in size)
        bottom, right = (int(rng.integers(start, side)) + 1 for start, side in zip((top, left), size, strict=True))
        units = shard.read((top, left, bottom - top, right - left), read_ranges)
        expected = array[:, top:bottom, left:right]
        assert units.dtype == expected.dtype
        np.testing.assert_array_equal(units, expected)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("size", [(1, 1), (64, 700), (256, 256), (257, 511), (1300, 700), (300, 2100)])
def test_a_shard_and_its_metadata_have_the_bytes_that_zarr_writes(tmp_path, size, dtype):
    """Chunks of zeros and of noise, in grids of 1 x 1 to 6 x 3 and 2 x 9 chunks, in zarr's order."""
    units = np.random.default_rng(size).integers(0, 200, (3, *size)).astype(dtype)
    units[:, : size[0] // 2, : size[1] // 2] = 0
    chunk = min(256, size[0]), min(256, size[1])
    array = zarr.create_array(
        tmp_path,
        shape=units.shape,
        dtype=dtype,
        chunks=(3, *chunk),
        shards=(3, -(-size[0] // chunk[0]) * chunk[0], -(-size[1] // chunk[1]) * chunk[1]),
        compressors=[zarr.codecs.ZstdCodec(level=tile.ZSTD_LEVEL), zarr.codecs.Crc32cCodec()],
        filters=(),
        fill_value=0,
        dimension_names=("class", "row", "column"),
        chunk_key_encoding={"name": "v2", "separator": "."},
        config={"write_empty_chunks": True},
    )
    array[:] = units
    image = ImageDigest(size_bytes=1, sha256="0" * 64)
    shard, metadata, _ = tile.encode_tile(units, "T/a", image, golden_cache.recipe(8), None)
    assert shard == (tmp_path / "0.0.0").read_bytes()
    assert {**json.loads(metadata), "attributes": {}} == json.loads((tmp_path / "zarr.json").read_bytes())


def test_a_flipped_bit_is_an_error_wherever_it_is():
    shard, metadata, _ = encoded(300, 300)
    for where in range(0, 100, 7):
        damaged = bytearray(shard)
        damaged[where * (len(shard) - 1) // 99] ^= 4
        with pytest.raises(ValueError, match="does not match its checksum"):
            open_shard(metadata, in_memory(bytes(damaged))).read((0, 0, 300, 300), in_memory(bytes(damaged)))


def test_a_shard_cut_short_is_an_error():
    shard, metadata, _ = encoded(300, 300)
    for kept in (0, 3, 40, len(shard) - 1):
        with pytest.raises(ValueError, match="checksum|has only"):
            open_shard(metadata, in_memory(shard[:kept]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["codecs"][0]["configuration"]["codecs"].append({"name": "gzip"}), "codecs are not those of the format"),
        (lambda m: m["codecs"][0].update(name="evil"), "codecs are not those of the format"),
        (lambda m: m["codecs"][0]["configuration"].update(index_location="start"), "codecs are not those of the format"),
        (lambda m: m.pop("shape"), "not that of a tile"),
        (lambda m: m.update(codecs=[]), "not enough values"),
        (lambda m: m.update(data_type="no such"), "not that of a tile"),
    ],
)  # fmt: skip
def test_metadata_of_another_kind_is_refused(change, message):
    shard, metadata, _ = encoded(30, 30)
    content = json.loads(metadata)
    change(content)
    with pytest.raises(ValueError, match=message):
        open_shard(json.dumps(content).encode(), in_memory(shard))


def test_a_forked_process_reads_a_local_cache(tmp_path):
    """zarr-python hangs here, because its event loop's thread does not exist in the child."""
    (tmp_path / "0.0.0").write_bytes(encoded(300, 40)[0])
    metadata, units = encoded(300, 40)[1:]
    storage = LocalStorage(tmp_path)

    def read():
        read_ranges = partial(storage.read_ranges, "0.0.0")
        return open_shard(metadata, read_ranges).read((0, 0, 300, 40), read_ranges)

    np.testing.assert_array_equal(read(), units)
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(read(), units) else 1)
    assert os.waitpid(child, 0)[1] == 0
