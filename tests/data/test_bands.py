"""Images of other than three bands: what is read, recoloured, resampled, and refused; expected values are NumPy's and Pillow's."""

from functools import partial

import numpy as np
import pytest
from helpers.files import noise, write_tiff
from PIL import Image

from kdpipe.configs.schema import Data
from kdpipe.data.augment import change_colours
from kdpipe.data.dataset import recoloured
from kdpipe.data.declared.check import Comparison, read_headers, tile_faults
from kdpipe.data.geometry import Plan, Resampler, View, transposed
from kdpipe.data.rasters import open_rows, read_image
from kdpipe.data.stretch import resolve_stretch
from kdpipe.data.tiles import Tile
from kdpipe.pipeline.pictures import visible

NAMES = {"red": 3, "green": 2, "blue": 1, "nir": 4}
data_of = partial(Data, train=["T"])


@pytest.mark.parametrize(
    ("keys", "places"),
    [
        ({}, (0, 1, 2)),
        ({"bands": [3, 2, 1]}, (0, 1, 2)),
        ({"bands": [1, 1, 1]}, (0, 1, 2)),
        ({"bands": [5, 4, 3, 2]}, (0, 1, 2)),
        ({"bands": [4, 1, 2, 3], "band_names": NAMES}, (3, 2, 1)),
        ({"bands": [4, 1, 2], "band_names": NAMES}, (0, 1, 2)),  # there is no red
        ({"bands": [7]}, (0,)),
        ({"bands": [7, 8]}, (0,)),
        ({"bands": [4, 1, 2, 3], "band_names": NAMES, "visible": ["nir", 3, "green"]}, (0, 3, 2)),
        ({"bands": [4, 1, 2, 3], "visible": [2]}, (2,)),
    ],
)
def test_visible_are_the_configured_bands_or_those_called_so_or_the_first(keys, places):
    data = data_of(**keys)
    assert data.visible_places == places
    image = noise(5, 7, bands=len(data.bands)).transpose(1, 2, 0)
    chosen = places if len(places) == 3 else places * 3
    np.testing.assert_array_equal(visible(image, places), np.stack([image[..., i] for i in chosen], axis=-1))


@pytest.mark.parametrize("places", [(3, 2, 0), (2,)])
def test_colours_change_in_visible_bands_alone_as_those_of_an_image_of_these(places):
    image = noise(40, 50, bands=5).transpose(1, 2, 0).copy()
    for seed in range(6):
        found = recoloured(image, places, Plan(crop=40, views=(), photometric_seed=seed))
        alone = change_colours(np.ascontiguousarray(image[..., list(places)]), seed)
        np.testing.assert_array_equal(found[..., list(places)], alone)
        others = [band for band in range(5) if band not in places]
        np.testing.assert_array_equal(found[..., others], image[..., others])
        assert not np.array_equal(found, image)


@pytest.mark.parametrize("bands", [1, 2, 4, 5, 7, 12, 40])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_an_image_of_any_number_of_bands_is_transposed_and_resampled_band_by_band(bands, dtype):
    image = noise(30, 41, bands=bands).transpose(1, 2, 0)
    np.testing.assert_array_equal(transposed(image.astype(dtype)), image.astype(dtype).swapaxes(0, 1))
    resampler = Resampler(View(0, 1.5, 5, 3, 32, 32), 30, 41)
    y, x, h, w = resampler.window
    cut = image[y : y + h, x : x + w]
    together = resampler.image(cut)
    for band in range(bands):
        three = resampler.image(np.repeat(cut[..., band : band + 1], 3, axis=-1))
        np.testing.assert_array_equal(together[..., band], three[..., 0])


def test_twelve_bands_of_16_bits_are_stretched_each_by_its_own_percentiles(tmp_path):
    values = (
        np.random.default_rng(1).integers(0, 9000, (12, 40, 50), dtype=np.uint16)
        * np.arange(1, 13, dtype=np.uint16)[:, None, None]
        // 12
    )
    path = write_tiff(tmp_path / "T/images/a.tif", values)
    data = data_of(bands=[12, 4, 8, 1], stretch={"percentiles": [2, 98]})
    stretch = resolve_stretch(data, [Tile("T/a", path, None)])
    chosen = values[[11, 3, 7, 0]].astype(np.float64)
    low, high = np.percentile(chosen, [2, 98], axis=(1, 2))
    np.testing.assert_allclose(stretch, np.stack([low, high], axis=1))
    scaled = np.rint(
        (np.clip(chosen, low[:, None, None], high[:, None, None]) - low[:, None, None])
        * (255 / (high - low))[:, None, None]
    )
    found = read_image(path, data.bands, stretch)
    assert np.abs(found.transpose(2, 0, 1) - scaled).max() <= 1  # computed in float32
    with open_rows(path, data.bands, stretch) as rows:
        np.testing.assert_array_equal(np.concatenate([rows.read(0, 25), rows.read(25, 40)]), found)


def test_an_image_with_fewer_bands_is_named_with_what_to_set(tmp_path):
    path = write_tiff(tmp_path / "T/images/a.tif", noise(8, 9))
    (headers,) = read_headers([Tile("T/a", path, None)])
    (fault,) = tile_faults(headers, [1, 2, 3, 4], has_stretch=False)
    assert fault == (
        f"{path} has 3 bands, and data.bands asks for [1, 2, 3, 4]: leave the image out, or set data.bands to bands that all images have"
    )


def test_images_of_8_bits_among_wider_ones_are_refused_as_one_stretch_is_for_all(tmp_path):
    byte = write_tiff(tmp_path / "T/images/a.tif", noise(8, 9))
    wide = write_tiff(tmp_path / "T/images/b.tif", noise(8, 9).astype(np.uint16) * 40)
    comparison = Comparison([1, 2, 3], chosen=True, classes=3)
    for headers in read_headers([Tile("T/a", byte, None), Tile("T/b", wide, None)]):
        assert tile_faults(headers, [1, 2, 3], has_stretch=True) == []
        comparison.add(headers, is_val=False)
    (fault,) = comparison.findings().faults
    assert f"uint8 in 1 (such as {byte}); uint16 in 1 (such as {wide})" in fault
    assert "convert them to one type and unit" in fault


def test_four_named_bands_in_any_order_are_no_mistake_and_two_orders_are(tmp_path):
    naip = write_tiff(tmp_path / "T/images/a.tif", noise(8, 9, bands=4), ["red", "green", "blue", "nir"])
    other = write_tiff(tmp_path / "T/images/b.tif", noise(8, 9, bands=4), ["nir", "red", "green", "blue"])
    for chosen in (True, False):
        comparison = Comparison([4, 1, 2, 3], chosen=chosen, classes=3)
        read = list(read_headers([Tile("T/a", naip, None), Tile("T/b", other, None)]))
        comparison.add(read[0], is_val=False)
        assert comparison.findings().faults == comparison.findings().notes == []
        comparison.add(read[1], is_val=False)
        assert "images name the bands that are read differently" in comparison.findings().faults[0]


def test_a_grey_image_is_read_as_one_band(tmp_path):
    Image.fromarray(noise(8, 9)[0]).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(read_image(tmp_path / "grey.png", [1])[..., 0], noise(8, 9)[0])
