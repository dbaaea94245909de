"""A flipped byte anywhere in a cache is found, named, and never read as other numbers."""

import re
import shutil

import numpy as np
import pytest
import torch
from helpers.caches import RECIPE, distributions
from helpers.files import tree

from kdpipe.cache import CorruptCache, SoftTargetCache, UnknownFormat, manifest
from kdpipe.cache import reader as reading
from kdpipe.cache import tile as tile_module
from kdpipe.cache.index.records import ImageDigest
from kdpipe.cache.integrity import check_full
from kdpipe.cache.storage.base import open_storage
from kdpipe.cache.writer import open_writer

CPU = torch.device("cpu")
IMAGE = ImageDigest(size_bytes=1, sha256="0" * 64)
SIDES = {"Train/a": (64, 40), "Train/b": (64, 40)}
CHUNK_PX = 32  # so that a tile of a few hundred bytes has four chunks
WINDOWS = [(0, 0, 64, 40), (0, 0, 32, 32), (40, 35, 20, 5), (30, 30, 4, 4)]
FEW_CHUNKS = WINDOWS[1:3]  # the windows that touch at most half of the chunks, and so read no others


def coarse(seed):
    """Targets of 3 classes, constant over 8 x 8 px, so that a chunk takes a hundred bytes."""
    return distributions(3, 8, 5, seed=seed).repeat(8, axis=1).repeat(8, axis=2)


def small_cache(path):
    with open_writer(open_storage(str(path)), RECIPE, device="cpu", libraries={}) as writer:
        writer.begin()
        records = [writer.write(tile, coarse(seed), IMAGE) for seed, tile in enumerate(SIDES)]
        writer.finish(records)


@pytest.fixture(params=["listed", "indexed"])
def small(tmp_path, monkeypatch, request):
    """A finished cache of two tiles with four chunks each, which are listed in the manifest or in an index beside it."""
    monkeypatch.setattr(tile_module, "CHUNK_PX", CHUNK_PX)
    if request.param == "indexed":
        monkeypatch.setattr(manifest, "MAX_LISTED", 0)
    small_cache(tmp_path / "c.zarr")
    return tmp_path / "c.zarr"


def values(cache):
    return {(tile, window): cache.read(tile, window) for tile in cache.tile_ids for window in WINDOWS}


def tile_of(file, root):
    """The tile that a file belongs to; None for the manifest and the metadata of groups."""
    parts = file.relative_to(root).parts
    return "/".join(parts[1:-1]) if len(parts) == 4 and parts[0] == "tiles" else None


def reads(cache, tile, window):
    """The window's values, or the message of the error."""
    try:
        return cache.read(tile, window)
    except CorruptCache as err:
        return str(err)


def flip_bytes(small, every):
    """Flip each `every`-th byte of each file, one at a time, check what is found, and return how many were flipped."""
    storage, whole = open_storage(str(small)), SoftTargetCache.open(str(small))
    right, images = values(whole), {}
    nothing = check_full(storage, whole.manifest, images)
    assert {finding.code for finding in nothing} == {"extra-tile"}  # there are no images
    tried = 0
    for file in sorted(path for path in small.rglob("*") if path.is_file()):
        before, tile, name = file.read_bytes(), tile_of(file, small), str(file.relative_to(small))
        for position in range(0, len(before), every):
            data = bytearray(before)
            data[position] ^= 1 << position % 8
            file.write_bytes(data)
            tried += 1
            if name == "manifest.json" or name.startswith("index/"):
                match = (
                    r"manifest\.json"
                    if name == "manifest.json"
                    else f"damaged: {re.escape(name)} is not what was written"
                )
                with pytest.raises((CorruptCache, UnknownFormat), match=match):
                    SoftTargetCache.open(str(small))
                continue
            cache = SoftTargetCache.open(str(small))
            found = [
                (f.code, f.tile, f.message) for f in check_full(storage, cache.manifest, images) if f not in nothing
            ]
            if tile is None:
                assert found == [("damaged-group", None, f"{name} is missing or not what was written")], position
            else:
                what = "shard" if file.name == "0.0.0" else "metadata"
                assert found == [("damaged-tile", tile, f"its {what} ({file.name}) is not what was written")], position
            window = WINDOWS[position % len(WINDOWS)]
            for other in SIDES:
                answer = reads(cache, other, window)
                if other == tile and isinstance(answer, str):
                    assert f"tile {tile} of " in answer
                    assert re.search(
                        rf"its {what} \({re.escape(file.name)}\) is not what was written|its chunks|the index", answer
                    )
                else:  # it touches other chunks than the one with the flipped byte
                    assert other != tile or (file.name == "0.0.0" and window in FEW_CHUNKS), position
                    np.testing.assert_array_equal(answer, right[other, window])
            if tile is not None:
                answer = reads(SoftTargetCache.open(str(small)), tile, WINDOWS[0])
                assert f"its {what} ({file.name}) is not what was written" in answer
        file.write_bytes(before)
    assert check_full(storage, whole.manifest, images) == nothing
    return tried


@pytest.mark.long
def test_every_seventh_byte_flipped_is_found_named_and_never_read_as_other_numbers(small):
    assert flip_bytes(small, 7) > 900


@pytest.mark.slow
def test_every_single_byte_flipped_is_found_named_and_never_read_as_other_numbers(small):
    assert flip_bytes(small, 1) == sum(len(data) for data in tree(small).values()) > 6_000


@pytest.mark.long
@pytest.mark.parametrize("remembered", [True, False], ids=["kept open", "opened again"])
def test_every_byte_of_a_tile_flipped_behind_an_open_reader_gives_the_right_numbers_or_an_error(
    small, monkeypatch, remembered
):
    """Digests were compared before the flip; the tile's index is still in memory, or was dropped."""
    monkeypatch.setattr(reading, "MAX_OPEN_TILES", 2 if remembered else 1)
    cache = SoftTargetCache.open(str(small))
    right = values(cache)
    tried, unnoticed = 0, 0
    for file in sorted((small / "tiles/Train/a").iterdir()):
        before = file.read_bytes()
        for position in range(len(before)):
            data = bytearray(before)
            data[position] ^= 1 << position % 8
            file.write_bytes(data)
            cache.read("Train/b", WINDOWS[2])  # where only one index is kept, that of a is dropped
            noticed = False
            for window in (WINDOWS[0], WINDOWS[1 + position % 3]):
                answer = reads(cache, "Train/a", window)
                if isinstance(answer, str):
                    assert "tile Train/a of " in answer
                    noticed = True
                else:
                    np.testing.assert_array_equal(answer, right["Train/a", window])
            unnoticed += not noticed
            tried += 1
        file.write_bytes(before)
    sizes = {name: len((small / "tiles/Train/a" / name).read_bytes()) for name in ("0.0.0", "zarr.json")}
    assert tried == sum(sizes.values())
    index = 4 * 16 + 4
    # What was read before and is kept need not be read again: no change there is noticed, and none matters.
    assert unnoticed == (sizes["zarr.json"] + index if remembered else 0)


@pytest.mark.parametrize("has_digests", [True, False])
def test_a_tile_replaced_behind_an_open_reader_by_a_whole_one_of_another_cache_is_not_taken_for_it(
    tmp_path, monkeypatch, has_digests
):
    """The other tile has the same size and one chunk at the same place, and all its checksums are right."""
    if not has_digests:  # as in older caches
        monkeypatch.setattr(tile_module, "read_chunk_digests", lambda attributes, grid: None)
    caches = {}
    for seed in range(100):
        path = tmp_path / f"{seed}.zarr"
        recipe = RECIPE.model_copy(update={"temperature": 1.0 + seed})
        with open_writer(open_storage(str(path)), recipe, device="cpu", libraries={}) as writer:
            record = writer.write("Train/a", coarse(seed), IMAGE)
            writer.finish([record])
        other = caches.setdefault(record.shard_bytes, path)
        if other != path:
            break
    cache = SoftTargetCache.open(str(path))
    mine, theirs = cache.read("Train/a"), SoftTargetCache.open(str(other)).read("Train/a")
    assert not np.array_equal(mine, theirs)
    begun = SoftTargetCache.open(str(path))
    begun.largest_entropy_error("Train/a")  # which reads the receipt and the index, and no chunk
    shutil.copy(other / "tiles/Train/a/0.0.0", path / "tiles/Train/a/0.0.0")
    with pytest.raises(CorruptCache, match=r"tile Train/a of .*\(chunk 0, 0 was replaced by another\)"):
        cache.read("Train/a")
    if has_digests:
        with pytest.raises(CorruptCache, match=r"tile Train/a of .*\(chunk 0, 0 is not what was written\)"):
            begun.read("Train/a")
