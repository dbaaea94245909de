"""A cache is written to the same bytes in any order, by one writer at a time, from images that have not changed since."""

import errno
import fcntl
import os
import shutil
import stat
import time

import pytest
from helpers.caches import RECIPE, SIZES, fill
from helpers.files import tree

from kdpipe.cache import CacheLocked, CorruptCache, IncompleteCache, SoftTargetCache, StaleCache
from kdpipe.cache.documents import whole_manifest
from kdpipe.cache.storage import lock as lock_module
from kdpipe.cache.storage.base import open_storage
from kdpipe.cache.storage.lock import writer_lock
from kdpipe.cache.writer import finished_tiles
from kdpipe.configs.errors import CacheError, ConfigError, DiskFull


def test_an_interrupted_and_resumed_cache_has_the_same_bytes(tmp_path, images):
    fill(tmp_path / "whole.zarr", images)
    fill(tmp_path / "parts.zarr", images, tiles=["Other/d"], finish=False)
    with pytest.raises(IncompleteCache, match="is not finished"):
        SoftTargetCache.open(str(tmp_path / "parts.zarr"))
    fill(tmp_path / "parts.zarr", images, tiles=["Train/b", "Other/c"], finish=False)
    fill(tmp_path / "parts.zarr", images)
    assert tree(tmp_path / "parts.zarr") == tree(tmp_path / "whole.zarr")


def test_only_one_writer_holds_the_lock(tmp_path, images):
    with writer_lock(open_storage(str(tmp_path / "c.zarr"))):
        message = (
            rf"c\.zarr is being written by process {os.getpid()} on .* since 20.*; wait until it is done, or stop it"
        )
        with pytest.raises(CacheLocked, match=message):
            fill(tmp_path / "c.zarr", images)
    fill(tmp_path / "c.zarr", images)
    assert not (tmp_path / "c.zarr.lock").exists()


def test_another_recipe_is_refused_with_the_fields_that_differ(cache, tmp_path, images):
    with pytest.raises(StaleCache, match="temperature: the cache has 2.0, the configuration says 1.0"):
        fill(tmp_path / "c.zarr", images, recipe=RECIPE.model_copy(update={"temperature": 1.0}))


def test_a_cache_without_a_tile_is_begun_anew_with_another_recipe(tmp_path, images):
    """A run that was refused or stopped before its first tile leaves such a cache."""
    fill(tmp_path / "c.zarr", images, tiles=[], finish=False)
    other = RECIPE.model_copy(update={"temperature": 1.0})
    fill(tmp_path / "c.zarr", images, tiles=["Other/c"], recipe=other, finish=False)
    with pytest.raises(StaleCache, match="temperature"):
        fill(tmp_path / "c.zarr", images)
    fill(tmp_path / "c.zarr", images, recipe=other)
    fill(tmp_path / "new.zarr", images, recipe=other)
    assert tree(tmp_path / "c.zarr") == tree(tmp_path / "new.zarr")


@pytest.mark.parametrize("is_there", [False, True])
def test_a_lock_leaves_no_folder_behind_but_the_users_own(tmp_path, is_there):
    """An empty folder may have been made with the owner and the rights that the cache is to have."""
    if is_there:
        (tmp_path / "c.zarr").mkdir()
    with writer_lock(open_storage(str(tmp_path / "c.zarr"))):
        pass
    assert (tmp_path / "c.zarr").exists() == is_there


def test_a_folder_that_is_not_a_cache_is_left_alone(tmp_path, images):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(CorruptCache, match="holds files, but no zarr.json"):
        finished_tiles(open_storage(str(tmp_path / "mine")), RECIPE, images, None)


def test_a_disk_without_room_for_the_lock_is_reported_as_full(tmp_path, images, monkeypatch):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(lock_module, "this_process", full)
        with pytest.raises(DiskFull, match=r"no room for .*c\.zarr\.lock.*make room and run the same command again"):
            fill(tmp_path / "c.zarr", images)
    assert list(tmp_path.glob("c.zarr*")) == []
    fill(tmp_path / "c.zarr", images)


@pytest.mark.parametrize("suffix", [".lock", ".workers"])
@pytest.mark.parametrize("what", ["a file", "a link", "a folder", "a pipe"])
def test_what_is_not_kdpipes_beside_the_cache_is_refused_and_stays_as_it_is(tmp_path, images, suffix, what):
    path, key = tmp_path / f"c.zarr{suffix}", tmp_path / "key"
    key.write_text("PRIVATE")
    {
        "a file": lambda: path.write_text("half of a thesis"), "a link": lambda: path.symlink_to(key),
        "a folder": path.mkdir, "a pipe": lambda: os.mkfifo(path),
    }[what]()  # fmt: skip
    before = path.lstat()
    with pytest.raises(ConfigError, match=rf"c\.zarr{suffix} is not kdpipe's.*nothing was changed: move it"):
        fill(tmp_path / "c.zarr", images)
    assert path.lstat() == before
    assert key.read_text() == "PRIVATE"
    assert not (tmp_path / "c.zarr").exists()


def test_the_lock_is_that_of_the_folder_by_whichever_path_and_outlives_the_file_that_names_its_holder(tmp_path, images):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/link.zarr").symlink_to(tmp_path / "c.zarr")
    with writer_lock(open_storage(str(tmp_path / "c.zarr"))):
        (tmp_path / "c.zarr.lock").unlink()
        for path in (tmp_path / "c.zarr", tmp_path / "other/link.zarr"):
            with pytest.raises(CacheLocked, match="is being written by another process"):
                fill(path, images)
        (tmp_path / "c.zarr.lock").write_text('{"host": "elsewhere"}')
    assert (tmp_path / "c.zarr.lock").exists(), "another process's file is not deleted"


def test_where_a_folder_cannot_be_locked_a_file_in_it_is(tmp_path, images, monkeypatch):
    """NFS is such a file system: it locks only what is open for writing."""
    flock = fcntl.flock

    def of_nfs(descriptor, operation):
        if stat.S_ISDIR(os.fstat(descriptor if isinstance(descriptor, int) else descriptor.fileno()).st_mode):
            raise OSError(errno.EBADF, "Bad file descriptor")
        return flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", of_nfs)
    with (
        writer_lock(open_storage(str(tmp_path / "c.zarr"))),
        pytest.raises(CacheLocked, match=f"process {os.getpid()}"),
    ):
        fill(tmp_path / "c.zarr", images)
    fill(tmp_path / "c.zarr", images)
    assert SoftTargetCache.open(str(tmp_path / "c.zarr")).tile_ids == list(SIZES)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(tmp_path, images, monkeypatch, code):
    def none(descriptor, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(CacheError, match=r"the file system of .*c\.zarr has no locks .*: mount it with locks"):
        fill(tmp_path / "c.zarr", images)


def test_only_partial_files_of_the_names_that_kdpipe_gives_are_deleted(tmp_path, images):
    folder = tmp_path / "c.zarr"
    fill(folder, images, tiles=["Other/c"], finish=False)
    ours = [f".{'0a' * 16}.partial", f".{'0b' * 16}x_1y2z3w.partial"]
    users = ["thesis.pdf.partial", ".thesis.partial", f".{'0A' * 16}.partial", f"{'0a' * 16}.partial"]
    for name in ours + users:
        (folder / name).write_text("half")
    (folder / f".{'0c' * 16}.partial").mkdir()
    fill(folder, images)
    left = {path.name for path in folder.iterdir() if path.name.endswith(".partial")}
    assert left == {*users, f".{'0c' * 16}.partial"}


@pytest.mark.parametrize("linked", ["tiles/Train/b", "tiles/Train", "tiles"])
def test_nothing_is_written_or_deleted_through_a_link_in_the_cache(cache, tmp_path, images, linked):
    """`rdfind -makesymlinks`, `jdupes -l` or a tidy user leave such links."""
    folder = tmp_path / "c.zarr"
    target = folder / "tiles/Train/a" if linked.endswith("b") else (folder / linked).rename(folder / "moved")
    shutil.rmtree(folder / linked, ignore_errors=True)
    (folder / linked).symlink_to(target)
    images["Train/b"].write_bytes(images["Train/b"].read_bytes() + b" ")
    before = tree(folder)
    del before["manifest.json"]  # as a run begins
    with pytest.raises(CorruptCache, match=rf"{linked} is a link, and nothing is written or deleted through one"):
        fill(folder, images)
    assert tree(folder) == before


def test_the_tile_of_a_changed_image_is_not_finished(cache, tmp_path, images):
    storage = open_storage(str(tmp_path / "c.zarr"))
    assert set(finished_tiles(storage, RECIPE, images, whole_manifest(storage))) == set(SIZES)
    time.sleep(0.01)
    images["Train/a"].write_bytes(b"X" + images["Train/a"].read_bytes()[1:])
    assert set(finished_tiles(storage, RECIPE, images, whole_manifest(storage))) == set(SIZES) - {"Train/a"}
    (tmp_path / "c.zarr/manifest.json").unlink()
    assert set(finished_tiles(storage, RECIPE, images, whole_manifest(storage))) == set(SIZES) - {"Train/a"}
