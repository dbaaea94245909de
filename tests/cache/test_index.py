"""The index of a cache of many tiles: what it holds, what is refused, and what stays equal to a cache that lists its tiles."""

import json
import multiprocessing
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from helpers.caches import RECIPE, SIZES, distributions, fill
from helpers.files import tree
from test_packs import same_folders

from kdpipe.cache import IncompleteCache, SoftTargetCache, manifest
from kdpipe.cache.documents import read_manifest, whole_manifest
from kdpipe.cache.index.columns import DIGESTS, NUMBERS, TileIndex
from kdpipe.cache.index.records import ImageDigest, TileRecord
from kdpipe.cache.integrity import check_full, check_quick
from kdpipe.cache.packing.pack import pack
from kdpipe.cache.packing.unpack import unpack
from kdpipe.cache.storage.base import open_storage
from kdpipe.cache.writer import finished_tiles, open_writer
from kdpipe.pipeline.inspection.cache import inspect_cache

INDEX = "index"


def records(count, seed=0):
    """Records of tiles with ids of all kinds, in no order."""
    rng = np.random.default_rng(seed)
    letters = ["a", "B", "Süd", "日本", "z.1", "_", "é", "\U0001f30d", " "]
    ids = [f"{letters[i % 9]}/{letters[i * 7 % 9]}{i}" for i in rng.permutation(count)]

    def digest():
        return rng.bytes(32).hex()

    def number(bits):
        return int(rng.integers(1, 2**bits))

    return [
        TileRecord(each, number(12), number(12), ImageDigest(number(40) - 1, digest()), number(33), digest(), digest())
        for each in ids
    ]


@pytest.mark.parametrize("count", [0, 1, 2, 17, 1023, 1024, 1025, 3000])
def test_an_index_holds_the_records_in_their_order_and_finds_each(count):
    made = records(count)
    index = TileIndex.of(made)
    assert len(index) == count
    assert list(index) == made
    assert list(index.ids()) == [record.id for record in made]
    assert index == made
    assert pickle.loads(pickle.dumps(index)) == index
    assert [index[i] for i in range(-count, count)] == made + made
    assert list(index[5:1030:3]) == made[5:1030:3]
    assert all(index.find(record.id) == record for record in made)
    assert [index.find(each) for each in ("", "a", "zz", "a/a", "\ud800", "\U0010ffff")] == [None] * 6
    assert dict(index.images()) == {record.id: record.image.sha256 for record in made}
    assert [tile for tile, _ in index.images()] == sorted(record.id for record in made)  # by code points
    assert index.pixels == sum(record.height * record.width for record in made)
    assert index.shard_bytes == sum(record.shard_bytes for record in made)
    index.require_consistent()
    index.require_unique()
    with pytest.raises(IndexError):
        index[count]


def test_indices_that_differ_anywhere_are_not_equal():
    made = records(40)
    for field, value in {
        "id": "else",
        "height": 9999,
        "image": ImageDigest(1, "0" * 64),
        "shard_sha256": "1" * 64,
    }.items():
        other = [*made[:20], replace(made[20], **{field: value}), *made[21:]]
        assert TileIndex.of(other) != TileIndex.of(made)
        assert TileIndex.of(other) != made
    assert TileIndex.of(made[:-1]) != TileIndex.of(made)
    assert TileIndex.of(made[::-1]) != TileIndex.of(made)


def test_only_a_cache_of_many_tiles_has_an_index(tmp_path, monkeypatch, images):
    for most, version in ((len(SIZES), "4.2"), (len(SIZES) - 1, "6.0")):
        monkeypatch.setattr(manifest, "MAX_LISTED", most)
        fill(tmp_path / version, images)
        found = json.loads((tmp_path / version / "manifest.json").read_text())
        assert found["format_version"] == version
        assert (tmp_path / version / INDEX).exists() == (version == "6.0") == ("index" in found)
        assert found["tiles"] == 4 or len(found["tiles"]) == 4


def test_stock_zarr_reads_the_columns(indexed):
    group = zarr.open_group(indexed, mode="r")[INDEX]
    made = read_manifest(open_storage(str(indexed))).tiles
    assert group["height"][:].tolist() == [height for height, _ in SIZES.values()]
    assert group["width"][:].tolist() == [width for _, width in SIZES.values()]
    assert group["id"][:].tobytes().decode() == "".join(SIZES)
    assert np.split(group["id"][:], group["id_end"][:])[1].tobytes().decode() == "Train/b"
    assert [list(SIZES)[place] for place in group["by_id"][:]] == sorted(SIZES)
    assert [row.tobytes().hex() for row in group["shard_sha256"][:]] == [record.shard_sha256 for record in made]
    assert group["height"].dtype == np.uint16
    assert group["width"].dtype == np.uint16
    assert group["by_id"].dtype == np.uint8
    assert set(group.array_keys()) == {"id", "id_end", "by_id", *NUMBERS, *DIGESTS}


def test_the_values_the_recipe_and_the_fingerprint_are_those_of_a_cache_that_lists_its_tiles(listed, indexed, images):
    one, two = SoftTargetCache.open(listed), SoftTargetCache.open(indexed)
    assert one.manifest.fingerprint == two.manifest.fingerprint
    assert one.manifest.recipe == two.manifest.recipe
    assert one.manifest.tiles == two.manifest.tiles
    assert dict(one.manifest.group_digests()) == dict(two.manifest.group_digests())
    assert one.tile_ids == two.tile_ids == list(SIZES)
    for tile in SIZES:
        np.testing.assert_array_equal(one.read(tile), two.read(tile))
    for level in (check_quick, check_full):
        assert level(open_storage(str(indexed)), two.manifest, images) == []
    own = {name: data for name, data in tree(indexed).items() if not name.startswith(INDEX) and name != "manifest.json"}
    assert own == {name: data for name, data in tree(listed).items() if name != "manifest.json"}


def size_in_child(cache, queue):
    queue.put((cache.size("Other/d"), float(cache.read("Other/d").sum())))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_process_maps_the_index_anew(indexed, method):
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    cache = SoftTargetCache.open(indexed)
    process = context.Process(target=size_in_child, args=(cache, queue))
    process.start()
    assert queue.get(timeout=120) == ((300, 257), pytest.approx(300 * 257))
    process.join()
    assert len(pickle.dumps(cache)) < 20_000


def test_a_cache_that_was_written_again_is_not_unpickled_as_the_old_one(indexed, images):
    pickled = pickle.dumps(SoftTargetCache.open(indexed))
    storage = open_storage(str(indexed))
    with open_writer(storage, RECIPE, device="cpu", libraries={}) as writer:
        writer.begin()
        found = finished_tiles(storage, RECIPE, images, None)
        writer.finish([found[tile] for tile in list(SIZES)[:3]])
    with pytest.raises(IncompleteCache, match=r"was written again since it was opened \(index/.*; open it again"):
        pickle.loads(pickled)


def test_memory_is_mapped_and_shared(indexed):
    tiles = SoftTargetCache.open(indexed).manifest.tiles
    assert not tiles.columns["shard_sha256"].flags.owndata
    with Path(f"/proc/{os.getpid()}/maps").open() as maps:
        assert f"{indexed}/index/shard_sha256/0.0" in maps.read()


def test_a_cache_that_loses_tiles_lists_them_again_and_has_no_index(indexed, images, monkeypatch):
    monkeypatch.setattr(manifest, "MAX_LISTED", 3)
    storage = open_storage(str(indexed))
    with open_writer(storage, RECIPE, device="cpu", libraries={"numpy": "1"}) as writer:
        found = finished_tiles(storage, RECIPE, images, whole_manifest(storage))
        writer.finish([found[tile] for tile in list(SIZES)[:3]])
    assert not (indexed / INDEX).exists()
    left = {tile: images[tile] for tile in list(SIZES)[:3]}
    assert read_manifest(storage).format_version == "4.2"
    assert check_full(storage, read_manifest(storage), left) == []


def test_a_pack_holds_the_index_and_unpacks_to_the_same_cache(indexed, images, tmp_path):
    pack(indexed, tmp_path / "c.zarr.zip")
    opened = SoftTargetCache.open(tmp_path / "c.zarr.zip")
    assert opened.manifest == SoftTargetCache.open(indexed).manifest
    assert check_full(open_storage(str(tmp_path / "c.zarr.zip")), opened.manifest, images) == []
    again = pickle.loads(pickle.dumps(opened))
    np.testing.assert_array_equal(again.read("Other/d"), SoftTargetCache.open(indexed).read("Other/d"))
    unpack([tmp_path / "c.zarr.zip"], tmp_path / "back.zarr")
    assert same_folders(indexed, tmp_path / "back.zarr")
    group = zarr.open_group(zarr.storage.ZipStore(tmp_path / "c.zarr.zip", read_only=True), mode="r")
    assert group["index/height"][:].tolist() == [height for height, _ in SIZES.values()]


def test_parts_of_few_tiles_list_them_and_join_to_the_index(indexed, images, tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "MAX_LISTED", 2)
    found = pack(indexed, tmp_path / "c.zarr.zip", most_bytes=20_000)
    assert len(found.files) > 1
    versions = {SoftTargetCache.open(file, partial=True).manifest.format_version for file in found.files}
    assert versions <= {"4.3", "6.0"}
    assert "4.3" in versions
    unpack(found.files, tmp_path / "back.zarr")
    assert same_folders(indexed, tmp_path / "back.zarr")


def test_an_index_is_read_from_an_object_store(images, monkeypatch):
    monkeypatch.setattr(manifest, "MAX_LISTED", 0)
    url = "memory://many/index.zarr"
    fill(url, images)
    cache = SoftTargetCache.open(url)
    for number, tile in enumerate(SIZES):
        expected = distributions(3, *SIZES[tile], seed=number)
        assert np.abs(cache.read(tile) - expected).max() <= cache.manifest.error_bound
    assert check_full(open_storage(url), cache.manifest, images) == []
    monkeypatch.setattr(manifest, "MAX_LISTED", len(SIZES))
    fill(url, images)
    assert open_storage(url).children(INDEX) == []
    assert check_full(open_storage(url), SoftTargetCache.open(url).manifest, images) == []


def test_inspect_gives_the_manifest_as_it_is_written(listed, indexed):
    for folder in (listed, indexed):
        content = json.loads((folder / "manifest.json").read_text())
        del content["checksum"]
        assert json.loads(json.dumps(inspect_cache(str(folder)).as_dict()["manifest"])) == content
