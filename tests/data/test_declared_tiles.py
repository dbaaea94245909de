"""What tiles declare against what is asked of them, and against each other: certain faults are refused, likely ones are noted."""

import re
import shutil

import numpy as np
import pytest
import rasterio
from affine import Affine
from helpers.files import noise, write_image, write_tiff
from PIL import Image, ImageOps
from rasterio.warp import transform

from kdpipe.configs.errors import DataError
from kdpipe.data.declared.check import Comparison, Findings, read_headers, refuse, tile_faults
from kdpipe.data.declared.tile import require_same_size
from kdpipe.data.rasters import read_mask_values
from kdpipe.data.tiles import Tile

RGB, BGR = ["red", "green", "blue"], ["blue", "green", "red"]
UTM = {"crs": "EPSG:32640", "transform": Affine(1, 0, 3e5, 0, -1, 2.7e6)}


def faults(image, mask=None, bands=(1, 2, 3), has_stretch=True):
    (headers,) = read_headers([Tile("t", image, mask)])
    return tile_faults(headers, bands, has_stretch=has_stretch)


def compared(images=(), val=(), masks=(), bands=(1, 2, 3), chosen=False, classes=3) -> Findings:
    comparison = Comparison(bands, chosen, classes)
    for paths, is_val in ((images, False), (val, True)):
        for headers in read_headers([Tile(path.stem, path, None) for path in paths]):
            comparison.add(headers, is_val=is_val)
    for headers in read_headers([Tile(path.stem, path, path) for path in masks]):
        comparison._agreement.add_mask(headers.tile.mask, headers.mask)
    return comparison.findings()


@pytest.mark.parametrize(
    "colours", [["alpha", *RGB], [*RGB, "alpha"], [*RGB, "nir", "alpha"]], ids=lambda names: names[-1]
)
def test_alpha_is_no_input_band(tmp_path, colours):
    path = write_tiff(tmp_path / "a.tif", noise(8, 9, len(colours)), colours)
    alpha = colours.index("alpha") + 1
    right = tuple(colours.index(colour) + 1 for colour in RGB)
    assert faults(path, bands=right) == []
    (fault,) = faults(path, bands=(right[0], right[1], alpha))
    assert f"takes band {alpha} of {path}, which the file calls alpha" in fault


def test_a_missing_band_and_values_without_a_stretch_are_named_by_the_header(tmp_path):
    path = write_tiff(tmp_path / "a.tif", noise(8, 9, 2).astype(np.uint16))
    (fault,) = faults(path)
    assert fault.startswith(
        f"{path} has 2 bands, and data.bands asks for [1, 2, 3]: leave the image out, or set data.bands to bands"
    )
    assert "holds uint16 values, and only uint8" in faults(path, bands=(1, 2, 1), has_stretch=False)[0]
    assert faults(path, bands=(1, 2, 1)) == []


def test_indices_into_a_palette_are_no_grey_values(tmp_path):
    image = Image.fromarray(noise(8, 9, 1)[0] % 3, "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.save(tmp_path / "a.png")
    assert "holds indices into a colour table, not colours" in faults(tmp_path / "a.png", bands=(1, 1, 1))[0]
    image.putpalette([value for value in range(256) for _ in range(3)])
    image.save(tmp_path / "grey.png")
    assert faults(tmp_path / "grey.png", bands=(1, 1, 1)) == []


def test_another_order_of_colours_is_refused_unless_the_user_wrote_it(tmp_path):
    path = write_tiff(tmp_path / "a.tif", noise(8, 9), BGR)
    (fault,) = compared([path]).faults
    assert fault.startswith(
        f"images call bands [3, 2, 1] red, green and blue (such as {path}), and data.bands is [1, 2, 3]. Set"
    )
    written = compared([path], chosen=True)
    assert (written.faults, len(written.notes)) == ([], 1)
    assert "right only if the teacher was trained on it" in written.notes[0]
    assert compared([path], bands=(3, 2, 1), chosen=True) == Findings()
    infrared = write_tiff(tmp_path / "b.tif", noise(8, 9, 4), [*RGB, "nir"])
    assert compared([infrared], bands=(4, 1, 2), chosen=True) == Findings()


@pytest.mark.parametrize("bands", [(1, 2, 3), None])
def test_two_orders_of_colours_in_one_set_are_refused(tmp_path, bands):
    paths = [write_tiff(tmp_path / f"{i}.tif", noise(8, 9), (RGB, BGR)[i % 2]) for i in range(4)]
    (fault,) = compared(paths, bands=bands, chosen=True).faults
    assert f"red, green, blue in 2 (such as {paths[0]}); blue, green, red in 2 (such as {paths[1]})" in fault
    # An alpha band behind the colours, or bands without names, contradict nothing.
    opaque = write_tiff(tmp_path / "rgba.tif", noise(8, 9, 4), [*RGB, "alpha"])
    nameless = write_tiff(tmp_path / "none.tif", noise(8, 9), ["undefined"] * 3)
    assert compared([paths[0], opaque, nameless], bands=bands, chosen=True).faults == []


@pytest.mark.parametrize(
    ("bands", "profile", "message"),
    [
        (1, {"compress": "jpeg"}, "is compressed as JPEG with loss"),
        (1, {"compress": "lerc_zstd", "max_z_error": 1}, "is compressed as LERC_ZSTD with loss"),
        (3, {"compress": "webp"}, "is compressed as WEBP with loss"),
        (
            3,
            {},
            r"should have 1 band of class indices, found 3 bands \(red, green, blue\): give each class its colour in data.colours",
        ),
        (1, {"compress": "lerc"}, None),
        (1, {"compress": "deflate"}, None),
    ],
)
def test_masks_are_refused_by_their_header(tmp_path, bands, profile, message):
    labels = noise(32, 33, bands) % 6
    path = write_tiff(tmp_path / "m.tif", labels, **profile)
    write_image(tmp_path / "i.png", 32, 33)
    found = faults(tmp_path / "i.png", path)
    if message is None:
        assert found == []
        np.testing.assert_array_equal(read_mask_values(path), labels[0])
    else:
        assert re.search(message, found[0])
        with pytest.raises(DataError, match=message):
            read_mask_values(path)


def test_a_float_mask_and_a_damaged_one_are_refused_by_their_header(tmp_path):
    write_image(tmp_path / "i.png", 8, 9)
    path = write_tiff(tmp_path / "m.tif", np.zeros((1, 8, 9), np.float32))
    assert faults(tmp_path / "i.png", path) == [f"the mask {path} should hold integers, class indices, found float32"]
    path.write_text("no mask")
    assert "which is damaged or not a PNG, JPEG or TIFF" in faults(tmp_path / "i.png", path)[0]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (UTM, None),
        ({"transform": UTM["transform"]}, None),
        (UTM | {"transform": Affine(1, 0, 3e5 + 0.4, 0, -1, 2.7e6)}, None),
        (
            UTM | {"transform": Affine(1, 0, 3e5 + 2000, 0, -1, 2.7e6)},
            r"lies \+2000 px in x and \+0 px in y from its image",
        ),
        (UTM | {"transform": Affine(1, 0, 3e5, 0, 1, 2.7e6 - 20)}, "is written from the bottom up, unlike its image"),
        (UTM | {"transform": Affine(2, 0, 3e5, 0, -2, 2.7e6)}, "from its image"),
        (UTM | {"crs": "EPSG:3857"}, r"\(the mask is in EPSG:3857, the image in EPSG:32640\)"),
    ],
)
def test_a_mask_must_lie_on_the_grid_of_its_image(tmp_path, place, message):
    image = write_tiff(tmp_path / "i.tif", noise(20, 30), **UTM)
    found = faults(image, write_tiff(tmp_path / "m.tif", noise(20, 30, 1), **place))
    assert bool(found) == (message is not None)
    if message:
        assert re.search(message, found[0])
        assert "by their own headers: labels would belong to other pixels" in found[0]


def test_one_grid_in_two_crs_is_one_place(tmp_path):
    # Two names of one grid: the same axes, metres from another origin.
    moved = "+proj=tmerc +lat_0=0 +lon_0=57 +k=0.9996 +x_0=600000 +y_0=0 +datum=WGS84 +units=m"
    (x,), (y,) = transform("EPSG:32640", moved, [3e5], [2.7e6])
    assert (round(x), round(y)) == (400000, 2700000)
    image = write_tiff(tmp_path / "i.tif", noise(20, 30), **UTM)
    mask = write_tiff(tmp_path / "m.tif", noise(20, 30, 1), crs=moved, transform=Affine(1, 0, x, 0, -1, y))
    assert faults(image, mask) == []


def test_the_error_of_another_size_says_that_the_image_is_turned(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(noise(20, 30).transpose(1, 2, 0)).save(tmp_path / "i.jpg", exif=exif)
    with Image.open(tmp_path / "i.jpg") as image:
        shown = ImageOps.exif_transpose(image).size[::-1]
    mask = write_tiff(tmp_path / "m.tif", noise(*shown, 1))
    (fault,) = faults(tmp_path / "i.jpg", mask)
    assert f"is 30 x 20 px, but its image {tmp_path / 'i.jpg'} is 20 x 30" in fault
    assert "The image's EXIF orientation is 6" in fault
    (note,) = compared([tmp_path / "i.jpg"]).notes
    assert "1 image has an EXIF orientation: 6 in 1" in note


def write_palette(path, colours):
    image = Image.fromarray(np.zeros((4, 5), np.uint8), "P")
    image.putpalette([value for colour in colours for value in colour])
    image.save(path)
    return path


def test_colour_tables_that_contradict_each_other_are_refused(tmp_path):
    red, green, blue, grey = (200, 0, 0), (0, 200, 0), (0, 0, 200), (9, 9, 9)
    one = write_palette(tmp_path / "1.png", [red, green, blue])
    same = write_palette(tmp_path / "2.png", [red, green, grey])
    swapped = write_palette(tmp_path / "3.png", [green, red, blue])
    beyond = write_palette(tmp_path / "4.png", [red, (1, 1, 1), blue, green])
    padded = write_palette(tmp_path / "5.png", [blue, blue, blue])
    assert compared(masks=[one, same, beyond, padded]).faults == []
    (fault,) = compared(masks=[one, swapped]).faults
    assert f"colour 0, 200, 0 is 1 in {one} and 0 in {swapped}" in fault
    assert "the same index means different classes" in fault


def test_scales_are_noted_as_not_applied(tmp_path):
    paths = [write_tiff(tmp_path / f"{i}.tif", noise(8, 9), transform=UTM["transform"]) for i in range(2)]
    assert compared(paths).notes == []
    for path, scale in zip(paths, (0.5, 0.25), strict=True):
        with rasterio.open(path, "r+") as raster:
            raster.scales = (scale,) * 3
    assert (
        compared(paths[:1])
        .notes[0]
        .startswith("images declare scale 0.5 and offset 0; kdpipe reads values as they are stored")
    )
    assert "scale 0.5 and offset 0 in 1" in compared(paths).notes[0]
    assert "different scales and offsets" in compared(paths).notes[0]


def test_validation_tiles_on_training_tiles_are_noted_with_their_share(tmp_path):
    def tile(name, x, y, crs="EPSG:32640"):
        return write_tiff(
            tmp_path / f"{name}.tif", noise(10, 20, seed=x + y), crs=crs, transform=Affine(2, 0, x, 0, -2, y)
        )

    train = [tile("a", 0, 100), tile("b", 40, 100)]
    beside, far, other = tile("c", 80, 100), tile("d", 5000, 9000), tile("e", 0, 100, crs="EPSG:32639")
    assert compared(train, [beside, far, other]) == Findings()
    # 30 of its 40 m in x and 15 of its 20 m in y lie on b.
    (note,) = compared(train, [beside, tile("f", 50, 105)]).notes
    assert "1 of 2 validation images lies on training images in place" in note
    assert f"f.tif, {100 * 30 / 40 * 15 / 20:.0f} % of which {train[1]} covers" in note
    large = write_tiff(tmp_path / "l.tif", noise(4, 4), crs="EPSG:32640", transform=Affine(1e5, 0, 0, 0, -1e5, 2e5))
    assert f"100 % of which {large} covers" in compared([large], [beside]).notes[0]


def test_copies_of_training_tiles_are_noted_and_refused_where_they_are_most(tmp_path):
    train = [write_tiff(tmp_path / f"t{i}.tif", noise(64, 64, seed=i)) for i in range(3)]
    val = [write_tiff(tmp_path / f"v{i}.tif", noise(64, 64, seed=9 + i)) for i in range(3)]
    assert {path.stat().st_size for path in [*train, *val]} == {train[0].stat().st_size}
    assert compared(train, val) == Findings()
    shutil.copy(train[1], val[0])
    (note,) = compared(train, val).notes
    assert f"1 of 3 validation images is byte for byte a training image, such as {val[0]} and {train[1]}" in note
    shutil.copy(train[2], val[2])
    with pytest.raises(
        DataError, match="2 of 3 validation images are byte for byte .* scores on training tiles mean nothing"
    ):
        refuse(compared(train, val))
    # Equal in the middle, where the sample is taken, and different elsewhere.
    changed = train[1].read_bytes()
    val[0].write_bytes(changed[:-1] + bytes([changed[-1] ^ 1]))
    assert "1 of 3 validation images is" in compared(train, val).notes[0]


def test_an_error_names_the_first_faults_and_counts_the_rest():
    with pytest.raises(DataError, match="^a; b; c; and 2 more$"):
        refuse(Findings(list("abcde")))
    refuse(Findings([], ["note"]))


def test_a_mask_that_is_first_touched_is_refused_with_the_same_words(tmp_path):
    exif = Image.Exif()
    exif[274] = 8
    Image.fromarray(noise(20, 30).transpose(1, 2, 0)).save(tmp_path / "i.png", exif=exif)
    mask = write_tiff(tmp_path / "m.tif", noise(30, 20, 1))
    (fault,) = faults(tmp_path / "i.png", mask)
    assert "EXIF orientation is 8" in fault
    with pytest.raises(DataError) as refused:
        require_same_size(tmp_path / "i.png", (20, 30), mask, (30, 20))
    assert str(refused.value) == fault


def test_places_share_their_crs(tmp_path):
    paths = [write_tiff(tmp_path / f"{i}.tif", noise(4, 4), **UTM) for i in range(3)]
    comparison = Comparison((1, 2, 3), False, 2)
    for headers in read_headers([Tile(path.stem, path, None) for path in paths]):
        comparison.add(headers, is_val=False)
    assert len({id(place.crs) for _, place in comparison._places[False]}) == 1
