"""Real processes share one cache: they are killed at random moments, compete for the lock, or read while another writes."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.caches import RECIPE, distributions
from helpers.commands import run_command
from helpers.files import tree

from kdpipe.cache import CorruptCache, IncompleteCache, SoftTargetCache
from kdpipe.cache.index.records import ImageDigest
from kdpipe.cache.storage.base import open_storage
from kdpipe.cache.writer import open_writer
from kdpipe.configs import dump_config

pytestmark = pytest.mark.long

CPU = torch.device("cpu")

# Forks a process for each config that it reads, so that each one need not import torch again. Prints its number, then how it ended.
LAUNCHER = """
import os, sys
import numcodecs.zstd, rasterio, rich.progress, segmentation_models_pytorch, timm, torch, zarr, zarr.codecs, zarr.storage
import kdpipe.pipeline.precompute.run, kdpipe.pipeline.commands.actions.precompute, kdpipe.pipeline.dry_run
from kdpipe.pipeline.commands.main import main
torch.set_num_threads(1)
print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        sys.argv[1:] = ["precompute-teacher", "-c", line.strip()]
        main()
        os._exit(0)
    print(pid, flush=True)
    sys.stdin.readline()  # until then its number is nobody else's, even if it has ended
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Launcher:
    """Runs the real command `kdpipe precompute-teacher -c CONFIG`, one process at a time."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._line() == "ready"

    def _line(self):
        return self.process.stdout.readline().strip()

    def start(self, config):
        """Start a process and return its pid."""
        self.process.stdin.write(f"{config}\n")
        self.process.stdin.flush()
        return int(self._line())

    def end(self):
        """Wait for the last process; returns its exit code, or minus the signal that killed it."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return int(self._line())

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="module")
def launcher():
    started = Launcher()
    yield started
    started.close()


@pytest.fixture
def config_file(make_config, tmp_path):
    """A config file whose cache lies beside it, at `cache.zarr`."""
    (tmp_path / "config.yaml").write_text(dump_config(make_config()))
    return tmp_path / "config.yaml"


@pytest.fixture
def undisturbed(finished_cache):
    """Every file of the cache of an undisturbed run."""
    return tree(finished_cache)


def receipts(cache):
    return {path: path.read_bytes() for path in cache.glob("tiles/*/*/zarr.json")}


def kill_again_and_again(launcher, config_file, expected, kills):
    """Kill runs and start them again; returns the number of caches that were finished meanwhile."""
    cache, rng = config_file.with_name("cache.zarr"), np.random.default_rng(0)
    killed, finished, seen = 0, 0, {}
    while killed < kills or seen:
        pid = launcher.start(config_file)
        if killed < kills:
            # Most kills are meant for the time from the first write of a run to its last, a fraction of its seconds.
            wanted = len(seen) + int(rng.integers(4))
            deadline = time.monotonic() + 60
            while len(receipts(cache)) < min(wanted, 6) and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(float(rng.uniform(0, 0.1)))
            os.kill(pid, signal.SIGKILL)
        code = launcher.end()
        assert code in (0, -signal.SIGKILL)
        now = receipts(cache)
        assert {path: now.get(path) for path in seen} == seen  # no finished tile is lost
        seen = now
        killed += code != 0
        if code == 0:
            assert tree(cache) == expected  # nor is any partial file left
            shutil.rmtree(cache)
            finished, seen = finished + 1, {}
    assert killed == kills
    return finished


def test_a_command_that_is_killed_a_dozen_times_goes_on_to_the_bytes_of_an_undisturbed_one(
    launcher, config_file, undisturbed
):
    assert kill_again_and_again(launcher, config_file, undisturbed, 12) >= 1


@pytest.mark.slow
def test_a_command_that_is_killed_a_hundred_and_fifty_times_goes_on_to_the_same_bytes(
    launcher, config_file, undisturbed
):
    assert kill_again_and_again(launcher, config_file, undisturbed, 150) >= 10


def test_the_second_of_two_commands_is_told_who_writes_and_takes_over_once_that_is_killed(
    launcher, config_file, tmp_path, undisturbed
):
    pid = launcher.start(config_file)
    lock = tmp_path / "cache.zarr.lock"
    deadline = time.monotonic() + 60
    while not (lock.exists() and lock.read_text()) and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(pid, signal.SIGSTOP)  # with the lock held
    try:
        assert json.loads(lock.read_text())["pid"] == pid
        second = run_command("precompute-teacher", "-c", config_file)
    finally:
        os.kill(pid, signal.SIGKILL)
        assert launcher.end() == -signal.SIGKILL
    assert second.returncode == 3
    said = " ".join(second.stderr.split())
    assert f"is being written by process {pid} on {socket.gethostname()} since 20" in said
    assert "wait until it is done, or stop it" in said
    launcher.start(config_file)
    assert launcher.end() == 0
    assert tree(tmp_path / "cache.zarr") == undisturbed
    assert not lock.exists()


TILES = {f"Train/t{i}": (40, 30 + i) for i in range(4)}
VERSIONS = 2


def image(tile, version):
    """Digest of a stand-in for a source image, in one of two versions."""
    return ImageDigest(size_bytes=version + 1, sha256=f"{version}" * 64)


def targets(tile, version):
    return distributions(3, *TILES[tile], seed=10 * version + list(TILES).index(tile))


def write_version(path, version, tiles):
    """Write tiles in the order of stage one: completion is withdrawn first and declared last."""
    with open_writer(open_storage(path), RECIPE, device="cpu", libraries={}) as writer:
        writer.begin()
        writer.finish([writer.write(tile, targets(tile, version), image(tile, version)) for tile in tiles])


WRITER = """
import sys
from pathlib import Path
from test_processes import TILES, write_version
version = 1
while not Path(sys.argv[2]).exists():
    # Every second time with a tile less: the next run adds it to a finished cache.
    write_version(sys.argv[1], version % 2, list(TILES)[: 4 - version // 2 % 2])
    version += 1
"""


def test_readers_beside_a_writer_get_whole_tiles_of_the_opened_manifest_or_a_clear_error(tmp_path):
    """One reader opens the cache again and again, the other keeps it open while its tiles are replaced."""
    path, stop = str(tmp_path / "c.zarr"), tmp_path / "stop"
    write_version(path, 0, list(TILES))
    right = {}
    for version in range(VERSIONS):
        write_version(str(tmp_path / f"{version}.zarr"), version, list(TILES))
        cache = SoftTargetCache.open(str(tmp_path / f"{version}.zarr"))
        right |= {(tile, image(tile, version).sha256): cache.read(tile) for tile in TILES}
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, path, str(stop)],
        cwd=Path(__file__).parent,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    opened, later = ({"whole": 0, "not finished": 0, "rewritten": 0} for _ in range(2))
    kept = SoftTargetCache.open(path)

    def counts():
        return [seen[state] for seen in (opened, later) for state in ("whole", "not finished")]

    def read_all(cache, counts):
        versions = {record.id: record.image.sha256 for record in cache.manifest.tiles}
        for tile in cache.tile_ids:
            try:
                units = cache.read(tile)
            except IncompleteCache as err:
                assert f"tile {tile} of {path} cannot be read" in str(err)
                assert "a run has begun to write the cache since it was opened" in str(err)
                counts["not finished"] += 1
            except CorruptCache as err:
                # Between the two looks at it the writer may have come to the version that was opened.
                assert f"tile {tile} of {path} is " in str(err)
                counts["rewritten"] += 1
            else:
                np.testing.assert_array_equal(units, right[tile, versions[tile]])
                counts["whole"] += 1

    try:
        deadline = time.monotonic() + 60
        reads = 0
        while min(counts()) < 10 and time.monotonic() < deadline:
            reads += 1
            if reads % 20 == 0:
                kept = SoftTargetCache(kept._storage, kept.manifest)  # has read nothing yet, as a new worker
            read_all(kept, later)
            try:
                cache = SoftTargetCache.open(path)
            except IncompleteCache as err:
                assert f"the cache {path} is not finished" in str(err)
                opened["not finished"] += 1
                continue
            read_all(cache, opened)
    finally:
        stop.touch()
        assert writer.wait(timeout=120) == 0
    assert min(counts()) >= 10, (opened, later)


def test_a_reader_whose_cache_is_written_again_is_told_what_happened(tmp_path):
    """Both during the rewrite and after it, only the rewritten tile is refused; the others are read."""
    path = str(tmp_path / "c.zarr")
    write_version(path, 0, list(TILES))
    cache = SoftTargetCache.open(path)
    right = cache.read("Train/t1")
    cache.read("Train/t0")
    storage = open_storage(path)
    readers = [cache, SoftTargetCache(storage, cache.manifest)]
    with open_writer(storage, RECIPE, device="cpu", libraries={}) as writer:
        writer.begin()
        record = writer.write("Train/t0", targets("Train/t0", 1), image("Train/t0", 1))
        for reader in readers:
            with pytest.raises(
                IncompleteCache, match=r"tile Train/t0 of .* a run has begun to write .* open it again once"
            ):
                reader.read("Train/t0")
            np.testing.assert_array_equal(reader.read("Train/t1"), right)
        writer.finish([record, *cache.manifest.tiles[1:]])
    for reader in readers:
        with pytest.raises(
            CorruptCache,
            match=r"tile Train/t0 of .* was written again since the cache was opened .* open the cache again",
        ):
            reader.read("Train/t0")
        np.testing.assert_array_equal(reader.read("Train/t1"), right)
