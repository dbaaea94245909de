"""Reading images and masks: correct pixels from every format, and an error for a damaged file."""

import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import rasterio
from helpers.files import write_tiff
from PIL import Image

from kdpipe.configs.errors import DataError
from kdpipe.data.declared import opening
from kdpipe.data.rasters import image_size, read_bands, read_image, read_mask

DUBAI = Path(__file__).parents[3] / "shared/data/dubai"
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (37, 53, 3), dtype=np.uint8)


def save(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


@pytest.mark.parametrize("name", ["a.png", "a.TIF", "x!y.png", "a:b.png", "zip:a.png", "ümlaut #1?.png"])
def test_8_bit_rgb_is_taken_as_it_is(tmp_path, name):
    path = tmp_path / name
    Image.fromarray(RGB).save(path, format="TIFF" if name.endswith("TIF") else "PNG")
    image = read_image(path)
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    np.testing.assert_array_equal(image, RGB)
    assert image_size(path) == (37, 53)


def test_alpha_is_not_among_the_bands(tmp_path):
    rgba = np.dstack([RGB, np.zeros(RGB.shape[:2], np.uint8)])
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", rgba)), RGB)


def test_bands_come_in_the_requested_order_and_may_repeat(tmp_path):
    path = write_tiff(tmp_path / "a.tif", RNG.integers(0, 256, (5, 9, 7), dtype=np.uint8), compress="deflate")
    bands = read_bands(path, [1, 2, 3, 4, 5])[0]
    np.testing.assert_array_equal(read_image(path, (5, 2, 5)), bands[[4, 1, 4]].transpose(1, 2, 0))


def test_missing_band_is_named_with_what_the_file_has(tmp_path):
    path = save(tmp_path / "grey.png", RGB[..., 0])
    with pytest.raises(DataError, match=r"grey\.png has 1 band, and data\.bands asks for \[1, 2, 3\]"):
        read_image(path)


@pytest.mark.parametrize("dtype", ["uint16", "int16", "int32", "float32", "float64"])
def test_stretch_maps_low_to_0_and_high_to_255_and_clips(tmp_path, dtype):
    values = RNG.integers(0, 4000, (3, 11, 13)).astype(dtype)
    path = write_tiff(tmp_path / "a.tif", values)
    stretch = [(100, 3000), (0, 4000), (500.5, 600.25)]
    image = read_image(path, stretch=stretch)
    for band, (low, high) in enumerate(stretch):
        for (row, column), value in np.ndenumerate(values[band]):
            exact = min(max((float(value) - low) / (high - low), 0), 1) * 255
            # Half a grey level is rounding; float32 may move a value across a tie by 1e-4 of a level.
            assert abs(image[row, column, band] - exact) <= 0.5 + 1e-4


def test_stretch_applies_to_8_bit_files_too(tmp_path):
    path = save(tmp_path / "a.png", np.full((2, 3, 3), 100, np.uint8))
    assert np.unique(read_image(path, stretch=[(50, 150)] * 3)).tolist() == [128]  # 127.5, half to even


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_wider_values_without_a_stretch_are_refused_with_the_config_to_add(tmp_path, dtype):
    path = write_tiff(tmp_path / "deep.tif", np.ones((3, 4, 5), dtype))
    with pytest.raises(DataError, match=rf"deep\.tif holds {dtype} .*range: \[low, high\].*percentiles: \[2, 98\]"):
        read_image(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_value_is_refused_and_located(tmp_path, value):
    values = np.ones((3, 4, 5), np.float32)
    values[1, 2, 3] = value
    path = write_tiff(tmp_path / "holes.tif", values)
    with pytest.raises(DataError, match=r"holes\.tif holds NaN or infinity in band 2 at 1 pixel.*row 2, column 3"):
        read_image(path, stretch=[(0, 1)] * 3)


def test_non_finite_value_in_an_unused_band_is_ignored(tmp_path):
    values = np.ones((4, 4, 5), np.float32)
    values[3] = np.nan
    assert read_image(write_tiff(tmp_path / "a.tif", values), stretch=[(0, 1)] * 3).min() == 255


@pytest.mark.parametrize(
    ("dtype", "nodata"), [("float32", np.nan), ("float32", -3.4028234663852886e38), ("uint16", 65535), ("int16", -9999)]
)
def test_declared_nodata_becomes_0(tmp_path, dtype, nodata):
    values = np.full((3, 4, 5), 7, dtype)
    values[1, 2, 3] = nodata
    image = read_image(write_tiff(tmp_path / "a.tif", values, nodata=nodata), stretch=[(-7, 7)] * 3)
    expected = np.full((4, 5, 3), 255)
    expected[2, 3, 1] = 0
    np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.jpg", {}),
        ("a.png", {}),
        ("a.tif", {}),
        ("b.tif", {"compress": "deflate", "tiled": True, "blockxsize": 16, "blockysize": 16}),
    ],
)
@pytest.mark.parametrize("share", [0.02, 0.4, 0.97])
def test_truncated_file_is_an_error(tmp_path, name, options, share):
    pixels = RNG.integers(0, 256, (120, 130, 3), dtype=np.uint8)
    whole = tmp_path / name
    if name.endswith("tif"):
        write_tiff(whole, pixels.transpose(2, 0, 1), **options)
    else:
        save(whole, pixels)
    assert read_image(whole).shape == (120, 130, 3)
    content = whole.read_bytes()
    cut = tmp_path / f"cut_{name}"
    cut.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DataError, match=rf"cannot read .*cut_{name}, which is damaged"):
        read_image(cut)


def test_truncated_mask_is_an_error(tmp_path):
    path = save(tmp_path / "m.png", RNG.integers(0, 6, (200, 210), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"cannot read .*m\.png"):
        read_mask(path, 6, 255)


def test_flipped_bit_in_a_png_is_an_error(tmp_path):
    path = save(tmp_path / "a.png", RNG.integers(0, 256, (100, 100, 3), dtype=np.uint8))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        read_image(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"<VRTDataset rasterXSize='1' rasterYSize='1'/>"])
def test_a_file_of_another_kind_is_an_error(tmp_path, content):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    for read in (read_image, image_size, lambda p: read_mask(p, 6, 255)):
        with pytest.raises(DataError, match=r"cannot read .*a\.png.*PNG, JPEG or TIFF"):
            read(path)


def test_missing_file_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"there is no file /.*none\.png"):
        read_image(tmp_path / "none.png")


def test_absurd_declared_size_is_refused_before_anything_is_read(tmp_path):
    path = tmp_path / "huge.tif"
    profile = {"driver": "GTiff", "count": 1, "height": 70000, "width": 70000, "dtype": "uint8"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        rasterio.open(path, "w", sparse_ok=True, compress="deflate", tiled=True, **profile).close()
    for read in (image_size, lambda p: read_image(p, (1, 1, 1)), lambda p: read_mask(p, 6, 255)):
        with pytest.raises(DataError, match=r"huge\.tif declares 70000 x 70000 px, more than"):
            read(path)


def test_mask_comes_back_as_it_was_written(tmp_path):
    labels = RNG.choice([0, 1, 5, 255], size=(9, 7))
    for name, dtype in [("m.png", np.uint8), ("m.tif", np.uint8), ("m16.tif", np.uint16), ("m32.tif", np.int32)]:
        path = tmp_path / name
        save(path, labels.astype(dtype)) if name.endswith("png") else write_tiff(path, labels[None].astype(dtype))
        mask = read_mask(path, 6, 255)
        assert mask.dtype == np.int32
        np.testing.assert_array_equal(mask, labels)


def test_wide_ignore_index(tmp_path):
    labels = np.array([[0, 65535], [1, 300]], np.uint16)
    path = write_tiff(tmp_path / "m.tif", labels[None])
    np.testing.assert_array_equal(read_mask(path, 301, 65535), labels)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_a_palette_s_indices_are_the_labels(tmp_path, bits):
    labels = RNG.integers(0, 2 if bits == 1 else 6, (9, 7), dtype=np.uint8)
    picture = Image.fromarray(labels).convert("P")
    picture.putdata(labels.ravel().tolist())
    picture.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200, 9, 9, 9, 8, 8, 8, 7, 7, 7])
    picture.save(tmp_path / "m.png", bits=bits)
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png", 6, 255), labels)


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ([[0, 6]], "6"),
        ([[-1, 0]], "-1"),
        ([[255, 254, 7]], "7, 254"),
        ([[10, 11, 12, 13, 14, 15]], "10, 11, 12, 13, 14, …"),
        ([[2**31 - 1, 0]], "2147483647"),
    ],
)
def test_value_outside_the_classes_is_named(tmp_path, labels, found):
    path = write_tiff(tmp_path / "m.tif", np.array([labels], np.int32))
    with pytest.raises(DataError, match=rf"m\.tif holds {found}, neither a class \(0\.\.5\) nor ignore_index 255"):
        read_mask(path, 6, 255)


def test_mask_of_several_bands_floats_or_lossy_compression_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"rgb\.png should have 1 band of class indices, found 3 bands"):
        read_mask(save(tmp_path / "rgb.png", RGB), 6, 255)
    with pytest.raises(DataError, match=r"f\.tif should hold integers, class indices, found float32"):
        read_mask(write_tiff(tmp_path / "f.tif", np.zeros((1, 3, 4), np.float32)), 6, 255)
    with pytest.raises(DataError, match=r"m\.jpg is a JPEG, which alters class indices"):
        read_mask(save(tmp_path / "m.jpg", np.zeros((8, 8), np.uint8)), 6, 255)


def test_complex_values_are_refused(tmp_path):
    path = write_tiff(tmp_path / "radar.tif", np.ones((3, 4, 5), np.complex64))
    with pytest.raises(DataError, match=r"radar\.tif holds complex64 values"):
        read_image(path, stretch=[(0, 1)] * 3)


def test_nothing_is_written_beside_the_data(tmp_path):
    path = write_tiff(tmp_path / "a.tif", np.ones((3, 40, 50), np.uint16))
    save(tmp_path / "a.jpg", RGB)
    before = sorted(tmp_path.iterdir())
    read_image(path, stretch=[(0, 1)] * 3)
    read_bands(path, [1])
    read_image(tmp_path / "a.jpg")
    assert sorted(tmp_path.iterdir()) == before


def test_nodata_of_a_sidecar_is_that_of_its_band(tmp_path):
    path = write_tiff(tmp_path / "a.tif", np.full((3, 4, 5), 7, np.uint16))
    sidecar = '<PAMDataset><PAMRasterBand band="1"><NoDataValue>7</NoDataValue></PAMRasterBand></PAMDataset>'
    (tmp_path / "a.tif.aux.xml").write_text(sidecar)
    assert read_bands(path, [1, 2, 3])[1].all(axis=(1, 2)).tolist() == [True, False, False]


def test_threads_read_whole_and_damaged_files_at_once_without_touching_the_warning_filters(tmp_path):
    whole = save(tmp_path / "a.jpg", RNG.integers(0, 256, (200, 200, 3), dtype=np.uint8))
    png = save(tmp_path / "a.png", RNG.integers(0, 256, (200, 200, 3), dtype=np.uint8))
    for path in (whole, png):
        content = path.read_bytes()
        (tmp_path / f"cut_{path.name}").write_bytes(content[: len(content) // 2])
    expected = {path: read_image(path) for path in (whole, png)}
    filters = list(warnings.filters)

    def read(i):
        path = (whole, png)[i % 2]
        if i % 4 < 2:
            return np.array_equal(read_image(path), expected[path])
        try:
            read_image(tmp_path / f"cut_{path.name}")
        except DataError:
            return True
        return False

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(200)))
    assert warnings.filters == filters


def test_the_limit_admits_a_tile_of_exactly_that_size():
    assert opening.MAX_PIXELS == 32768 * 32768


@pytest.mark.skipif(not DUBAI.is_dir(), reason=f"the real tiles are not at {DUBAI}")
def test_real_tiles_read_and_match_in_size():
    masks = sorted((DUBAI / "Train/masks").iterdir())[:4]
    for mask_path in masks:
        image_path = DUBAI / "Train/images" / f"{mask_path.stem}.jpg"
        labels = read_mask(mask_path, 6, 255)
        assert read_image(image_path).shape == (*labels.shape, 3)
        assert image_size(image_path) == labels.shape == np.asarray(Image.open(mask_path)).shape
        assert set(np.unique(labels)) <= {0, 1, 4, 5, 255}
