"""The bytes of a pack against Python's zipfile, and damage to each part of them."""

import io
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers.caches import SIZES, fill

from kdpipe.cache import SoftTargetCache
from kdpipe.cache.integrity import check_full
from kdpipe.cache.packing.pack import pack
from kdpipe.cache.storage import zip_format
from kdpipe.cache.storage.base import open_storage
from kdpipe.configs.errors import CacheError, CorruptCache, IncompleteCache


def codes(path, images):
    storage = open_storage(str(path))
    return {finding.code for finding in check_full(storage, SoftTargetCache.open(path, partial=True).manifest, images)}


class TestDamage:
    @pytest.mark.long
    def test_a_flipped_byte_is_found_and_no_other_number_is_read(self, images, tmp_path):
        """Every seventh byte around the contents, and every 97th of them."""
        fill(tmp_path / "s.zarr", images)
        packed = Path(pack(tmp_path / "s.zarr", tmp_path / "s.zarr.zip").files[0])
        content, expected = packed.read_bytes(), {tile: SoftTargetCache.open(packed).read(tile) for tile in SIZES}
        with zipfile.ZipFile(packed) as file:
            of_contents = set()
            for member in file.infolist():
                start = member.header_offset + zip_format.header_bytes(member.filename, member.file_size)
                of_contents |= set(range(start, start + member.file_size))
        for place in range(len(content)):
            if place % (97 if place in of_contents else 7):
                continue
            damaged = bytearray(content)
            damaged[place] ^= 0x10
            packed.write_bytes(damaged)
            try:
                opened = SoftTargetCache.open(packed)
                found = check_full(open_storage(str(packed)), opened.manifest, images)
            except CacheError:
                continue
            assert found, place
            for tile, values in expected.items():
                try:
                    read = opened.read(tile)
                except CacheError:
                    continue
                assert np.array_equal(read, values), (place, tile)

    def test_a_pack_that_was_cut_off_or_appended_to_is_found(self, packed, images):
        content = packed.read_bytes()
        for end in (0, 1, 30, len(content) // 2, len(content) - 1):
            packed.write_bytes(content[:end])
            with pytest.raises(CorruptCache, match="copy it again|copy the pack again"):
                SoftTargetCache.open(packed)
        packed.write_bytes(content + b"x")
        with pytest.raises(CorruptCache, match="is not what `kdpipe pack` wrote"):
            SoftTargetCache.open(packed)

    def test_a_swapped_member_is_not_taken_for_another(self, packed, images):
        """Two tiles of one size in each other's place in the table, whose digests tell them apart."""
        with zipfile.ZipFile(packed) as file:
            table = file.read(zip_format.TABLE_NAME)
        rows = np.frombuffer(table, zip_format.ROW).copy()
        a, b = (np.flatnonzero(rows["key"] == zip_format.key(f"tiles/Train/{x}/0.0.0"))[0] for x in "ab")
        for column in ("offset", "size"):
            rows[column][[a, b]] = rows[column][[b, a]]
        packed.write_bytes(packed.read_bytes().replace(table, rows.tobytes()))
        with pytest.raises(CorruptCache, match="has something else where its table says"):
            SoftTargetCache.open(packed).read("Train/a")
        assert "damaged-tile" in codes(packed, images)

    @pytest.mark.parametrize("seed", range(8))
    def test_a_table_made_to_harm_costs_neither_memory_nor_a_wrong_number(self, seed, packed, images):
        rng = np.random.default_rng(seed)
        content, expected = packed.read_bytes(), {tile: SoftTargetCache.open(packed).read(tile) for tile in SIZES}
        with zipfile.ZipFile(packed) as file:
            table = file.read(zip_format.TABLE_NAME)
        for _ in range(25):
            rows = np.frombuffer(table, zip_format.ROW).copy()
            column = rng.choice(["key", "offset", "size"])
            places = rng.integers(len(rows), size=rng.integers(1, 4))
            values = [
                0,
                1,
                len(content),
                2**31,
                2**63,
                2**64 - 1,
                int(rng.integers(len(content))),
                int(rows[column][0]),
            ]
            rows[column][places] = np.array(values, np.uint64)[rng.integers(len(values), size=len(places))]
            packed.write_bytes(content.replace(table, rows.tobytes()))
            for tile, values_CHW in expected.items():
                try:
                    assert np.array_equal(SoftTargetCache.open(packed).read(tile), values_CHW)
                except CacheError:
                    continue
            assert rows.tobytes() == table or self._is_found(packed, images)

    @staticmethod
    def _is_found(packed, images):
        try:
            return codes(packed, images) != set()
        except CacheError:
            return True

    @pytest.mark.parametrize(
        "comment", [b"table of 999999999999 members at byte 0.", b"table of 1 members at byte 99999999999."]
    )
    def test_a_comment_that_says_more_than_there_is_is_refused(self, comment, packed):
        content = packed.read_bytes()
        start = content.rindex(b"table of ")
        packed.write_bytes(content[:start] + comment)
        with pytest.raises(CorruptCache, match="is shorter than it says: copy it again"):
            SoftTargetCache.open(packed)

    def test_a_damaged_tile_of_the_cache_is_not_packed(self, written, tmp_path):
        file = written / "tiles/Other/d/0.0.0"
        content = bytearray(file.read_bytes())
        content[50] ^= 1
        file.write_bytes(content)
        with pytest.raises(CorruptCache, match=r"tile Other/d of .*c.zarr is damaged: .*--repair"):
            pack(written, tmp_path / "d.zarr.zip")
        assert not (tmp_path / "d.zarr.zip").exists()

    def test_a_missing_pack_and_an_unfinished_cache_say_what_to_do(self, images, tmp_path):
        with pytest.raises(
            IncompleteCache, match="there is no file .*; correct the path, or make it with `kdpipe pack`"
        ):
            SoftTargetCache.open(tmp_path / "none.zarr.zip")
        fill(tmp_path / "u.zarr", images, tiles=["Train/a"], finish=False)
        with pytest.raises(IncompleteCache, match="is not finished"):
            pack(tmp_path / "u.zarr", tmp_path / "u.zarr.zip")


def test_names_of_one_key_are_told_apart_by_their_headers(written, tmp_path, monkeypatch):
    monkeypatch.setattr(zip_format, "key", lambda name: len(name) % 3)
    opened, folder = (
        SoftTargetCache.open(pack(written, tmp_path / "k.zarr.zip").files[0]),
        SoftTargetCache.open(written),
    )
    for tile in SIZES:
        np.testing.assert_array_equal(opened.read(tile), folder.read(tile))
    assert open_storage(str(tmp_path / "k.zarr.zip")).info("tiles/none/0.0.0") is None


class TestLargeArchives:
    """Against Python's zipfile."""

    def test_more_members_than_16_bits_count(self):
        names, none = [f"tiles/Wälder/{i}" for i in range(70_000)], np.zeros(70_000, np.uint64)
        header_bytes = np.array([zip_format.header_bytes(name, 0) for name in names], np.uint64)
        offsets = np.concatenate([[0], np.cumsum(header_bytes)[:-1]]).astype(np.uint64)
        file = io.BytesIO(b"".join(zip_format.header(name, 0, 0) for name in names))
        position = file.seek(0, io.SEEK_END)
        for piece in zip_format.tail(names, none, [0] * len(names), offsets, position):
            file.write(piece)
        with zipfile.ZipFile(file) as found:
            assert found.namelist() == [*names, zip_format.TABLE_NAME]
            assert found.read(names[-1]) == b""
            rows = np.frombuffer(found.read(zip_format.TABLE_NAME), zip_format.ROW)
        assert (np.diff(rows["key"].astype(object)) >= 0).all()

    def test_members_and_places_beyond_4_gib(self, tmp_path):
        """The first member is 5 GiB of a sparse file, whose checksum nobody takes."""
        size, small = 5 << 30, b"behind it"
        path, names = tmp_path / "large.zarr.zip", ["large", "small"]
        with path.open("wb") as file:
            file.write(zip_format.header("large", size, 7))
            file.seek(size, io.SEEK_CUR)
            second = file.tell()
            file.write(zip_format.header("small", len(small), zlib.crc32(small)) + small)
            sizes, offsets = np.array([size, len(small)], np.uint64), np.array([0, second], np.uint64)
            for piece in zip_format.tail(names, sizes, [7, zlib.crc32(small)], offsets, file.tell()):
                file.write(piece)
        with zipfile.ZipFile(path) as found:
            assert [(each.filename, each.file_size, each.header_offset) for each in found.infolist()[:2]] == [
                ("large", size, 0), ("small", len(small), second)
            ]  # fmt: skip
            assert found.read("small") == small
            with found.open("large") as content:
                assert content.read(10) == bytes(10)
        storage = open_storage(str(path))
        assert storage.read("small") == small
        assert storage.read_ranges("large", [(size - 4, 4), (0, 3)]) == [bytes(4), bytes(3)]
        assert storage.info("large").size == size
        assert storage.children("") == ["large", "small"]
