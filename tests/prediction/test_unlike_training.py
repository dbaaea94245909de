"""Scenes that are unlike the training images: other bands, an order of their own, other units."""

import json
import re
from contextlib import nullcontext

import numpy as np
import pytest
import rasterio
import torch
from helpers.commands import run_command
from helpers.files import noise, read_raster, write_scene
from helpers.map_process import predictor
from rasterio.enums import ColorInterp

from kdpipe.pipeline.prediction.maps import predict
from kdpipe.pipeline.runs.checkpoint import load_trained
from kdpipe.pipeline.training.run import train, with_mode

RGB = ["red", "green", "blue"]


class Said:
    """Keeps what is said, and shows no bar."""

    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)

    def bar(self, title, total, unit, done=0):
        return nullcontext(lambda steps=1, **figures: None)


def scene(path, pixels_BHW, colours, **options):
    write_scene(path, pixels_BHW, **options)
    with rasterio.open(path, "r+") as raster:
        raster.colorinterp = [ColorInterp[colour] for colour in colours]
    return path


def drawn(tmp_path, path, **card):
    """The map of the scene, which is its red band modulo three, the summary, and what was said."""
    said = Said()
    summary = predict(predictor(**card), [str(path)], tmp_path / "out", progress=said, overwrite=True)
    found = read_raster(summary.maps[0].files["classes"])[0] if summary.maps else None
    return found, summary, said.lines


@pytest.mark.parametrize(
    ("trained", "bands", "colours"),
    [
        (RGB, (1, 2, 3), ["blue", "green", "red"]),
        (RGB, (1, 2, 3), ["alpha", "red", "green", "blue"]),
        (RGB, (4, 3, 2), ["red", "green", "blue"]),
        (["red", "green", "blue"], (3, 2, 1), ["undefined", "green", "blue", "red", "alpha"]),
        (["blue", "green", "red"], (1, 2, 3), ["red", "green", "blue"]),
    ],
)
def test_bands_are_taken_by_the_colours_of_the_training_and_that_is_said_once(tmp_path, trained, bands, colours):
    pixels = noise(40, 50, bands=len(colours))
    if "alpha" in colours:
        pixels[colours.index("alpha")] = 255
    path = scene(tmp_path / "scene.tif", pixels, colours)
    found, summary, lines = drawn(tmp_path, path, bands=bands, colours=trained)
    np.testing.assert_array_equal(found, pixels[colours.index(trained[0])] % 3)
    numbers = ", ".join(str(colours.index(colour) + 1) for colour in trained)
    expected = (
        f"its bands are called {', '.join(colours)}: bands {numbers} are taken as {', '.join(trained)}, as in training"
    )
    assert lines == [f"note: {path}: {expected}"]
    assert summary.maps[0].notes == [expected]


@pytest.mark.parametrize(
    ("trained", "colours"),
    [
        (RGB, [*RGB, "undefined"]),
        (["blue", "green", "red"], ["blue", "green", "red"]),
        (None, RGB),
        (RGB, ["gray", "undefined", "undefined"]),
        (["gray", "undefined", "undefined"], RGB),
        (["undefined"] * 3, ["blue", "green", "red"]),
    ],
)
def test_bands_are_taken_by_number_where_no_colour_speaks_against_it(tmp_path, trained, colours):
    pixels = noise(40, 50, bands=len(colours))
    found, summary, lines = drawn(tmp_path, scene(tmp_path / "scene.tif", pixels, colours), colours=trained)
    np.testing.assert_array_equal(found, pixels[0] % 3)
    assert lines == summary.maps[0].notes == []


def test_a_contradiction_that_cannot_be_settled_is_said(tmp_path):
    """A checkpoint of an earlier version does not record what the bands were called."""
    pixels = noise(40, 50)
    path = scene(tmp_path / "scene.tif", pixels, ["blue", "green", "red"])
    found, _, lines = drawn(tmp_path, path, colours=None)
    np.testing.assert_array_equal(found, pixels[0] % 3)
    (line,) = lines
    assert (
        "its bands 1, 2, 3 are called blue, green, red, and the student does not say what its training called them"
        in line
    )
    path = scene(tmp_path / "nir.tif", pixels, ["green", "undefined", "undefined"])
    (line,) = drawn(tmp_path, path, colours=RGB)[2]
    assert "are called green, undefined, undefined, and the student called them red, green, blue" in line


@pytest.mark.parametrize("trained", [None, ["undefined"] * 3])
def test_alpha_is_never_an_input_band(tmp_path, trained):
    path = scene(tmp_path / "scene.tif", noise(40, 50, bands=4), ["alpha", *RGB])
    _, summary, _ = drawn(tmp_path, path, colours=trained)
    reason = summary.failed[str(path)]
    assert (
        "scene.tif calls band 1 alpha, which is opacity and no colour, and the student was trained on bands [1, 2, 3]"
        in reason
    )
    assert not list((tmp_path / "out").iterdir())
    # The advice of the message.
    with rasterio.open(path, "r+") as raster:
        raster.colorinterp = [ColorInterp["undefined"], *(ColorInterp[colour] for colour in RGB)]
    found, *_ = drawn(tmp_path, path, colours=["undefined"] * 3)
    np.testing.assert_array_equal(found, read_raster(path)[0] % 3)


def naip(path):
    """A scene whose infrared band GDAL calls alpha by default, with zeros over water, and that band."""
    pixels = noise(64, 80, bands=4) | 1
    pixels[3, 20:30] = 0
    with rasterio.open(write_scene(path, pixels)) as raster:
        assert raster.colorinterp[3] == ColorInterp.alpha
    return path, pixels


@pytest.mark.parametrize("trained", [None, RGB, ["undefined", "red", "green"]])
def test_infrared_called_alpha_hides_no_pixel_from_a_student_that_was_trained_on_it(tmp_path, trained):
    path, pixels = naip(tmp_path / "scene.tif")
    bands = (1, 2, 3) if trained in (None, RGB) else (4, 1, 2)
    found, summary, lines = drawn(tmp_path, path, bands=bands, colours=trained, alpha="band")
    np.testing.assert_array_equal(found, pixels[bands[0] - 1] % 3)
    assert (summary.maps[0].no_data, lines) == (0, [])
    found, summary, _ = drawn(tmp_path, path, colours=RGB)  # opacity
    np.testing.assert_array_equal(found, np.where(pixels[3] == 0, 255, pixels[0] % 3))


def test_the_refusal_of_alpha_names_the_key(tmp_path):
    path, _ = naip(tmp_path / "scene.tif")
    summary = drawn(tmp_path, path, bands=(4, 1, 2), colours=["undefined"] * 3)[1]
    assert "or train with data.alpha: band" in summary.failed[str(path)]


@pytest.mark.long
def test_the_key_goes_from_the_config_through_the_checkpoint_to_an_exported_file(make_config, landscape, tmp_path):
    pytest.importorskip("onnxruntime")
    from kdpipe.pipeline.prediction.export import export_student
    from kdpipe.pipeline.prediction.model import open_predictor

    for split in ("Train", "Val"):
        for mask in sorted((landscape / split / "masks").iterdir()):
            labels = read_raster(mask)
            values = noise(*labels.shape[1:], bands=4) | 1
            values[3, :9] = 0
            write_scene(tmp_path / "naip" / split / "images" / f"{mask.stem}.tif", values)
            write_scene(tmp_path / "naip" / split / "masks" / f"{mask.stem}.tif", labels)
    roots = {key: [str(tmp_path / "naip" / key.title())] for key in ("train", "val")}
    config = make_config(data={**roots, "bands": [4, 1, 2], "alpha": "band"}, train__epochs=1, train__max_steps=1)
    train(with_mode(config, "none"), torch.device("cpu"))
    checkpoint = tmp_path / "model_weights/tests/tiny-none/last.ckpt"
    exported = export_student(checkpoint, "onnx", tmp_path / "a.onnx")
    path, pixels = naip(tmp_path / "scene.tif")
    for file in (checkpoint, exported.file):
        opened = open_predictor(file, "cpu")
        assert (opened.card.alpha, opened.card.colours) == ("band", ["undefined", "red", "green"])
        summary = predict(opened, [str(path)], tmp_path / "maps", overwrite=True)
        assert (summary.failed, summary.maps[0].no_data) == ({}, 0)
        expected = opened.logits(torch.from_numpy(pixels[[3, 0, 1]])[None])[0].argmax(dim=0).numpy()
        np.testing.assert_array_equal(read_raster(summary.maps[0].files["classes"])[0], expected)


def test_a_folder_of_such_scenes_is_one_line(tmp_path):
    for name in "abc":
        scene(tmp_path / "in" / f"{name}.tif", noise(40, 50), ["blue", "green", "red"])
    _, summary, lines = drawn(tmp_path, tmp_path / "in", colours=RGB)
    (line,) = lines
    assert line.startswith(f"note: {tmp_path}/in/a.tif: ")
    assert line.endswith("(3 scenes have a note like this, see --json)")
    assert all(map_.notes for map_ in summary.maps)


def test_a_hole_is_no_data_wherever_alpha_stands_and_beside_a_nodata_tag(tmp_path):
    hole = np.zeros((40, 50), np.bool_)
    hole[:11, 7:] = True
    alpha = np.where(hole, 0, 255).astype(np.uint8)
    pixels = noise(40, 50) | 1
    for colours, options in (
        ([*RGB, "alpha"], {"nodata": 0}),
        ([*RGB, "undefined", "alpha"], {}),
        (["alpha", *RGB], {"nodata": 9}),
    ):
        planes = dict(zip(RGB, pixels, strict=True)) | {"undefined": pixels[0], "alpha": alpha}
        path = scene(tmp_path / "scene.tif", np.stack([planes[colour] for colour in colours]), colours, **options)
        found, summary, _ = drawn(tmp_path, path, colours=RGB)
        np.testing.assert_array_equal(found, np.where(hole, 255, pixels[0] % 3))
        assert summary.maps[0].no_data == hole.sum()
        path.unlink()


RANGE = [(0.0, 3060.0)] * 3


@pytest.mark.parametrize(
    ("values", "stretch", "expected"),
    [
        (noise(40, 50), RANGE, "in the darkest tenth .* holds uint8 values of 0 to 255, and the student's stretch is 0 to 3060"),
        (np.float32(noise(40, 50)) / 255, RANGE, "in the darkest tenth .* float32 values of 0 to 1, .* 0 to 3060"),
        (noise(40, 50).astype(np.uint16) * 256, [(0, 255), (0, 9), (0, 255)],
         "9.* % of its values are in the brightest tenth .* uint16 values of 0 to 65280, .* 0 to 255, 0 to 9, 0 to 255"),
        (noise(40, 50) // 20, None, "in the darkest tenth .* uint8 values of 0 to 12, .* 0 to 255, 8-bit values as they are"),
        (noise(40, 50).astype(np.uint16) * 12, RANGE, None),
        (noise(40, 50), None, None),
    ],
    ids=["bytes", "reflectance", "bright", "8 bits", "as trained", "8 bits as trained"],
)  # fmt: skip
def test_a_scene_of_another_range_is_warned_of_and_drawn(tmp_path, values, stretch, expected):
    path = write_scene(tmp_path / "scene.tif", values)
    found, summary, lines = drawn(tmp_path, path, stretch=stretch, colours=RGB)
    assert found.shape == (40, 50)
    assert len(lines) == (expected is not None)
    for line in lines:
        assert line.startswith(f"warning: {path}: ")
        assert [line.removeprefix(f"warning: {path}: ")] == summary.maps[0].notes
        assert re.search(expected, line)


def test_pixels_without_data_say_nothing_about_a_scenes_range(tmp_path):
    values = noise(640, 64).astype(np.uint16) * 12
    values[:, 5:] = 0
    mask = np.zeros((640, 64), np.bool_)
    mask[:5] = True
    path = write_scene(tmp_path / "scene.tif", values, mask=mask)
    assert drawn(tmp_path, path, stretch=RANGE)[2] == []
    path.unlink()
    (line,) = drawn(tmp_path, write_scene(path, values), stretch=RANGE)[2]
    assert "in the darkest tenth" in line


@pytest.mark.long
def test_a_student_records_the_colours_of_its_training_images(trained, tmp_path):
    assert load_trained(trained).colours == RGB
    content = torch.load(trained, weights_only=True)
    assert content["kdpipe"].pop("image_colours") == RGB
    torch.save(content, tmp_path / "earlier.ckpt")
    assert load_trained(tmp_path / "earlier.ckpt").colours is None
    content["kdpipe"]["colours"] = ["blue", "green", "red"]  # of `data.bands` alone
    torch.save(content, tmp_path / "earlier.ckpt")
    assert load_trained(tmp_path / "earlier.ckpt").colours == ["blue", "green", "red"]


def test_the_command_says_it_once_and_draws_the_same_map(trained, tmp_path):
    pixels = noise(64, 64)
    scene(tmp_path / "in" / "rgb.tif", pixels, RGB)
    scene(tmp_path / "in" / "bgr.tif", pixels[::-1], RGB[::-1])
    done = run_command(
        "predict", tmp_path / "in", "--checkpoint", trained, "--out", tmp_path / "maps", "--json", tmp_path / "a.json",
        "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("its bands are called blue, green, red") == 1
    maps = {name: read_raster(tmp_path / "maps" / f"{name}.tif") for name in ("rgb", "bgr")}
    np.testing.assert_array_equal(maps["bgr"], maps["rgb"])
    notes = {drawn["scene"]: drawn["notes"] for drawn in json.loads((tmp_path / "a.json").read_text())["maps"]}
    assert [len(notes[str(tmp_path / "in" / f"{name}.tif")]) for name in ("bgr", "rgb")] == [1, 0]
