"""A local write is durable and whole, from any number of threads; a disk that fails while it is read is not damage."""

import errno
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers.caches import RECIPE, fill
from helpers.files import tree

from kdpipe.cache import CacheUnreachable, SoftTargetCache
from kdpipe.cache.documents import read_manifest, whole_manifest
from kdpipe.cache.integrity import check_full, find_damage
from kdpipe.cache.storage import local
from kdpipe.cache.storage.base import open_storage
from kdpipe.cache.storage.local import LocalStorage


def test_no_thread_uses_a_folder_before_it_is_durable(tmp_path, monkeypatch):
    """Otherwise a power cut could delete the folder, and with it a tile that was reported as finished."""
    storage = open_storage(str(tmp_path / "c"))
    made, go_on, sync = threading.Event(), threading.Event(), local.sync_folder

    def slow_once(folder):
        if not made.is_set():
            made.set()
            assert go_on.wait(60)
        sync(folder)

    monkeypatch.setattr(local, "sync_folder", slow_once)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(storage.write, "tiles/a/0", b"1")
        assert made.wait(60)
        second = threads.submit(storage.write, "tiles/b/0", b"2")
        time.sleep(0.2)
        assert not second.done()
        go_on.set()
        first.result()
        second.result()


def test_threads_delete_a_file_in_the_place_of_a_folder_once(tmp_path, monkeypatch):
    """All tiles below the folder are written at once, and every thread sees the file."""
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


@pytest.fixture
def failing_disk(monkeypatch):
    """A function `fail(end, code, times)`: the next `times` reads of files whose path ends so fail with that error."""
    left, opened = {}, os.open

    def opening(path, *args, **kwargs):
        for (end, code), times in left.items():
            if times and str(path).endswith(end):
                left[end, code] -= 1
                raise OSError(code, os.strerror(code), str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(local, "WAITS_SECONDS", (0.0, 0.0))
    return lambda end, code, times: left.update({(end, code): times})


CODES = [errno.EIO, errno.ESTALE, errno.EMFILE, errno.EACCES]


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
def test_a_disk_that_fails_for_a_moment_is_read_again(tmp_path, images, failing_disk, code):
    fill(tmp_path / "c.zarr", images)
    expected = SoftTargetCache.open(str(tmp_path / "c.zarr")).read("Train/a")
    for name in ("manifest.json", "a/zarr.json", "a/0.0.0"):
        failing_disk(name, code, 2)
    np.testing.assert_array_equal(SoftTargetCache.open(str(tmp_path / "c.zarr")).read("Train/a"), expected)


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
def test_a_disk_that_goes_on_failing_is_named_and_is_no_damage(tmp_path, images, failing_disk, code):
    storage = fill(tmp_path / "c.zarr", images)
    manifest = read_manifest(storage)
    before = tree(tmp_path / "c.zarr")
    says = rf"cannot be read \({os.strerror(code)}\), after 3 attempts; this says nothing of what is stored there"
    failing_disk("a/0.0.0", code, 10**6)
    with pytest.raises(CacheUnreachable, match=says):
        SoftTargetCache.open(str(tmp_path / "c.zarr")).read("Train/a")
    with pytest.raises(CacheUnreachable, match=says):  # as --repair looks for damage: nothing is thrown away
        find_damage(storage, RECIPE, manifest.tiles, images)
    with pytest.raises(CacheUnreachable, match=says):
        check_full(storage, manifest, images)
    failing_disk("manifest.json", code, 10**6)
    for look in (read_manifest, whole_manifest):
        with pytest.raises(CacheUnreachable, match=says):
            look(storage)
    failing_disk("c.zarr/zarr.json", code, 10**6)
    with pytest.raises(CacheUnreachable, match=says):
        fill(tmp_path / "c.zarr", images)
    for name in ("a/0.0.0", "manifest.json", "c.zarr/zarr.json"):
        failing_disk(name, code, 0)
    assert tree(tmp_path / "c.zarr") == before
