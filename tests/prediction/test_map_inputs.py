"""Scenes that `predict` reads, and inputs, sizes and files that it refuses."""

import os
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from helpers.files import PLACE, noise, read_raster, write_scene
from helpers.map_process import first_band, predictor
from PIL import Image

from kdpipe.configs.errors import CheckpointError, ConfigError, DataError, KdpipeError
from kdpipe.data import scenes
from kdpipe.data.rasters import read_image
from kdpipe.data.scenes import list_scenes, open_scene
from kdpipe.pipeline.prediction.maps import predict
from kdpipe.pipeline.prediction.model import open_predictor


def test_transparent_pixels_are_no_data_and_alpha_is_not_a_band(tmp_path):
    pixels = noise(40, 50, bands=4)
    pixels[3] = 255
    pixels[3, :, :20] = 0
    path = tmp_path / "rgba.png"
    Image.fromarray(pixels.transpose(1, 2, 0)).save(path)
    predict(predictor(), [str(path)], tmp_path / "out")
    found = read_raster(tmp_path / "out" / "rgba.tif")[0]
    assert (found[:, :20] == 255).all()
    np.testing.assert_array_equal(found[:, 20:], pixels[0, :, 20:] % 3)


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_other_units_are_stretched_as_in_training(tmp_path, dtype):
    values = np.random.default_rng(1).integers(0, 3000, (4, 300, 40)).astype(dtype)
    nodata = 0 if dtype == "uint16" else np.nan
    values[:, 7, 9] = nodata
    scene = write_scene(tmp_path / "scene.tif", values, nodata=nodata)
    stretch = [(0, 3000), (100, 2500), (0, 3000)]
    predict(predictor(bands=(4, 3, 2), stretch=stretch), [str(scene)], tmp_path / "out", window=64, overlap=32)
    expected = read_image(scene, (4, 3, 2), stretch)[..., 0] % 3
    expected[7, 9] = 255
    np.testing.assert_array_equal(read_raster(tmp_path / "out" / "scene.tif")[0], expected)


def test_a_pixel_with_data_in_one_band_is_drawn(tmp_path):
    pixels = noise(40, 40)
    pixels[:, 3, 4] = (0, 0, 9)
    pixels[:, 5, 5] = 0
    scene = write_scene(tmp_path / "scene.tif", pixels, nodata=0)
    predict(predictor(), [str(scene)], tmp_path / "out")
    found = read_raster(tmp_path / "out" / "scene.tif")[0]
    assert (found[3, 4], found[5, 5]) == (0, 255)


def test_windows_without_data_are_not_predicted(tmp_path):
    pixels = np.zeros((3, 640, 640), np.uint8)
    pixels[:, 600:, 600:] = 1
    scene = write_scene(tmp_path / "scene.tif", pixels, nodata=0)
    seen = []
    counting = predictor(lambda images: seen.append(len(images)) or first_band(images))
    predict(counting, [str(scene)], tmp_path / "out", window=128, overlap=32)
    np.testing.assert_array_equal(read_raster(tmp_path / "out" / "scene.tif")[0], np.where(pixels[0], 1, 255))
    assert sum(seen) == 1


def test_a_mosaic_is_a_scene(tmp_path):
    pixels = noise(64, 64)
    write_scene(tmp_path / "part.tif", pixels)
    source = "".join(
        f'<VRTRasterBand dataType="Byte" band="{b}"><SimpleSource><SourceFilename relativeToVRT="1">part.tif</SourceFilename>'
        f"<SourceBand>{b}</SourceBand></SimpleSource></VRTRasterBand>"
        for b in (1, 2, 3)
    )
    (tmp_path / "all.vrt").write_text(f'<VRTDataset rasterXSize="64" rasterYSize="64">{source}</VRTDataset>')
    predict(predictor(), [str(tmp_path / "all.vrt")], tmp_path / "out")
    np.testing.assert_array_equal(read_raster(tmp_path / "out" / "all.tif")[0], pixels[0] % 3)
    (tmp_path / "part.tif").unlink()
    summary = predict(predictor(), [str(tmp_path / "all.vrt")], tmp_path / "other")
    assert "cannot read" in summary.failed[str(tmp_path / "all.vrt")]
    assert os.listdir(tmp_path / "other") == []


def test_a_world_file_georeferences_its_jpeg(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(noise(40, 50).transpose(1, 2, 0)).save(path)
    path.with_suffix(".jgw").write_text("0.5\n0\n0\n-0.5\n320000.25\n2789999.75\n")
    predict(predictor(), [str(path)], tmp_path / "out")
    with rasterio.open(tmp_path / "out" / "a.tif") as found:
        assert found.transform == PLACE
    assert sorted(os.listdir(tmp_path)) == ["a.jgw", "a.jpg", "out"]


def test_scenes_of_folders_patterns_and_files_are_listed_in_order(tmp_path):
    for name in ("b.tif", "a.JPG", "notes.txt", ".hidden.tif", "a.tfw", "s/x.png", "r/x.png", "tile[1].tif"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    folder = tmp_path / "in"
    names = [os.path.relpath(path, folder) for path in list_scenes([str(folder), str(folder / "*" / "x.png")])]
    assert names == ["a.JPG", "b.tif", "tile[1].tif", "r/x.png", "s/x.png"]
    assert list_scenes([str(folder / "tile[1].tif"), "s3://bucket/a.tif"]) == [
        str(folder / "tile[1].tif"),
        "s3://bucket/a.tif",
    ]


def test_inputs_that_name_nothing_or_a_scene_twice_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    scene = write_scene(tmp_path / "a.tif", noise(40, 40))
    with pytest.raises(DataError, match=r"there is no file or folder .*none\.tif, and as a pattern it matches nothing"):
        list_scenes([str(tmp_path / "none.tif")])
    with pytest.raises(DataError, match=r"no scenes in .*empty: expected files that end in \.png, .*\.vrt"):
        list_scenes([str(tmp_path / "empty")])
    with pytest.raises(DataError, match=r"a\.tif is named twice"):
        list_scenes([str(scene), str(tmp_path)])


def test_maps_with_equal_names_and_existing_maps_are_refused(tmp_path):
    scenes = [str(write_scene(tmp_path / folder / "a.tif", noise(40, 40))) for folder in "xy"]
    with pytest.raises(
        DataError, match=r"x/a\.tif and .*y/a\.tif would both have the map .*out/a\.tif: map them in two runs"
    ):
        predict(predictor(), scenes, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    predict(predictor(), scenes[:1], tmp_path / "out")
    before = (tmp_path / "out" / "a.tif").read_bytes()
    with pytest.raises(DataError, match=r"out/a\.tif exists already: .*--overwrite"):
        predict(predictor(), scenes[1:], tmp_path / "out")
    assert (tmp_path / "out" / "a.tif").read_bytes() == before
    predict(predictor(), scenes[:1], tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "a.tif").read_bytes() == before  # the same scene, the same bytes
    with pytest.raises(DataError, match=r"the map .*x/a\.tif would replace a scene"):
        predict(predictor(), scenes[:1], tmp_path / "x", overwrite=True)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"window": 500}, "--window must be a multiple of 32 px, from 64 up.*found 500"),
        ({"window": 32}, "--window must be a multiple of 32 px, from 64 up.*found 32"),
        ({"overlap": 100}, "--overlap must be a multiple of 32 px, from 0 up.*found 100"),
        ({"window": 128, "overlap": 96}, "--overlap must be at most half of --window, 64 px, found 96"),
    ],
)
def test_sizes_off_the_networks_grid_are_refused(tmp_path, sizes, message):
    with pytest.raises(ConfigError, match=message):
        predict(predictor(), ["x"], tmp_path, **sizes)


def test_unreadable_scenes_are_named_and_the_others_mapped(tmp_path):
    good = write_scene(tmp_path / "in" / "good.tif", noise(40, 40))
    write_scene(tmp_path / "in" / "float.tif", np.ones((3, 40, 40), np.float32))
    write_scene(tmp_path / "in" / "grey.tif", noise(40, 40, bands=1))
    (tmp_path / "in" / "text.tif").write_text("hello")
    # Damaged below its first window, so that reading fails midway.
    cut = write_scene(tmp_path / "in" / "cut.tif", noise(900, 40), compress="deflate")
    content = cut.read_bytes()
    cut.write_bytes(content[: len(content) * 3 // 4])
    advanced = []

    class Bars:
        def say(self, line): ...

        def bar(self, title, total, unit, done=0):
            advanced.append(-total)
            return nullcontext(lambda steps=1, **figures: advanced.append(steps))

    summary = predict(predictor(), [str(tmp_path / "in")], tmp_path / "out", window=128, overlap=32, progress=Bars())
    reasons = {Path(path).name: reason for path, reason in summary.failed.items()}
    assert sorted(reasons) == ["cut.tif", "float.tif", "grey.tif", "text.tif"]
    assert "cut.tif, which is damaged or not a raster" in reasons["cut.tif"]
    assert "text.tif, which is damaged or not a raster" in reasons["text.tif"]
    assert "holds float32 values, and only uint8 is taken as it is" in reasons["float.tif"]
    assert "grey.tif has 1 band, and the student was trained on bands [1, 2, 3]" in reasons["grey.tif"]
    assert [drawn.scene for drawn in summary.maps] == [str(good)]
    assert sorted(os.listdir(tmp_path / "out")) == ["good.tif", "good.tif.aux.xml"]
    assert sum(advanced) == 0  # the bar ends at its total


def test_pixels_and_logits_that_are_not_finite_are_refused(tmp_path):
    values = np.ones((3, 300, 40), np.float32)
    values[1, 200, 7] = np.inf
    scene = write_scene(tmp_path / "scene.tif", values)
    summary = predict(predictor(stretch=[(0, 9)] * 3), [str(scene)], tmp_path / "out", window=64, overlap=32)
    assert "NaN or infinity in band 2 at 1 pixel, the first at row 200, column 7" in summary.failed[str(scene)]
    bad = predictor(lambda images: torch.full((len(images), 3, *images.shape[-2:]), torch.nan), origin="bad.ckpt")
    fine = write_scene(tmp_path / "fine.tif", noise(40, 40))
    with pytest.raises(KdpipeError, match=r"bad\.ckpt gives logits that are not finite for .*fine\.tif, near row 0"):
        predict(bad, [str(fine)], tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []


def test_a_container_of_images_is_refused(monkeypatch):
    class Empty:
        count, subdatasets = 0, ["HDF5:a.h5://red"]

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

    monkeypatch.setattr(scenes, "open_quietly", lambda path, **options: Empty())
    message = r"a\.h5 holds no bands but further images inside.*HDF5:a\.h5://red"
    with pytest.raises(DataError, match=message), open_scene("a.h5", (1, 2, 3), None):
        pass


def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"a\.ckpt is not a checkpoint of `kdpipe train-student`"):
        open_predictor(tmp_path / "a.ckpt", "cpu")
