"""Tiles cut from large rasters of predictions by their place, on the same grid."""

import numpy as np
import pytest
from helpers.predicted_world import CPU, SIZES, TEACHER, config, image_of, softened
from helpers.stored_predictions import logits_of, probabilities, write_prediction
from rasterio import Affine

from kdpipe.cache import SoftTargetCache
from kdpipe.configs.errors import DataError
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.training.targets import open_targets

UTM = "EPSG:32633"
PLACES = {"a": (0, 0), "b": (0, 52), "north/c": (40, 20)}  # row and column of each tile in the mosaic
HEIGHT, WIDTH = 80, 110
PIXEL, LEFT, TOP = 0.3, 500_000.0, 5_000_000.0


def placed(row, column):
    return Affine(PIXEL, 0, LEFT + column * PIXEL, 0, -PIXEL, TOP - row * PIXEL)


@pytest.fixture
def mapped(world):
    """The tiles as GeoTIFFs cut from one scene, and a function that writes the logits of the scene as one large GeoTIFF."""
    rng = np.random.default_rng(1)
    scene = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    for name, (row, column) in PLACES.items():
        height, width = SIZES[name]
        image_of(world, name).unlink()
        cut = scene[row : row + height, column : column + width].transpose(2, 0, 1)
        path = image_of(world, name).with_suffix(".tif")
        write_prediction(path, cut, transform=placed(row, column), crs=UTM)
    logits = logits_of(scene, len(TEACHER))

    def write_scene(
        name="scene.tif", rows=slice(0, HEIGHT), columns=slice(0, WIDTH), change=lambda values: values, **options
    ):
        options = {"transform": placed(rows.start, columns.start), "crs": UTM} | options
        return str(write_prediction(world / name, change(logits[:, rows, columns].copy()), **options))

    return world, logits, write_scene


def test_tiles_are_cut_from_a_large_raster_by_their_place(mapped):
    world, logits, write_scene = mapped
    made = config(world, "logits", write_scene())
    assert precompute(made, CPU).computed == 3
    cache = SoftTargetCache.open(made.cache.path)
    for name, (row, column) in PLACES.items():
        height, width = SIZES[name]
        cut = logits[:, row : row + height, column : column + width]
        assert np.abs(cache.read(f"Mine/{name}") - softened(probabilities(cut))).max() <= 1 / 255 + 1e-5
    assert precompute(made, CPU).computed == 0

    def other(values):
        values[:, 45:50, 25:30] += 1  # within c alone
        return values

    write_scene(change=other)
    assert precompute(made, CPU).computed == 1, "only the tile whose part has changed"


def test_several_rasters_complete_each_other(mapped):
    world, _, write_scene = mapped
    left, right = slice(0, 60), slice(60, WIDTH)
    made = config(world, "logits", [write_scene("left.tif", columns=left), write_scene("right.tif", columns=right)])
    precompute(made, CPU)
    whole = config(world, "logits", write_scene(), cache={"path": str(world / "whole.zarr")})
    precompute(whole, CPU)
    parts, one = SoftTargetCache.open(made.cache.path), SoftTargetCache.open(whole.cache.path)
    assert all(np.array_equal(parts.read_units(tile), one.read_units(tile)) for tile in one.tile_ids)


def test_pixels_outside_of_the_raster_have_no_prediction(mapped):
    world, _, write_scene = mapped
    made = config(world, "logits", write_scene(rows=slice(0, 60)))
    precompute(made, CPU)
    tiles = list_tiles(made.data, "train")
    target = open_targets(made, tiles, None, CPU).source.read("Mine/north/c", (0, 0, *SIZES["north/c"]))
    assert (target[:, :20].sum(axis=0) > 0.99).all()
    assert (target[:, 20:] == 0).all()


MISPLACED = {
    "half a pixel off": ({"transform": placed(0, 0.5)}, r"does not lie on the grid of .*its corner is at column -0.500, row 0.000"),
    "other pixels": ({"transform": Affine(0.6, 0, LEFT, 0, -0.6, TOP)}, r"its pixels have 0.3 x -0.3 against 0.6 x -0.6"),
    "another CRS": ({"crs": "EPSG:32632"}, r"is in EPSG:32632, and the tile .* in EPSG:32633"),
    "elsewhere": ({"transform": placed(500, 500)}, r"lack 3 of 3 tiles: .*the large rasters cover none of their pixels"),
}  # fmt: skip


@pytest.mark.parametrize("how", MISPLACED)
def test_a_raster_of_another_grid_is_refused_with_the_numbers(mapped, how):
    world, _, write_scene = mapped
    options, message = MISPLACED[how]
    with pytest.raises(DataError, match=message):
        precompute(config(world, "logits", write_scene(**options)), CPU)


def test_images_without_a_place_cannot_be_cut(world):
    path = write_prediction(world / "scene.tif", np.zeros((3, 90, 90), np.float32), transform=placed(0, 0), crs=UTM)
    with pytest.raises(
        DataError, match=r"a.png has no georeference, and a tile is cut from a large raster by its place"
    ):
        precompute(config(world, "logits", str(path)), CPU)


def test_a_file_of_a_tile_that_says_that_it_lies_elsewhere_is_refused(mapped):
    world, logits, _ = mapped
    for name, (row, column) in PLACES.items():
        height, width = SIZES[name]
        cut = logits[:, row : row + height, column : column + width]
        write_prediction(world / f"saved/{name}.tif", cut, transform=placed(row + 3, column), crs=UTM)
    with pytest.raises(DataError, match=r"the prediction .*a.tif lies .* in y from its image"):
        precompute(config(world, "logits"), CPU)
