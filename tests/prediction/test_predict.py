"""Maps: equal to whole-image inference, whole or absent, with the scene's place, no data and names; memory that stays flat."""

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from helpers.files import PLACE, write_scene
from helpers.map_process import NAMES, first_band
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.errors import NotGeoreferencedWarning

from kdpipe.configs.errors import CheckpointError, ConfigError, DataError, Interrupted, KdpipeError
from kdpipe.data.maps import Layer, class_layer, new_map
from kdpipe.data.scenes import Georeference, list_scenes, open_scene
from kdpipe.pipeline.commands.main import main
from kdpipe.pipeline.models.views import padded_logits
from kdpipe.pipeline.models.windows import spans, tapered_overlap
from kdpipe.pipeline.prediction import maps as prediction
from kdpipe.pipeline.prediction.maps import predict
from kdpipe.pipeline.prediction.model import Card, Predictor, open_predictor
from kdpipe.pipeline.training.run import train, with_mode

CPU = torch.device("cpu")
MAP_PROCESS = str(Path(__file__).parents[1] / "helpers/map_process.py")
BEST = "model_weights/tests/tiny-none/best.ckpt"


def card(**changes):
    values = {
        "run": "tiny", "step": 2, "network": "stub", "checkpoint_sha256": "0" * 64, "classes": NAMES,
        "palette": [(0, 0, 0), (0, 158, 115), (86, 180, 233)], "ignore_index": 255, "bands": (1, 2, 3), "stretch": None,
        "mean": (0, 0, 0), "std": (1, 1, 1), "sizes": "any", "kdpipe": "0",
    }  # fmt: skip
    return Card(**{**values, **changes})


def predictor(model=None, **changes):
    """Asks `model`, or answers each pixel's class with its first band."""

    def ask(images_NCHW):
        with torch.inference_mode():
            return padded_logits(model, images_NCHW.float() / 255)

    return Predictor("stub.ckpt", card(**changes), "cpu", "none", first_band if model is None else ask)


def pyramid(num_classes=3):
    """A network that halves its image three times: what it says of a pixel depends on where its grid starts, and on some 44 px around."""
    torch.manual_seed(0)
    layers, channels = [], 3
    for out in (8, 16, 16):
        layers += [torch.nn.Conv2d(channels, out, 3, stride=2, padding=1), torch.nn.ReLU()]
        channels = out
    layers += [torch.nn.Conv2d(channels, channels, 3, padding=1), torch.nn.Upsample(scale_factor=8, mode="bilinear")]
    head = torch.nn.Conv2d(channels, num_classes, 3, padding=1)
    model = torch.nn.Sequential(*layers, head).eval().requires_grad_(False)
    logits = model(torch.from_numpy(noise(256, 256, seed=1))[None].float() / 255)
    deviation = logits.std(dim=(0, 2, 3))  # so that no class wins everywhere
    head.bias.copy_((head.bias - logits.mean(dim=(0, 2, 3))) / deviation)
    head.weight.div_(deviation[:, None, None, None])
    return model


def noise(height, width, bands=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (bands, height, width), dtype=np.uint8)


def read(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path) as raster:
            return raster.read()


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["kdpipe", "predict", *map(str, arguments)])
    try:
        main()
    except SystemExit as ended:
        return ended.code
    return 0


@pytest.fixture(scope="module")
def made():
    """The checkpoint of a student that was trained for two steps: made by the first test that wants it."""
    return {}


@pytest.fixture
def trained(make_config, made, tmp_path):
    config = make_config(train__epochs=1, train__max_steps=2)
    if not made:
        train(with_mode(config, "none"), CPU)
        made["best.ckpt"] = (tmp_path / BEST).read_bytes()
    (tmp_path / "best.ckpt").write_bytes(made["best.ckpt"])
    return "best.ckpt"


# --- windows ---


@pytest.mark.parametrize(("side", "overlap"), [(64, 0), (64, 32), (128, 32), (128, 64), (256, 96)])
@pytest.mark.parametrize("size", [1, 31, 32, 33, 64, 65, 97, 128, 129, 160, 300, 1000])
def test_shares_sum_to_one_on_the_grid_and_neighbours_overlap_enough(size, side, overlap):
    found = spans(size, side, overlap, tapered_overlap)
    padded = -(-size // 32) * 32
    total = torch.zeros(padded)
    for span in found:
        assert span.start % 32 == 0
        assert len(span.shares) == min(side, padded)
        assert (span.shares >= 0).all()
        total[span.start : span.start + len(span.shares)] += span.shares
    torch.testing.assert_close(total, torch.ones(padded))
    for before, after in pairwise(found):
        assert before.start + side - after.start >= overlap
    assert found[0].start == 0
    assert found[-1].start + len(found[-1].shares) == padded


def test_a_window_says_nothing_in_its_margin_and_all_where_it_is_alone():
    first, second = spans(224, 128, 32, tapered_overlap)
    assert (first.start, second.start) == (0, 96)
    shares = first.shares.numpy()
    np.testing.assert_array_equal(shares[:108], 1)  # 96, and the neighbour's margin of 12
    np.testing.assert_array_equal(shares[116:], 0)
    np.testing.assert_allclose(shares[108:116], (7.5 - np.arange(8)) / 8, rtol=1e-6)


# --- equal to the whole image ---


@pytest.mark.parametrize(("height", "width"), [(333, 410), (40, 700), (129, 128), (20, 9)])
def test_a_map_is_whole_image_inference_where_the_margin_covers_what_the_network_sees(tmp_path, height, width):
    """The network sees 44 px around a pixel, and the margin is 0.375 of 128 px: 48. Batches, strips and the scene's borders included."""
    model, pixels = pyramid(), noise(height, width)
    scene = write_scene(tmp_path / "scene.tif", pixels)
    predict(predictor(model), [str(scene)], tmp_path / "out", window=256, overlap=128, batch_size=3, probabilities=True)
    with torch.inference_mode():
        probs = padded_logits(model, torch.from_numpy(pixels)[None].float() / 255).softmax(dim=1)[0].numpy()
    stored = read(tmp_path / "out" / "scene.probabilities.tif")
    assert np.abs(stored / 254 - probs).max() <= 0.5 / 254 + 1e-5
    classes, expected = read(tmp_path / "out" / "scene.tif")[0], probs.argmax(axis=0)
    sure = np.sort(probs, axis=0)[-1] - np.sort(probs, axis=0)[-2] > 1e-5
    np.testing.assert_array_equal(classes[sure], expected[sure])
    assert sure.mean() > 0.99
    assert len(np.unique(classes)) > 1


def test_unaligned_windows_would_fail_that_test():
    """The network does depend on where its grid starts, so that the test above is one."""
    model, image = pyramid(), torch.from_numpy(noise(256, 256))[None].float() / 255
    with torch.inference_mode():
        whole, moved = model(image)[..., 128, 128], model(image[..., 4:, 4:])[..., 124, 124]
    assert (whole - moved).abs().max() > 1e-3


def test_a_real_students_map_is_that_of_whole_tiles(dubai, trained, tmp_path):
    """A small tile is one window: exactly what `evaluate` asks for."""
    from kdpipe.data.rasters import read_image
    from kdpipe.pipeline.evaluation.evaluate import student_model

    tile = dubai / "data" / "dubai" / "Val" / "images" / "t2_001.jpg"
    predict(open_predictor(trained, "cpu"), [str(tile)], tmp_path / "out", window=576)
    expected = student_model(trained, CPU, tta=None, window=None).predict(read_image(tile)).argmax(axis=0)
    np.testing.assert_array_equal(read(tmp_path / "out" / "t2_001.tif")[0], expected)


def test_views_are_averaged(trained, tmp_path):
    from kdpipe.pipeline.evaluation.evaluate import student_model

    pixels = noise(70, 90)
    scene = write_scene(tmp_path / "scene.tif", pixels)
    predict(open_predictor(trained, "cpu", tta="d4"), [str(scene)], tmp_path / "out", confidence=True)
    probs = student_model(trained, CPU, tta="d4", window=None).predict(pixels.transpose(1, 2, 0))
    np.testing.assert_array_equal(read(tmp_path / "out" / "scene.tif")[0], probs.argmax(axis=0))
    stored = read(tmp_path / "out" / "scene.confidence.tif")[0]
    assert np.abs(stored / 254 - probs.max(axis=0)).max() <= 0.5 / 254 + 1e-5


# --- what is in the file ---


def test_the_map_has_place_palette_names_no_data_and_overviews(tmp_path):
    pixels = noise(600, 530)
    pixels[:, :40, :50] = 7  # declared as no data
    scene = write_scene(tmp_path / "scene.tif", pixels, nodata=7)
    summary = predict(predictor(), [str(scene)], tmp_path / "out", window=256, overlap=64)
    with rasterio.open(tmp_path / "out" / "scene.tif") as found:
        assert (found.crs, found.transform, found.dtypes, found.nodata) == ("EPSG:32640", PLACE, ("uint8",), 255)
        assert found.profile["tiled"]
        assert found.compression.name == "deflate"
        assert found.overviews(1) == [2, 4]
        assert found.colormap(1)[1] == (0, 158, 115, 255)
        assert found.colormap(1)[255][3] == 0
        assert json.loads(found.tags()["classes"]) == NAMES
        assert found.tags()["model"] == "tiny after step 2, stub"
        classes = found.read(1)
    empty = (pixels == 7).all(axis=0)
    np.testing.assert_array_equal(classes, np.where(empty, 255, pixels[0] % 3))
    drawn = summary.maps[0]
    assert drawn.no_data == empty.sum() >= 2000
    assert drawn.pixels == {name: int((classes == i).sum()) for i, name in enumerate(NAMES)}
    assert "<Category>Water &amp; ice</Category>" in (tmp_path / "out" / "scene.tif.aux.xml").read_text()
    assert sorted(os.listdir(tmp_path / "out")) == ["scene.tif", "scene.tif.aux.xml"]


def test_confidence_and_probabilities_have_their_scale_names_and_no_data(tmp_path):
    pixels = noise(40, 50)
    mask = np.full((40, 50), 255, np.uint8)
    mask[:10] = 0
    scene = write_scene(tmp_path / "scene.tif", pixels, mask=mask)
    predict(predictor(), [str(scene)], tmp_path / "out", confidence=True, probabilities=True)
    expected = np.exp(4) / (np.exp(4) + 2)
    with rasterio.open(tmp_path / "out" / "scene.confidence.tif") as found:
        assert (found.descriptions, found.nodata) == (("confidence",), 255)
        np.testing.assert_allclose(found.read(1, masked=True) * found.scales[0], expected, atol=0.5 / 254)
        assert (found.read(1)[:10] == 255).all()
    with rasterio.open(tmp_path / "out" / "scene.probabilities.tif") as found:
        assert found.descriptions == tuple(NAMES)
        stored = found.read()
        np.testing.assert_array_equal(stored[:, 10:].argmax(axis=0), pixels[0, 10:] % 3)
        assert (stored[:, :10] == 255).all()


def test_overviews_show_what_most_pixels_are(tmp_path):
    classes = np.zeros((1, 512, 512), np.uint8)
    classes[0, ::2, ::2] = 2  # one pixel of four
    with new_map(tmp_path / "a.tif", class_layer(NAMES, card().palette, 255, {}), 512, 512, Georeference()) as writer:
        writer.write(classes[:, :100])
        writer.write(classes[:, 100:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(tmp_path / "a.tif", overview_level=0) as found:
            assert (found.read(1) == 0).all()
    np.testing.assert_array_equal(read(tmp_path / "a.tif"), classes)


@pytest.mark.parametrize(("ignore_index", "dtype"), [(255, "uint8"), (3, "uint8"), (65535, "uint16")])
def test_no_data_is_the_ignore_index_so_that_a_map_can_be_a_mask(tmp_path, ignore_index, dtype):
    from kdpipe.data.rasters import read_mask

    pixels = noise(40, 40)
    pixels[:, 5, 5] = 0
    scene = write_scene(tmp_path / "scene.tif", pixels, nodata=0)
    predict(predictor(ignore_index=ignore_index), [str(scene)], tmp_path / "out")
    mask = read_mask(tmp_path / "out" / "scene.tif", len(NAMES), ignore_index)
    assert mask[5, 5] == ignore_index
    assert read(tmp_path / "out" / "scene.tif").dtype == dtype


def test_control_points_are_kept(tmp_path):
    points = [GroundControlPoint(r, c, 55 + c / 1e5, 25 - r / 1e5) for r, c in [(0, 0), (0, 50), (40, 0), (40, 50)]]
    scene = write_scene(tmp_path / "scene.tif", noise(40, 50), transform=None, crs="EPSG:4326", gcps=points)
    predict(predictor(), [str(scene)], tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(tmp_path / "out" / "scene.tif") as found:
            assert [(p.row, p.col, p.x, p.y) for p in found.gcps[0]] == [(p.row, p.col, p.x, p.y) for p in points]
            assert found.gcps[1] == "EPSG:4326"


# --- inputs ---


def test_alpha_is_no_data_and_no_band(tmp_path):
    pixels = noise(40, 50, bands=4)
    pixels[3] = 255
    pixels[3, :, :20] = 0
    path = tmp_path / "rgba.png"
    Image.fromarray(pixels.transpose(1, 2, 0)).save(path)
    predict(predictor(), [str(path)], tmp_path / "out")
    found = read(tmp_path / "out" / "rgba.tif")[0]
    assert (found[:, :20] == 255).all()
    np.testing.assert_array_equal(found[:, 20:], pixels[0, :, 20:] % 3)


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_other_units_are_stretched_as_training_stretched_them(tmp_path, dtype):
    from kdpipe.data.rasters import read_image

    values = np.random.default_rng(1).integers(0, 3000, (4, 300, 40)).astype(dtype)
    nodata = 0 if dtype == "uint16" else np.nan
    values[:, 7, 9] = nodata
    scene = write_scene(tmp_path / "scene.tif", values, nodata=nodata)
    stretch = [(0, 3000), (100, 2500), (0, 3000)]
    predict(predictor(bands=(4, 3, 2), stretch=stretch), [str(scene)], tmp_path / "out", window=64, overlap=32)
    expected = read_image(scene, (4, 3, 2), stretch)[..., 0] % 3
    expected[7, 9] = 255
    np.testing.assert_array_equal(read(tmp_path / "out" / "scene.tif")[0], expected)


def test_a_pixel_with_data_in_one_band_is_drawn(tmp_path):
    pixels = noise(40, 40)
    pixels[:, 3, 4] = (0, 0, 9)
    pixels[:, 5, 5] = 0
    scene = write_scene(tmp_path / "scene.tif", pixels, nodata=0)
    predict(predictor(), [str(scene)], tmp_path / "out")
    found = read(tmp_path / "out" / "scene.tif")[0]
    assert (found[3, 4], found[5, 5]) == (0, 255)


def test_windows_without_data_are_not_asked(tmp_path):
    pixels = np.zeros((3, 640, 640), np.uint8)
    pixels[:, 600:, 600:] = 1
    scene = write_scene(tmp_path / "scene.tif", pixels, nodata=0)
    asked = []
    stub = predictor()
    counting = Predictor("a", stub.card, "cpu", "none", lambda images: asked.append(len(images)) or stub.ask(images))
    predict(counting, [str(scene)], tmp_path / "out", window=128, overlap=32)
    np.testing.assert_array_equal(read(tmp_path / "out" / "scene.tif")[0], np.where(pixels[0], 1, 255))
    assert sum(asked) == 1


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
    np.testing.assert_array_equal(read(tmp_path / "out" / "all.tif")[0], pixels[0] % 3)
    (tmp_path / "part.tif").unlink()  # no map with a hole
    summary = predict(predictor(), [str(tmp_path / "all.vrt")], tmp_path / "other")
    assert "cannot read" in summary.failed[str(tmp_path / "all.vrt")]
    assert os.listdir(tmp_path / "other") == []


def test_a_world_file_beside_a_jpeg_is_its_place(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(noise(40, 50).transpose(1, 2, 0)).save(path)
    path.with_suffix(".jgw").write_text("0.5\n0\n0\n-0.5\n320000.25\n2789999.75\n")
    predict(predictor(), [str(path)], tmp_path / "out")
    with rasterio.open(tmp_path / "out" / "a.tif") as found:
        assert found.transform == PLACE
    assert sorted(os.listdir(tmp_path)) == ["a.jgw", "a.jpg", "out"]


def test_folders_patterns_and_files_are_listed_in_order_without_anything_else(tmp_path):
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


# --- refused ---


def test_inputs_that_name_nothing_or_one_scene_twice_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    scene = write_scene(tmp_path / "a.tif", noise(40, 40))
    with pytest.raises(DataError, match=r"there is no file or folder .*none\.tif, and as a pattern it matches nothing"):
        list_scenes([str(tmp_path / "none.tif")])
    with pytest.raises(DataError, match=r"no scenes in .*empty: expected files that end in \.png, .*\.vrt"):
        list_scenes([str(tmp_path / "empty")])
    with pytest.raises(DataError, match=r"a\.tif is named twice"):
        list_scenes([str(scene), str(tmp_path)])


def test_maps_of_one_name_and_maps_that_are_there_are_refused(tmp_path):
    scenes = [str(write_scene(tmp_path / folder / "a.tif", noise(40, 40))) for folder in "xy"]
    with pytest.raises(
        DataError, match=r"x/a\.tif and .*y/a\.tif would both have the map .*out/a\.tif: map them in two runs"
    ):
        predict(predictor(), scenes, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    predict(predictor(), scenes[:1], tmp_path / "out")
    before = (tmp_path / "out" / "a.tif").read_bytes()
    with pytest.raises(DataError, match=r"out/a\.tif is there already: .*--overwrite"):
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
def test_sizes_that_do_not_fit_the_networks_grid_are_refused(tmp_path, sizes, message):
    with pytest.raises(ConfigError, match=message):
        predict(predictor(), ["x"], tmp_path, **sizes)


def test_unreadable_scenes_are_named_and_the_others_go_on(tmp_path):
    good = write_scene(tmp_path / "in" / "good.tif", noise(40, 40))
    write_scene(tmp_path / "in" / "float.tif", np.ones((3, 40, 40), np.float32))
    write_scene(tmp_path / "in" / "grey.tif", noise(40, 40, bands=1))
    (tmp_path / "in" / "text.tif").write_text("hello")
    # Damaged below its first window, so that it fails midway.
    cut = write_scene(tmp_path / "in" / "cut.tif", noise(900, 40), compress="deflate")
    content = cut.read_bytes()
    cut.write_bytes(content[: len(content) * 3 // 4])
    advanced = []

    class Bars:
        def say(self, line): ...

        def bar(self, title, total, unit, done=0):
            from contextlib import nullcontext

            advanced.append(-total)
            return nullcontext(lambda steps=1, **figures: advanced.append(steps))

    summary = predict(predictor(), [str(tmp_path / "in")], tmp_path / "out", window=128, overlap=32, progress=Bars())
    reasons = {Path(path).name: reason for path, reason in summary.failed.items()}
    assert sorted(reasons) == ["cut.tif", "float.tif", "grey.tif", "text.tif"]
    assert "cut.tif, which is damaged or not a raster" in reasons["cut.tif"]
    assert "text.tif, which is damaged or not a raster" in reasons["text.tif"]
    assert "holds float32 values, and only uint8 is taken as it is" in reasons["float.tif"]
    assert "grey.tif has 1 bands, and the student was trained on bands [1, 2, 3]" in reasons["grey.tif"]
    assert [drawn.scene for drawn in summary.maps] == [str(good)]
    assert sorted(os.listdir(tmp_path / "out")) == ["good.tif", "good.tif.aux.xml"]
    assert sum(advanced) == 0  # the bar ends where it should


def test_what_is_not_finite_is_refused(tmp_path):
    values = np.ones((3, 300, 40), np.float32)
    values[1, 200, 7] = np.inf
    scene = write_scene(tmp_path / "scene.tif", values)
    summary = predict(predictor(stretch=[(0, 9)] * 3), [str(scene)], tmp_path / "out", window=64, overlap=32)
    assert "NaN or infinity in band 2 at 1 pixels, the first at row 200, column 7" in summary.failed[str(scene)]
    bad = Predictor(
        "bad.ckpt", card(), "cpu", "none", lambda images: torch.full((len(images), 3, *images.shape[-2:]), torch.nan)
    )
    fine = write_scene(tmp_path / "fine.tif", noise(40, 40))
    with pytest.raises(KdpipeError, match=r"bad\.ckpt answers .*fine\.tif with numbers that are not finite near row 0"):
        predict(bad, [str(fine)], tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []


def test_a_file_with_images_inside_says_so(monkeypatch):
    from kdpipe.data import scenes as module

    class Empty:
        count, subdatasets = 0, ["HDF5:a.h5://red"]

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

    monkeypatch.setattr(module, "open_quietly", lambda path: Empty())
    message = r"a\.h5 holds no bands but further images inside.*HDF5:a\.h5://red"
    with pytest.raises(DataError, match=message), open_scene("a.h5", (1, 2, 3), None):
        pass


# --- whole or absent ---


def test_ctrl_c_leaves_finished_maps_alone_and_no_half_one(tmp_path):
    stop, stub = threading.Event(), predictor()
    scenes = [str(write_scene(tmp_path / f"{name}.tif", noise(300, 40))) for name in "ab"]
    asked = []

    def ask(images):
        asked.append(1)
        if len(asked) == 7:  # a window of the second scene
            stop.set()
        return stub.ask(images)

    with pytest.raises(
        Interrupted, match=r"stopped in .*b\.tif, of which nothing is kept; 1 of 2 scenes have their map"
    ):
        predict(
            Predictor("a", stub.card, "cpu", "none", ask), scenes, tmp_path / "out", window=96, overlap=32, stop=stop
        )
    assert sorted(os.listdir(tmp_path / "out")) == ["a.tif", "a.tif.aux.xml"]


def test_a_killed_run_leaves_no_map_and_the_next_one_draws_it(tmp_path):
    """kill -9 in the middle of a scene."""
    write_scene(tmp_path / "a.tif", noise(2000, 64))
    process = subprocess.Popen(
        [sys.executable, MAP_PROCESS, "kill", "a.tif"], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    for _ in range(20):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert os.listdir(tmp_path / "out") == [".a.tif.partial"]
    predict(predictor(), [str(tmp_path / "a.tif")], tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["a.tif", "a.tif.aux.xml"]
    np.testing.assert_array_equal(read(tmp_path / "out" / "a.tif")[0], read(tmp_path / "a.tif")[0] % 3)


def test_two_processes_do_not_write_one_map(tmp_path):
    layer = Layer(["class"], "uint8", 255, "mode")
    with (
        new_map(tmp_path / "a.tif", layer, 8, 8, Georeference()) as writer,
        pytest.raises(DataError, match=r"another process is writing .*\.a\.tif\.partial"),
        new_map(tmp_path / "a.tif", layer, 8, 8, Georeference()),
    ):
        pass
    assert writer is not None


@pytest.fixture
def file_limit():
    """Sets the most bytes that a file may have, which stands for a full disk; None is no limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_FSIZE, (soft if limit is None else limit, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path, file_limit):
    """GDAL finds out when it writes a tile, or never: of the last four limits it says nothing when it closes the file."""
    scene = write_scene(tmp_path / "scene.tif", noise(600, 600))
    whole = predict(predictor(), [str(scene)], tmp_path / "whole")
    size = Path(whole.maps[0].files["classes"]).stat().st_size
    for limit in (1000, size // 2, size - 4000, size - 500, size - 100, size - 1):
        file_limit(limit)
        with pytest.raises(
            KdpipeError, match=r"cannot write the map .*out/scene\.tif: .*; check free space and permissions"
        ):
            predict(predictor(), [str(scene)], tmp_path / "out")
        file_limit(None)
        assert os.listdir(tmp_path / "out") == []


def test_an_out_folder_that_cannot_be_written_is_an_error(tmp_path):
    scene = write_scene(tmp_path / "a.tif", noise(40, 40))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--out .*file/maps cannot be made"):
        predict(predictor(), [str(scene)], tmp_path / "file" / "maps")


# --- memory ---


def test_memory_does_not_grow_with_a_scenes_height(tmp_path):
    """The peak of a process that draws a scene of 1000 px width, and then one four times as high."""
    for height in (1000, 4000):
        write_scene(tmp_path / f"{height}.tif", np.ones((3, height, 1000), np.uint8), tiled=True, compress="deflate")
    command = [sys.executable, MAP_PROCESS, "memory", "1000.tif", "4000.tif"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    small, large = map(float, said.split())
    # All of the image and its logits would be 3000 rows x 1000 px x (3 + 12) bytes = 43 MB more.
    assert large - small < 20, said


def test_out_of_memory_says_which_options_help(tmp_path):
    def ask(images):
        raise torch.OutOfMemoryError("CUDA out of memory")

    scene = write_scene(tmp_path / "a.tif", noise(40, 40))
    with pytest.raises(
        KdpipeError, match=r"1 window of 40 x 40 px.*--batch-size 1; --window 512 \(now 1024\); --device cpu"
    ):
        predict(Predictor("a", card(), "cpu", "none", ask), [str(scene)], tmp_path / "out")


# --- the command ---


def test_the_command_draws_writes_json_and_names_failures(trained, landscape, tmp_path, monkeypatch, capsys):
    (tmp_path / "in").mkdir()
    tiles = sorted((landscape / "Val" / "images").iterdir())
    (tmp_path / "in" / "bad.tif").write_text("no raster")
    code = run(
        monkeypatch, *tiles, tmp_path / "in", "--checkpoint", trained, "--out", tmp_path / "maps", "--json", tmp_path / "a.json",
        "--device", "cpu",
    )  # fmt: skip
    said = capsys.readouterr()
    assert code == 1
    assert "kdpipe: cannot read" in said.err
    assert "bad.tif" in said.err
    assert "Area by class" in said.out
    content = json.loads((tmp_path / "a.json").read_text())
    assert len(content["maps"]) == len(tiles)
    assert list(content["failed"]) == [str(tmp_path / "in" / "bad.tif")]
    for drawn in content["maps"]:
        found = read(drawn["files"]["classes"])[0]
        assert found.shape == (drawn["height"], drawn["width"])
        assert sum(drawn["pixels"].values()) == found.size
    # The tiles that were read have nothing beside them that was not there.
    assert sorted((landscape / "Val" / "images").iterdir()) == tiles


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "none.ckpt", "--out", "m", "."], "no checkpoint at"),
        (["--checkpoint", "none.onnx", "--out", "m", "."], "no file at"),
        (["--checkpoint", "a.pt2", "--out", "m", "."], "a.pt2 is an exported file that predict does not run"),
        (["--checkpoint", "x", "--out", "m"], "Missing argument 'INPUT...'"),
        (["--checkpoint", "x", "."], "Missing option '--out'"),
    ],
)
def test_mistakes_end_in_one_paragraph(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *arguments) == 2
    assert message in capsys.readouterr().err


def test_defaults_of_the_command_are_those_of_the_function():
    from kdpipe.pipeline.commands.main import cli

    defaults = {option.name: option.default for option in cli.commands["predict"].params}
    assert (defaults["window"], defaults["overlap"]) == (prediction.WINDOW_PX, prediction.OVERLAP_PX)


def test_a_checkpoint_of_another_kind_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"a\.ckpt is not a checkpoint of `kdpipe train-student`"):
        open_predictor(tmp_path / "a.ckpt", "cpu")
