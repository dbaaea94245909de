"""An image is trusted by its own size and time, not by the age of its tile; it is read once, and any other time is a reason to read it."""

import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from helpers.files import flip, tree

from kdpipe.cache import StaleCache, known_images
from kdpipe.configs.errors import DataError
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.training.targets import open_fresh_cache
from kdpipe.pipeline.verify.gate import verify

CPU = torch.device("cpu")
STALE = [("stale-tile", "Mine/t1")]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """The user's cache folder, which is the tests' own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home/kdpipe"


@pytest.fixture
def images(finished, tmp_path):
    """The images of a finished cache, an hour older than now."""
    found = sorted((tmp_path / "data/Mine/images").iterdir())
    for image in found:
        os.utime(image, (0, time.time() - 3600))
    return found


@pytest.fixture
def reads(monkeypatch):
    """The images that are compared by content, as they are."""
    seen, compare = [], known_images.same_content

    def counting(source, record):
        seen.append(Path(source).name)
        return compare(source, record)

    monkeypatch.setattr(known_images, "same_content", counting)
    return seen


def quick(config):
    return [(finding.code, finding.tile) for finding in verify(config, "quick", CPU).findings]


def other_pixels(image, seconds):
    """Change a bit of an image, and set its date."""
    flip(image)
    os.utime(image, (0, seconds))


def test_an_image_is_read_at_the_first_look_and_never_again(finished, images, reads):
    assert quick(finished()) == []
    assert sorted(reads) == ["t0.tif", "t1.tif", "t2.tif"]
    for _ in range(2):
        assert quick(finished()) == []
        open_fresh_cache(finished(), list_tiles(finished().data, "train"), None)
        assert precompute(finished(), CPU).computed == 0
    assert len(reads) == 3
    os.utime(images[0], (0, time.time() - 7200))  # copied without its date
    assert quick(finished()) == quick(finished()) == []
    assert reads[3:] == ["t0.tif"]


@pytest.mark.parametrize(
    "hours", [0, -24 * 3650, 24 * 3650], ids=["now", "clock ten years back", "clock ten years ahead"]
)
def test_stage_one_leaves_no_image_to_read_whatever_the_clock_says(make, tmp_path, reads, monkeypatch, hours):
    for image in (tmp_path / "data/Mine/images").iterdir():
        os.utime(image, (0, time.time() - 100 * 3600))
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + hours * 3600)
    config = make()
    precompute(config, CPU)
    monkeypatch.setattr(time, "time", real)
    assert quick(config) == []
    assert reads == []


@pytest.mark.parametrize("seconds", [-1e9, -3600, 3600, 1e9], ids=["1994", "an hour older", "an hour newer", "2050s"])
def test_another_image_of_the_same_size_is_found_with_any_date(finished, images, seconds):
    assert quick(finished()) == []
    other_pixels(images[1], max(0, images[1].stat().st_mtime + seconds))
    assert quick(finished()) == STALE
    with pytest.raises(StaleCache, match="1 stale tile: Mine/t1"):
        open_fresh_cache(finished(), list_tiles(finished().data, "train"), None)
    assert precompute(finished(), CPU).computed == 1
    assert quick(finished()) == []


def test_a_copied_cache_is_as_old_as_its_images_say(finished, images, tmp_path, reads):
    """`cp -r`, `aws s3 sync`, `unzip`: every file of the copy is younger than every image."""
    other_pixels(images[1], time.time() - 1800)
    shutil.copytree(tmp_path / "cache.zarr", tmp_path / "moved.zarr", copy_function=shutil.copyfile)
    config = finished(cache__path=str(tmp_path / "moved.zarr"))
    assert quick(config) == STALE
    with pytest.raises(StaleCache, match="1 stale tile: Mine/t1"):
        open_fresh_cache(config, list_tiles(config.data, "train"), None)
    assert len(reads) == 4  # the stale one twice
    assert precompute(config, CPU).computed == 1
    assert verify(config, "full", CPU).passes


def test_an_image_that_was_just_written_is_read_again(finished, images, reads):
    """It could be written twice within one tick of the clock, and keep its size and time."""
    os.utime(images[1])
    assert quick(finished()) == quick(finished()) == []
    assert sorted(reads) == ["t0.tif", "t1.tif", "t1.tif", "t2.tif"]


def test_an_image_that_changes_while_it_is_compared_is_not_noted(finished, images, monkeypatch):
    compare = known_images.same_content

    def rewritten(source, record):
        same = compare(source, record)
        if source == images[1] and same:
            other_pixels(source, time.time() - 1000)
        return same

    with monkeypatch.context() as patch:
        patch.setattr(known_images, "same_content", rewritten)
        assert quick(finished()) == []
    assert quick(finished()) == STALE


def test_an_image_changed_without_its_size_or_time_is_found_by_full_alone(finished, images):
    """What `quick` cannot see: other pixels, and a time of change set back to the nanosecond."""
    assert quick(finished()) == []
    times = images[1].stat()
    flip(images[1])
    os.utime(images[1], ns=(times.st_atime_ns, times.st_mtime_ns))
    assert quick(finished()) == []
    assert [(finding.code, finding.tile) for finding in verify(finished(), "full", CPU).findings] == STALE


def test_full_verification_makes_images_known(finished, images, reads):
    assert verify(finished(), "full", CPU).passes
    reads.clear()
    assert quick(finished()) == []
    assert reads == []


@pytest.mark.parametrize("left", [0, 1, 16, 17, 40], ids=lambda bytes_: f"{bytes_} bytes")
def test_notes_that_were_cut_short_cost_a_look_and_no_more(finished, images, tmp_path, left):
    notes = tmp_path / "cache.zarr.images"
    assert quick(finished()) == []
    whole = notes.read_bytes()
    notes.write_bytes(whole[:left])
    assert quick(finished()) == []
    assert len(notes.read_bytes()) % 16 == 0
    other_pixels(images[1], time.time() - 1800)
    assert quick(finished()) == STALE


def test_notes_of_many_changes_do_not_grow_without_end(finished, images, tmp_path, monkeypatch):
    monkeypatch.setattr(known_images, "SPARE", 0)
    sizes = []
    for hour in range(12):
        for image in images:
            os.utime(image, (0, 1e9 + hour * 3600))
        assert quick(finished()) == []
        sizes.append((tmp_path / "cache.zarr.images").stat().st_size)
    assert max(sizes) <= 16 + 16 * 3 * 4


@pytest.mark.parametrize("kind", ["text", "link", "fifo", "folder"])
def test_what_is_the_users_beside_the_cache_stays_and_the_notes_go_elsewhere(
    finished, images, tmp_path, own_folder, reads, kind
):
    place, thesis = tmp_path / "cache.zarr.images", tmp_path / "thesis"
    thesis.write_text("my own")
    {
        "text": lambda: place.write_text("my own"),
        "link": lambda: place.symlink_to(thesis),
        "fifo": lambda: os.mkfifo(place),
        "folder": lambda: place.mkdir(),
    }[kind]()
    mode = place.lstat().st_mode
    assert quick(finished()) == quick(finished()) == []
    assert len(reads) == 3
    assert (place.lstat().st_mode, thesis.read_text()) == (mode, "my own")
    assert kind != "text" or place.read_text() == "my own"
    assert len(list(own_folder.iterdir())) == 1


def test_where_nothing_can_be_noted_every_image_is_read_and_the_findings_are_the_same(
    finished, images, tmp_path, reads, monkeypatch
):
    (tmp_path / "cache.zarr.images").mkdir()
    (tmp_path / "home").write_text("no folder")
    before = tree(tmp_path)
    assert quick(finished()) == quick(finished()) == []
    assert len(reads) == 6
    assert tree(tmp_path) == before
    other_pixels(images[1], 1e9)
    assert quick(finished()) == STALE


def test_an_image_that_the_disk_does_not_give_is_not_called_stale(finished, images, monkeypatch):
    """A mount that fails says nothing of the image; the tile is not computed again for it."""
    real = os.stat

    def failing(path, *args, **kwargs):
        if str(path).endswith("t1.tif"):
            raise OSError(5, "Input/output error", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", failing)
    with pytest.raises(DataError, match=r"looking at .*t1\.tif failed, as its disk or mount failed"):
        verify(finished(), "quick", CPU)
