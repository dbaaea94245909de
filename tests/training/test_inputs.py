"""The check of tiles before work begins: nothing is computed, and nothing written, from files that cannot be right."""

import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.files import noise, write_tiff
from helpers.runs import assert_same_weights, checkpoint, weights
from PIL import Image

from kdpipe.configs.errors import DataError
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline import inputs
from kdpipe.pipeline.dry_run import estimate
from kdpipe.pipeline.inputs import check_headers, check_labels
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.progress import Silent
from kdpipe.pipeline.runs.record import read_run
from kdpipe.pipeline.training import loop
from kdpipe.pipeline.training.run import train, with_mode

CPU = torch.device("cpu")


class Told(Silent):
    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)


@pytest.fixture
def own(landscape, make_config, tmp_path):
    """A configuration on a copy of the landscape, to be spoilt."""
    shutil.copytree(landscape, tmp_path / "own")
    return make_config(
        data={"train": [str(tmp_path / "own/Train")], "val": [str(tmp_path / "own/Val")]}, distill={"mode": "none"}
    )


def first_mask(config, split):
    return list_tiles(config.data, split)[0].mask


def recode(path, change):
    with Image.open(path) as image:
        labels = np.asarray(image).copy()
    Image.fromarray(change(labels)).save(path)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_mask_of_another_size_stops_each_stage_before_it_begins(own, tmp_path, split, small_student):
    mask = first_mask(own, split)
    recode(mask, lambda labels: labels[:-1])
    for stage in (precompute, estimate, train):
        with pytest.raises(DataError, match=f"the mask {mask} is .* px, but its image"):
            stage(own, CPU)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own"]


def test_bands_that_contradict_each_other_stop_each_stage_and_orders_are_noted_once(own, tmp_path, small_student):
    tiles = list_tiles(own.data, "train")
    for tile in tiles:
        with Image.open(tile.image) as image:
            pixels = np.asarray(image).transpose(2, 0, 1)
        tile.image.unlink()
        write_tiff(tile.image.with_suffix(".tif"), pixels, ["blue", "green", "red"])
    told = Told()
    with pytest.raises(DataError, match=r"images name the bands that are read differently: blue, green, red in 6"):
        check_headers(own, list_tiles(own.data, "train"), list_tiles(own.data, "val"), told)
    data = own.data.model_copy(update={"bands": (1, 2, 3)})
    check_headers(own.model_copy(update={"data": data}), list_tiles(own.data, "train"), [], told)
    assert [line[:60] for line in told.lines] == ["note: images call bands [3, 2, 1] red, green and blue (such "]
    with pytest.raises(DataError, match=r"and data.bands is \[1, 2, 3\]. Set data.bands to those three"):
        precompute(own.model_copy(update={"data": own.data.model_copy(update={"val": []})}), CPU)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own"]


def test_masks_without_a_label_are_refused_before_the_first_step(own, tmp_path, small_student):
    for split, kind, count in (("val", "validation", 2), ("train", "training", 6)):
        for tile in list_tiles(own.data, split):
            recode(tile.mask, lambda labels: np.full_like(labels, 255))
        with pytest.raises(DataError, match=f"all pixels of the {count} {kind} masks are 255, classes.ignore_index"):
            train(own, CPU)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own"]


def one_labelled(labels):
    """No label but one, in the last pixel."""
    return np.where(np.arange(labels.size).reshape(labels.shape) == labels.size - 1, 3, 255).astype(np.uint8)


def test_one_labelled_pixel_is_enough(own):
    train_tiles, val_tiles = list_tiles(own.data, "train"), list_tiles(own.data, "val")
    for tiles in (train_tiles, val_tiles):
        for tile in tiles[:-1]:
            recode(tile.mask, lambda labels: np.full_like(labels, 255))
        recode(tiles[-1].mask, one_labelled)
    check_labels(own, train_tiles, val_tiles, Silent())


def test_a_value_that_is_no_class_in_a_validation_mask_is_found_before_the_first_step(own, tmp_path, small_student):
    mask = list_tiles(own.data, "val")[-1].mask
    recode(mask, lambda labels: np.where(labels == labels.max(), 77, labels).astype(np.uint8))
    with pytest.raises(DataError, match=f"the mask {mask} holds 77, neither a class"):
        train(own, CPU)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own"]


def test_only_files_that_have_changed_are_opened_again_beside_a_sample(own, monkeypatch):
    tiles, val = list_tiles(own.data, "train"), list_tiles(own.data, "val")
    opened = []
    real = inputs.read_headers
    monkeypatch.setattr(inputs, "read_headers", lambda tiles, advance: opened.extend(tiles) or real(tiles, advance))
    monkeypatch.setattr(inputs, "MOST_AGAIN", 2)
    check_headers(own, tiles, val, Silent())
    assert opened == [*tiles, *val]
    opened.clear()
    since = max(max(tile.image.stat().st_ctime, tile.mask.stat().st_ctime) for tile in [*tiles, *val])
    while time.time() <= since + 0.05:
        time.sleep(0.01)
    # A copy that keeps its old time of modification is new here all the same.
    shutil.copy2(tiles[4].mask, tiles[4].mask.with_suffix(".new"))
    tiles[4].mask.with_suffix(".new").replace(tiles[4].mask)
    assert tiles[4].mask.stat().st_mtime < since
    check_headers(own, tiles, val, Silent(), since=since)
    assert opened == [tiles[4], tiles[1], tiles[3], *val]


def test_a_complete_cache_opens_no_header_and_a_continued_one_those_of_missing_tiles(cached, monkeypatch):
    opened = []
    real = inputs.read_headers
    monkeypatch.setattr(inputs, "read_headers", lambda tiles, advance: opened.extend(tiles) or real(tiles, advance))
    assert precompute(cached, CPU).computed == 0
    assert opened == []
    tiles = list_tiles(cached.data, "train")
    shutil.rmtree(Path(cached.cache.path) / "tiles" / tiles[2].id)
    assert precompute(cached, CPU).computed == 1
    assert opened == [tiles[2]]


def test_an_unreadable_image_is_left_to_stage_one_and_stops_training(own, small_student):
    image = list_tiles(own.data, "train")[1].image
    image.write_text("no image")
    assert list(precompute(own, CPU).failed) == ["Train/" + image.stem]
    with pytest.raises(DataError, match=f"cannot read {image}, which is damaged or not a PNG, JPEG or TIFF"):
        train(with_mode(own, "none"), CPU)


def test_a_run_is_saved_before_the_validation_that_ends_it_and_catches_up(
    cached, make_config, small_student, monkeypatch
):
    whole = train(make_config(name="whole"), CPU)
    real = loop.validate
    monkeypatch.setattr(loop, "validate", lambda *args: (_ for _ in ()).throw(DataError("a tile has gone")))
    with pytest.raises(DataError, match="a tile has gone"):
        train(cached, CPU)
    assert checkpoint()["position"]["steps"] == 3
    assert checkpoint()["position"]["history"] == ()
    monkeypatch.setattr(loop, "validate", real)
    resumed = train(cached, CPU, resume=True)
    found, expected = (read_run(summary.weights).history for summary in (resumed, whole))
    assert [(past.steps, past.iou) for past in found] == [(past.steps, past.iou) for past in expected]
    assert [past.steps for past in found] == [3, 6]
    assert_same_weights(weights(), weights("whole"))
    assert (resumed.best_step, resumed.best_miou) == (whole.best_step, whole.best_miou)


def test_a_tile_with_an_alpha_band_among_its_inputs_is_refused_by_training(own, small_student):
    image = list_tiles(own.data, "train")[0].image
    with Image.open(image) as picture:
        height, width = picture.height, picture.width
    image.unlink()
    write_tiff(image.with_suffix(".tif"), noise(height, width, 4), ["alpha", "red", "green", "blue"])
    with pytest.raises(DataError, match=r"data.bands \[1, 2, 3\] takes band 1 of .*tif, which the file calls alpha"):
        train(own, CPU)
    assert not Path("model_weights").exists()


@pytest.mark.parametrize(("alpha", "values", "told"), [
    ("opacity", noise(66, 79, 4), 1), ("band", noise(66, 79, 4), 0), ("opacity", noise(66, 79, 4) // 128 * 255, 0),
])  # fmt: skip
def test_a_run_says_once_that_what_it_takes_for_opacity_is_none(own, tmp_path, alpha, values, told):
    root = tmp_path / "naip"
    for name in "abcd":
        path = write_tiff(root / f"images/{name}.tif", values)
    data = own.data.model_copy(update={"train": [str(root)], "val": [], "alpha": alpha, "allow_missing_masks": True})
    said = Told()
    check_headers(own.model_copy(update={"data": data}), list_tiles(data, "train"), [], said)
    share = 100 * ((values[3] > 0) & (values[3] < 255)).mean()
    expected = f"note: {path.with_name('a.tif')} calls band 4 alpha, and {share:.0f} % of its values lie between 0"
    assert [line.startswith(expected) and "set data.alpha: band" in line for line in said.lines] == [True] * told
