"""The first batch of a run over very many tiles: headers are read as tiles come, and an unusable image costs its own tile alone."""

import numpy as np
import pytest
import torch
from helpers.doubles import CostlessTeacher
from helpers.files import tree, write_image, write_tiff

from kdpipe.configs.errors import DataError
from kdpipe.data.dataset import batches_of_equal_size
from kdpipe.pipeline import inputs
from kdpipe.pipeline.precompute import plan
from kdpipe.pipeline.precompute import run as stage
from kdpipe.pipeline.precompute.batches import HEADER_READERS, make_batches
from kdpipe.pipeline.precompute.plan import failure_report
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.progress import Silent

CPU = torch.device("cpu")


class Sized:
    """A subject whose header is its size, None where it cannot be read."""

    def __init__(self, number, size):
        self.id, self._size, self.looks = f"t{number}", size, 0

    def size(self):
        self.looks += 1
        if self._size is None:
            raise DataError("by the test")
        return self._size


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
@pytest.mark.parametrize("unreadable", [0.0, 0.3, 1.0])
def test_each_tile_is_in_the_batch_that_a_list_of_all_sizes_gives(batch_size, unreadable):
    rng = np.random.default_rng(batch_size)
    for count in (0, 1, 5, 60):
        sizes = [
            None if rng.random() < unreadable else [(64, 64), (64, 80), (9, 9)][rng.integers(3)] for _ in range(count)
        ]
        tiles = [Sized(i, size) for i, size in enumerate(sizes)]
        assumed = next((size for size in sizes if size), (0, 0))
        whole = []
        for size in sizes:
            assumed = size or assumed
            whole.append(assumed)
        expected = [[f"t{i}" for i in batch] for batch in batches_of_equal_size(whole, batch_size)]
        found = [[tile.id for tile in batch] for batch in make_batches(tiles, {}, batch_size)]
        assert sorted(found) == sorted(expected)


def test_the_first_batch_comes_after_a_few_headers():
    tiles = [Sized(i, (64, 64)) for i in range(10_000)]
    batches = make_batches(tiles, {}, 8)
    assert [tile.id for tile in next(batches)] == [f"t{i}" for i in range(8)]
    assert sum(tile.looks for tile in tiles) <= 8 + 2 * HEADER_READERS
    assert sum(len(batch) for batch in batches) == 10_000 - 8


class EvenTeacher(CostlessTeacher):
    """All classes alike."""

    def cached_values(self, images_NHWC):
        return np.full((len(images_NHWC), 6, *images_NHWC.shape[1:3]), 1 / 6, dtype=np.float32)


class Told(Silent):
    """Keeps what is said."""

    def __init__(self):
        self.said = []

    def say(self, message):
        self.said.append(message)


@pytest.fixture
def scenes(make_config, tmp_path, monkeypatch):
    """Overrides for seven tiles, of which the headers of two are read before the work begins; `t2` takes alpha for a colour."""
    monkeypatch.setattr(stage, "open_teacher", EvenTeacher().by)
    for module in (inputs, plan):
        monkeypatch.setattr(module, "MOST_BEFORE", 2)
    images = tmp_path / "Many" / "images"
    for i in range(7):
        write_image(images / f"t{i}.png", 64, 64, seed=i)
    (images / "t2.png").unlink()
    pixels_BHW = np.random.default_rng(2).integers(0, 256, (3, 64, 64), dtype=np.uint8)
    write_tiff(images / "t2.tif", pixels_BHW, ["red", "green", "alpha"])
    return {"data__train": [str(tmp_path / "Many")], "data__allow_missing_masks": True, "data__unlabelled": []}


@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_image_that_nobody_looked_at_before_is_refused_as_it_comes(make_config, scenes, tmp_path, batch_size):
    config = make_config(**scenes, teacher__batch_size=batch_size)
    told = Told()
    summary = precompute(config, CPU, told)
    assert "note: of 7 tiles the headers of 2 are read now, evenly spread, the others' as their tiles come" in told.said
    assert (list(summary.failed), summary.computed, summary.fingerprint) == (["Many/t2"], 6, None)
    assert "takes band 3 of " in failure_report(summary)
    assert "which the file calls alpha" in failure_report(summary)
    (tmp_path / "Many/images/t2.tif").unlink()
    write_image(tmp_path / "Many/images/t2.png", 64, 64, seed=2)
    assert precompute(config, CPU).computed == 1
    whole = make_config(**scenes, teacher__batch_size=batch_size, cache__path=str(tmp_path / "whole.zarr"))
    precompute(whole, CPU)
    assert tree(tmp_path / "cache.zarr") == tree(tmp_path / "whole.zarr")


def test_a_mask_that_nobody_looked_at_before_is_refused_as_its_tile_comes(make_config, scenes, tmp_path):
    """Training takes tiles for checked that are older than their cache."""
    (tmp_path / "Many/images/t2.tif").unlink()
    write_image(tmp_path / "Many/images/t2.png", 64, 64, seed=2)
    write_image(tmp_path / "Many/masks/t2.jpg", 64, 64)
    summary = precompute(make_config(**scenes), CPU)
    assert (list(summary.failed), summary.computed) == (["Many/t2"], 6)
    assert "t2.jpg is a JPEG, which alters class indices" in summary.failed["Many/t2"]


def test_what_is_among_the_first_is_refused_before_the_work_begins(make_config, scenes, monkeypatch):
    for module in (inputs, plan):
        monkeypatch.setattr(module, "MOST_BEFORE", 7)
    told = Told()
    with pytest.raises(DataError, match=r"takes band 3 of .*t2\.tif, which the file calls alpha"):
        precompute(make_config(**scenes), CPU, told)
    assert not any("headers" in text for text in told.said)
