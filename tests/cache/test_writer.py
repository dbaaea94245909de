"""A cache is written to the same bytes in any order, by one writer at a time, from images that have not changed since."""

import os
import time
from pathlib import Path

import pytest
from helpers.caches import RECIPE, SIZES, fill
from helpers.files import tree

from kdpipe.cache import CacheLocked, CorruptCache, IncompleteCache, SoftTargetCache, StaleCache
from kdpipe.cache.storage.base import open_storage
from kdpipe.cache.storage.lock import writer_lock
from kdpipe.cache.writer import finished_tiles, whole_manifest
from kdpipe.configs.errors import DiskFull


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


def test_a_folder_that_is_not_a_cache_is_left_alone(tmp_path, images):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(CorruptCache, match="holds files, but no zarr.json"):
        finished_tiles(open_storage(str(tmp_path / "mine")), RECIPE, images, None)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is always full")
def test_a_disk_without_room_for_the_lock_is_reported_as_full(tmp_path, images):
    (tmp_path / "c.zarr.lock").symlink_to("/dev/full")
    with pytest.raises(DiskFull, match=r"no room for .*c\.zarr\.lock.*make room and run the same command again"):
        fill(tmp_path / "c.zarr", images)
    assert not (tmp_path / "c.zarr.lock").is_symlink()
    fill(tmp_path / "c.zarr", images)


def test_the_tile_of_a_changed_image_is_not_finished(cache, tmp_path, images):
    storage = open_storage(str(tmp_path / "c.zarr"))
    assert set(finished_tiles(storage, RECIPE, images, whole_manifest(storage))) == set(SIZES)
    time.sleep(0.01)
    images["Train/a"].write_bytes(b"X" + images["Train/a"].read_bytes()[1:])
    assert set(finished_tiles(storage, RECIPE, images, whole_manifest(storage))) == set(SIZES) - {"Train/a"}
    (tmp_path / "c.zarr/manifest.json").unlink()
    assert set(finished_tiles(storage, RECIPE, images, whole_manifest(storage))) == set(SIZES) - {"Train/a"}
