"""Stage one is killed, loses power, or meets a full or failing disk at every file operation: the next run ends with the same bytes."""

import errno
import shutil
import threading

import numpy as np
import pytest
import torch
from helpers.crash_disk import Disk, Killed, full
from helpers.files import tree
from helpers.small_world import PixelTeacher, write_tile

from kdpipe.cache import CacheUnreachable, IncompleteCache, SoftTargetCache, manifest
from kdpipe.cache import tile as tile_module
from kdpipe.cache.writer import CacheWriter
from kdpipe.configs.errors import DiskFull
from kdpipe.data.rasters import read_image
from kdpipe.pipeline.precompute import run as stage
from kdpipe.pipeline.precompute import subjects
from kdpipe.pipeline.precompute.costs import SUFFIX
from kdpipe.pipeline.precompute.run import precompute

pytestmark = pytest.mark.long

CPU = torch.device("cpu")


@pytest.fixture
def config_of(make, monkeypatch):
    """Makes the config of a cache at a path. Each shard is encoded only once."""
    encode, made = tile_module.encode_tile, {}

    def encode_once(units, tile, image, recipe, lost, gaps=None):
        key = (tile, units.tobytes(), image.sha256, recipe.digest())
        if key not in made:
            made[key] = encode(units, tile, image, recipe, lost, gaps)
        return made[key]

    monkeypatch.setattr(tile_module, "encode_tile", encode_once)
    return lambda path: make(cache__path=str(path))


def change_an_image(tmp_path):
    write_tile(tmp_path / "data/Mine/images/t1.tif", seed=9)


@pytest.fixture(
    params=["a fresh cache", "a changed image in a finished cache", "a changed image in a finished cache with an index"]
)
def scene(request, config_of, tmp_path, monkeypatch):
    """The disk before a run, and every file after an undisturbed one."""
    if request.param.endswith("index"):
        monkeypatch.setattr(manifest, "MAX_LISTED", 0)
    before, whole = tmp_path / "before", tmp_path / "whole"
    before.mkdir()
    if request.param != "a fresh cache":
        precompute(config_of(before / "c.zarr"), CPU)
        change_an_image(tmp_path)
    shutil.copytree(before, whole)
    precompute(config_of(whole / "c.zarr"), CPU)
    return before, stored(whole)


def stored(folder):
    """Every file except the record of costs and the notes on images, which hold times."""
    return {name: data for name, data in tree(folder).items() if not name.endswith((SUFFIX, ".images"))}


def run(disk, config_of, monkeypatch):
    """Whether the run completed, and the tiles that it had reported as stored."""
    promised, write = [], CacheWriter.write

    def writing(self, tile_id, *args):
        record = write(self, tile_id, *args)
        promised.append(tile_id)
        return record

    with disk.installed(monkeypatch), monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "write", writing)
        try:
            precompute(config_of(disk.root / "c.zarr"), CPU)
        except Killed:
            return False, promised
    return True, promised


def assert_readable_or_unfinished(path):
    """A manifest on disk vouches for every tile that it lists, because its removal is synced before a tile is touched."""
    try:
        cache = SoftTargetCache.open(str(path))
    except IncompleteCache:
        return
    for tile in cache.tile_ids:
        cache.read(tile)


@pytest.mark.parametrize("torn", [False, True], ids=["between", "within"])
def test_killed_or_without_power_at_any_file_operation_a_run_goes_on_to_the_same_bytes(
    scene, config_of, tmp_path, monkeypatch, torn
):
    before, expected = scene
    rng = np.random.default_rng(0)
    points, done = 0, False
    while not done:
        disk = Disk(shutil.copytree(before, tmp_path / "disk"), kill_at=points, torn=torn)
        done, promised = run(disk, config_of, monkeypatch)
        places = {"killed": disk.root, "least": tmp_path / "least", "some": tmp_path / "some"}
        disk.after_power_loss(places["least"])
        disk.after_power_loss(places["some"], rng)
        for kind, place in places.items():
            if torn and not done and [what for what, _ in disk.operations[-1:]] != ["write"]:
                break  # the test without torn writes has been here
            assert_readable_or_unfinished(place / "c.zarr")
            summary = precompute(config_of(place / "c.zarr"), CPU)
            assert summary.kept >= len(promised), (kind, points, disk.operations[-1:])
            left = stored(place)
            left.pop("c.zarr.lock", None)  # a dead writer's lock does not matter
            assert left == expected, (kind, points, disk.operations[-1:])
        for place in places.values():
            shutil.rmtree(place)
        points += 1
    assert points > 60  # 64 where one tile of a finished cache is computed again, more than 100 on a fresh one


@pytest.mark.parametrize("kind", ["full", "failing"])
def test_a_disk_that_fails_at_any_operation_is_reported_and_the_next_run_goes_on(
    scene, config_of, tmp_path, monkeypatch, kind
):
    before, expected = scene
    point, reported = 0, 0
    while True:
        failure = full() if kind == "full" else OSError(errno.EIO, "Input/output error")
        disk = Disk(shutil.copytree(before, tmp_path / "disk"), fail_at=point, failure=failure, lasting=kind == "full")
        try:
            run(disk, config_of, monkeypatch)
        except DiskFull as err:
            assert kind == "full"
            assert "no room for" in str(err)
            assert not list(disk.root.rglob("*.partial"))
            reported += 1
        except CacheUnreachable as err:
            assert kind == "failing", disk.operations[-1]
            assert "Input/output error" in str(err)
            reported += 1
        precompute(config_of(disk.root / "c.zarr"), CPU)
        left = stored(disk.root)
        left.pop("c.zarr.lock", None)
        assert left == expected, (point, disk.operations[point : point + 1])
        if point >= len(disk.operations):
            break
        shutil.rmtree(disk.root)
        point += 1
    assert reported > 30


def break_once(function, error, at=1):
    """The function, except that its call number `at` raises."""
    calls = []

    def run(*args, **kwargs):
        calls.append(threading.current_thread().name)
        if len(calls) == at + 1:
            raise error
        return function(*args, **kwargs)

    run.calls = calls
    return run


@pytest.mark.parametrize("where", ["reader", "teacher", "writer"])
def test_an_exception_in_any_thread_ends_the_run_and_the_next_one_goes_on(
    scene, config_of, tmp_path, monkeypatch, where
):
    before, expected = scene
    disk = shutil.copytree(before, tmp_path / "disk")
    at = 0 if (before / "c.zarr").exists() else 1
    broken = {
        "reader": (subjects, "read_image", read_image),
        "teacher": (PixelTeacher, "cached_values", PixelTeacher.cached_values),
        "writer": (tile_module, "encode_tile", tile_module.encode_tile),
    }[where]
    with monkeypatch.context() as patch:
        breaking = break_once(broken[2], RuntimeError("by the test"), at)
        patch.setattr(*broken[:2], breaking)
        with pytest.raises(RuntimeError, match="by the test"):
            precompute(config_of(disk / "c.zarr"), CPU)
    assert (breaking.calls[at] == threading.main_thread().name) == (where == "teacher")
    assert not (disk / "c.zarr/manifest.json").exists()
    precompute(config_of(disk / "c.zarr"), CPU)
    assert stored(disk) == expected


@pytest.mark.parametrize("moment", ["listing", "reading", "digesting"])
def test_an_image_that_vanishes_is_named_and_the_next_run_goes_on(config_of, tmp_path, monkeypatch, moment):
    precompute(config_of(tmp_path / "whole.zarr"), CPU)
    image, away = tmp_path / "data/Mine/images/t1.tif", tmp_path / "t1.tif"

    def vanishing(function, when):
        def run(*args, **kwargs):
            if when == "before":
                hide(args)
            result = function(*args, **kwargs)
            if when == "after":
                hide(args)
            return result

        def hide(args):
            if moment == "listing" or args[0] == image:
                image.rename(away)

        return run

    hooked = {
        "listing": ("list_tiles", "after"),
        "reading": ("read_image", "before"),
        "digesting": ("read_image", "after"),
    }
    name, when = hooked[moment]
    with monkeypatch.context() as patch:
        # `list_tiles` is asked twice; the second answer is what counts
        plan = stage.make_plan(config_of(tmp_path / "c.zarr"), lambda recipe, *_: recipe)
        patch.setattr(stage, "make_plan", lambda *arguments, **options: plan)
        if moment == "listing":
            image.rename(away)
        else:
            patch.setattr(subjects, name, vanishing(getattr(subjects, name), when))
        summary = precompute(config_of(tmp_path / "c.zarr"), CPU)
    assert list(summary.failed) == ["Mine/t1"]
    assert "t1.tif" in summary.failed["Mine/t1"]
    assert (summary.computed, summary.fingerprint) == (2, None)
    away.rename(image)
    assert precompute(config_of(tmp_path / "c.zarr"), CPU).computed == 1
    assert tree(tmp_path / "c.zarr") == tree(tmp_path / "whole.zarr")


def test_an_image_that_is_rewritten_while_it_is_read_is_not_cached_under_the_new_ones_digest(
    config_of, tmp_path, monkeypatch
):
    def rewriting(path, *args):
        pixels = read_image(path, *args)
        if path.name == "t1.tif":
            change_an_image(tmp_path)
        return pixels

    with monkeypatch.context() as patch:
        patch.setattr(subjects, "read_image", rewriting)
        summary = precompute(config_of(tmp_path / "c.zarr"), CPU)
    assert list(summary.failed) == ["Mine/t1"]
    assert "t1.tif changed while it was read" in summary.failed["Mine/t1"]
    precompute(config_of(tmp_path / "c.zarr"), CPU)
    precompute(config_of(tmp_path / "whole.zarr"), CPU)
    assert tree(tmp_path / "c.zarr") == tree(tmp_path / "whole.zarr")


@pytest.mark.parametrize("finished", [False, True])
def test_what_killed_runs_left_is_swept_even_where_nothing_is_to_do(config_of, tmp_path, finished):
    config = config_of(tmp_path / "c.zarr")
    precompute(config, CPU)
    expected = tree(tmp_path / "c.zarr")
    if not finished:
        (tmp_path / "c.zarr/manifest.json").unlink()
    (tmp_path / "c.zarr" / f".{'0a' * 16}.partial").write_bytes(b"half")
    assert precompute(config, CPU).computed == 0
    assert tree(tmp_path / "c.zarr") == expected


@pytest.mark.parametrize("digit", ["entropy_error", "shard_bytes", "shard_sha256", "sha256", "shape"])
def test_a_receipt_with_a_changed_digit_is_not_believed_while_there_is_no_manifest(config_of, tmp_path, digit):
    config = config_of(tmp_path / "c.zarr")
    precompute(config, CPU)
    expected = tree(tmp_path / "c.zarr")
    (tmp_path / "c.zarr/manifest.json").unlink()
    receipt = tmp_path / "c.zarr/tiles/Mine/t1/zarr.json"
    data = bytearray(receipt.read_bytes())
    at = data.index(f'"{digit}"'.encode()) + len(digit) + 2
    at = next(i for i in range(at, len(data)) if data[i] in b"0123456789")
    data[at] = ord("1") if data[at] != ord("1") else ord("2")
    receipt.write_bytes(data)
    assert precompute(config, CPU).computed == 1
    assert tree(tmp_path / "c.zarr") == expected
