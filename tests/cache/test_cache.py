"""The cache: exact integers, whole tiles, and no damage that goes unnoticed."""

import errno
import itertools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr
from helpers.caches import RECIPE, SIZES, distributions, fill
from helpers.files import tree
from hypothesis import given, settings
from hypothesis import strategies as st

from kdpipe.cache import CacheLocked, CorruptCache, IncompleteCache, SoftTargetCache, StaleCache
from kdpipe.cache.encoding.simplex import (
    FLOAT32_SLACK,
    decode,
    encode,
    entropy_error,
    error_bound,
    levels_of,
    storage_type,
)
from kdpipe.cache.images import digest_image
from kdpipe.cache.integrity import check_full
from kdpipe.cache.storage import local as storage_module
from kdpipe.cache.storage.base import open_storage
from kdpipe.cache.storage.local import LocalStorage
from kdpipe.cache.writer import finished_tiles, open_writer, whole_manifest
from kdpipe.configs.errors import CacheError, DiskFull


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=2, max_size=9), st.sampled_from([4, 6, 8, 16]))
def test_integers_sum_exactly_and_stay_within_the_bound(weights, bits):
    weights = np.array(weights, dtype=np.float64) + 1e-6
    probs = (weights / weights.sum()).astype(np.float32)[:, None, None]
    levels = levels_of(bits, len(weights))
    units = encode(probs, levels)
    assert units.dtype == storage_type(bits)
    assert int(units.sum(dtype=np.int64)) == levels < np.iinfo(units.dtype).max
    largest = np.abs(decode(units, levels) - probs).max()
    assert largest <= error_bound(levels, len(weights)) <= 1 / (2**bits - 1) + 2 * FLOAT32_SLACK


def largest_remainder(probs, total):
    """Hamilton's method for one pixel, as one would do it by hand."""
    scaled = [float(np.float32(p) * np.float32(total)) for p in probs]
    units = [int(s) for s in scaled]
    order = sorted(range(len(probs)), key=lambda i: (-(scaled[i] - units[i]), i))
    for i in order[: total - sum(units)]:
        units[i] += 1
    return units


@pytest.mark.parametrize("levels", [213, 255, 65535])
def test_rounding_is_by_largest_remainder_ties_to_the_lower_class(levels):
    probs = distributions(5, 6, 7)
    probs[:, 0, 0] = 0.2
    probs[:, 0, 1] = [0.5, 0.5, 0, 0, 0]
    units = encode(probs, levels)
    for y, x in itertools.product(range(6), range(7)):
        assert units[:, y, x].tolist() == largest_remainder(probs[:, y, x], levels)
    assert units[:, 0, 1].tolist() == [levels // 2 + 1, levels // 2, 0, 0, 0]


def test_the_bound_is_reached_so_that_it_could_not_be_smaller():
    probs = np.full((6, 1, 1), 1 / 6, dtype=np.float32)
    probs[:, 0, 0] = (np.array([42, 42, 42, 42, 43, 43]) + np.array([1, 1, 1, 1, 1, 1]) / 6 * 1) / 255
    error = np.abs(decode(encode(probs, 255), 255) - probs).max()
    assert 0.99 * error_bound(255, 6) < error <= error_bound(255, 6)


@pytest.mark.parametrize(
    ("bits", "num_classes", "levels"),
    [(8, 2, 128), (8, 3, 170), (8, 6, 213), (6, 6, 53), (4, 6, 13), (16, 6, 54613), (8, 255, 254), (8, 256, 254)],
)
def test_no_fewer_levels_keep_the_bound_that_the_bits_promise(bits, num_classes, levels):
    assert levels_of(bits, num_classes) == levels
    promised = 1 / (2**bits - 1)
    assert error_bound(levels - 1, num_classes) - FLOAT32_SLACK > promised
    if num_classes < 256:  # more classes than a byte has values: 255 is taken, and the bound as stated a little larger
        assert error_bound(levels, num_classes) - FLOAT32_SLACK <= promised * (1 + 1e-12)


@pytest.mark.parametrize("bad", [np.nan, -0.5, 0.9])
def test_what_is_no_distribution_is_refused(bad):
    probs = distributions(3, 4, 5)
    probs[1, 2, 3] = bad
    with pytest.raises(ValueError, match="must be distributions over axis 0"):
        encode(probs, 255)


def entropy_lost(probs, decoded):
    """H(p) - H(decoded) of every pixel, by the textbook."""
    stored = decoded.astype(float)
    exact, rounded = (-(p * np.log(np.where(p > 0, p, 1))).sum(axis=0) for p in (probs.astype(float), stored))
    return exact - rounded


@pytest.mark.parametrize("levels", [192, 65535])
def test_entropy_error_is_the_mean_difference_of_entropies_block_by_block(levels):
    probs = distributions(4, 70, 131, sharpness=6.0)
    units = encode(probs, levels)
    lost = entropy_lost(probs, decode(units, levels))
    blocks = entropy_error(probs, units, levels)
    assert blocks.shape == (2, 3)
    for row, column in itertools.product(range(2), range(3)):
        expected = lost[row * 64 : row * 64 + 64, column * 64 : column * 64 + 64].mean()
        assert blocks[row, column] == pytest.approx(expected, abs=1e-7)


def test_a_scene_encoded_band_by_band_has_the_same_values(monkeypatch):
    probs = distributions(5, 300, 70)
    units, lost = encode(probs, 255), entropy_error(probs, encode(probs, 255), 255)
    monkeypatch.setattr(
        "kdpipe.cache.encoding.simplex.BAND_PX", 64 * 70 * 2
    )  # bands of two blocks: 128, 128 and 44 rows
    np.testing.assert_array_equal(encode(probs, 255), units)
    np.testing.assert_array_equal(entropy_error(probs, units, 255), lost)


@pytest.mark.parametrize("window", [(0, 0, 70, 131), (64, 64, 6, 64), (10, 100, 57, 31), (69, 130, 1, 1)])
def test_a_windows_entropy_error_weighs_each_block_by_the_pixels_it_has_there(window, tmp_path, images):
    probs = distributions(3, 70, 131, sharpness=6.0)
    with open_writer(open_storage(str(tmp_path / "c.zarr")), RECIPE, device="cpu", libraries={}) as writer:
        writer.finish([writer.write("Train/a", probs, digest_image(images["Train/a"]))])
    cache = SoftTargetCache.open(str(tmp_path / "c.zarr"))
    by_pixel = np.zeros((70, 131))
    for row, column in itertools.product(range(2), range(3)):
        block = np.s_[row * 64 : row * 64 + 64, column * 64 : column * 64 + 64]
        by_pixel[block] = entropy_lost(probs, cache.read("Train/a"))[block].mean()
    y, x, h, w = window
    assert cache.entropy_error("Train/a", window) == pytest.approx(by_pixel[y : y + h, x : x + w].mean(), abs=1e-6)
    with pytest.raises(ValueError, match="is not within tile Train/a of 70 × 131 px"):
        cache.entropy_error("Train/a", (0, 0, 71, 1))


@pytest.fixture
def cache(tmp_path, images):
    fill(tmp_path / "c.zarr", images)
    return SoftTargetCache.open(str(tmp_path / "c.zarr"))


@pytest.mark.parametrize("url", ["{tmp}/c.zarr", "memory://kdpipe-tests/c.zarr"])
def test_what_is_written_is_read_within_the_bound_whole_and_by_window(url, tmp_path, images):
    url = url.format(tmp=tmp_path)
    fill(url, images)
    cache = SoftTargetCache.open(url)
    assert cache.tile_ids == list(SIZES)
    for number, (tile, size) in enumerate(SIZES.items()):
        whole = cache.read(tile)
        assert whole.dtype == np.float32
        np.testing.assert_allclose(whole.sum(axis=0), 1, atol=1e-6)
        assert np.abs(whole - distributions(3, *size, seed=number)).max() <= cache.manifest.error_bound
    np.testing.assert_array_equal(cache.read("Other/d", (250, 200, 40, 57)), cache.read("Other/d")[:, 250:290, 200:257])
    with pytest.raises(ValueError, match=r"is not within tile Other/c of 1 × 1 px"):
        cache.read("Other/c", (0, 0, 2, 1))
    with pytest.raises(KeyError, match="no tile 'Train/z'"):
        cache.read("Train/z")


def test_plain_zarr_reads_the_documented_rule(cache, tmp_path):
    group = zarr.open_group(tmp_path / "c.zarr", mode="r")
    decoding = (
        "stored: value minus that of the row above, modulo 256, but in every 64th row from the first; "
        "p = value / 170; 255 is what the pixel's other values leave of 170; axes: class, row, column"
    )
    assert group.attrs["kdpipe"]["decoding"] == decoding
    array = group["tiles/Other/d"]
    value = np.concatenate([np.cumsum(array[:, y : y + 64], axis=1, dtype="u1") for y in range(0, 300, 64)], axis=1)
    value = value.astype(np.float32)
    value = np.where(value == 255, 170 - np.where(value == 255, 0, value).sum(axis=0), value)
    np.testing.assert_array_equal(value / np.float32(170), cache.read("Other/d"))
    assert array.shards == (3, 512, 512)
    assert [type(codec).__name__ for codec in array.compressors] == ["ZstdCodec", "Crc32cCodec"]
    assert sorted(p.name for p in (tmp_path / "c.zarr/tiles/Other/d").iterdir()) == ["0.0.0", "zarr.json"]


def test_only_the_chunks_of_a_window_are_decoded(cache, tmp_path):
    """After the digest check, the last chunk is broken behind the reader's back: windows elsewhere still read."""
    cache.read("Other/d")
    shard = tmp_path / "c.zarr/tiles/Other/d/0.0.0"
    data = bytearray(shard.read_bytes())
    data[10] ^= 255
    shard.write_bytes(data)
    with pytest.raises(CorruptCache, match="tile Other/d .* its chunks cannot be decoded"):
        cache.read("Other/d", (0, 0, 10, 10))
    assert cache.read("Other/d", (260, 0, 10, 10)).shape == (3, 10, 10)


def test_interrupted_and_resumed_in_another_order_the_bytes_are_the_same(tmp_path, images):
    fill(tmp_path / "whole.zarr", images)
    fill(tmp_path / "parts.zarr", images, tiles=["Other/d"], finish=False)
    with pytest.raises(IncompleteCache, match="is not finished"):
        SoftTargetCache.open(str(tmp_path / "parts.zarr"))
    fill(tmp_path / "parts.zarr", images, tiles=["Train/b", "Other/c"], finish=False)
    fill(tmp_path / "parts.zarr", images)
    assert tree(tmp_path / "parts.zarr") == tree(tmp_path / "whole.zarr")


class Crash(Exception):
    pass


def test_a_crash_at_any_file_operation_leaves_a_cache_that_goes_on_to_the_same_bytes(tmp_path, images, monkeypatch):
    fill(tmp_path / "whole.zarr", images)
    expected = tree(tmp_path / "whole.zarr")
    real = {"fsync": os.fsync, "replace": Path.replace, "mkdir": Path.mkdir, "unlink": Path.unlink}
    for point in itertools.count():
        calls = itertools.count()

        def crashing(operation, calls=calls, point=point):
            def run(*args, **kwargs):
                if next(calls) == point:
                    raise Crash
                return operation(*args, **kwargs)

            return run

        path = tmp_path / f"crash{point}.zarr"
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", crashing(real["fsync"]))
            patch.setattr(Path, "replace", crashing(real["replace"]))
            try:
                fill(path, images)
            except Crash:
                crashed = True
            else:
                crashed = False
        fill(path, images)
        assert tree(path) == expected, point
        if not crashed:
            break
    assert point > 40


def test_a_full_disk_is_named_and_leaves_no_half_file(tmp_path, monkeypatch):
    storage = LocalStorage(tmp_path)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull, match=r"no room for 3 bytes of .*what is finished is kept"):
        storage.write("a", b"abc")
    assert list(tmp_path.iterdir()) == []


def flips(path, rng, count):
    size = path.stat().st_size
    return range(size) if size <= count else sorted(rng.choice(size, count, replace=False))


def test_every_flipped_byte_is_found(cache, tmp_path, images):
    """In every file of the cache: all bytes of small files, forty of each large one."""
    root = tmp_path / "c.zarr"
    rng = np.random.default_rng(0)
    storage = open_storage(str(root))
    tried = 0
    for file in sorted(p for p in root.rglob("*") if p.is_file() and "Train/a" not in str(p)):
        before = file.read_bytes()
        for position in flips(file, rng, 40):
            data = bytearray(before)
            data[position] ^= 1 << int(rng.integers(8))
            file.write_bytes(data)
            if file.name == "manifest.json":
                with pytest.raises(CorruptCache):
                    SoftTargetCache.open(str(root))
            else:
                assert check_full(storage, cache.manifest, images), (file, position)
            tried += 1
        file.write_bytes(before)
    assert check_full(storage, cache.manifest, images) == []
    assert tried > 300


def swap(root):
    one, two = root / "tiles/Train/a/0.0.0", root / "tiles/Train/b/0.0.0"
    first = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(first)


def swap_folders(root):
    (root / "tiles/Train/a").rename(root / "x")
    (root / "tiles/Train/b").rename(root / "tiles/Train/a")
    (root / "x").rename(root / "tiles/Train/b")


@pytest.mark.parametrize(
    "damage",
    [
        swap,
        swap_folders,
        lambda root: (root / "tiles/Train/a/0.0.0").unlink(),
        lambda root: (root / "tiles/Train/a/zarr.json").unlink(),
        lambda root: (root / "tiles/Train/a/0.0.0").write_bytes(b""),
        lambda root: (root / "tiles/Train/a/0.0.0").write_bytes((root / "tiles/Train/a/0.0.0").read_bytes()[:-5]),
    ],
)
def test_a_reader_names_a_damaged_tile_rather_than_return_wrong_numbers(cache, tmp_path, images, damage):
    damage(tmp_path / "c.zarr")
    with pytest.raises(CorruptCache, match="tile Train/a of .* is damaged"):
        SoftTargetCache.open(str(tmp_path / "c.zarr")).read("Train/a", (0, 0, 5, 5))
    found = check_full(open_storage(str(tmp_path / "c.zarr")), cache.manifest, images)
    assert "Train/a" in {finding.tile for finding in found}


def test_files_that_do_not_belong_are_found(cache, tmp_path, images):
    (tmp_path / "c.zarr/tiles/Train/a/1.0.0").write_bytes(b"x")
    found = check_full(open_storage(str(tmp_path / "c.zarr")), cache.manifest, images)
    assert [(f.code, f.message) for f in found] == [("stray-file", "tiles/Train/a/1.0.0 does not belong to the cache")]


def test_another_recipe_is_refused_by_field(cache, tmp_path, images):
    with pytest.raises(StaleCache, match="temperature: the cache has 2.0, the configuration says 1.0"):
        fill(tmp_path / "c.zarr", images, recipe=RECIPE.model_copy(update={"temperature": 1.0}))


def test_a_folder_that_is_no_cache_is_left_alone(tmp_path, images):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(CorruptCache, match="holds files, but no zarr.json"):
        finished_tiles(open_storage(str(tmp_path / "mine")), RECIPE, images, None)


def read_in_worker(cache, queue):
    queue.put(cache.read("Train/a").sum().item())


def test_a_cache_travels_to_spawned_workers(cache):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    expected = cache.read("Train/a").sum().item()
    worker = context.Process(target=read_in_worker, args=(cache, queue))
    worker.start()
    assert queue.get(timeout=60) == expected
    worker.join()
    queue.close()
    queue.join_thread()
    assert pickle.loads(pickle.dumps(cache)).tile_ids == cache.tile_ids


def test_a_forked_reader_of_a_remote_cache_is_told_instead_of_hanging(images, monkeypatch):
    fill("memory://kdpipe-tests/forked.zarr", images)
    cache = SoftTargetCache.open("memory://kdpipe-tests/forked.zarr")
    cache.read("Train/a")
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(CacheError, match=r"connections hang after a fork: .*='spawn' or 'forkserver'"):
        cache.read("Train/a")


HOLD = """
import sys, time
from kdpipe.cache.storage.lock import writer_lock
from kdpipe.cache.storage.base import open_storage
with writer_lock(open_storage(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_writer_at_a_time_and_a_killed_ones_lock_is_free(tmp_path, images):
    path = tmp_path / "c.zarr"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(CacheLocked, match=rf"is being written by process {holder.pid} on .* since 20"):
        fill(path, images)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    fill(path, images)
    assert not path.with_name("c.zarr.lock").exists()


def test_no_thread_builds_on_a_folder_that_another_has_made_and_not_synced(tmp_path, monkeypatch):
    """After a power cut the folder could be gone, and with it a tile that was called finished."""
    storage = open_storage(str(tmp_path / "c"))
    made, go_on, sync = threading.Event(), threading.Event(), storage_module.sync_folder

    def slow_once(folder):
        if not made.is_set():
            made.set()
            assert go_on.wait(60)
        sync(folder)

    monkeypatch.setattr(storage_module, "sync_folder", slow_once)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(storage.write, "tiles/a/0", b"1")
        assert made.wait(60)
        second = threads.submit(storage.write, "tiles/b/0", b"2")
        time.sleep(0.2)
        assert not second.done()
        go_on.set()
        first.result()
        second.result()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the disk that is always full is Linux's")
def test_a_disk_without_room_for_the_lock_is_said_to_be_full(tmp_path, images):
    (tmp_path / "c.zarr.lock").symlink_to("/dev/full")
    with pytest.raises(DiskFull, match=r"no room for .*c\.zarr\.lock.*make room and run the same command again"):
        fill(tmp_path / "c.zarr", images)
    assert not (tmp_path / "c.zarr.lock").is_symlink()
    fill(tmp_path / "c.zarr", images)


def test_a_changed_image_makes_its_tile_unfinished(cache, tmp_path, images):
    storage = open_storage(str(tmp_path / "c.zarr"))
    assert set(finished_tiles(storage, RECIPE, images, whole_manifest(storage))) == set(SIZES)
    time.sleep(0.01)
    images["Train/a"].write_bytes(b"X" + images["Train/a"].read_bytes()[1:])
    assert set(finished_tiles(storage, RECIPE, images, whole_manifest(storage))) == set(SIZES) - {"Train/a"}
    (tmp_path / "c.zarr/manifest.json").unlink()
    assert set(finished_tiles(storage, RECIPE, images, whole_manifest(storage))) == set(SIZES) - {"Train/a"}


def test_threads_that_find_the_same_file_in_the_place_of_a_folder_take_it_away_once(tmp_path, monkeypatch):
    """Every tile below it is written again at once, each by a thread that sees the file."""
    (tmp_path / "tiles").write_bytes(b"no folder")
    is_file = Path.is_file

    def seen_for_a_while(path):
        found = is_file(path)
        time.sleep(0.05)
        return found

    monkeypatch.setattr(Path, "is_file", seen_for_a_while)
    storage = LocalStorage(tmp_path)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda n: storage.write(f"tiles/{n}/0.0.0", b"shard"), range(4)))
    assert [storage.read(f"tiles/{n}/0.0.0") for n in range(4)] == [b"shard"] * 4
