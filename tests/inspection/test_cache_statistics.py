"""`kdpipe inspect CACHE --stats` gives the numbers of plain NumPy over whole arrays, in memory that does not grow with them."""

import csv
import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from helpers.golden_cache import GOLDEN, recipe
from helpers.plain_reader import Cache
from PIL import Image

from kdpipe.cache import CorruptCache, SoftTargetCache
from kdpipe.cache.index.records import ImageDigest
from kdpipe.cache.storage.base import open_storage
from kdpipe.cache.writer import open_writer
from kdpipe.configs.errors import ConfigError
from kdpipe.pipeline.commands.main import cli
from kdpipe.pipeline.inspection import statistics
from kdpipe.pipeline.inspection.statistics import TileStatistics, compute_statistics, find_outliers, write_table

CLASSES = ["water", "forest", "meadow"]


def whole(bits):
    """Probabilities of the golden cache by tile, float64 `(C, H, W)`, from a reader that shares no code with kdpipe."""
    cache = Cache(GOLDEN / f"{bits}-bits.zarr")
    return {tile["id"]: cache.probabilities(tile["id"]) for tile in cache.tiles}


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("block_px", [512, 96])
def test_every_number_is_numpys_over_whole_arrays(bits, block_px, monkeypatch):
    monkeypatch.setattr(statistics, "BLOCK_PX", block_px)
    monkeypatch.setattr(statistics, "TILES_AT_ONCE", 3)
    found = compute_statistics(SoftTargetCache.open(str(GOLDEN / f"{bits}-bits.zarr")))
    tiles = whole(bits)
    flat = np.concatenate([p.reshape(len(p), -1) for p in tiles.values()], axis=1)
    entropy = -(flat * np.log(np.where(flat > 0, flat, 1))).sum(axis=0)
    assert found.pixels == flat.shape[1]
    np.testing.assert_allclose(found.shares, flat.mean(axis=1), rtol=1e-12)
    np.testing.assert_allclose(
        found.argmax_shares, np.bincount(flat.argmax(axis=0), minlength=len(flat)) / found.pixels
    )
    assert found.entropy == pytest.approx(entropy.mean(), rel=1e-9)
    assert found.confidence == pytest.approx(flat.max(axis=0).mean(), rel=1e-9)
    expected = np.histogram(flat.max(axis=0), bins=20, range=(0, 1))[0]
    np.testing.assert_array_equal(found.confidence_histogram, expected)
    by_entropy = np.histogram(np.minimum(entropy, math.log(len(flat))), bins=20, range=(0, math.log(len(flat))))[0]
    np.testing.assert_array_equal(found.entropy_histogram, by_entropy)
    for tile, probs in zip(found.tiles, tiles.values(), strict=True):
        one = -(probs * np.log(np.where(probs > 0, probs, 1))).sum(axis=0)
        assert (tile.height, tile.width) == probs.shape[1:]
        assert tile.entropy == pytest.approx(one.mean(), rel=1e-9, abs=1e-12)
        np.testing.assert_allclose(tile.shares, probs.mean(axis=(1, 2)), rtol=1e-12)


def test_the_entropy_lost_to_rounding_is_that_of_the_receipts():
    found = compute_statistics(SoftTargetCache.open(str(GOLDEN / "8-bits.zarr")))
    receipts = {
        tile.tile: json.loads((GOLDEN / f"8-bits.zarr/tiles/{tile.tile}/zarr.json").read_text())["attributes"]["kdpipe"]
        for tile in found.tiles
    }  # fmt: skip
    blocks = [1e-6 * value for receipt in receipts.values() for row in receipt["entropy_error"] for value in row]
    assert found.largest_entropy_lost == pytest.approx(max(blocks, key=abs))
    assert found.shard_bytes == sum(receipt["shard_bytes"] for receipt in receipts.values())


def tile(name, entropy, water, size=100):
    return TileStatistics(name, 10, 10, size, entropy, 0.0, 0.0, 0.9, [water, 1 - water, 0.0], [1.0, 0.0, 0.0])


def test_outliers_are_those_of_the_modified_z_score_by_hand():
    entropies = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 5.0]
    tiles = [tile(f"t{i}", value, 0.1 * i) for i, value in enumerate(entropies)]
    outliers, without_spread = find_outliers(tiles, CLASSES)
    # Median 0.55, absolute deviations 0.05 … 0.45 and 4.45, their median 0.25.
    assert [(o.tile, o.figure, o.value) for o in outliers] == [("t9", "entropy", 5.0)]
    assert outliers[0].median == pytest.approx(0.55)
    assert outliers[0].score == pytest.approx(0.6745 * 4.45 / 0.25)
    assert without_spread == ["confidence", "bytes_per_pixel", "share meadow"]


def test_fewer_than_eight_tiles_have_no_outliers():
    assert find_outliers([tile(f"t{i}", 10.0**i, 0.5) for i in range(7)], CLASSES) == ([], [])


PEAK = """
import sys
import psutil
import threading, time
from kdpipe.cache import SoftTargetCache
from kdpipe.pipeline.inspection.statistics import compute_statistics

small, large = map(SoftTargetCache.open, sys.argv[1:])
process = psutil.Process()
peak, running = [0], [True]
def watch():
    while running[0]:
        peak[0] = max(peak[0], process.memory_info().rss)
        time.sleep(0.005)
compute_statistics(small)
before = process.memory_info().rss
threading.Thread(target=watch, daemon=True).start()
compute_statistics(large)
running[0] = False
print(peak[0] - before)
"""


@pytest.mark.long
def test_memory_is_that_of_the_blocks_in_flight_and_not_of_the_scene(tmp_path):
    """A scene of 12 MP and 3 classes, 294 MB as float64, after a small one as warm-up."""
    for name, side in (("small", 600), ("large", 3500)):
        probs = np.zeros((3, side, side), np.float32)
        probs[0], probs[1] = 0.75, 0.25
        with open_writer(open_storage(str(tmp_path / name)), recipe(8), device="cpu", libraries={}) as writer:
            writer.finish([writer.write("T/a", probs, ImageDigest(size_bytes=1, sha256="0" * 64))])
        del probs
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "small"), str(tmp_path / "large")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 150e6


@pytest.fixture(scope="module")
def dozen(tmp_path_factory):
    """Twelve similar tiles, and one whose teacher was uncertain everywhere."""
    path = tmp_path_factory.mktemp("dozen") / "c.zarr"
    rng = np.random.default_rng(0)
    with open_writer(open_storage(str(path)), recipe(8), device="cpu", libraries={}) as writer:
        records = []
        for number in range(13):
            alpha = [9.0, 2, 1] if number < 12 else [50.0, 50, 50]
            probs = rng.dirichlet(alpha, size=(40, 30 + number)).transpose(2, 0, 1).astype(np.float32)
            records.append(writer.write(f"T/{number:02}", probs, ImageDigest(size_bytes=1, sha256="0" * 64)))
        writer.finish(records)
    return path


def inspected(*arguments):
    return CliRunner().invoke(cli, ["inspect", *map(str, arguments)], catch_exceptions=False)


@pytest.mark.long
def test_the_command_prints_writes_and_draws_all_of_it(dozen, tmp_path):
    result = inspected(
        dozen, "--stats", "--json", tmp_path / "s.json", "--table", tmp_path / "s.csv", "--plot", tmp_path / "s.png"
    )
    assert result.exit_code == 0, result.output
    found = compute_statistics(SoftTargetCache.open(str(dozen)))
    content = json.loads((tmp_path / "s.json").read_text())
    assert content["statistics"] == json.loads(json.dumps(found.as_dict()))
    assert content["manifest"]["fingerprint"] in result.output
    for shown in (
        "water", f"{100 * found.shares[0]:.2f} %", f"entropy {found.entropy:.4f} nats", f"confidence {found.confidence:.4f}",
        f"{found.shard_bytes / found.pixels:.3f} bytes per pixel", "T/12", "measured by verify-cache --level parity",
    ):  # fmt: skip
        assert shown in result.output, shown
    assert {outlier["tile"] for outlier in content["statistics"]["outliers"]} >= {"T/12"}
    with (tmp_path / "s.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["tile"] for row in rows] == [record.tile for record in found.tiles]
    assert [float(row["entropy"]) for row in rows] == [record.entropy for record in found.tiles]
    assert [float(row["share forest"]) for row in rows] == [record.shares[1] for record in found.tiles]
    assert float(rows[12]["outlier_score"]) > 3.5
    assert rows[0]["argmax water"] == str(found.tiles[0].argmax_shares[0])
    with Image.open(tmp_path / "s.png") as picture:
        assert np.asarray(picture.convert("RGB")).std() > 10


def test_parquet_holds_the_same_rows(dozen, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is an extra")
    found = compute_statistics(SoftTargetCache.open(str(dozen)))
    write_table(found, tmp_path / "t.parquet")
    assert parquet.read_table(tmp_path / "t.parquet").to_pylist() == list(found.rows())


def test_options_that_do_not_fit_are_refused(dozen, tmp_path):
    (tmp_path / "w.pth").write_bytes(b"")
    for arguments, message in (
        ([tmp_path / "w.pth", "--stats"], "--stats is for a cache"),
        ([dozen, "--table", tmp_path / "t.csv"], "--table, --plot and --limit go with --stats"),
    ):
        result = inspected(*arguments)
        assert (result.exit_code, message in result.output) == (2, True)
    with pytest.raises(ConfigError, match=r"expected a name that ends in \.csv or \.parquet"):
        inspected(dozen, "--stats", "--table", tmp_path / "t.xls")


def test_parquet_without_pyarrow_names_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"Parquet needs pyarrow; install .*pip install '\.\[parquet\]'"):
        statistics.require_table_format(tmp_path / "t.parquet")


def test_a_damaged_tile_is_named_and_no_statistics_are_given(tmp_path):
    shutil.copytree(GOLDEN / "8-bits.zarr", tmp_path / "c")
    (tmp_path / "c/tiles/Other/deep/c/0.0.0").write_bytes(b"")
    with pytest.raises(CorruptCache, match="tile Other/deep/c .* is damaged"):
        compute_statistics(SoftTargetCache.open(str(tmp_path / "c")))
