"""The index of a cache of many tiles: what it holds, what is refused, and what stays equal to a cache that lists its tiles."""

import json
import multiprocessing
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from helpers.caches import RECIPE, SIZES, distributions, fill
from helpers.files import tree, write_image
from test_packs import same_folders

from kdpipe.cache import CorruptCache, IncompleteCache, SoftTargetCache, manifest
from kdpipe.cache.documents import read_manifest, whole_manifest
from kdpipe.cache.index import files as index_files_module
from kdpipe.cache.index.columns import DIGESTS, NUMBERS, TileIndex
from kdpipe.cache.index.records import ImageDigest, TileRecord, node_path
from kdpipe.cache.integrity import check_full, check_quick
from kdpipe.cache.manifest import dump_manifest, store_manifest
from kdpipe.cache.packing.pack import pack
from kdpipe.cache.packing.unpack import unpack
from kdpipe.cache.storage.base import open_storage
from kdpipe.cache.writer import finished_tiles, open_writer

INDEX = "index"


@pytest.fixture
def images(tmp_path):
    found = {tile: tmp_path / "images" / f"{tile.replace('/', '-')}.png" for tile in SIZES}
    for number, (tile, path) in enumerate(found.items()):
        write_image(path, *SIZES[tile], seed=number)
    return found


@pytest.fixture
def listed(tmp_path, images):
    """A finished cache whose manifest lists the tiles."""
    fill(tmp_path / "listed.zarr", images)
    return tmp_path / "listed.zarr"


@pytest.fixture
def indexed(tmp_path, images, monkeypatch):
    """The same cache, whose tiles are in an index."""
    monkeypatch.setattr(manifest, "MAX_LISTED", 0)
    fill(tmp_path / "indexed.zarr", images)
    return tmp_path / "indexed.zarr"


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
    for most, version in ((len(SIZES), "4.0"), (len(SIZES) - 1, "6.0")):
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
    assert read_manifest(storage).format_version == "4.0"
    assert check_full(storage, read_manifest(storage), left) == []


def test_an_index_that_no_manifest_has_is_a_stray_file(listed, indexed, images):
    shutil.copytree(indexed / INDEX, listed / INDEX)
    (found,) = check_full(open_storage(str(listed)), SoftTargetCache.open(listed).manifest, images)
    assert (found.code, found.message) == ("stray-file", "index does not belong to the cache")
    (indexed / INDEX / "height" / "c").mkdir()
    (found,) = check_full(open_storage(str(indexed)), SoftTargetCache.open(indexed).manifest, images)
    assert (found.code, found.message) == ("stray-file", "index/height/c does not belong to the cache")


@pytest.mark.parametrize("file", ["id/0", "height/zarr.json", "zarr.json", "metadata_sha256/0.0"])
def test_a_missing_file_of_the_index_is_named_and_the_receipts_replace_it(indexed, images, file):
    before = tree(indexed)
    (indexed / INDEX / file).unlink()
    storage = open_storage(str(indexed))
    with pytest.raises(CorruptCache, match=rf"manifest\.json has an index that is damaged: index/{file} is missing; "):
        SoftTargetCache.open(indexed)
    assert whole_manifest(storage) is None
    fill(indexed, images)  # from the receipts
    assert tree(indexed) == before


def test_a_cache_that_is_being_written_is_not_called_damaged(indexed, monkeypatch):
    read = index_files_module.read_index

    def meanwhile(storage, digests, count):
        (indexed / "manifest.json").unlink()
        (indexed / INDEX / "id" / "0").write_bytes(b"new")
        return read(storage, digests, count)

    monkeypatch.setattr(manifest, "read_index", meanwhile)
    with pytest.raises(
        IncompleteCache, match="is being written: open it again once `kdpipe precompute-teacher` is done"
    ):
        SoftTargetCache.open(indexed)


def resigned(folder, change):
    """Change the columns, and vouch for them: digests and checksum fit."""
    storage = open_storage(str(folder))
    found = read_manifest(storage)
    columns = {name: column.copy() for name, column in found.tiles.columns.items()}
    columns = change(columns) or columns
    tiles = TileIndex(columns)
    edited = found.model_copy(update={"tiles": tiles, "index": index_files_module.index_digests(tiles)})
    store_manifest(storage, edited)


def setting(name, place, value):
    def change(columns):
        columns[name][place] = value

    return change


def with_ids(*ids):
    def change(columns):
        text = [each.encode() if isinstance(each, str) else each for each in ids]
        columns["id"] = np.frombuffer(b"".join(text), np.uint8)
        columns["id_end"] = np.cumsum([len(each) for each in text]).astype(np.uint8)
        columns["by_id"] = np.argsort(np.array(text, dtype=object)).astype(np.uint8)

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (setting("id_end", 0, 0), "id_end does not part the ids"),
        (setting("id_end", 3, 5), "id_end does not part the ids"),
        (setting("id_end", 3, 255), "id_end does not part the ids"),
        (setting("by_id", 0, 77), "by_id does not name each tile once"),
        (setting("by_id", 0, 1), "by_id does not name each tile once"),
        (setting("height", 2, 0), "a tile has at least one pixel, and at most 1073741824"),
        (lambda c: {**c, "height": np.full(4, 2**16, np.uint32), "width": np.full(4, 2**15, np.uint32)}, "at most 1073741824"),
        (lambda c: {**c, "height": np.full(4, 2**63, np.uint64), "width": np.full(4, 2, np.uint8)}, "at most 1073741824"),
        (setting("shard_bytes", 1, 0), "a shard has at least one byte"),
        (lambda c: {**c, "width": c["width"][:3]}, r"width has shape \(3,\), uint16, for 4 tiles"),
        (lambda c: {**c, "image_sha256": c["image_sha256"][:, :16]}, r"image_sha256 has shape \(4, 16\)"),
        (lambda c: {**c, "width": c["width"].astype(np.int16)}, "index/width/zarr.json is not that of the format"),
        (lambda c: {**c, "width": c["width"].astype(np.float64)}, "index/width/zarr.json is not that of the format"),
    ],
)  # fmt: skip
def test_columns_that_do_not_fit_are_refused_though_the_manifest_vouches_for_them(indexed, change, says):
    resigned(indexed, change)
    with pytest.raises(
        CorruptCache, match=rf"manifest\.json has an index that is damaged: .*{says}.*finished tiles are kept"
    ):
        SoftTargetCache.open(indexed)


ELSEWHERE = ["../x", "/etc/passwd", "a//b", "a\x00b", "a\x1b[2Jb", "a\\b", "__a/b", "a/zarr.json", "...", b"\xff\xfe"]


@pytest.mark.parametrize("tile", ELSEWHERE)
def test_an_id_that_lies_elsewhere_is_refused(indexed, tile):
    resigned(indexed, with_ids("Train/a", tile, "Other/c", "Other/d"))
    with pytest.raises(
        CorruptCache, match=r"index that is damaged: .*(cannot lie in a cache|codec can't decode)"
    ) as caught:
        SoftTargetCache.open(indexed)
    assert "\x1b" not in str(caught.value)


PARTS = [
    "a",
    "B.1",
    "-",
    "_",
    "_a",
    "a_",
    "zarr",
    "zarr.jso",
    "zarr.json2",
    "xzarr.json",
    "z",
    ".a",
    "..b",
    "Süd",
    "a b",
]
NO_PARTS = ["", ".", "..", "__", "__a", "zarr.json", "a\\b", "\n"]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_ids_are_judged_together_as_each_is_alone(depth):
    rng = np.random.default_rng(depth)
    for trial in range(300):
        parts = PARTS if trial % 2 else PARTS + NO_PARTS
        plain = [part for part in parts if part.isascii() and " " not in part] if trial % 3 else parts
        ids = ["/".join(rng.choice(plain, depth)) for _ in range(1 + trial % 4)]
        text = [each.encode() for each in ids]
        columns = {**TileIndex.of(records(len(ids))).columns, "id": np.frombuffer(b"".join(text), np.uint8)}
        columns["id_end"] = np.cumsum([len(each) for each in text]).astype(np.uint8)
        try:
            for each in ids:
                node_path(each)
            is_valid = True
        except ValueError:
            is_valid = False
        try:
            TileIndex(columns).require_consistent()
            assert is_valid, ids
        except ValueError:
            assert not is_valid, ids


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (with_ids("Train/a", "Train/a", "Other/c", "Other/d"), "its index has faults: two tiles of one id"),
        (
            lambda c: {**c, "by_id": c["by_id"][::-1].copy()},
            "its index has faults: by_id is not in the order of the ids",
        ),
        (with_ids("Train/a", "Train/b", "Other/c", "Other/c/d"), "['tiles/Other/c'] are groups and tiles at once"),
        (setting("image_sha256", (1, 7), 99), "its fingerprint is not that of its recipe and images"),
    ],
)
def test_verify_finds_an_index_that_was_edited_and_signed_again(indexed, images, change, says):
    resigned(indexed, change)
    found = check_quick(open_storage(str(indexed)), SoftTargetCache.open(indexed).manifest, images)
    messages = [finding.message for finding in found if finding.code == "damaged-manifest"]
    assert f"manifest.json was changed and signed again: {says}" in messages


def test_fields_of_the_other_form_are_damage(listed, indexed):
    for folder, field in ((listed, "root_sha256"), (indexed, "groups")):
        content = json.loads((folder / "manifest.json").read_text())
        storage = open_storage(str(folder))
        whole = read_manifest(storage)
        wrong = whole.model_copy(update={field: "0" * 64 if field == "root_sha256" else {}})
        (folder / "manifest.json").write_bytes(dump_manifest(wrong))
        with pytest.raises(CorruptCache, match=f"the field '{field}' is none of this version"):
            SoftTargetCache.open(folder)
        assert field not in content


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
