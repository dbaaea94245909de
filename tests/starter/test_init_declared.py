"""`kdpipe init` on files that declare, or fail to declare, what a run must know."""

from pathlib import Path

import numpy as np
import pytest
from affine import Affine
from helpers.files import noise, read_raster, write_tiff
from helpers.first_config import init, small, write_mask
from PIL import Image

from kdpipe.data.survey import undeclared_text
from kdpipe.pipeline.starter.yaml import as_plain

LABELS = np.kron([[0, 1], [2, 2]], np.ones((32, 32)))
UTM = {"crs": "EPSG:32640", "transform": Affine(1, 0, 3e5, 0, -1, 2.7e6)}


def tile(root, name, values, mask=LABELS, **profile):
    path = write_tiff(root / f"images/{name}.tif", values, **profile)
    write_mask(root / f"masks/{name}.png", mask)
    return path


def said(found):
    return found.draft.problems, [note for note in found.draft.notes if "no folder to validate on" not in note]


def test_half_of_the_tiles_in_another_order_is_to_be_fixed(tmp_path):
    for i, colours in enumerate((["red", "green", "blue"], ["blue", "green", "red"])):
        tile(tmp_path / "t", str(i), noise(64, 64, seed=i), colours=colours)
    problems, notes = said(init(tmp_path / "t"))
    assert len(problems) == 1
    assert problems[0].startswith("images name the bands that are read differently: red, green, blue in 1 (such as ")
    assert notes == []


def test_one_order_of_colours_is_taken_from_the_files(tmp_path):
    for i in range(2):
        values = noise(64, 64, 4, seed=i)
        values[0] = np.where(values[0] < 25, 0, 255)
        tile(tmp_path / "t", str(i), values, colours=["alpha", "blue", "green", "red"])
    found = init(tmp_path / "t")
    assert as_plain(found.draft.keys)["data"]["bands"] == [4, 3, 2]
    assert said(found)[0] == []
    problems, notes = said(init(tmp_path / "t", overwrite=True, bands=(1, 2, 3)))
    assert [problem[:35] for problem in problems] == ["data.bands [1, 2, 3] takes band 1 o"] * 2
    problems, notes = said(init(tmp_path / "t", overwrite=True, bands=(2, 3, 4)))
    assert (problems, len(notes)) == ([], 2)  # and the transparent pixels
    assert "images call bands [4, 3, 2] red, green and blue" in " ".join(notes)


def infrared_called_alpha(root, water=0.05, **profile):
    """A tile of four bands, of which GDAL calls the fourth alpha; the infrared is 0 over water."""
    values = noise(64, 64, 4) // 2 + 50
    values[3, : int(64 * water)] = 0
    return tile(root, "a", values, **profile)


def test_infrared_that_the_files_call_alpha_is_a_band_in_the_config(tmp_path):
    infrared_called_alpha(tmp_path / "t")
    for bands in (None, (4, 1, 2)):
        found = init(tmp_path / "t", overwrite=True, bands=bands)
        assert as_plain(found.draft.keys)["data"]["alpha"] == "band"
        problems, (note,) = said(found)
        assert problems == []
        assert "data.alpha: band, so it hides no pixel" in note
        assert found.roots[0].pixels_without_data == 0
    between = 100 * (read_raster(tmp_path / "t/images/a.tif")[3, 3:] < 177).sum() / 64**2
    assert f"# Measured: {between:.1f} % of the values of the band called alpha lie between 0" in found.draft.text


@pytest.mark.parametrize("edge", [0, 5])  # rows of 64 in which the opacity is soft: 0 % and 8 %
def test_opacity_with_soft_edges_stays_opacity(tmp_path, edge):
    values = noise(64, 64, 4)
    values[3] = 255
    values[3, :20] = 0
    values[3, 20 : 20 + edge] = np.linspace(40, 200, edge)[:, None]
    tile(tmp_path / "t", "a", values)
    found = init(tmp_path / "t")
    assert "alpha" not in as_plain(found.draft.keys)["data"]
    assert found.roots[0].pixels_without_data == 20 * 64
    (problem,) = said(init(tmp_path / "t", overwrite=True, bands=(4, 1, 2)))[0]
    assert "set data.alpha: band" in problem


def test_opacity_in_one_folder_and_infrared_in_another_is_said(tmp_path):
    infrared_called_alpha(tmp_path / "all/A")
    values = noise(64, 64, 4)
    values[3] = 255
    tile(tmp_path / "all/B", "b", values)
    problems, (note,) = said(init(tmp_path / "all"))
    assert problems == []
    assert note.endswith(f"That holds for {tmp_path / 'all/B'} too, where it may be opacity")


def test_bands_without_names_are_asked_for_among_all_four(tmp_path):
    infrared_called_alpha(tmp_path / "t", colours=["undefined"] * 3 + ["alpha"])
    found = init(tmp_path / "t")
    assert as_plain(found.draft.keys)["data"]["alpha"] == "band"
    assert "data.bands" in found.unfilled


def test_init_finds_the_infrared_of_real_aerial_tiles(tmp_path):
    scene = Path(__file__).resolve().parents[3] / "shared/data/ohio/scene_a"
    if not scene.is_dir():
        pytest.skip("the Ohio tiles are not here (../shared)")
    for folder in ("images", "masks"):
        (tmp_path / "t" / folder).mkdir(parents=True)
        for path in sorted((scene / folder).iterdir())[:8]:
            (tmp_path / "t" / folder / path.name).symlink_to(path)
    found = init(tmp_path / "t")
    assert as_plain(found.draft.keys)["data"]["alpha"] == "band"
    assert (found.roots[0].pixels, found.roots[0].pixels_without_data) == (8 * 256 * 256, 0)


def test_fill_values_that_no_header_declares_are_to_be_fixed(tmp_path):
    values = np.random.default_rng(0).random((3, 64, 64), dtype=np.float32)
    for name, odd in (("nan", np.nan), ("fill", -9999)):
        spoilt = values.copy()
        spoilt[1, :8] = odd
        tile(tmp_path / name, "a", spoilt)
        (problem,) = said(init(tmp_path / name, out=f"{name}.yaml"))[0]
        assert (
            f"{name}/images/a.tif holds {'NaN or infinity' if name == 'nan' else -9999} in band 2 at 512 pixels"
            in problem
        )
        tile(tmp_path / "declared", name, spoilt, nodata=odd)
    found = init(tmp_path / "declared")
    assert said(found)[0] == []
    np.testing.assert_allclose(found.roots[0].ranges[0], np.percentile(np.tile(values[0], 2), [2, 98]), rtol=1e-5)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (np.float32([-9999, -9999, 0.1, 0.5]), True),
        (np.int16([-32768, -32768, 3, 4000]), True),
        (np.float32([-3.4028235e38, -3.4028235e38, 1]), True),
        (np.float32([-9999, 0.1, 0.5]), False),  # one pixel
        (np.int16([-9999, -9999, -9998, -5000, 0]), False),  # values down to there
        (np.int16([-5, -5, 3, 4000]), False),
        (np.uint16([0, 0, 65535, 3]), False),
        (np.float32([]), False),
    ],
)
def test_a_fill_value_is_usual_repeated_and_far_from_the_data(tmp_path, values, named):
    assert (undeclared_text(tmp_path / "a.tif", 1, values) is not None) == named


def test_masks_elsewhere_and_lossy_masks_are_to_be_fixed(tmp_path):
    write_tiff(tmp_path / "t/images/a.tif", noise(64, 64), **UTM)
    write_tiff(
        tmp_path / "t/masks/a.tif",
        LABELS[None].astype(np.uint8),
        crs="EPSG:32640",
        transform=Affine(1, 0, 3e5, 0, 1, 2.7e6 - 64),
    )
    write_tiff(tmp_path / "t/images/b.tif", noise(64, 64), **UTM)
    write_tiff(tmp_path / "t/masks/b.tif", LABELS[None].astype(np.uint8), compress="jpeg")
    problems = said(init(tmp_path / "t"))[0]
    assert "a.tif is written from the bottom up, unlike its image" in problems[0]
    assert "b.tif is compressed as JPEG with loss" in problems[1]


def test_turned_images_and_tiles_of_val_in_train_are_noted(tmp_path):
    small(tmp_path / "all/Train", tiles=2)
    small(tmp_path / "all/Val", tiles=1)
    exif = Image.Exif()
    exif[274] = 8
    with Image.open(tmp_path / "all/Train/images/1.png") as image:
        image.save(tmp_path / "all/Train/images/1.png", exif=exif)
    tile(tmp_path / "all/Train", "p", noise(64, 64, seed=5), **UTM)
    tile(tmp_path / "all/Val", "q", noise(64, 64, seed=6), **UTM)
    problems, notes = said(init(tmp_path / "all"))
    text = " ".join(notes)
    assert problems == []
    assert "1 image has an EXIF orientation: 8 in 1" in text
    assert "1 of 2 validation images is byte for byte a training image" in text
    assert "1 of 2 validation images lies on training images in place" in text


def test_colours_and_greys_in_masks_point_to_the_recipe(tmp_path):
    root = small(tmp_path / "grey", ((0, 1), (254, 255)))  # black and white after a lossy compression
    assert "give each class its colour in data.colours" in said(init(root))[0][0]
