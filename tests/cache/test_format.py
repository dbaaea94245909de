"""The format on disk: FORMAT.md is enough to write a reader, and a cache is read for as long as its major version lives."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import golden_cache, plain_reader
from helpers.caches import SIZES as CACHED_SIZES
from helpers.caches import fill, sign
from helpers.golden_cache import BITS, CACHES, FOLDERS, GOLDEN, SIZES

from kdpipe.cache import CorruptCache, SoftTargetCache, UnknownFormat
from kdpipe.cache import tile as tile_module
from kdpipe.cache.documents import read_manifest, read_recipe, whole_manifest
from kdpipe.cache.encoding.logits import DEPTH
from kdpipe.cache.integrity import check_full
from kdpipe.cache.recipe import differences
from kdpipe.cache.storage.base import open_storage
from kdpipe.cache.tile import tile_path
from kdpipe.cache.writer import open_writer

PLAIN = """
import sys
from pathlib import Path
import numpy as np
from helpers import plain_reader

golden, version, all_bits = Path(sys.argv[1]), sys.argv[2], map(int, sys.argv[3:])
with np.load(golden / "expected.npz") as expected:
    for bits in all_bits:
        cache = plain_reader.Cache(golden / f"{bits}-bits.zarr")
        for number, tile in enumerate(cache.tiles):
            assert np.array_equal(cache.read(tile["id"]), expected[f"{bits}-{number}"]), tile
            if version[0] != "2":
                assert np.abs(cache.probabilities(tile["id"]).sum(axis=0) - 1).max() < 1e-12
            else:
                assert (cache.logits(tile["id"]).max(axis=0) == 0).all()
print(sorted(name for name in sys.modules if name.split(".")[0] in ("kdpipe", "zarr")))
"""


@pytest.mark.long
@pytest.mark.parametrize("version", FOLDERS)
def test_a_reader_written_from_the_page_alone_reads_and_checks_the_golden_caches(version):
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(FOLDERS[version]), version, *map(str, BITS[version])],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize("file", ["manifest.json", "zarr.json", "tiles/Train/zarr.json", "tiles/Other/deep/c/0.0.0",
                                  "tiles/Other/deep/c/zarr.json"])  # fmt: skip
def test_the_plain_reader_notices_a_changed_byte(file, tmp_path):
    shutil.copytree(GOLDEN / "8-bits.zarr", tmp_path / "c")
    data = bytearray((tmp_path / "c" / file).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "c" / file).write_bytes(data)
    with pytest.raises((AssertionError, ValueError)):
        plain_reader.Cache(tmp_path / "c").read("Other/deep/c")


@pytest.mark.parametrize(("version", "bits"), CACHES)
def test_the_reader_reads_the_golden_caches_and_finds_them_whole(version, bits):
    path = FOLDERS[version] / f"{bits}-bits.zarr"
    cache = SoftTargetCache.open(str(path))
    with np.load(FOLDERS[version] / "expected.npz") as expected:
        for number, tile in enumerate(SIZES):
            units = cache.read_units(tile)
            assert units.dtype == np.dtype("uint16" if bits == 16 or version[0] == "5" else "uint8")
            np.testing.assert_array_equal(units, expected[f"{bits}-{number}"])
            if version[0] != "2":
                error = cache.read(tile) - golden_cache.probs(bits, *SIZES[tile], version)
            else:
                logits = golden_cache.logits(bits, *SIZES[tile])
                error = cache.read_logits(tile) - np.maximum(logits - logits.max(axis=0), -DEPTH[bits])
                np.testing.assert_allclose(plain_reader.Cache(path).logits(tile), cache.read_logits(tile), rtol=1e-6)
            assert np.abs(error).max() <= cache.manifest.error_bound
    found = check_full(open_storage(str(path)), cache.manifest, {})
    assert [(f.code, f.tile) for f in found] == [("extra-tile", tile) for tile in sorted(SIZES)]  # there are no images


@pytest.mark.parametrize("bits", BITS["4.0"])
def test_a_golden_cache_has_the_recipe_and_the_bound_of_the_page(bits):
    manifest = read_manifest(open_storage(str(GOLDEN / f"{bits}-bits.zarr")))
    assert manifest.recipe.levels == golden_cache.recipe(bits).levels == {6: 48, 8: 170, 16: 52428}[bits]
    assert differences(manifest.recipe, golden_cache.recipe(bits).model_dump()) == []
    bound = {6: 1 / 63, 8: 1 / 255, 16: 0.8 / 52428}[bits]
    assert manifest.error_bound == pytest.approx(bound + 1e-6, rel=1e-12)


@pytest.mark.parametrize("version", ["1.0", "3.0", "3.1"])
def test_a_cache_of_an_unreleased_format_is_refused_and_is_to_be_computed_anew(altered, version):
    path = altered(lambda m: m.update(format_version=version))
    message = rf"format version {version}, which only unreleased versions of kdpipe wrote .* compute it anew"
    with pytest.raises(UnknownFormat, match=rf"manifest\.json has {message}"):
        SoftTargetCache.open(path)
    root = Path(path, "zarr.json")
    root.write_text(root.read_text().replace('"format_version": "4.0"', f'"format_version": "{version}"'))
    for to_write in (True, False):
        with pytest.raises(UnknownFormat, match=rf"zarr\.json has {message}"):
            read_recipe(open_storage(path), to_write=to_write)


def test_levels_that_are_not_those_of_the_bits_are_damage(altered):
    with pytest.raises(CorruptCache, match="8 bits of 3 classes have 170 levels, not 171"):
        SoftTargetCache.open(altered(lambda m: m["recipe"].update(levels=171)))


def test_a_cache_begun_at_another_compression_level_keeps_its_tiles(tmp_path, monkeypatch):
    path, images = tmp_path / "c.zarr", {tile: tmp_path / f"{number}.png" for number, tile in enumerate(CACHED_SIZES)}
    for tile, image in images.items():
        image.write_bytes(tile.encode())
    first = next(iter(images))
    monkeypatch.setattr(tile_module, "ZSTD_LEVEL", 3)
    monkeypatch.setattr(
        tile_module, "_array_metadata", tile_module._array_metadata.__wrapped__
    )  # without its lru_cache
    fill(path, images, tiles=[first], finish=False)
    begun = {file: file.read_bytes() for file in (path / tile_path(first)).iterdir()}
    monkeypatch.undo()
    fill(path, images)
    assert {file: file.read_bytes() for file in begun} == begun
    for tile in images:
        (sharding,) = json.loads((path / tile_path(tile) / "zarr.json").read_text())["codecs"]
        zstd = sharding["configuration"]["codecs"][1]
        assert zstd["configuration"]["level"] == (3 if tile == first else 7)
    storage = open_storage(str(path))
    assert list(check_full(storage, read_manifest(storage), images)) == []


def without(content, names):
    return {key: value for key, value in content.items() if key not in names}


@pytest.mark.long
@pytest.mark.parametrize(("version", "bits"), CACHES)
def test_the_writer_writes_the_values_and_metadata_of_the_golden_caches(version, bits, tmp_path):
    """Compressed bytes are not compared: another release or level of zstd may compress otherwise."""
    golden_cache.write(tmp_path / "c", bits, version)
    folder = FOLDERS[version]
    golden = folder / f"{bits}-bits.zarr"
    compressed = ("shard_bytes", "shard_sha256", "metadata_sha256")
    with np.load(folder / "expected.npz") as expected:
        for number, tile in enumerate(SIZES):
            np.testing.assert_array_equal(plain_reader.Cache(tmp_path / "c").read(tile), expected[f"{bits}-{number}"])
    for file in sorted(path.relative_to(golden) for path in golden.rglob("*.json")):
        then, now = (json.loads((cache / file).read_text()) for cache in (golden, tmp_path / "c"))
        if file.parts[0] == "index":
            assert now == then, file
        elif file.name == "manifest.json":
            del then["checksum"], now["checksum"]  # cover what is left out below
            for manifest in (then, now):
                if "index" in manifest:
                    del manifest["index"]  # digests of the columns below, which are compared
                    continue
                manifest["tiles"] = [without(tile, compressed) for tile in manifest["tiles"]]
        elif then["node_type"] == "array":
            receipts = [content["attributes"].pop("kdpipe") for content in (then, now)]
            for content in (then, now):
                zstd = content["codecs"][0]["configuration"]["codecs"][1]["configuration"]
                assert zstd.pop("level") in (3, 7)
            # One millionth either way: the last bit of a logarithm depends on the machine.
            if version[0] != "2":
                lost = [np.array(receipt.pop("entropy_error")) for receipt in receipts]
                np.testing.assert_allclose(lost[0], lost[1], atol=1, rtol=0)
            assert all(len(receipt.pop("receipt_sha256")) == 64 for receipt in receipts)
            rows, columns = (-(-side // min(256, side)) for side in now["shape"][1:])
            assert len(receipts[1].pop("chunk_sha256", "")) == 32 * rows * columns * (version not in ("4.0", "2.0"))
            receipts[0].pop("chunk_sha256", None)  # compressed bytes, which older caches have no digests of
            assert without(receipts[0], compressed) == without(receipts[1], compressed)
        assert now == then, file
    assert sorted(p.relative_to(golden) for p in golden.rglob("*")) == sorted(
        p.relative_to(tmp_path / "c") for p in (tmp_path / "c").rglob("*")
    )


@pytest.fixture
def altered(tmp_path):
    """A function that changes the golden manifest, signs it again, and returns the cache's path."""

    def alter(change):
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        shutil.copytree(GOLDEN / "8-bits.zarr", tmp_path / "c")
        manifest = json.loads((tmp_path / "c/manifest.json").read_text())
        change(manifest)
        (tmp_path / "c/manifest.json").write_bytes(sign(manifest))
        return str(tmp_path / "c")

    return alter


def test_signing_an_unchanged_manifest_again_gives_the_same_bytes(altered):
    signed = Path(altered(lambda m: None), "manifest.json").read_bytes()
    assert signed == (GOLDEN / "8-bits.zarr/manifest.json").read_bytes()


def test_an_unknown_major_version_is_refused_before_anything_else_is_believed(altered, tmp_path):
    path = altered(lambda m: m.update(format_version="8.0"))
    message = r"manifest\.json has format version 8\.0, and this kdpipe reads 2\.x, 4\.x, 5\.x, 6\.x: install a kdpipe"
    with pytest.raises(UnknownFormat, match=message):
        SoftTargetCache.open(path)
    (tmp_path / "c/manifest.json").write_text('{"format_version": "7.3", "all": "else", "may": "differ"}')
    with pytest.raises(UnknownFormat, match=r"format version 7\.3"):
        SoftTargetCache.open(path)


@pytest.mark.parametrize("version", ["1", "1.0.0", "one", "1.x", "-1.0", "01.0", "", 1.0, None, ["1.0"]])
def test_an_invalid_version_is_damage(altered, version):
    with pytest.raises(CorruptCache, match=r"its format_version is .*, not MAJOR\.MINOR"):
        SoftTargetCache.open(altered(lambda m: m.update(format_version=version)))


def add_fields(manifest):
    manifest["coordinates"] = {"crs": "EPSG:4326"}
    for record in (manifest["recipe"], manifest["recipe"]["teachers"][0], *manifest["tiles"]):
        record["sharpness"] = 2.5


def resign_receipts(path):
    """Give the tiles of an altered cache receipts that fit its recipe, so that it is whole by the page."""

    def sha256(text):
        return hashlib.sha256(text.encode()).hexdigest()

    def canonical(content):
        return json.dumps(content, sort_keys=True, indent=1) + "\n"

    manifest = json.loads(Path(path, "manifest.json").read_text())
    digest = sha256(json.dumps(manifest["recipe"], sort_keys=True, separators=(",", ":")))
    for tile in manifest["tiles"]:
        file = Path(path, "tiles", tile["id"], "zarr.json")
        content = json.loads(file.read_text())
        receipt = content["attributes"]["kdpipe"]
        receipt.update(recipe_sha256=digest, weather="fair", receipt_sha256="")
        receipt["receipt_sha256"] = sha256(canonical(content))
        file.write_text(canonical(content))
        tile["metadata_sha256"] = sha256(canonical(content))
    Path(path, "manifest.json").write_bytes(sign(manifest))


def test_a_newer_minor_version_is_read_despite_the_fields_that_it_adds(altered):
    path = altered(lambda m: (add_fields(m), m.update(format_version="4.4")))
    resign_receipts(path)
    cache = SoftTargetCache.open(path)
    with np.load(GOLDEN / "expected.npz") as expected:
        for number, tile in enumerate(SIZES):
            np.testing.assert_array_equal(cache.read_units(tile), expected[f"8-{number}"])
    assert {f.code for f in check_full(open_storage(path), cache.manifest, {})} == {"extra-tile"}
    assert cache.manifest.fingerprint != SoftTargetCache.open(str(GOLDEN / "8-bits.zarr")).manifest.fingerprint


@pytest.mark.parametrize("place", [[], ["recipe"], ["recipe", "teachers", 0], ["tiles", 1]])
def test_added_fields_belong_to_the_checksum(altered, place):
    path = altered(lambda m: (add_fields(m), m.update(format_version="4.4")))
    content = json.loads(Path(path, "manifest.json").read_text())
    target = content
    for key in place:
        target = target[key]
    target["coordinates" if not place else "sharpness"] = 3
    Path(path, "manifest.json").write_text(json.dumps(content, sort_keys=True, indent=1) + "\n")
    with pytest.raises(CorruptCache, match="does not match its checksum"):
        SoftTargetCache.open(path)


def test_a_field_that_a_newer_recipe_adds_is_a_difference_from_any_configuration(altered):
    recipe = read_manifest(open_storage(altered(lambda m: (add_fields(m), m.update(format_version="4.4"))))).recipe
    assert differences(recipe, golden_cache.recipe(8).model_dump()) == [
        f"{field}: the cache has 2.5, and this kdpipe does not know that field: install the one that wrote the cache"
        for field in ("teacher.sharpness", "sharpness")
    ]


def test_the_same_fields_in_a_known_version_are_damage(altered):
    with pytest.raises(CorruptCache, match=r"unknown fields \['sharpness'\]"):
        SoftTargetCache.open(altered(add_fields))
    with pytest.raises(CorruptCache, match=r"unknown fields \['colour'\]"):
        SoftTargetCache.open(altered(lambda m: m.update(colour="red")))


@pytest.mark.parametrize(
    ("version", "held"), [("4.1", "this recipe"), ("4.2", "this recipe"), ("2.0", "soft"), ("5.2", "soft")]
)
def test_a_version_of_another_kind_of_cache_is_damage(altered, version, held):
    with pytest.raises(CorruptCache, match=f"format version {version} does not hold {held}"):
        SoftTargetCache.open(altered(lambda m: m.update(format_version=version)))


def test_a_cache_of_another_version_is_never_written_to(altered):
    path = altered(lambda m: m.update(format_version="4.4"))
    storage = open_storage(path)
    message = r"has format version 4\.4, which this kdpipe reads, but it writes 2\.0, 2\.1, 2\.2, .*5\.2, 5\.3, 6\.0"
    with pytest.raises(UnknownFormat, match=rf"manifest\.json {message}"):
        whole_manifest(storage)
    root = Path(path, "zarr.json")
    root.write_text(root.read_text().replace('"format_version": "4.0"', '"format_version": "4.4"'))
    for write in (
        lambda: read_recipe(storage),
        lambda: open_writer(storage, golden_cache.recipe(8), device="cpu", libraries={}).__enter__(),
    ):
        with pytest.raises(UnknownFormat, match=rf"zarr\.json {message}"):
            write()
