"""Caches as one file: the bytes of a pack, what stops and damages it, and reading from it as from the folder."""

import filecmp
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import zarr
from helpers.caches import RECIPE, SIZES, fill

from kdpipe.cache import SoftTargetCache
from kdpipe.cache.integrity import check_full, check_quick
from kdpipe.cache.packing import pack as pack_module
from kdpipe.cache.packing.pack import pack
from kdpipe.cache.packing.unpack import unpack
from kdpipe.cache.storage import zip_format
from kdpipe.cache.storage.base import open_storage
from kdpipe.cache.storage.lock import writer_lock
from kdpipe.cache.writer import open_writer
from kdpipe.configs.errors import CacheLocked, ConfigError, CorruptCache, IncompleteCache, KdpipeError, StaleCache


def same_folders(a, b):
    compared = filecmp.dircmp(a, b, ignore=[])
    differing = [*compared.left_only, *compared.right_only, *compared.funny_files]
    differing += filecmp.cmpfiles(a, b, compared.common_files, shallow=False)[1]
    return not differing and all(same_folders(Path(a, name), Path(b, name)) for name in compared.common_dirs)


def codes(path, images):
    storage = open_storage(str(path))
    return {finding.code for finding in check_full(storage, SoftTargetCache.open(path, partial=True).manifest, images)}


def test_stock_tools_read_a_pack_and_find_the_files_of_the_folder(written, packed, tmp_path):
    with zipfile.ZipFile(packed) as file:
        assert file.testzip() is None
        assert {each.compress_type for each in file.infolist()} == {zipfile.ZIP_STORED}
        file.extractall(tmp_path / "extracted")
    (tmp_path / "extracted" / zip_format.TABLE_NAME).unlink()
    assert same_folders(written, tmp_path / "extracted")
    folder = zarr.open_group(written, mode="r")
    opened = zarr.open_group(zarr.storage.ZipStore(packed, read_only=True), mode="r")
    assert opened.attrs.asdict() == folder.attrs.asdict()
    for tile in SIZES:
        np.testing.assert_array_equal(opened[f"tiles/{tile}"][:], folder[f"tiles/{tile}"][:])


def test_a_pack_is_read_as_the_folder_is(written, packed, images):
    folder, opened = SoftTargetCache.open(written), SoftTargetCache.open(packed)
    assert opened.manifest == folder.manifest
    again = pickle.loads(pickle.dumps(opened))
    for tile, (height, width) in SIZES.items():
        window = (height // 3, width // 4, height - height // 3, width - width // 4)
        for reader in (opened, again):
            np.testing.assert_array_equal(reader.read(tile), folder.read(tile))
            np.testing.assert_array_equal(reader.read(tile, window), folder.read(tile, window))
            assert reader.entropy_error(tile) == folder.entropy_error(tile)
    for level in (check_quick, check_full):
        assert level(open_storage(str(packed)), opened.manifest, images) == []


def test_a_forked_process_reads_on(packed):
    opened = SoftTargetCache.open(packed)
    expected = opened.read("Other/d")
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(opened.read("Other/d"), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_the_same_cache_has_the_same_bytes_from_a_folder_a_pack_and_a_store(written, packed, images, tmp_path):
    for path in written.rglob("*"):
        os.utime(path, (1, 1))
    (tmp_path / "other").mkdir()
    fill("memory://tests/c.zarr", images)
    for source in (written, packed, "memory://tests/c.zarr"):
        again = pack(source, tmp_path / "other" / "again.zarr.zip", overwrite=True)
        assert Path(again.files[0]).read_bytes() == packed.read_bytes()
        assert (again.tiles, again.size_bytes, again.kept_bytes) == ([len(SIZES)], packed.stat().st_size, 0)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.999, 1.0])
@pytest.mark.parametrize("rest", [b"", b"what another program wrote"])
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(share, rest, written, packed, tmp_path):
    whole = packed.read_bytes()
    (tmp_path / ".d.zarr.zip.partial").write_bytes(whole[: int(share * len(whole))] + rest)
    again = pack(written, tmp_path / "d.zarr.zip")
    assert Path(again.files[0]).read_bytes() == whole
    assert (again.kept_bytes > 0) == (share >= 0.3)
    assert not (tmp_path / ".d.zarr.zip.partial").exists()


def test_a_run_stopped_at_a_tile_keeps_what_it_has(written, packed, tmp_path, monkeypatch):
    class Stops:
        seen = 0

        def __call__(self):
            self.seen += 1
            if self.seen == 3:
                raise KeyboardInterrupt

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    with pytest.raises(KeyboardInterrupt):
        pack(written, tmp_path / "d.zarr.zip", bar=lambda total: Stops())
    assert not (tmp_path / "d.zarr.zip").exists()
    again = pack(written, tmp_path / "d.zarr.zip")
    assert Path(again.files[0]).read_bytes() == packed.read_bytes()
    assert again.kept_bytes > 0


def test_two_processes_do_not_write_one_pack(written, tmp_path):
    with (
        pack_module._Writer(tmp_path / ".d.zarr.zip.partial"),
        pytest.raises(CacheLocked, match="another process is writing"),
    ):
        pack(written, tmp_path / "d.zarr.zip")


def test_a_full_disk_is_one_paragraph_and_the_run_goes_on(written, packed, tmp_path, monkeypatch):
    put = pack_module._Writer.put

    def full(self, name, content):
        if name.startswith("tiles/Other/d"):
            raise OSError(28, os.strerror(28))
        put(self, name, content)

    with monkeypatch.context() as patch:
        patch.setattr(pack_module._Writer, "put", full)
        with pytest.raises(
            KdpipeError, match=r"no room for .*d.zarr.zip: its disk is full .* run the same command again"
        ):
            pack(written, tmp_path / "d.zarr.zip")
    again = pack(written, tmp_path / "d.zarr.zip")
    assert again.kept_bytes > 0
    assert Path(again.files[0]).read_bytes() == packed.read_bytes()


class TestParts:
    @pytest.fixture
    def parts(self, written, tmp_path):
        return pack(written, tmp_path / "p.zarr.zip", most_bytes=20_000)

    def test_each_is_a_cache_of_some_tiles_and_no_larger_than_asked(self, written, parts, images):
        assert [Path(file).name for file in parts.files] == [f"p-{i + 1:04d}.zarr.zip" for i in range(len(parts.files))]
        assert len(parts.files) > 1
        assert sum(parts.tiles) == len(SIZES)
        assert Path(parts.files[0]).stat().st_size <= 20_000
        ids, folder = [], SoftTargetCache.open(written)
        for file in parts.files:
            with pytest.raises(IncompleteCache, match=r"holds \d of 4 tiles"):
                SoftTargetCache.open(file)
            part = SoftTargetCache.open(file, partial=True)
            ids += part.tile_ids
            for tile in part.tile_ids:
                np.testing.assert_array_equal(part.read(tile), folder.read(tile))
            assert codes(file, {tile: images[tile] for tile in part.tile_ids}) == set()
        assert ids == folder.tile_ids

    @pytest.mark.parametrize("most_bytes", [1, 8_000, 15_000, 30_000, 10**9])
    def test_any_size_gives_the_same_cache_again(self, most_bytes, written, tmp_path):
        parts = pack(written, tmp_path / "q.zarr.zip", most_bytes=most_bytes)
        for file, tiles in zip(parts.files, parts.tiles, strict=True):
            assert tiles == 1 or Path(file).stat().st_size <= most_bytes
        found = unpack(reversed(parts.files), tmp_path / "back.zarr")
        assert (found.tiles, found.kept, found.partial_of) == (len(SIZES), 0, None)
        assert same_folders(written, tmp_path / "back.zarr")

    def test_a_stopped_run_of_another_size_leaves_nothing_behind(self, written, parts, tmp_path):
        for number, file in enumerate(parts.files, 1):
            shutil.copy(file, tmp_path / f".r-{number:04d}.zarr.zip.partial")
        again = pack(written, tmp_path / "r.zarr.zip", most_bytes=8_000)
        found = unpack(again.files, tmp_path / "back.zarr")
        assert found.partial_of is None
        assert same_folders(written, tmp_path / "back.zarr")
        assert all(
            tiles == 1 or Path(f).stat().st_size <= 8_000 for f, tiles in zip(again.files, again.tiles, strict=True)
        )

    def test_parts_that_an_earlier_pack_had_more_of_are_removed(self, written, parts, tmp_path):
        (tmp_path / ".p-0003.zarr.zip.partial").write_bytes(b"left")
        (tmp_path / "p-0003.zarr.zip").write_bytes(b"earlier")
        with pytest.raises(ConfigError, match=r"p-0001.zarr.zip exists already"):
            pack(written, tmp_path / "p.zarr.zip", most_bytes=10**9)
        again = pack(written, tmp_path / "p.zarr.zip", most_bytes=10**9, overwrite=True)
        assert sorted(map(str, tmp_path.glob("*p-*"))) == again.files
        assert list(tmp_path.glob(".p-*")) == []

    def test_a_missing_one_leaves_a_part_of_a_cache_which_the_others_complete(self, written, parts, tmp_path):
        found = unpack(parts.files[1:], tmp_path / "back.zarr")
        assert found.partial_of == len(SIZES)
        assert SoftTargetCache.open(tmp_path / "back.zarr", partial=True).tile_ids == list(SIZES)[parts.tiles[0] :]
        with pytest.raises(StaleCache, match="holds a finished cache already, of other tiles"):
            unpack(parts.files, tmp_path / "back.zarr")

    def test_packs_that_do_not_belong_together_are_refused(self, written, packed, parts, images, tmp_path):
        with pytest.raises(ConfigError, match="share tiles"):
            unpack([parts.files[0], parts.files[0]], tmp_path / "x.zarr")
        with pytest.raises(ConfigError, match="parts of another number of tiles"):
            unpack([parts.files[0], packed], tmp_path / "x.zarr")
        fill(tmp_path / "e.zarr", images, recipe=RECIPE.model_copy(update={"temperature": 3.0}))
        other = pack(tmp_path / "e.zarr", tmp_path / "e.zarr.zip", most_bytes=20_000)
        with pytest.raises(ConfigError, match="are not of one cache: temperature"):
            unpack([parts.files[0], other.files[1]], tmp_path / "x.zarr")
        with pytest.raises(ConfigError, match="holds a part of its tiles already"):
            pack(parts.files[0], tmp_path / "y.zarr.zip", most_bytes=20_000)


class TestUnpack:
    def test_a_stopped_one_goes_on(self, written, packed, images, tmp_path):
        fill(tmp_path / "back.zarr", images, tiles=["Train/b", "Other/c"], finish=False)
        os.truncate(tmp_path / "back.zarr/tiles/Other/c/0.0.0", 3)
        found = unpack([packed], tmp_path / "back.zarr")
        assert (found.tiles, found.kept) == (len(SIZES), 1)
        assert same_folders(written, tmp_path / "back.zarr")
        assert unpack([packed], tmp_path / "back.zarr").kept == len(SIZES)

    def test_what_is_there_is_not_overwritten(self, packed, images, tmp_path):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "letter.txt").write_text("dear")
        with pytest.raises(ConfigError, match="holds something that is no cache"):
            unpack([packed], tmp_path / "mine")
        fill(tmp_path / "e.zarr", images, recipe=RECIPE.model_copy(update={"temperature": 3.0}))
        with pytest.raises(StaleCache, match="holds a cache of another recipe"):
            unpack([packed], tmp_path / "e.zarr")
        assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"

    def test_damage_is_named_and_not_copied(self, packed, tmp_path):
        content = bytearray(packed.read_bytes())
        with zipfile.ZipFile(packed) as file:
            member = file.getinfo("tiles/Other/d/0.0.0")
        content[member.header_offset + 1000] ^= 1
        packed.write_bytes(content)
        with pytest.raises(
            CorruptCache, match=r"tile Other/d of .*c.zarr.zip is damaged: its shard .* copy the pack again"
        ):
            unpack([packed], tmp_path / "back.zarr")
        assert not (tmp_path / "back.zarr" / "manifest.json").exists()

    def test_a_folder_and_a_foreign_archive_are_no_packs(self, written, tmp_path):
        with pytest.raises(ConfigError, match="is no pack: give the NAME.zarr.zip"):
            unpack([written], tmp_path / "x.zarr")
        with zipfile.ZipFile(tmp_path / "z.zarr.zip", "w") as file:
            file.writestr("zarr.json", "{}")
        with pytest.raises(CorruptCache, match="is not what `kdpipe pack` wrote"):
            unpack([tmp_path / "z.zarr.zip"], tmp_path / "x.zarr")


def test_a_pack_is_only_read(packed, images):
    before, storage = packed.read_bytes(), open_storage(str(packed))
    advice = r"c.zarr.zip is a pack, which is only read: make a folder of it with `kdpipe unpack .*c.zarr.zip c.zarr`"
    for refused in (
        lambda: writer_lock(storage).__enter__(),
        lambda: open_writer(storage, RECIPE, device="cpu", libraries={}).__enter__(),
        lambda: SoftTargetCache.create(packed, ["a", "b"]).__enter__(),
        lambda: storage.write("x", b""),
        lambda: storage.remove("x"),
    ):
        with pytest.raises(ConfigError, match=advice):
            refused()
    assert packed.read_bytes() == before


@pytest.mark.parametrize("name", ["c.zip", "c.zarr", ".zarr.zip"])
def test_a_pack_has_a_name_that_zarr_knows(name, written, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match=r"a pack is named NAME\.zarr\.zip"):
        pack(written, tmp_path / "out" / name)


def test_files_that_exist_are_replaced_only_on_request(written, packed, tmp_path):
    before = packed.read_bytes()
    packed.write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"c.zarr.zip exists already.*--overwrite"):
        pack(written, packed)
    assert packed.read_bytes() == b"mine"
    pack(written, packed, overwrite=True)
    assert packed.read_bytes() == before


class TestS3:
    @pytest.fixture
    def remote(self, s3, packed):
        url = f"{s3.url}.zip"
        open_storage(s3.url)._fs.put_file(str(packed), url)
        s3.count()
        return url

    def test_a_remote_pack_is_read_in_few_requests(self, remote, s3, written, images):
        opened, folder = SoftTargetCache.open(remote), SoftTargetCache.open(written)
        # Size, end, table, manifest.
        assert sum(s3.count().values()) <= 6
        np.testing.assert_array_equal(opened.read("Other/d"), folder.read("Other/d"))
        assert sum(s3.count().values()) <= 2  # metadata and shard
        np.testing.assert_array_equal(
            opened.read("Other/d", (10, 10, 90, 80)), folder.read("Other/d", (10, 10, 90, 80))
        )
        assert sum(s3.count().values()) <= 1
        in_a_worker = pickle.loads(pickle.dumps(opened))
        in_a_worker.read("Other/d")
        assert (
            sum(s3.count().values()) <= 5
        )  # size, end and table, though two threads ask for their files at once; and these
        assert check_full(open_storage(remote), opened.manifest, images) == []

    def test_it_is_unpacked_and_a_cache_on_s3_is_packed(self, remote, s3, written, packed, tmp_path):
        unpack([remote], s3.url)
        assert SoftTargetCache.open(s3.url).manifest == SoftTargetCache.open(written).manifest
        again = pack(s3.url, tmp_path / "again.zarr.zip")
        assert Path(again.files[0]).read_bytes() == packed.read_bytes()
        with pytest.raises(ConfigError, match="is only read"), writer_lock(open_storage(remote)):
            pass
