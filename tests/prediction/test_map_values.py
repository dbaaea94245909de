"""Maps equal whole-image inference, and hold the scene's place, its no data, palette and class names."""

import json
import os
import warnings
from itertools import pairwise

import numpy as np
import pytest
import rasterio
import torch
from helpers.files import PLACE, noise, read_raster, write_scene
from helpers.map_process import NAMES, card, predictor
from rasterio.control import GroundControlPoint
from rasterio.errors import NotGeoreferencedWarning

from kdpipe.data.maps import class_layer, new_map
from kdpipe.data.rasters import read_image, read_mask
from kdpipe.data.scenes import Georeference
from kdpipe.pipeline.evaluation.evaluate import student_model
from kdpipe.pipeline.models.views import padded_logits
from kdpipe.pipeline.models.windows import spans, tapered_overlap
from kdpipe.pipeline.prediction.maps import predict
from kdpipe.pipeline.prediction.model import open_predictor

CPU = torch.device("cpu")


@pytest.mark.parametrize(("side", "overlap"), [(64, 0), (64, 32), (128, 32), (128, 64), (256, 96)])
@pytest.mark.parametrize("size", [1, 31, 32, 33, 64, 65, 97, 128, 129, 160, 300, 1000])
def test_shares_sum_to_one_and_windows_lie_on_the_grid_and_overlap_enough(size, side, overlap):
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


def test_a_window_has_no_share_in_its_margin_and_all_of_it_where_it_is_alone():
    first, second = spans(224, 128, 32, tapered_overlap)
    assert (first.start, second.start) == (0, 96)
    shares = first.shares.numpy()
    np.testing.assert_array_equal(shares[:108], 1)  # 96, and the neighbour's margin of 12
    np.testing.assert_array_equal(shares[116:], 0)
    np.testing.assert_allclose(shares[108:116], (7.5 - np.arange(8)) / 8, rtol=1e-6)


def pyramid(num_classes=3):
    """A network that halves its image three times: logits depend on where its grid starts, and on 44 px around each pixel."""
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


@pytest.mark.parametrize(("height", "width"), [(333, 410), (40, 700), (129, 128), (20, 9)])
def test_a_map_equals_whole_image_inference_if_the_margin_covers_the_receptive_field(tmp_path, height, width):
    """The network sees 44 px around a pixel, and the margin is 0.375 of 128 px: 48. Batches, strips and borders included."""
    model, pixels = pyramid(), noise(height, width)
    scene = write_scene(tmp_path / "scene.tif", pixels)
    predict(
        predictor(model=model),
        [str(scene)],
        tmp_path / "out",
        window=256,
        overlap=128,
        batch_size=3,
        probabilities=True,
    )
    with torch.inference_mode():
        probs = padded_logits(model, torch.from_numpy(pixels)[None].float() / 255).softmax(dim=1)[0].numpy()
    stored = read_raster(tmp_path / "out" / "scene.probabilities.tif")
    assert np.abs(stored / 254 - probs).max() <= 0.5 / 254 + 1e-5
    classes, expected = read_raster(tmp_path / "out" / "scene.tif")[0], probs.argmax(axis=0)
    sure = np.sort(probs, axis=0)[-1] - np.sort(probs, axis=0)[-2] > 1e-5
    np.testing.assert_array_equal(classes[sure], expected[sure])
    assert sure.mean() > 0.99
    assert len(np.unique(classes)) > 1


def test_windows_off_the_grid_would_fail_the_test_above():
    model, image = pyramid(), torch.from_numpy(noise(256, 256))[None].float() / 255
    with torch.inference_mode():
        whole, moved = model(image)[..., 128, 128], model(image[..., 4:, 4:])[..., 124, 124]
    assert (whole - moved).abs().max() > 1e-3


@pytest.mark.long
def test_a_real_students_map_is_the_prediction_of_whole_tiles(dubai, trained, tmp_path):
    """A small tile is one window: the very prediction of `evaluate`."""
    tile = dubai / "data" / "dubai" / "Val" / "images" / "t2_001.jpg"
    predict(open_predictor(trained, "cpu"), [str(tile)], tmp_path / "out", window=576)
    expected = student_model(trained, CPU, tta=None, window=None).predict(read_image(tile)).argmax(axis=0)
    np.testing.assert_array_equal(read_raster(tmp_path / "out" / "t2_001.tif")[0], expected)


@pytest.mark.long
def test_tta_averages_as_evaluate_does(trained, tmp_path):
    pixels = noise(70, 90)
    scene = write_scene(tmp_path / "scene.tif", pixels)
    predict(open_predictor(trained, "cpu", tta="d4"), [str(scene)], tmp_path / "out", confidence=True)
    probs = student_model(trained, CPU, tta="d4", window=None).predict(pixels.transpose(1, 2, 0))
    np.testing.assert_array_equal(read_raster(tmp_path / "out" / "scene.tif")[0], probs.argmax(axis=0))
    stored = read_raster(tmp_path / "out" / "scene.confidence.tif")[0]
    assert np.abs(stored / 254 - probs.max(axis=0)).max() <= 0.5 / 254 + 1e-5


def test_a_map_has_georeference_palette_names_no_data_and_overviews(tmp_path):
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


def test_overviews_show_the_most_frequent_class(tmp_path):
    classes = np.zeros((1, 512, 512), np.uint8)
    classes[0, ::2, ::2] = 2  # one pixel of four
    with new_map(tmp_path / "a.tif", class_layer(NAMES, card().palette, 255, {}), 512, 512, Georeference()) as writer:
        writer.write(classes[:, :100])
        writer.write(classes[:, 100:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(tmp_path / "a.tif", overview_level=0) as found:
            assert (found.read(1) == 0).all()
    np.testing.assert_array_equal(read_raster(tmp_path / "a.tif"), classes)


@pytest.mark.parametrize(("ignore_index", "dtype"), [(255, "uint8"), (3, "uint8"), (65535, "uint16")])
def test_no_data_is_the_ignore_index_so_that_a_map_can_be_a_mask(tmp_path, ignore_index, dtype):
    pixels = noise(40, 40)
    pixels[:, 5, 5] = 0
    scene = write_scene(tmp_path / "scene.tif", pixels, nodata=0)
    predict(predictor(ignore_index=ignore_index), [str(scene)], tmp_path / "out")
    mask = read_mask(tmp_path / "out" / "scene.tif", len(NAMES), ignore_index)
    assert mask[5, 5] == ignore_index
    assert read_raster(tmp_path / "out" / "scene.tif").dtype == dtype


def test_control_points_are_kept(tmp_path):
    points = [GroundControlPoint(r, c, 55 + c / 1e5, 25 - r / 1e5) for r, c in [(0, 0), (0, 50), (40, 0), (40, 50)]]
    scene = write_scene(tmp_path / "scene.tif", noise(40, 50), transform=None, crs="EPSG:4326", gcps=points)
    predict(predictor(), [str(scene)], tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(tmp_path / "out" / "scene.tif") as found:
            assert [(p.row, p.col, p.x, p.y) for p in found.gcps[0]] == [(p.row, p.col, p.x, p.y) for p in points]
            assert found.gcps[1] == "EPSG:4326"
