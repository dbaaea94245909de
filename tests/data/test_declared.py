"""The header of a raster: what the file and its side files declare."""

import io
import os
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from helpers.files import write_tiff
from PIL import Image
from rasterio.enums import MaskFlags

from kdpipe.configs import schema
from kdpipe.data.declared.header import read_declared
from kdpipe.data.rasters import read_bands, read_image
from kdpipe.data.stretch import resolve_stretch, sampled_bands
from kdpipe.data.survey import list_root, survey_root

NODATA_XML = "<PAMDataset>{}</PAMDataset>"
BAND_XML = '<PAMRasterBand band="{}"><NoDataValue>{}</NoDataValue></PAMRasterBand>'


@pytest.fixture
def rgb_3HW():
    return np.random.default_rng(0).integers(1, 255, (3, 24, 40), dtype=np.uint8)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        yield


def test_declared_says_what_rasterio_says(tmp_path, rgb_3HW):
    transform = Affine(0.5, 0, 3e5, 0, -0.5, 2.7e6)
    path = write_tiff(
        tmp_path / "a.tif", np.concatenate([rgb_3HW, rgb_3HW[:1]]).astype(np.uint16), ["blue", "green", "red", "alpha"],
        crs="EPSG:32640", transform=transform, compress="deflate",
    )  # fmt: skip
    with rasterio.open(path, "r+") as raster:
        raster.scales, raster.offsets = (0.0001,) * 4, (-0.1,) * 4
    declared = read_declared(path)
    with rasterio.open(path) as raster:
        assert (declared.height, declared.width, declared.dtypes) == (raster.height, raster.width, raster.dtypes)
        assert declared.colours == tuple(meaning.name for meaning in raster.colorinterp)
        assert (declared.scales, declared.offsets) == (raster.scales, raster.offsets)
        assert (declared.crs, declared.transform) == (raster.crs, raster.transform)
    assert (declared.rgb, declared.alpha, declared.bands, declared.dtype) == ((3, 2, 1), 4, 4, "uint16")
    assert (declared.compression, declared.lossy) == ("DEFLATE", False)


@pytest.mark.parametrize(
    "colours", [["alpha", "red", "green", "blue", "nir"], ["red", "green", "blue", "nir", "alpha"]]
)
def test_alpha_is_found_wherever_it_stands(tmp_path, rgb_3HW, colours):
    path = write_tiff(tmp_path / "a.tif", np.concatenate([rgb_3HW, rgb_3HW[:2]]), colours, nodata=0)
    assert read_declared(path).alpha == colours.index("alpha") + 1


def test_nodata_beside_a_tile_is_read_and_nothing_is_written(tmp_path, rgb_3HW):
    values = rgb_3HW.astype(np.float32)
    values[:, :5] = -9999
    path = write_tiff(tmp_path / "a.tif", values)
    (tmp_path / "a.tif.aux.xml").write_text(
        NODATA_XML.format("".join(BAND_XML.format(band, -9999) for band in (1, 2, 3)))
    )
    (tmp_path / "tiles").mkdir()
    (tmp_path / "tiles/images").symlink_to(tmp_path)
    root = list_root(str(tmp_path / "tiles"))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    with rasterio.open(path) as raster:
        hidden_HW = raster.read_masks(2) == 0
    assert hidden_HW.sum() == 5 * 40
    assert read_declared(path).nodata == (-9999.0,) * 3
    assert np.array_equal(read_bands(path, [2])[1][0], hidden_HW)
    assert [band.min() for band in sampled_bands(path, [1, 2, 3], 10_000)] == [band[5:].min() for band in values]
    assert not read_image(path, stretch=[(0, 255)] * 3)[:5].any()
    survey_root(root)
    expected = [np.percentile(band[5:], [2, 98]) for band in values]
    np.testing.assert_allclose(root.ranges, expected)
    data = schema.Data(train=["t"], stretch={"percentiles": [2, 98]})
    np.testing.assert_allclose(resolve_stretch(data, root.tiles), expected)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()} == before


def test_opening_a_tile_lists_no_folder(tmp_path, rgb_3HW):
    folder = tmp_path / "images"
    folder.mkdir()
    path = write_tiff(folder / "a.tif", rgb_3HW)
    (folder / "a.tif.aux.xml").write_text(NODATA_XML.format(BAND_XML.format(1, 7)))

    def is_listed_by(action):
        os.utime(folder, ns=(0, 1))  # the kernel notes an access if the last one noted is older than the last change
        action()
        return folder.stat().st_atime_ns != 0

    if not is_listed_by(lambda: os.listdir(folder)):
        pytest.skip("this file system does not record when a folder was listed")
    with rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="FALSE"):
        assert is_listed_by(lambda: rasterio.open(path).close())
    assert not is_listed_by(lambda: read_declared(path))
    assert not is_listed_by(lambda: read_image(path))


def test_a_mask_beside_a_tile_is_found(tmp_path, rgb_3HW):
    path = write_tiff(tmp_path / "a.tif", rgb_3HW)
    assert not read_declared(path).masked
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(path, "r+") as raster:
        raster.write_mask(rgb_3HW[0] > 100)
    assert (tmp_path / "a.tif.msk").exists()
    with rasterio.open(path) as raster:
        assert MaskFlags.per_dataset in raster.mask_flag_enums[0]
    assert read_declared(path).masked


@pytest.mark.parametrize(
    ("profile", "lossy"),
    [
        ({}, False),
        ({"compress": "lzw"}, False),
        ({"compress": "jpeg"}, True),
        ({"compress": "jpeg", "photometric": "ycbcr"}, True),
        ({"compress": "lerc"}, False),
        ({"compress": "lerc", "max_z_error": 1}, True),
        ({"compress": "lerc_deflate", "max_z_error": 1}, True),
        ({"compress": "webp"}, True),
        ({"compress": "webp", "webp_lossless": True}, False),
    ],
    ids=str,
)
def test_lossy_is_what_changes_values(tmp_path, rgb_3HW, profile, lossy):
    path = write_tiff(tmp_path / "a.tif", rgb_3HW, **profile)
    with rasterio.open(path) as raster:
        assert (raster.read() != rgb_3HW).any() == lossy
    assert read_declared(path).lossy == lossy


def test_colour_table_is_the_palette(tmp_path):
    image = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4) % 3, "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.save(tmp_path / "a.png")
    declared = read_declared(tmp_path / "a.png")
    assert declared.colour_table[:3] == ((10, 20, 30, 255), (40, 50, 60, 255), (70, 80, 90, 255))
    assert read_declared(write_tiff(tmp_path / "b.tif", np.zeros((1, 3, 4), np.uint8))).colour_table is None


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
def test_orientation_is_what_pillow_says(tmp_path, name, orientation):
    exif = Image.Exif()
    if orientation:
        exif[274] = orientation
    Image.new("RGB", (20, 10)).save(tmp_path / name, exif=exif)
    with Image.open(tmp_path / name) as image:
        assert image.getexif().get(274, 1) == (orientation or 1)
    assert read_declared(tmp_path / name).orientation == (orientation or 1)


def test_orientation_of_a_big_tiff_and_of_the_other_byte_order(tmp_path, rgb_3HW):
    for order in ("<", ">"):
        # A classic TIFF of one strip of four grey pixels, written out by hand.
        tags = [(256, 3, 4), (257, 3, 1), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 122), (274, 3, 5), (277, 3, 1),
                (279, 4, 4)]  # fmt: skip
        entries = b"".join(struct.pack(order + "HHI", tag, kind, 1) + struct.pack(order + ("Hxx" if kind == 3 else "I"), value)
                           for tag, kind, value in tags)  # fmt: skip
        head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8)
        written = head + struct.pack(order + "H", len(tags)) + entries + struct.pack(order + "I", 0)
        (tmp_path / "a.tif").write_bytes(written + bytes(4))
        with Image.open(io.BytesIO(written + bytes(4))) as image:
            assert image.getexif()[274] == 5
        assert read_declared(tmp_path / "a.tif").orientation == 5
    assert read_declared(write_tiff(tmp_path / "b.tif", rgb_3HW, bigtiff="yes")).orientation == 1


def test_header_of_a_plain_png(tmp_path):
    Image.new("LA", (5, 7)).save(Path(tmp_path) / "a.png")
    declared = read_declared(tmp_path / "a.png")
    assert (declared.height, declared.width, declared.bands, declared.alpha, declared.rgb) == (7, 5, 2, 2, None)
    assert (declared.crs, declared.transform, declared.masked, declared.orientation) == (None, None, False, 1)
