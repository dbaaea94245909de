"""An index that was damaged, edited and signed again, or made to harm: it is named, and no path is made of what it says."""

import json
import shutil

import numpy as np
import pytest
from helpers.caches import fill
from helpers.files import tree
from test_index import INDEX, records

from kdpipe.cache import CorruptCache, IncompleteCache, SoftTargetCache, manifest
from kdpipe.cache.documents import read_manifest, whole_manifest
from kdpipe.cache.index import files as index_files_module
from kdpipe.cache.index.columns import TileIndex
from kdpipe.cache.index.records import node_path
from kdpipe.cache.integrity import check_full, check_quick
from kdpipe.cache.manifest import dump_manifest, store_manifest
from kdpipe.cache.storage.base import open_storage


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
