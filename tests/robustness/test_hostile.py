"""Hostile caches and images are refused with an error of kdpipe's own, in bounded time and memory."""

import hashlib
import json
import shutil
import struct
import zlib

import numpy as np
import psutil
import pytest
from helpers.caches import sign
from helpers.golden_cache import GOLDEN
from helpers.mutations import fuzzed, mutated, spliced
from hypothesis import given
from hypothesis import strategies as st
from numcodecs.checksum32 import CRC32C
from numcodecs.zstd import Zstd

from kdpipe.cache import CorruptCache, SoftTargetCache
from kdpipe.cache.integrity import check_full
from kdpipe.cache.manifest import Manifest, parse_manifest
from kdpipe.cache.reader import in_memory
from kdpipe.cache.shard import open_shard
from kdpipe.cache.storage.base import open_storage
from kdpipe.cache.tile import METADATA_NAME, parse_receipt
from kdpipe.configs import load_config
from kdpipe.configs.errors import DataError, KdpipeError
from kdpipe.data.rasters import image_size
from kdpipe.data.tiles import list_tiles

CACHE = GOLDEN / "8-bits.zarr"
MANIFEST = (CACHE / "manifest.json").read_bytes()
METADATA = (CACHE / "tiles/Other/deep/c/zarr.json").read_bytes()
SHARD = (CACHE / "tiles/Other/deep/c/0.0.0").read_bytes()


def canonical(content):
    return (json.dumps(content, sort_keys=True, indent=1) + "\n").encode()


def try_to_sign(content):
    try:
        return sign(content)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError):
        return canonical(content)


def parsed_or_refused(data):
    try:
        manifest = parse_manifest(data, "manifest.json", open_storage(str(CACHE)))
    except KdpipeError as err:
        assert len(str(err)) < 1000
    else:
        assert isinstance(manifest, Manifest)


@pytest.mark.long
@fuzzed
@given(mutated(json.loads(MANIFEST)))
def test_no_manifest_that_is_signed_but_wrong_escapes_the_parser(content):
    parsed_or_refused(try_to_sign(content))


@fuzzed
@given(spliced(MANIFEST))
def test_no_bytes_escape_the_manifest_parser(data):
    parsed_or_refused(data)


@fuzzed
@given(
    st.one_of(
        mutated(json.loads(METADATA)).map(canonical),
        spliced(METADATA),
    )
)
def test_a_receipt_is_a_tiles_or_none(data):
    digest = json.loads(METADATA)["attributes"]["kdpipe"]["recipe_sha256"]
    record = parse_receipt(data, "Other/deep/c", digest)
    assert record is None or record.id == "Other/deep/c"


@fuzzed
@given(mutated(json.loads(METADATA)), st.one_of(st.just(SHARD), spliced(SHARD)))
def test_no_tile_escapes_the_opener_of_shards(content, data):
    try:
        shard = open_shard(canonical(content), in_memory(data))
        if shard.shape[1] * shard.shape[2] <= 2**20:  # a reader has compared it with the manifest
            shard.read((0, 0, *shard.shape[1:]), in_memory(data))
    except ValueError:
        pass


def png_of(height, width):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def tiff_of(height, width):
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8), (277, 3, 1, 1),
            (278, 4, 1, height), (279, 4, 1, 16)]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + b"\0" * 20


@pytest.mark.parametrize(("name", "make"), [("huge.png", png_of), ("huge.tif", tiff_of)])
def test_a_header_of_a_million_by_a_million_pixels_is_refused_without_reading(name, make, tmp_path):
    (tmp_path / name).write_bytes(make(1000, 1000))
    assert image_size(tmp_path / name) == (1000, 1000)  # the header is a good one
    (tmp_path / name).write_bytes(make(10**6, 10**6))
    before = psutil.Process().memory_info().rss
    with pytest.raises(DataError, match=rf"{name}.*(declares 1000000 x 1000000 px|damaged)"):
        image_size(tmp_path / name)
    assert psutil.Process().memory_info().rss - before < 100e6


@pytest.mark.parametrize("stem", ["a\nb", "a\x1b[2Jb", "a\\b", "__a", "a\x7f"])
def test_names_of_images_that_no_cache_can_hold_are_refused(stem, tmp_path):
    (tmp_path / "T/images").mkdir(parents=True)
    (tmp_path / "T/images" / f"{stem}.png").write_bytes(png_of(1, 1))
    data = load_config("demo").data.model_copy(update={"train": [], "val": [], "unlabelled": [str(tmp_path / "T")]})
    with pytest.raises(DataError, match="cannot name a tile in the cache: rename it") as caught:
        list_tiles(data, "train")
    assert "\x1b" not in str(caught.value)


@pytest.fixture
def altered(tmp_path):
    def alter(change):
        shutil.copytree(CACHE, tmp_path / "c")
        manifest = json.loads(MANIFEST)
        change(manifest)
        (tmp_path / "c/manifest.json").write_bytes(sign(manifest))
        return str(tmp_path / "c")

    return alter


ELSEWHERE = [
    "../x", "Train/../../x", "/etc/passwd", "a//b", "a/./b", "a\x00b", "a\x1b[2Jb", "a\\b", "__a/b", "a/zarr.json", "", "...",
]  # fmt: skip


@pytest.mark.parametrize("tile", ELSEWHERE)
def test_a_manifest_whose_tiles_lie_elsewhere_is_refused(altered, tile):
    with pytest.raises(CorruptCache, match="cannot lie in a cache") as caught:
        SoftTargetCache.open(altered(lambda m: m["tiles"][0].update(id=tile)))
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["groups"].update({"../x": "0" * 64}), "cannot lie in a cache"),
        (lambda m: m["groups"].update({"elsewhere": "0" * 64}), "the group 'elsewhere' is not one of tiles"),
        (lambda m: m["groups"].update({"tiles/Train/a": "0" * 64}), "are groups and tiles at once"),
        (lambda m: m["tiles"].append(m["tiles"][0]), "two tiles of one id"),
        (lambda m: m["tiles"][0].update(height=10**6, width=10**6), "a tile has at most 1073741824 px"),
        (lambda m: m["tiles"][0].update(height=0), "tiles.0.height: Input should be greater than or equal to 1"),
        (lambda m: m["tiles"][0].update(shard_sha256="x"), "tiles.0.shard_sha256: String should match"),
        (lambda m: m["recipe"].update(bits=64), "recipe.bits: Input should be 4, 6, 8 or 16"),
        (lambda m: m["recipe"].update(teachers=[]), "recipe.teachers: List should have at least 1 item"),
    ],
)
def test_a_manifest_that_claims_the_impossible_is_refused(altered, change, message):
    with pytest.raises(CorruptCache, match=message):
        SoftTargetCache.open(altered(change))


@pytest.mark.parametrize("what", ["tiles/Train/a/0.0.0", "tiles/Train/a", "tiles/Train"])
def test_a_link_out_of_the_cache_is_neither_read_nor_written(what, tmp_path):
    shutil.copytree(CACHE, tmp_path / "c")
    link = tmp_path / "c" / what
    link.rename(tmp_path / "outside")
    link.symlink_to(tmp_path / "outside")
    storage = open_storage(str(tmp_path / "c"))
    cache = SoftTargetCache.open(str(tmp_path / "c"))
    for read in (cache.read, cache.entropy_error):  # which reads no chunk
        with pytest.raises(CorruptCache, match="leads out of the cache, to .*outside"):
            read("Train/a")
    with pytest.raises(CorruptCache, match="leads out of the cache, to .*outside"):
        storage.write("tiles/Train/a/0.0.0", b"")
    with pytest.raises(CorruptCache, match="leads out of the cache, to .*x"):
        storage.read("../x")


def test_a_cache_that_is_reached_through_a_link_is_read(tmp_path):
    (tmp_path / "link").symlink_to(CACHE)
    assert SoftTargetCache.open(str(tmp_path / "link")).read("Train/a").shape == (3, 1, 1)


def forged(tmp_path, change_metadata=lambda m: None, shard=None):
    """The golden cache with a forged tile `Train/b.1` that its manifest vouches for."""
    shutil.copytree(CACHE, tmp_path / "c")
    folder = tmp_path / "c/tiles/Train/b.1"
    metadata = json.loads((folder / METADATA_NAME).read_bytes())
    change_metadata(metadata)
    (folder / METADATA_NAME).write_bytes(canonical(metadata))
    if shard is not None:
        (folder / "0.0.0").write_bytes(shard)
    manifest = json.loads(MANIFEST)
    manifest["tiles"][1].update(
        metadata_sha256=hashlib.sha256((folder / METADATA_NAME).read_bytes()).hexdigest(),
        shard_sha256=hashlib.sha256((folder / "0.0.0").read_bytes()).hexdigest(),
        shard_bytes=(folder / "0.0.0").stat().st_size,
    )
    (tmp_path / "c/manifest.json").write_bytes(sign(manifest))
    return SoftTargetCache.open(str(tmp_path / "c"))


def in_codec(name, **configuration):
    def change(metadata):
        codecs = metadata["codecs"][0]["configuration"]["codecs"]
        codecs[1] = {"name": name, "configuration": configuration}

    return change


def as_16_bits(metadata):
    metadata["data_type"] = "uint16"
    metadata["codecs"][0]["configuration"]["codecs"][0] = {"name": "bytes", "configuration": {"endian": "little"}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (in_codec("numcodecs.pickle"), "codecs are not those of the format"),
        (in_codec("zstd", level=3, checksum=True), "codecs are not those of the format"),
        (lambda m: m.update(data_type="object"), "not that of a tile"),
        (lambda m: m.update(data_type={"name": "variable_length_bytes"}), "not that of a tile"),
        (as_16_bits, "and the manifest says"),
        (lambda m: m.update(shape=[3, 2**60, 41]), "larger than any tile"),
        (lambda m: m.update(shape=[3, -70, 41]), "do not fit"),
        (
            lambda m: m["codecs"][0]["configuration"].update(chunk_shape=[3, 10**9, 10**9]),
            "larger than the format has them",
        ),
        (lambda m: m["codecs"][0]["configuration"].update(chunk_shape=[3, 0, 41]), "do not fit"),
    ],
)
def test_metadata_that_the_manifest_vouches_for_is_refused_all_the_same(tmp_path, change, message):
    with pytest.raises(CorruptCache, match=f"tile Train/b.1 .* is damaged: .*{message}"):
        forged(tmp_path, change).read("Train/b.1")


@pytest.mark.parametrize("lost", [[[1]], [], "x", None, [[10**400], [0]], [[1, 2], [3]]])
def test_an_entropy_error_of_another_size_is_refused(tmp_path, lost):
    cache = forged(tmp_path, lambda m: m["attributes"]["kdpipe"].update(entropy_error=lost))
    with pytest.raises(CorruptCache, match=r"tile Train/b\.1 .* its entropy_error does not fit its size"):
        cache.entropy_error("Train/b.1")


@pytest.mark.parametrize("digests", ["", "ab", "zz" * 16, "0" * 64, 5, None, ["0" * 32]])
def test_digests_of_chunks_that_are_none_or_too_many_are_refused(tmp_path, digests):
    cache = forged(tmp_path, lambda m: m["attributes"]["kdpipe"].update(chunk_sha256=digests))
    with pytest.raises(CorruptCache, match=r"tile Train/b\.1 .* its chunk_sha256 do not fit its 1 × 1 chunks"):
        cache.read("Train/b.1")


def test_a_wrong_digest_of_a_chunk_is_found_though_the_shard_is_right(tmp_path):
    def change(metadata):
        receipt = metadata["attributes"]["kdpipe"]
        del receipt["receipt_sha256"]
        receipt["chunk_sha256"] = "0" * 32

    cache = forged(tmp_path, change)
    found = check_full(open_storage(str(tmp_path / "c")), cache.manifest, {})
    assert [(f.tile, f.message) for f in found if f.code == "damaged-tile"] == [
        ("Train/b.1", "chunk 0, 0 is not what was written")
    ]


def shard_of(frame):
    chunk = bytes(CRC32C(location="end").encode(np.frombuffer(frame, np.uint8)))
    index = np.array([0, len(chunk)], "<u8").tobytes()
    return chunk + bytes(CRC32C(location="end").encode(np.frombuffer(index, np.uint8)))


def test_a_frame_that_would_expand_to_gigabytes_is_refused_before_it_does(tmp_path):
    bomb = Zstd(3).encode(np.zeros(2**28, np.uint8))
    assert len(bomb) < 20_000
    cache = forged(tmp_path, shard=shard_of(bomb))
    before = psutil.Process().memory_info().rss
    with pytest.raises(CorruptCache, match=r"chunk 0, 0 declares 268435456 bytes, not those of \(3, 70, 41\) values"):
        cache.read("Train/b.1")
    assert psutil.Process().memory_info().rss - before < 50e6


def test_a_frame_that_lies_about_its_size_is_refused(tmp_path):
    frame = bytearray(Zstd(3).encode(np.zeros(2**20, np.uint8)))
    honest = Zstd(3).encode(np.zeros(3 * 70 * 41, np.uint8))
    assert (frame[4] >> 6, honest[4] >> 6) == (2, 1)  # four bytes of size against two
    start = 5 if frame[4] & 32 else 6
    frame[start : start + 4] = struct.pack("<I", 3 * 70 * 41)
    with pytest.raises(CorruptCache, match="tile Train/b.1 .* cannot be decoded"):
        forged(tmp_path, shard=shard_of(bytes(frame))).read("Train/b.1")


def test_verification_of_a_hostile_cache_ends_in_findings(tmp_path):
    cache = forged(tmp_path, in_codec("numcodecs.pickle"))
    found = check_full(open_storage(str(tmp_path / "c")), cache.manifest, {})
    assert {(f.code, f.tile) for f in found if f.code != "extra-tile"} == {("damaged-tile", "Train/b.1")}
