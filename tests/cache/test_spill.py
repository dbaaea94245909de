"""A shard whose chunks wait in a temporary file has the same bytes, takes little memory, and leaves no file behind."""

import errno
import os
import shutil
import tempfile
import tracemalloc
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from helpers import golden_cache
from helpers.crash_disk import Disk, Killed, full, state_of
from helpers.files import tree

from kdpipe.cache import IncompleteCache, SoftTargetCache, tile
from kdpipe.cache.index.records import ImageDigest
from kdpipe.cache.shard import encode_shard, spill_shard
from kdpipe.cache.spill import Spill
from kdpipe.cache.storage.base import open_storage
from kdpipe.cache.storage.remote import _joined
from kdpipe.cache.writer import open_writer, store_tile
from kdpipe.configs.errors import CacheError, DiskFull

IMAGE = ImageDigest(size_bytes=1, sha256="0" * 64)
RECIPE = golden_cache.recipe(8)
MB = 2**20


def noise(*shape, dtype="uint8"):
    return np.random.default_rng(shape).integers(0, 256, shape, dtype=dtype)


def spilled(units, spill, chunk_px=(256, 256)):
    height = units.shape[1]
    rows_of_chunks = (units[:, top : top + chunk_px[0]] for top in range(0, height, chunk_px[0]))
    return spill_shard(rows_of_chunks, height, chunk_px, tile.ZSTD_LEVEL, spill)


@pytest.fixture
def storage(tmp_path):
    (tmp_path / "c.zarr").mkdir()
    return open_storage(str(tmp_path / "c.zarr"))


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("size", [(1, 1), (64, 700), (256, 256), (257, 511), (1300, 700), (300, 2100)])
def test_the_bytes_are_those_of_a_shard_made_in_memory(storage, size, dtype):
    units = noise(3, *size, dtype=dtype)
    units[:, : size[0] // 2, : size[1] // 2] = 0
    chunk_px = min(256, size[0]), min(256, size[1])
    whole, digests = encode_shard(units, chunk_px, tile.ZSTD_LEVEL)
    with closing(Spill(storage)) as spill:
        shard = spilled(units, spill, chunk_px)
        assert shard.digests == digests
        assert b"".join(shard.pieces()) == whole
        assert (shard.size, shard.shape, shard.dtype) == (len(whole), units.shape, units.dtype)
        record = store_tile(storage, "T/a", (shard, None), IMAGE, RECIPE)
    stored = tree(storage.folder)
    storage.remove("tiles")
    assert store_tile(storage, "T/a", (units, None), IMAGE, RECIPE) == record
    assert tree(storage.folder) == stored


def peak(function):
    """The most bytes that Python and NumPy allocate while the function runs."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_rows_of_a_scene(storage):
    """Noise does not compress: the shards have 12 and 48 MB."""
    row = noise(3, 256, 1024)

    def store(count):
        with closing(Spill(storage)) as spill:
            shard = spill_shard((row for _ in range(count)), 256 * count, (256, 256), tile.ZSTD_LEVEL, spill)
            assert store_tile(storage, f"T/{count}", (shard, None), IMAGE, RECIPE).shard_bytes > count * row.nbytes

    store(1)  # imports zarr-python
    small, large = peak(lambda: store(16)), peak(lambda: store(64))
    assert large < small + MB
    assert large < 4 * MB


def test_an_upload_is_in_memory_once():
    """32 MB in pieces, and the room by which the buffer grows ahead."""
    assert peak(lambda: _joined(bytes(MB // 4) for _ in range(128))) < 40 * MB


def test_the_nameless_file_lies_in_a_local_cache_or_in_the_temporary_folder(storage, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    for place, folder in ((storage, "c.zarr"), (open_storage("memory://bucket/c.zarr"), "temporary")):
        with closing(Spill(place)) as spill:
            assert [spill.put(data) for data in (b"abc", b"", b"de")] == [0, 3, 3]
            assert [spill.take(*span) for span in ((3, 2), (0, 3), (4, 9))] == [b"de", b"abc", b"e"]
            assert Path(f"/proc/self/fd/{spill._file.fileno()}").readlink().parent == tmp_path / folder
            assert list((tmp_path / folder).iterdir()) == []


def test_a_file_that_needs_a_name_has_one_that_the_next_run_deletes(storage, monkeypatch):
    unlink, names = os.unlink, []
    monkeypatch.setattr(tempfile, "_O_TMPFILE_WORKS", False)
    monkeypatch.setattr(tempfile._os, "unlink", lambda path: names.append(Path(path).name) or unlink(path))
    Spill(storage).close()
    assert [(name[0], Path(name).suffix) for name in names] == [(".", ".partial")]
    assert storage.children("") == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is always full")
def test_a_disk_that_fills_while_chunks_are_written_is_reported(storage, monkeypatch):
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: open("/dev/full", "r+b", buffering=0))  # noqa: SIM115, PTH123
    for place, advice in ((storage, "make room and run"), (open_storage("memory://bucket/c.zarr"), "TMPDIR")):
        with (
            closing(Spill(place)) as spill,
            pytest.raises(DiskFull, match=f"no room for a scene's chunks in .*{advice}.*what is finished is kept"),
        ):
            spilled(noise(3, 600, 300), spill)
    assert storage.children("") == []


def test_a_disk_that_fills_while_the_shard_is_written_is_reported(storage, monkeypatch):
    def no_room(descriptor):
        raise full()

    storage.write("tiles/T/a/other", b"")  # makes the folders, which are synced too
    with closing(Spill(storage)) as spill:
        shard = spilled(noise(3, 600, 300), spill)
        monkeypatch.setattr(os, "fsync", no_room)
        with pytest.raises(DiskFull, match=r"no room for .*0\.0\.0: .*what is finished is kept"):
            store_tile(storage, "T/a", (shard, None), IMAGE, RECIPE)
    assert tree(storage.folder) == {"tiles/T/a/other": b""}


@pytest.mark.parametrize("damage", ["flipped", "cut short", "unreadable"])
def test_no_digest_vouches_for_chunks_that_are_lost_in_the_temporary_file(storage, damage):
    with closing(Spill(storage)) as spill:
        shard = spilled(noise(3, 600, 300), spill)
        file = spill._file.fileno()
        if damage == "flipped":
            os.pwrite(file, bytes([os.pread(file, 1, 200_000)[0] ^ 1]), 200_000)
        elif damage == "cut short":
            os.truncate(file, 200_000)
        else:
            spill.close()
            spill._file = open(os.devnull, "wb", buffering=0)  # noqa: SIM115, PTH123
        with pytest.raises(CacheError, match="temporary file of a scene's chunks in .* failed"):
            store_tile(storage, "T/a", (shard, None), IMAGE, RECIPE)
    assert tree(storage.folder) == {}


def store_scene(path):
    """Write a cache of one scene of 2 x 2 chunks in bands, with the same bytes each time."""
    probs = np.random.default_rng(0).dirichlet(np.ones(len(RECIPE.channels)), (300, 270)).transpose(2, 0, 1)
    bands = np.split(probs.astype(np.float32), [100, 290], axis=1)
    with open_writer(open_storage(str(path)), RECIPE, device="cpu", libraries={}) as writer:
        writer.begin()
        with closing(Spill(writer.storage)) as spill:
            encoded = tile.encode_bands(iter(bands), RECIPE, 300, 270, spill)
            record = writer.write_encoded("T/a", encoded, IMAGE)
        writer.finish([record])


def left_in(folder):
    found = tree(folder)
    found.pop("c.zarr.lock", None)  # the lock of a dead writer, which the next one takes over
    return found


@pytest.mark.long
@pytest.mark.parametrize("torn", [False, True], ids=["between", "within"])
def test_after_a_kill_or_a_power_cut_at_any_file_operation_the_next_run_writes_the_same_bytes(
    tmp_path, monkeypatch, torn
):
    store_scene(tmp_path / "whole/c.zarr")
    expected, rng = tree(tmp_path / "whole"), np.random.default_rng(0)
    points, done, seen = 0, False, set()
    while not done:
        (tmp_path / "disk").mkdir()
        disk = Disk(tmp_path / "disk", kill_at=points, torn=torn)
        with disk.installed(monkeypatch):
            try:
                store_scene(disk.root / "c.zarr")
                done = True
            except Killed:
                pass
        places = {"killed": disk.root, "least": tmp_path / "least", "some": tmp_path / "some"}
        disk.after_power_loss(places["least"])
        disk.after_power_loss(places["some"], rng)
        for kind, place in places.items():
            state = state_of(place)
            as_between = torn and disk.operations and disk.operations[-1][0] != "write"
            if not done and (state in seen or as_between):
                shutil.rmtree(place)
                continue
            seen.add(state)
            tile = {name: data for name, data in tree(place).items() if "/T/a/" in name}
            if "c.zarr/tiles/T/a/zarr.json" in tile:  # the receipt
                assert tile.items() <= expected.items(), (kind, points)
                assert len(tile) == 2, (kind, points)
            try:
                SoftTargetCache.open(str(place / "c.zarr")).read("T/a")
            except IncompleteCache:
                assert not done
            store_scene(place / "c.zarr")
            assert left_in(place) == expected, (kind, points, disk.operations[-1:])
            shutil.rmtree(place)
        points += 1
    assert sum(what == "write" and Path(path) == disk.root / "c.zarr" for what, path in disk.operations) == 4
    assert points > 40


@pytest.mark.long
@pytest.mark.parametrize("kind", ["full", "failing"])
def test_a_disk_that_fails_at_any_operation_is_reported_and_the_next_run_goes_on(tmp_path, monkeypatch, kind):
    store_scene(tmp_path / "whole/c.zarr")
    expected = tree(tmp_path / "whole")
    point, reported, done, seen = 0, 0, False, set()
    while not done:
        (tmp_path / "disk").mkdir()
        failure = full() if kind == "full" else OSError(errno.EIO, "Input/output error")
        disk = Disk(tmp_path / "disk", fail_at=point, failure=failure, lasting=kind == "full")
        try:
            with disk.installed(monkeypatch):
                store_scene(disk.root / "c.zarr")
        except DiskFull as err:
            assert kind == "full"
            assert "no room for" in str(err)
            assert not list(disk.root.rglob("*.partial"))
            reported += 1
        except (OSError, CacheError) as err:
            assert kind == "failing"
            assert "Input/output error" in str(err)
            reported += 1
        done = point >= len(disk.operations)
        state = state_of(disk.root)
        if state not in seen:
            seen.add(state)
            store_scene(disk.root / "c.zarr")
            assert left_in(disk.root) == expected, (point, disk.operations[point : point + 1])
        shutil.rmtree(disk.root)
        point += 1
    assert reported > 20
