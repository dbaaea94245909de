"""A disk that is full, read-only, without locks or without syncing: told in one paragraph, and what was there stays."""

import errno
import fcntl
import os
import resource
import shutil
from contextlib import contextmanager

import pytest
import torch
from helpers.files import tree
from helpers.odd_files import fifo, mounted

from kdpipe.cache import CacheUnreachable
from kdpipe.configs import files
from kdpipe.configs.errors import ConfigError, DiskFull, NoLocks
from kdpipe.configs.files import make_folder, write_atomically, write_file
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.runs.checkpoint import Position, save
from kdpipe.pipeline.verify.gate import verify

CPU = torch.device("cpu")
pytestmark = pytest.mark.timeout(120)  # what waits for a FIFO waits for ever


@contextmanager
def largest_file(size_bytes):
    """`ulimit -f` during the block."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_costs_nothing_that_was_there(make, tiny_disk, tmp_path):
    config = make(cache__path=str(tiny_disk / "cache.zarr"))
    precompute(make(), CPU)
    (tiny_disk / "filler").write_bytes(bytes(80_000))
    with pytest.raises(
        DiskFull,
        match=r"no room for .*: its disk is full \(No space left on device; \d+ bytes are free\); make room and",
    ):
        precompute(config, CPU)
    assert (tiny_disk / "thesis").read_text() == "my own"
    assert not list(tiny_disk.rglob("*.partial"))
    (tiny_disk / "filler").unlink()
    precompute(config, CPU)
    assert tree(tiny_disk / "cache.zarr") == tree(tmp_path / "cache.zarr")


def writers(place):
    """Ways of writing a file of some 200 kB that is there already."""
    content = os.urandom(200_000)
    state = torch.nn.Linear(200, 200)
    optimizer = torch.optim.SGD(state.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    yield lambda: write_file(place, content)
    yield lambda: save(place, state, optimizer, scheduler, {}, Position(), {})


@pytest.mark.parametrize("number", [0, 1], ids=["a file", "a checkpoint"])
@pytest.mark.parametrize("fault", ["full", "ulimit -f"])
def test_a_file_that_does_not_fit_leaves_the_one_before(number, fault, tiny_disk, tmp_path):
    place = (tiny_disk if fault == "full" else tmp_path) / "best.ckpt"
    place.write_text("the one before")
    write = list(writers(place))[number]
    if fault == "full":
        with pytest.raises(DiskFull, match=r"no room for .*best\.ckpt: its disk is full \(No space left on device"):
            write()
    else:
        with (
            largest_file(50_000),
            pytest.raises(DiskFull, match=r"no room for .*best\.ckpt: the file would be larger .*`ulimit -f`"),
        ):
            write()
    assert place.read_text() == "the one before"
    assert sorted(path.name for path in place.parent.iterdir() if path.name != "disk") in (
        ["best.ckpt"],
        ["best.ckpt", "thesis"],
    )


def test_a_cache_with_a_limit_of_the_size_of_files_is_told_and_goes_on_without(make, tmp_path):
    with largest_file(200), pytest.raises(DiskFull, match="raise the limit"):
        precompute(make(), CPU)
    assert precompute(make(), CPU).computed == 3
    assert verify(make(), "full", CPU).passes


def test_a_read_only_cache_is_read_and_a_write_into_it_is_told(finished, tmp_path, read_only, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    shutil.copytree(tmp_path / "cache.zarr", tmp_path / "sealed/cache.zarr")
    config = finished(cache__path=str(tmp_path / "sealed/cache.zarr"))
    read_only(tmp_path / "sealed")
    for level in ("quick", "full"):
        assert verify(config, level, CPU).passes
    assert precompute(config, CPU).computed == 0
    (tmp_path / "data/Mine/images/t2.tif").unlink()
    with pytest.raises(
        CacheUnreachable,
        match=r"failed, as its file system is mounted read-only \(Read-only file system\)",
    ):
        precompute(config, CPU)


def test_a_cache_whose_parent_cannot_be_written_is_computed_all_the_same(make, tmp_path, monkeypatch):
    """A container with a read-only root, and the cache mounted into it: only the name of the holder has no place."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "root/cache.zarr").mkdir(parents=True)
    (tmp_path / "volume").mkdir()
    with mounted(tmp_path / "root", "--bind", "-o", "ro", str(tmp_path / "root")) as root:
        with mounted(root / "cache.zarr", "--bind", str(tmp_path / "volume")):
            config = make(cache__path=str(root / "cache.zarr"))
            assert precompute(config, CPU).computed == 3
            assert verify(config, "full", CPU).passes
        assert [path.name for path in root.iterdir()] == ["cache.zarr"]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS], ids=errno.errorcode.get)
def test_a_file_system_without_locks_is_told(make, tmp_path, monkeypatch, code):
    def flock(descriptor, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(NoLocks, match=rf"has no locks \({os.strerror(code)}\)"):
        precompute(make(), CPU)
    assert not (tmp_path / "cache.zarr").exists()


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_a_file_system_that_cannot_sync_is_written_all_the_same_and_it_is_said_once(
    make, tmp_path, monkeypatch, caplog, code
):
    def fsync(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files, "_unsynced", set())
    monkeypatch.setattr(os, "fsync", fsync)
    assert precompute(make(), CPU).computed == 3
    assert verify(make(), "full", CPU).passes
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [
        "note: this file system cannot be told to write to the disk at once"
    ]


def test_a_protected_file_and_the_target_of_a_link_are_what_they_were(tmp_path, monkeypatch):
    (tmp_path / "scores.json").symlink_to("real.json")
    write_file(tmp_path / "scores.json", "new")
    assert (tmp_path / "scores.json").is_symlink()
    assert (tmp_path / "real.json").read_text() == "new"
    write_file("/dev/null", "x")
    with pytest.raises(ConfigError, match="it is a FIFO, not a file"):
        fifo(tmp_path / "fifo")
        write_file(tmp_path / "fifo", "x")
    with pytest.raises(DiskFull, match=r"no room for /dev/full: its disk is full"):
        write_file("/dev/full", "x")
    with pytest.raises(ConfigError, match=r"making the folder .* failed, as something else is there"):
        make_folder(tmp_path / "real.json")
    name = "ü" * 127  # 254 bytes: no room for the ending of a partial file
    write_file(tmp_path / name, "x")
    assert (tmp_path / name).read_text() == "x"
    with pytest.raises(RuntimeError, match="of a library"), write_atomically(tmp_path / "real.json"):
        raise RuntimeError("of a library")
