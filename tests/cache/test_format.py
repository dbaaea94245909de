"""The format on disk: written down so that another language can read it, and read for as long as its major version lives."""

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
from helpers.golden_cache import BITS, GOLDEN, GOLDEN_KEY_ROWS, GOLDEN_LOGITS, GOLDEN_REST, SIZES

from kdpipe.cache import CorruptCache, SoftTargetCache, UnknownFormat
from kdpipe.cache import tile as layout
from kdpipe.cache.encoding.logits import DEPTH
from kdpipe.cache.encoding.simplex import error_bound
from kdpipe.cache.integrity import check_full
from kdpipe.cache.reader import read_manifest, read_recipe
from kdpipe.cache.recipe import differences
from kdpipe.cache.storage.base import open_storage
from kdpipe.cache.writer import open_writer, whole_manifest

FOLDERS = {"first": GOLDEN, "third": GOLDEN_REST, "soft": GOLDEN_KEY_ROWS}
SOFT = [(folder, bits) for kind, folder in FOLDERS.items() for bits in BITS[kind]]

PLAIN = """
import sys
from pathlib import Path
import numpy as np
from helpers import plain_reader

golden, kind, all_bits = Path(sys.argv[1]), sys.argv[2], map(int, sys.argv[3:])
with np.load(golden / "expected.npz") as expected:
    for bits in all_bits:
        cache = plain_reader.Cache(golden / f"{bits}-bits.zarr")
        for number, tile in enumerate(cache.manifest["tiles"]):
            assert np.array_equal(cache.read(tile["id"]), expected[f"{bits}-{number}"]), tile
            if kind != "logits":
                assert np.abs(cache.probabilities(tile["id"]).sum(axis=0) - 1).max() < 1e-12
            else:
                assert (cache.logits(tile["id"]).max(axis=0) == 0).all()
print(sorted(name for name in sys.modules if name.split(".")[0] in ("kdpipe", "zarr")))
"""


@pytest.mark.parametrize(
    ("golden", "kind"), [(GOLDEN_LOGITS, "logits"), *((folder, kind) for kind, folder in FOLDERS.items())]
)
def test_a_reader_written_from_the_page_alone_reads_and_checks_the_golden_cache(golden, kind):
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(golden), kind, *map(str, BITS[kind])],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize("file", ["manifest.json", "zarr.json", "tiles/Train/zarr.json", "tiles/Other/deep/c/0.0.0",
                                  "tiles/Other/deep/c/zarr.json"])  # fmt: skip
def test_that_reader_notices_a_changed_byte(file, tmp_path):
    shutil.copytree(GOLDEN / "8-bits.zarr", tmp_path / "c")
    data = bytearray((tmp_path / "c" / file).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "c" / file).write_bytes(data)
    with pytest.raises((AssertionError, ValueError)):
        plain_reader.Cache(tmp_path / "c").read("Other/deep/c")


@pytest.mark.parametrize(("golden", "bits"), SOFT)
def test_todays_reader_reads_the_golden_cache_and_finds_it_whole(golden, bits):
    path = golden / f"{bits}-bits.zarr"
    cache = SoftTargetCache.open(str(path))
    with np.load(golden / "expected.npz") as expected:
        for number, tile in enumerate(SIZES):
            units = cache.read_units(tile)
            assert units.dtype == np.dtype("uint16" if bits == 16 else "uint8")
            np.testing.assert_array_equal(units, expected[f"{bits}-{number}"])
            probs = golden_cache.probs(bits, *SIZES[tile])
            assert np.abs(cache.read(tile) - probs).max() <= cache.manifest.error_bound
    found = check_full(open_storage(str(path)), cache.manifest, {})
    assert [(f.code, f.tile) for f in found] == [("extra-tile", tile) for tile in sorted(SIZES)]  # there are no images


@pytest.mark.parametrize("bits", BITS["logits"])
def test_todays_reader_reads_the_golden_logits_and_finds_them_whole(bits):
    path = GOLDEN_LOGITS / f"{bits}-bits.zarr"
    cache = SoftTargetCache.open(str(path))
    with np.load(GOLDEN_LOGITS / "expected.npz") as expected:
        for number, tile in enumerate(SIZES):
            np.testing.assert_array_equal(cache.read_units(tile), expected[f"{bits}-{number}"])
            logits = golden_cache.logits(bits, *SIZES[tile])
            exact = np.maximum(logits - logits.max(axis=0), -DEPTH[bits])
            assert np.abs(cache.read_logits(tile) - exact).max() <= cache.manifest.error_bound
    found = check_full(open_storage(str(path)), cache.manifest, {})
    assert [(f.code, f.tile) for f in found] == [("extra-tile", tile) for tile in sorted(SIZES)]


@pytest.mark.parametrize(("folder", "bits"), SOFT)
def test_a_student_may_learn_from_a_cache_of_any_format(folder, bits):
    """What a configuration asks for today, such a cache says of itself as far as it can: its levels are its bits'."""
    recipe = read_manifest(open_storage(str(folder / f"{bits}-bits.zarr"))).recipe
    assert recipe.levels == (2**bits - 1 if folder == GOLDEN else golden_cache.recipe(bits).levels)
    assert differences(recipe, golden_cache.recipe(bits).model_dump()) == []


def test_levels_that_are_not_those_of_the_bits_are_damage(tmp_path):
    shutil.copytree(GOLDEN_REST / "8-bits.zarr", tmp_path / "c")
    manifest = json.loads((tmp_path / "c/manifest.json").read_text())
    manifest["recipe"]["levels"] = 171
    (tmp_path / "c/manifest.json").write_bytes(sign(manifest))
    with pytest.raises(CorruptCache, match="8 bits of 3 classes have 170 levels, not 171"):
        SoftTargetCache.open(str(tmp_path / "c"))


def test_a_cache_begun_at_the_level_of_an_earlier_version_goes_on_with_its_tiles_as_they_are(tmp_path, monkeypatch):
    path, images = tmp_path / "c.zarr", {tile: tmp_path / f"{number}.png" for number, tile in enumerate(CACHED_SIZES)}
    for tile, image in images.items():
        image.write_bytes(tile.encode())
    first = next(iter(images))
    monkeypatch.setattr(layout, "ZSTD_LEVEL", 3)
    monkeypatch.setattr(
        layout, "_array_metadata", layout._array_metadata.__wrapped__
    )  # nothing of that level is remembered
    fill(path, images, tiles=[first], finish=False)
    begun = {file: file.read_bytes() for file in (path / layout.tile_path(first)).iterdir()}
    monkeypatch.undo()
    fill(path, images)
    assert {file: file.read_bytes() for file in begun} == begun
    levels = {
        tile: json.loads((path / layout.tile_path(tile) / "zarr.json").read_text())["codecs"][0]["configuration"][
            "codecs"
        ][1]
        for tile in images
    }
    assert {tile: codec["configuration"]["level"] for tile, codec in levels.items()} == {
        tile: 3 if tile == first else 7 for tile in images
    }
    storage = open_storage(str(path))
    assert list(check_full(storage, read_manifest(storage), images)) == []


def lines_of(content, but=()):
    return {key: value for key, value in content.items() if key not in but}


@pytest.mark.parametrize(
    ("folder", "kind", "bits"),
    [
        *((GOLDEN_KEY_ROWS, "soft", bits) for bits in BITS["soft"]),
        *((GOLDEN_LOGITS, "logits", bits) for bits in BITS["logits"]),
    ],
)
def test_todays_writer_writes_what_the_golden_cache_holds(folder, kind, bits, tmp_path):
    """Values and metadata are compared, not bytes: another release of zstd, or another level, compresses otherwise, and is free to."""
    golden_cache.write(tmp_path / "c", bits, kind)
    golden = folder / f"{bits}-bits.zarr"
    compressed = ("shard_bytes", "shard_sha256", "metadata_sha256")
    with np.load(folder / "expected.npz") as expected:
        for number, tile in enumerate(SIZES):
            np.testing.assert_array_equal(plain_reader.Cache(tmp_path / "c").read(tile), expected[f"{bits}-{number}"])
    for file in sorted(path.relative_to(golden) for path in golden.rglob("*.json")):
        then, now = (json.loads((cache / file).read_text()) for cache in (golden, tmp_path / "c"))
        if file.name == "manifest.json":
            for manifest in (then, now):
                manifest["tiles"] = [lines_of(tile, compressed) for tile in manifest["tiles"]]
                del manifest["checksum"]  # vouches for those as well
        elif then["node_type"] == "array":
            receipts = [content["attributes"].pop("kdpipe") for content in (then, now)]
            for content in (then, now):
                zstd = content["codecs"][0]["configuration"]["codecs"][1]["configuration"]
                assert zstd.pop("level") in (3, 7)
            # One millionth either way: a logarithm's last bit is the machine's.
            if kind == "soft":
                lost = [np.array(receipt.pop("entropy_error")) for receipt in receipts]
                np.testing.assert_allclose(lost[0], lost[1], atol=1, rtol=0)
            assert all(len(receipt.pop("receipt_sha256")) == 64 for receipt in receipts)
            assert lines_of(receipts[0], compressed) == lines_of(receipts[1], compressed)
        assert now == then, file
    assert sorted(p.relative_to(golden) for p in golden.rglob("*")) == sorted(
        p.relative_to(tmp_path / "c") for p in (tmp_path / "c").rglob("*")
    )


def test_the_golden_caches_state_the_bound_of_the_page():
    for golden, bits, num_classes, levels in (
        (GOLDEN, 8, 3, 255), (GOLDEN, 16, 5, 65535),
        (GOLDEN_REST, 6, 4, 48), (GOLDEN_REST, 8, 3, 170), (GOLDEN_REST, 16, 5, 52428),
    ):  # fmt: skip
        manifest = json.loads((golden / f"{bits}-bits.zarr/manifest.json").read_text())
        assert manifest["error_bound"] == (1 - 1 / num_classes) / levels + 1e-6 == error_bound(levels, num_classes)
    for bits, bound in ((6, 1 / 63), (8, 1 / 255), (16, 0.8 / 52428)):
        manifest = json.loads((GOLDEN_KEY_ROWS / f"{bits}-bits.zarr/manifest.json").read_text())
        assert manifest["error_bound"] == pytest.approx(bound + 1e-6, rel=1e-12)


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


def test_signing_again_what_did_not_change_gives_the_same_bytes(altered):
    assert (
        Path(altered(lambda m: None), "manifest.json").read_bytes()
        == (GOLDEN / "8-bits.zarr/manifest.json").read_bytes()
    )


def test_an_unknown_major_version_is_refused_before_anything_else_is_believed(altered, tmp_path):
    path = altered(lambda m: m.update(format_version="5.0"))
    message = r"manifest\.json has format version 5\.0, and this kdpipe reads 1\.x and 2\.x and 3\.x and 4\.x: install a kdpipe"
    with pytest.raises(UnknownFormat, match=message):
        SoftTargetCache.open(path)
    (tmp_path / "c/manifest.json").write_text('{"format_version": "7.3", "all": "else", "may": "differ"}')
    with pytest.raises(UnknownFormat, match=r"format version 7\.3"):
        SoftTargetCache.open(path)


@pytest.mark.parametrize("version", ["1", "1.0.0", "one", "1.x", "-1.0", "01.0", "", 1.0, None, ["1.0"]])
def test_what_is_no_version_is_damage(altered, version):
    with pytest.raises(CorruptCache, match=r"its format_version is .*, not MAJOR\.MINOR"):
        SoftTargetCache.open(altered(lambda m: m.update(format_version=version)))


def add_fields(manifest):
    manifest["coordinates"] = {"crs": "EPSG:4326"}
    for record in (manifest["recipe"], manifest["recipe"]["teachers"][0], *manifest["tiles"]):
        record["sharpness"] = 2.5


def resign_receipts(path):
    """Give the tiles of an altered cache the receipts that its recipe asks for, so that it is whole by the page."""
    manifest = json.loads(Path(path, "manifest.json").read_text())
    digest = hashlib.sha256(json.dumps(manifest["recipe"], sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    for tile in manifest["tiles"]:
        file = Path(path, "tiles", tile["id"], "zarr.json")
        content = json.loads(file.read_text())
        content["attributes"]["kdpipe"].update(recipe_sha256=digest, weather="fair")
        file.write_text(json.dumps(content, sort_keys=True, indent=1) + "\n")
        tile["metadata_sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    Path(path, "manifest.json").write_bytes(sign(manifest))


def test_a_newer_minor_version_is_read_with_what_it_adds(altered):
    path = altered(lambda m: (add_fields(m), m.update(format_version="1.4")))
    resign_receipts(path)
    cache = SoftTargetCache.open(path)
    with np.load(GOLDEN / "expected.npz") as expected:
        for number, tile in enumerate(SIZES):
            np.testing.assert_array_equal(cache.read_units(tile), expected[f"8-{number}"])
    assert {f.code for f in check_full(open_storage(path), cache.manifest, {})} == {"extra-tile"}
    assert cache.manifest.fingerprint != SoftTargetCache.open(str(GOLDEN / "8-bits.zarr")).manifest.fingerprint


@pytest.mark.parametrize("place", [[], ["recipe"], ["recipe", "teachers", 0], ["tiles", 1]])
def test_added_fields_belong_to_the_checksum(altered, place):
    path = altered(lambda m: (add_fields(m), m.update(format_version="1.4")))
    content = json.loads(Path(path, "manifest.json").read_text())
    target = content
    for key in place:
        target = target[key]
    target["coordinates" if not place else "sharpness"] = 3
    Path(path, "manifest.json").write_text(json.dumps(content, sort_keys=True, indent=1) + "\n")
    with pytest.raises(CorruptCache, match="does not match its checksum"):
        SoftTargetCache.open(path)


def test_what_a_newer_recipe_adds_is_named_as_a_difference_from_any_configuration(altered):
    recipe = read_manifest(open_storage(altered(lambda m: (add_fields(m), m.update(format_version="1.4"))))).recipe
    assert differences(recipe, golden_cache.recipe(8).model_dump()) == [
        f"{field}: the cache has 2.5, and this kdpipe does not know that field: install the one that wrote the cache"
        for field in ("teacher.sharpness", "sharpness")
    ]


def test_the_same_fields_in_a_known_version_are_damage(altered):
    with pytest.raises(CorruptCache, match=r"unknown fields \['sharpness'\]"):
        SoftTargetCache.open(altered(add_fields))
    with pytest.raises(CorruptCache, match=r"unknown fields \['colour'\]"):
        SoftTargetCache.open(altered(lambda m: m.update(colour="red")))


def test_a_version_of_recorded_views_that_holds_none_is_damage(altered):
    with pytest.raises(CorruptCache, match=r"format version 1\.1 does not hold whole tiles"):
        SoftTargetCache.open(altered(lambda m: m.update(format_version="1.1")))


def test_nobody_writes_into_a_cache_of_another_version(altered):
    path = altered(lambda m: m.update(format_version="1.4"))
    storage = open_storage(path)
    message = r"has format version 1\.4, which this kdpipe reads, but it writes 2\.0, 2\.1, 4\.0, 4\.1"
    with pytest.raises(UnknownFormat, match=rf"manifest\.json {message}"):
        whole_manifest(storage)
    root = Path(path, "zarr.json")
    root.write_text(root.read_text().replace('"format_version": "1.0"', '"format_version": "1.4"'))
    for write in (
        lambda: read_recipe(storage),
        lambda: open_writer(storage, golden_cache.recipe(8), device="cpu", libraries={}).__enter__(),
    ):
        with pytest.raises(UnknownFormat, match=rf"zarr\.json {message}"):
            write()
