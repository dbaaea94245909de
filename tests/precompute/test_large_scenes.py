"""A tile larger than the teacher's window is read, predicted and encoded from the top down, to the bytes of one held whole."""

import errno
import io
import os
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from helpers.files import tree, write_image
from PIL import Image

from kdpipe.cache import writer
from kdpipe.cache.images import digest_image
from kdpipe.cache.storage.base import open_storage
from kdpipe.cache.writer import open_writer
from kdpipe.configs.errors import CacheError, DataError, DiskFull, Interrupted
from kdpipe.data import rasters
from kdpipe.data.rasters import open_rows, read_image
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.precompute import subjects
from kdpipe.pipeline.precompute.expected_recipe import complete_recipe
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.teacher.frozen import open_teacher

CPU = torch.device("cpu")
SIZES = {"a": (300, 150), "b": (90, 330), "c": (60, 64)}  # the last fits into a window


@pytest.fixture
def scenes(make_config, tmp_path):
    """A configuration over three images, two of them larger than the window of 64 px."""
    for seed, (name, size) in enumerate(SIZES.items()):
        write_image(tmp_path / f"data/Mine/images/{name}.png", *size, seed=seed)
    return make_config(
        data__train=[str(tmp_path / "data/Mine")], data__allow_missing_masks=True, teacher__window=64, data__val=[]
    )


@pytest.mark.parametrize("ending", ["png", "jpg", "tif"])
def test_rows_equal_the_whole_images_and_each_is_read_once(tmp_path, monkeypatch, ending):
    path = tmp_path / f"scene.{ending}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (150, 70, 3), dtype=np.uint8)).save(path)
    whole, read, from_file = read_image(path), [], rasters.Rows._rows

    def counted(rows, top, count):
        read.extend(range(top, top + count))
        return from_file(rows, top, count)

    monkeypatch.setattr(rasters.Rows, "_rows", counted)
    with open_rows(path) as rows:
        assert (rows.height, rows.width) == (150, 70)
        for top, bottom in [(0, 64), (0, 64), (32, 96), (64, 128), (86, 150)]:
            np.testing.assert_array_equal(rows.read(top, bottom), whole[top:bottom])
    assert read == list(range(150))


def test_rows_are_stretched_like_the_whole_image_and_a_nan_is_located(tmp_path):
    values = np.random.default_rng(1).uniform(0, 4000, (4, 100, 30)).astype(np.float32)
    options = {"driver": "GTiff", "width": 30, "height": 100, "count": 4, "dtype": "float32", "nodata": -1}
    values[1, 3, 4] = -1

    def write(name):
        with rasterio.open(tmp_path / name, "w", transform=rasterio.Affine.scale(2), **options) as raster:
            raster.write(values)
        return tmp_path / name

    stretch = [(0.0, 3000.0), (10.0, 2000.0), (0.0, 4000.0)]
    path = write("whole.tif")
    with open_rows(path, (4, 2, 1), stretch) as rows:
        found = np.concatenate([rows.read(0, 40), rows.read(40, 100)])
    np.testing.assert_array_equal(found, read_image(path, (4, 2, 1), stretch))
    values[0, 70, 5] = np.nan
    with open_rows(write("nan.tif"), (4, 2, 1), stretch) as rows:
        rows.read(0, 64)
        with pytest.raises(DataError, match=r"nan\.tif.*row 70, column 5"):
            rows.read(64, 100)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["soft", "logits"])
def test_scenes_have_the_bytes_of_images_held_whole(scenes, tmp_path, kind):
    config = scenes.model_copy(update={"cache": scenes.cache.model_copy(update={"kind": kind})})
    assert precompute(config, CPU).computed == 3
    recipe = complete_recipe(config, None, None)
    teacher = open_teacher(config, recipe, CPU)
    with open_writer(open_storage(str(tmp_path / "whole.zarr")), recipe, device="cpu", libraries={}) as opened:
        opened.finish([
            opened.write(tile.id, teacher.cached_values(read_image(tile.image)[None])[0], digest_image(tile.image))
            for tile in list_tiles(config.data, "train")
        ])  # fmt: skip
    assert tree(Path(config.cache.path) / "tiles") == tree(tmp_path / "whole.zarr" / "tiles")


@pytest.mark.long
def test_no_more_rows_are_held_than_a_window_has(scenes, monkeypatch):
    held, read, whole = [], rasters.Rows.read, []

    def watched(rows, top, bottom):
        found = read(rows, top, bottom)
        held.append(len(rows._kept_hWB))
        return found

    monkeypatch.setattr(rasters.Rows, "read", watched)
    monkeypatch.setattr(subjects, "read_image", lambda path, *args: whole.append(path.stem) or read_image(path, *args))
    precompute(scenes, CPU)
    assert whole == ["c"]
    assert max(held) == 64


@pytest.mark.long
def test_a_truncated_scene_is_named_and_the_next_run_continues(scenes, tmp_path):
    image = tmp_path / "data/Mine/images/a.png"
    intact = image.read_bytes()
    image.write_bytes(intact[: len(intact) // 2])
    summary = precompute(scenes, CPU)
    assert (summary.computed, list(summary.failed)) == (2, ["Mine/a"])
    assert "a.png" in summary.failed["Mine/a"]
    image.write_bytes(intact)
    summary = precompute(scenes, CPU)
    assert (summary.computed, summary.kept, summary.failed) == (1, 2, {})


@pytest.mark.long
def test_a_scene_that_changes_while_it_is_read_is_not_stored(scenes, monkeypatch, tmp_path):
    read = rasters.Rows.read

    def touched(rows, top, bottom):
        found = read(rows, top, bottom)
        if rows.height == 300 and top > 100:
            write_image(tmp_path / "data/Mine/images/a.png", 300, 150, seed=9)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(rasters.Rows, "read", touched)
        summary = precompute(scenes, CPU)
    assert list(summary.failed) == ["Mine/a"]
    assert "changed while it was read" in summary.failed["Mine/a"] or "cannot read" in summary.failed["Mine/a"]
    assert precompute(scenes, CPU).failed == {}


@pytest.mark.long
def test_a_run_stops_within_a_scene(scenes, monkeypatch):
    stop, read, tops = threading.Event(), rasters.Rows.read, []

    def stopping_read(rows, top, bottom):
        tops.append(top)
        if top > 50:
            stop.set()
        return read(rows, top, bottom)

    with monkeypatch.context() as patch:
        patch.setattr(rasters.Rows, "read", stopping_read)
        with pytest.raises(Interrupted, match="0 of 3 tiles are finished"):
            precompute(scenes, CPU, stop=stop)
    assert max(tops) < 200
    assert precompute(scenes, CPU).computed == 3


@pytest.mark.long
def test_a_cache_that_cannot_be_written_ends_the_run_and_is_not_mistaken_for_a_bad_image(scenes, monkeypatch):
    store = writer.store_tile

    def broken(storage, tile_id, *others):
        if tile_id == "Mine/a":  # a scene
            raise OSError(errno.EIO, "by the test")
        return store(storage, tile_id, *others)

    monkeypatch.setattr(writer, "store_tile", broken)
    with pytest.raises(OSError, match="by the test"):
        precompute(scenes, CPU)


def temporary_files(folder):
    """Unnamed files of this process that are open in a folder."""
    links = (Path(link) for link in Path("/proc/self/fd").iterdir())
    return [link for link in links if os.path.realpath(link).startswith(f"{folder}/")]


@pytest.mark.long
@pytest.mark.parametrize("end", ["success", "bad image", "interrupt", "ctrl-c twice", "full disk", "failing disk"])
def test_the_temporary_file_of_a_scene_is_gone_however_the_run_ends(scenes, monkeypatch, tmp_path, end):
    errors = {
        "bad image": DataError("by the test"), "interrupt": Interrupted("by the test"), "ctrl-c twice": KeyboardInterrupt(),
        "full disk": OSError(errno.ENOSPC, "by the test"), "failing disk": OSError(errno.EIO, "by the test"),
    }  # fmt: skip
    read, raised = rasters.Rows.read, {"full disk": DiskFull, "failing disk": CacheError}
    cache, seen = Path(scenes.cache.path), []

    def failing_read(rows, top, bottom):
        seen.extend(temporary_files(cache))
        if top > 50 and end in ("bad image", "interrupt", "ctrl-c twice"):
            raise errors[end]
        return read(rows, top, bottom)

    class FailingFile(io.FileIO):
        def write(self, data):
            raise errors[end]

    with monkeypatch.context() as patch:
        patch.setattr(rasters.Rows, "read", failing_read)
        if end.endswith("disk"):
            patch.setattr(tempfile, "TemporaryFile", lambda **_: FailingFile(os.devnull, "r+"))
        if end in ("success", "bad image"):
            summary = precompute(scenes, CPU)
            assert list(summary.failed) == (["Mine/a"] if end == "bad image" else [])
        else:
            with pytest.raises(raised.get(end, type(errors[end]))):
                precompute(scenes, CPU)
    assert seen or end.endswith("disk")
    assert temporary_files(cache) == []
    assert [path.name for path in cache.glob(".*")] == []
    assert precompute(scenes, CPU).failed == {}
