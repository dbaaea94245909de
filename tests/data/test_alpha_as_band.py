"""`data.alpha`: a band that files call alpha is opacity, or an ordinary band that hides nothing; expected values are NumPy's."""

import numpy as np
import pytest
from helpers.files import write_tiff
from PIL import Image

from kdpipe.configs import parse_config
from kdpipe.configs.schema import Data
from kdpipe.data.dataset import TrainTiles, ValTiles
from kdpipe.data.declared.check import Comparison, read_headers, tile_faults
from kdpipe.data.declared.scene import colours_of
from kdpipe.data.rasters import open_rows, read_bands, read_data, read_image, read_image_with_data
from kdpipe.data.scenes import open_scene
from kdpipe.data.stretch import resolve_stretch
from kdpipe.data.tiles import Tile, list_tiles

H, W, IGNORE = 66, 79, 255
RNG = np.random.default_rng(5)
NAIP = RNG.integers(1, 255, (4, H, W), dtype=np.uint8)
WATER = np.zeros((H, W), np.bool_)
WATER[10:40, 20:50] = True
NAIP[3, WATER] = 0
LABELS = RNG.integers(0, 3, (H, W), dtype=np.uint8)
WITH_INFRARED = (4, 1, 2)


@pytest.fixture
def naip(tmp_path):
    """The image of a root with one tile, of which GDAL calls the infrared band alpha because it is the fourth."""
    path = write_tiff(tmp_path / "T/images/a.tif", NAIP)
    assert colours_of(path)[3] == "alpha"
    (tmp_path / "T/masks").mkdir()
    Image.fromarray(LABELS).save(tmp_path / "T/masks/a.png")
    return path


def data_of(path, **keys):
    return {"train": [str(path.parents[1])], **keys}


def rows_of(opened):
    with opened as rows:
        parts = [rows.read_with_data(top, min(top + 25, H)) for top in range(0, H, 25)]
    return tuple(np.concatenate(part) for part in zip(*parts, strict=True))


@pytest.mark.parametrize("bands", [(1, 2, 3), WITH_INFRARED])
def test_a_band_called_alpha_hides_nothing_and_is_read_as_any_other(naip, bands):
    expected = np.stack([NAIP[band - 1] for band in bands], axis=-1)
    image, data = read_image_with_data(naip, bands, alpha="band")
    assert data is None
    assert read_data(naip, bands, alpha="band") is None
    np.testing.assert_array_equal(image, expected)
    np.testing.assert_array_equal(read_image(naip, bands, [(0, 255)] * 3, "band"), expected)
    values, missing = read_bands(naip, bands, "band")
    np.testing.assert_array_equal(values, expected.transpose(2, 0, 1))
    assert not missing.any()
    for opened in (open_rows(naip, bands, alpha="band"), open_scene(str(naip), bands, None, alpha="band")):
        image, data = rows_of(opened)
        np.testing.assert_array_equal(image, expected)
        assert data.all()


def test_it_is_opacity_unless_the_key_says_otherwise(naip):
    assert Data(**data_of(naip)).alpha == "opacity"
    for alpha in ({}, {"alpha": "opacity"}):
        np.testing.assert_array_equal(read_image_with_data(naip, **alpha)[1], ~WATER)
        np.testing.assert_array_equal(read_data(naip, **alpha), ~WATER)
        np.testing.assert_array_equal(read_bands(naip, (1,), **alpha)[1][0], WATER)
        np.testing.assert_array_equal(rows_of(open_rows(naip, **alpha))[1], ~WATER)
        np.testing.assert_array_equal(rows_of(open_scene(str(naip), (1, 2, 3), None, **alpha))[1], ~WATER)


def test_nodata_and_a_mask_of_the_file_hide_pixels_all_the_same(tmp_path):
    """Beside a nodata tag, GDAL does not take the fourth band for a mask; by itself it does."""
    values = NAIP.copy()
    values[:, :5] = 7
    values[3, :5] = 9  # the colours alone are nodata
    path = write_tiff(tmp_path / "a.tif", values, ["red", "green", "blue", "alpha"], nodata=7)
    expected = ~(values[:3] == 7).all(axis=0)
    np.testing.assert_array_equal(read_data(path, alpha="band"), expected)
    np.testing.assert_array_equal(read_data(path, WITH_INFRARED, alpha="band"), None)


@pytest.mark.parametrize(("alpha", "seen"), [("opacity", ~WATER), ("band", np.ones((H, W), np.bool_))])
def test_samples_labels_and_percentiles_follow_the_key(naip, alpha, seen):
    config = parse_config(
        {
            "name": "test",
            "classes": {"names": ["a", "b", "c"], "ignore_index": IGNORE},
            "data": data_of(naip, alpha=alpha, stretch={"percentiles": [2, 98]}),
            "teacher": {"architecture": "unet", "encoder": "resnet18", "checkpoint": "x.pth", "classes": ["a", "b"]},
            "class_map": {"a": {"a": 1}, "b": {"b": 1}},
            "cache": {"path": "x.zarr"},
            "student": {"architecture": "unet", "encoder": "resnet18"},
            "train": {"crop": 64, "scales": [1.0], "photometric": 0, "mosaic": 0, "max_class_share": 1},
        },
        origin="test",
    )
    tiles = list_tiles(config.data, "train")
    stretch = resolve_stretch(config.data, tiles)
    np.testing.assert_allclose(stretch, [np.percentile(band[seen], [2, 98]) for band in NAIP[:3]])
    np.testing.assert_array_equal(ValTiles(tiles, config, stretch)[0]["mask"], np.where(seen, LABELS, IGNORE))
    dataset = TrainTiles(tiles, config, stretch)
    for k in range(4):
        (view,) = dataset.plan(k).views
        cut = np.s_[view.top : view.top + 64, view.left : view.left + 64]
        assert dataset[k]["inside"].sum() == seen[cut].sum()
        assert (dataset[k]["mask"] != IGNORE).sum() == seen[cut].sum()


def test_it_may_stand_among_the_bands_where_it_is_one_and_the_refusal_names_the_key(naip, tmp_path):
    named = write_tiff(tmp_path / "T/images/b.tif", NAIP, ["red", "green", "blue", "nir"])
    read = list(read_headers([Tile(path.stem, path, None) for path in (naip, named)]))
    (fault,) = tile_faults(read[0], WITH_INFRARED, has_stretch=False)
    assert fault.endswith("or, if band 4 is something else, such as infrared, set data.alpha: band")
    comparison = Comparison(WITH_INFRARED, chosen=True, classes=3)
    for headers in read:
        assert tile_faults(headers.called("band"), WITH_INFRARED, has_stretch=False) == []
        comparison.add(headers.called("band"), is_val=False)
    assert comparison.findings().faults == []  # a band that is called nothing contradicts no name
    assert colours_of(naip, "band") == ["red", "green", "blue", "undefined"]
