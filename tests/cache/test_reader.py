"""The reader returns what was written, by tile and by window, in any process, and never numbers that are damaged."""

import itertools
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import zarr
from helpers.caches import RECIPE, SIZES, distributions, fill

from kdpipe.cache import CorruptCache, SoftTargetCache
from kdpipe.cache import tile as tile_module
from kdpipe.cache.images import digest_image
from kdpipe.cache.index.records import ImageDigest
from kdpipe.cache.storage.base import open_storage
from kdpipe.cache.writer import open_writer
from kdpipe.configs.errors import CacheError


@pytest.mark.parametrize("url", ["{tmp}/c.zarr", "memory://kdpipe-tests/c.zarr"])
def test_values_are_read_within_the_bound_by_tile_and_by_window(url, tmp_path, images):
    url = url.format(tmp=tmp_path)
    fill(url, images)
    cache = SoftTargetCache.open(url)
    assert cache.tile_ids == list(SIZES)
    for number, (tile, size) in enumerate(SIZES.items()):
        whole = cache.read(tile)
        assert whole.dtype == np.float32
        np.testing.assert_allclose(whole.sum(axis=0), 1, atol=1e-6)
        assert np.abs(whole - distributions(3, *size, seed=number)).max() <= cache.manifest.error_bound
    np.testing.assert_array_equal(cache.read("Other/d", (250, 200, 40, 57)), cache.read("Other/d")[:, 250:290, 200:257])
    with pytest.raises(ValueError, match=r"is not within tile Other/c of 1 × 1 px"):
        cache.read("Other/c", (0, 0, 2, 1))
    with pytest.raises(KeyError, match="no tile 'Train/z'"):
        cache.read("Train/z")


def test_zarr_reads_the_values_by_the_documented_rule(cache, tmp_path):
    group = zarr.open_group(tmp_path / "c.zarr", mode="r")
    decoding = (
        "stored: value minus that of the row above, modulo 256, but in every 64th row from the first; "
        "p = value / 170; 255 is what the pixel's other values leave of 170; axes: class, row, column"
    )
    assert group.attrs["kdpipe"]["decoding"] == decoding
    array = group["tiles/Other/d"]
    value = np.concatenate([np.cumsum(array[:, y : y + 64], axis=1, dtype="u1") for y in range(0, 300, 64)], axis=1)
    value = value.astype(np.float32)
    value = np.where(value == 255, 170 - np.where(value == 255, 0, value).sum(axis=0), value)
    np.testing.assert_array_equal(value / np.float32(170), cache.read("Other/d"))
    assert array.shards == (3, 512, 512)
    assert [type(codec).__name__ for codec in array.compressors] == ["ZstdCodec", "Crc32cCodec"]
    assert sorted(p.name for p in (tmp_path / "c.zarr/tiles/Other/d").iterdir()) == ["0.0.0", "zarr.json"]


def test_only_the_chunks_of_a_window_are_decoded(cache, tmp_path):
    """The first chunk is damaged after the digest check; a window in another chunk is still read."""
    cache.read("Other/d")
    shard = tmp_path / "c.zarr/tiles/Other/d/0.0.0"
    data = bytearray(shard.read_bytes())
    data[10] ^= 255
    shard.write_bytes(data)
    with pytest.raises(CorruptCache, match="tile Other/d .* its chunks cannot be decoded"):
        cache.read("Other/d", (0, 0, 10, 10))
    assert cache.read("Other/d", (260, 0, 10, 10)).shape == (3, 10, 10)


def entropy(probs):
    """The entropy of every pixel in nats, in float64."""
    p = probs.astype(float)
    return -(p * np.log(np.where(p > 0, p, 1))).sum(axis=0)


@pytest.mark.parametrize("listing", ["folder", "object store"])
def test_a_window_reads_the_bytes_of_its_chunks_and_no_others(listing, tmp_path):
    """1024 x 1024 px have 16 chunks: bytes anywhere else in the shard may be damaged, those of the window may not."""
    url = f"{tmp_path}/c.zarr" if listing == "folder" else "memory://kdpipe-tests/few-chunks.zarr"
    storage = open_storage(url)
    with open_writer(storage, RECIPE, device="cpu", libraries={}) as writer:
        writer.begin()
        writer.finish([writer.write("T/a", distributions(3, 1024, 1024), ImageDigest(size_bytes=1, sha256="0" * 64))])
    whole, window = SoftTargetCache.open(url).read("T/a"), (300, 520, 200, 200)
    content = bytearray(storage.read("tiles/T/a/0.0.0"))
    offset, size = np.frombuffer(content[-16 * 16 - 4 : -4], "<u8").reshape(4, 4, 2)[1, 2].tolist()
    for place in range(0, len(content) - 16 * 16 - 4, 997):
        content[place] ^= 255 * (not offset <= place < offset + size)
    storage.write("tiles/T/a/0.0.0", bytes(content))
    cache = SoftTargetCache.open(url)
    np.testing.assert_array_equal(cache.read("T/a", window), whole[:, 300:500, 520:720])
    with pytest.raises(CorruptCache, match=r"T/a .* is damaged: .*chunk 0, 2 does not match its checksum"):
        cache.read("T/a", (200, 520, 200, 200))
    with pytest.raises(CorruptCache, match=r"its shard \(0\.0\.0\) is not what was written"):
        SoftTargetCache.open(url).read("T/a")


def test_the_chunks_of_a_tile_are_those_of_its_metadata(tmp_path, monkeypatch):
    """Another writer may cut tiles otherwise; where a window needs few chunks, the index alone is read first."""
    with (
        monkeypatch.context() as patch,
        open_writer(open_storage(f"{tmp_path}/c.zarr"), RECIPE, device="cpu", libraries={}) as writer,
    ):
        patch.setattr(tile_module, "CHUNK_PX", 128)
        image = ImageDigest(size_bytes=1, sha256="0" * 64)
        probs = np.full((3, 600, 600), [[[0.5]], [[0.25]], [[0.25]]], np.float32)
        writer.finish([writer.write("T/a", probs, image)])
    assert zarr.open_array(f"{tmp_path}/c.zarr/tiles/T/a", mode="r").chunks == (3, 128, 128)
    cache = SoftTargetCache.open(f"{tmp_path}/c.zarr")
    assert cache.largest_entropy_error("T/a") is not None
    assert json.loads((tmp_path / "c.zarr/tiles/T/a/zarr.json").read_bytes())["attributes"]["kdpipe"]["chunk_sha256"]


@pytest.mark.parametrize("window", [(0, 0, 70, 131), (64, 64, 6, 64), (10, 100, 57, 31), (69, 130, 1, 1)])
def test_the_entropy_error_of_a_window_weights_blocks_by_their_pixels_in_it(window, tmp_path, images):
    probs = distributions(3, 70, 131, sharpness=6.0)
    with open_writer(open_storage(str(tmp_path / "c.zarr")), RECIPE, device="cpu", libraries={}) as writer:
        writer.finish([writer.write("Train/a", probs, digest_image(images["Train/a"]))])
    cache = SoftTargetCache.open(str(tmp_path / "c.zarr"))
    lost, by_pixel = entropy(probs) - entropy(cache.read("Train/a")), np.zeros((70, 131))
    for row, column in itertools.product(range(2), range(3)):
        block = np.s_[row * 64 : row * 64 + 64, column * 64 : column * 64 + 64]
        by_pixel[block] = lost[block].mean()
    y, x, h, w = window
    assert cache.entropy_error("Train/a", window) == pytest.approx(by_pixel[y : y + h, x : x + w].mean(), abs=1e-6)
    inside = np.zeros((70, 131), dtype=bool)
    inside[y : y + h, x : x + w] = True
    assert cache.entropy_error_over("Train/a", inside) == pytest.approx(by_pixel[inside].mean(), abs=1e-6)
    with pytest.raises(ValueError, match="is not within tile Train/a of 70 × 131 px"):
        cache.entropy_error("Train/a", (0, 0, 71, 1))


READ_PICKLED = "import pickle, sys; print(repr(pickle.load(sys.stdin.buffer).read('Train/a').sum().item()))"


@pytest.mark.long
def test_a_pickled_cache_is_read_in_another_process(cache):
    expected = repr(cache.read("Train/a").sum().item())
    done = subprocess.run([sys.executable, "-c", READ_PICKLED], input=pickle.dumps(cache), capture_output=True)
    assert (done.stdout.decode(), done.stderr) == (f"{expected}\n", b"")


def test_a_forked_reader_of_a_remote_cache_raises_instead_of_hanging(images, monkeypatch):
    fill("memory://kdpipe-tests/forked.zarr", images)
    cache = SoftTargetCache.open("memory://kdpipe-tests/forked.zarr")
    cache.read("Train/a")
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(CacheError, match=r"connections hang after a fork: .*='spawn' or 'forkserver'"):
        cache.read("Train/a")
