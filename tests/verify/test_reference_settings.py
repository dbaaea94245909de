"""verify-cache --reference beside other settings: orders of channels, orientation, decoders, views, precision, several teachers."""

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from helpers import owner_script as own
from helpers.configs import ENCODER
from helpers.files import write_tiff
from PIL import Image, ImageOps

from kdpipe.pipeline.models.smp import create_smp_model
from kdpipe.pipeline.verify import reference
from kdpipe.pipeline.verify.gate import verify
from kdpipe.pipeline.verify.script_runs import turned

CPU = torch.device("cpu")
CLASSES = ["Tree", "Rangeland", "Cropland", "Developed", "Road", "Bareland", "Water", "Background"]
ORDER = [3, 0, 1, 2, 7, 4, 6, 5]  # the script saves channel ORDER[j] as its jth


@pytest.fixture(scope="module")
def net(teacher_file):
    return own.network(teacher_file)


@pytest.fixture
def config_of(make_config, tmp_path):
    """A configuration on one tile that the caller writes."""

    def config(write, **overrides):
        (tmp_path / "Mine/images").mkdir(parents=True)
        path = write(tmp_path / "Mine/images")
        return path, make_config(
            data__train=[str(tmp_path / "Mine")], data__val=[], data__allow_missing_masks=True, **overrides
        )

    return config


def picture(height=64, width=96, seed=0):
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def png(folder):
    picture().save(folder / "t.png")
    return folder / "t.png"


def square(folder):
    """The smallest that a search is tried on."""
    picture(64, 64).save(folder / "t.png")
    return folder / "t.png"


def compared(config, tmp_path, scores, name="t.npy"):
    path = tmp_path / "scores" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, scores)
    return verify(config, "full", CPU, reference=tmp_path / "scores")


def right(net, path):
    return own.logits(net, own.pixels(path) / 255)


@pytest.mark.parametrize("saved", [lambda z: z, own.softmax], ids=["logits", "probabilities"])
def test_an_order_of_channels_is_found_and_its_classes_make_the_scores_fit(config_of, net, tmp_path, saved):
    path, config = config_of(png)
    report = compared(config, tmp_path, saved(right(net, path))[ORDER])
    (cause,) = report.reference.causes
    names = [CLASSES[ORDER.index(channel)] for channel in range(8)]  # what the script calls each channel of the network
    assert cause.remedies == [f"set teacher.classes: [{', '.join(names)}]"]
    assert cause.after < 1e-5
    assert f"set teacher.classes: [{', '.join(names)}]; then the largest |Δp| falls" in report.findings[0].message


def test_an_order_of_channels_and_a_normalisation_are_found_together(config_of, net, tmp_path):
    path, config = config_of(png)
    report = compared(config, tmp_path, own.logits(net, own.pixels(path))[ORDER])
    assert len(report.reference.causes[0].remedies) == 2
    assert "feeds 0..255 as they are and saves channels in another order" in report.findings[0].message


@pytest.mark.parametrize("orientation", [3, 6])
def test_the_orientation_that_a_script_applies_is_named(config_of, net, tmp_path, orientation):
    def write(folder):
        exif = Image.Exif()
        exif[274] = orientation
        picture().save(folder / "t.jpg", quality=95, subsampling=0, exif=exif)
        return folder / "t.jpg"

    path, config = config_of(write)
    with Image.open(path) as image:
        upright = np.asarray(ImageOps.exif_transpose(image), dtype=np.float32)
    report = compared(config, tmp_path, own.logits(net, upright / 255))
    assert f"turns images by their EXIF orientation ({orientation}): " in report.findings[0].message
    assert report.reference.causes[0].complete


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_pillow_turns_them(orientation):
    image = picture(8, 16)
    image.getexif()[274] = orientation
    expected = np.asarray(ImageOps.exif_transpose(image)).transpose(2, 0, 1)
    np.testing.assert_array_equal(turned(np.asarray(image).transpose(2, 0, 1), orientation), expected)


def test_a_script_that_decodes_jpeg_otherwise_is_named(config_of, net, tmp_path):
    import warnings

    import rasterio

    def write(folder):
        picture(seed=3).save(folder / "t.jpg", quality=80, subsampling=2)
        return folder / "t.jpg"

    path, config = config_of(write)
    with warnings.catch_warnings(), rasterio.Env():
        warnings.simplefilter("ignore")
        with rasterio.open(path) as raster:
            pixels = raster.read().transpose(1, 2, 0).astype(np.float32)
    assert np.abs(pixels - own.pixels(path)).max() > 2
    report = compared(config, tmp_path, own.logits(net, pixels / 255))
    assert (
        "reads pixels as GDAL decodes them: read the images in it as kdpipe does, with Pillow;"
        in report.findings[0].message
    )
    assert report.reference.causes[0].after < 1e-5
    assert compared(config, tmp_path, right(net, path)).passes


def test_scores_without_the_configured_views_are_compared_without_them(config_of, net, tmp_path):
    path, config = config_of(png, teacher__tta="d4", teacher__window=64)
    report = compared(config, tmp_path, right(net, path))
    assert report.passes
    assert report.reference.notes == [
        "the scores of Mine/t are compared with one view of the whole tile: they are without teacher.tta, teacher.window"
    ]
    wrong = compared(config, tmp_path, own.logits(net, own.pixels(path)))
    assert "set teacher.normalize: {mean: [0, 0, 0], std: [0.0039" in wrong.findings[0].message


def test_scores_with_the_configured_views_pass(config_of, net, tmp_path):
    path, config = config_of(png, teacher__tta="flips")
    inputs = own.pixels(path) / 255
    views = [own.logits(net, inputs[::y, ::x])[:, ::y, ::x] for y in (1, -1) for x in (1, -1)]
    report = compared(config, tmp_path, np.mean(views, axis=0))
    assert report.passes
    assert report.reference.notes == []
    assert report.reference.tiles[0].max_abs.value < 1e-5


@pytest.mark.long
def test_a_configured_precision_allows_its_own_rounding_and_hides_no_fault(config_of, net, tmp_path):
    path, config = config_of(png, teacher__precision="bf16")
    inputs = own.pixels(path) / 255
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = own.logits(net, inputs)
    report = compared(config, tmp_path, scores)
    (row,) = report.reference.tiles
    assert report.passes
    assert row.max_abs.tolerance == 0.15
    assert row.computed_in == "bf16"


@pytest.mark.long
def test_a_configured_precision_hides_no_fault_that_is_smaller_than_its_rounding(config_of, net, tmp_path):
    def odd(folder):
        picture(70, 90).save(folder / "t.png")
        return folder / "t.png"

    path, config = config_of(odd, teacher__precision="bf16")
    report = compared(config, tmp_path, own.logits(net, own.pixels(path) / 255, "edge"))
    assert report.reference.tiles[0].max_abs.value < 0.15
    assert "pads images with the border's pixels" in report.findings[0].message


@pytest.mark.slow
def test_numbers_of_half_precision_are_named_where_another_machine_rounds_otherwise(config_of, net, tmp_path):
    path, config = config_of(square)
    scores = right(net, path)
    noise = np.random.default_rng(0).normal(0, 0.004, scores.shape).astype(np.float32)
    half = torch.from_numpy(scores + noise).bfloat16().float().numpy()
    report = compared(config, tmp_path, half)
    assert "all scores are numbers of bf16" in report.findings[0].message
    assert "set teacher.precision: bf16" in report.findings[0].message
    report = compared(config, tmp_path, scores + noise / 2)
    assert "as arithmetic in lower precision leaves it" in report.findings[0].message


@pytest.mark.long
def test_an_option_that_leaves_no_trace_in_the_weights_is_named(config_of, net, teacher_file, tmp_path):
    path, config = config_of(png)
    other = smp.Unet(ENCODER, encoder_weights=None, classes=8, decoder_interpolation="bilinear")
    other.load_state_dict(torch.load(teacher_file, weights_only=True))
    report = compared(config, tmp_path, right(other.eval(), path))
    assert report.reference.causes[0].remedies == ["set teacher.options: {decoder_interpolation: bilinear}"]
    assert report.reference.causes[0].complete


@pytest.mark.long
def test_what_comes_nearest_is_said_to_leave_a_difference(config_of, net, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "ROUNDS", 1)
    path, config = config_of(png)
    with Image.open(path) as image:
        small = np.asarray(image.resize((256, 256), Image.Resampling.LANCZOS), dtype=np.float32)
    scores = own.logits(net, small / 255)
    back = np.stack(
        [np.asarray(Image.fromarray(plane).resize((96, 64), Image.Resampling.BILINEAR)) for plane in scores]
    )
    report = compared(config, tmp_path, back)
    (cause,) = report.reference.causes
    assert not cause.complete
    assert cause.script[0].startswith("resizes images to 256 x 256 px")
    assert report.findings[0].message.startswith(
        "what comes nearest, and does not explain all, is that the script resizes"
    )
    assert not report.passes


@pytest.mark.long
def test_other_weights_are_not_explained(config_of, teacher_file, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "ROUNDS", 1)
    path, config = config_of(square)
    other = own.network(teacher_file)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter *= 1.2
    report = compared(config, tmp_path, right(other, path))
    assert "Are teacher.checkpoint and the script's weights the same file" in report.findings[0].message


def test_channels_that_are_dropped_are_compared_too(config_of, net, tmp_path):
    path, config = config_of(png, teacher__drop_channels=[6], class_map={
        name: {"Forest": 1} for name in CLASSES if name != "Water"
    })  # fmt: skip
    scores = right(net, path)
    assert compared(config, tmp_path, scores).passes
    report = compared(config, tmp_path, scores[[0, 1, 2, 3, 4, 5, 7, 6]])
    assert report.reference.causes[0].remedies == [
        "set teacher.classes: [Tree, Rangeland, Cropland, Developed, Road, Bareland, Background, Water] and teacher.drop_channels: [7]"
    ]


def test_each_of_several_teachers_has_its_own_folder(config_of, net, teacher_file, tmp_path):
    torch.manual_seed(1)
    second = tmp_path / "second.pth"
    torch.save(create_smp_model("fpn", ENCODER, 8, key="teacher").state_dict(), second)
    member = {"architecture": "unet", "encoder": ENCODER, "checkpoint": str(teacher_file), "classes": CLASSES}
    fpn = member | {"architecture": "fpn", "checkpoint": str(second), "classes": CLASSES[::-1]}
    path, config = config_of(png, teacher=None, teachers=[member, fpn])
    report = compared(config, tmp_path, own.logits(net, own.pixels(path)), "0/t.npy")
    assert {row.teacher for row in report.reference.tiles} == {"teachers.0"}
    assert "set teachers.0.normalize: " in report.findings[0].message
    assert report.reference.notes == [f"teachers.1 was not compared: there is no folder {tmp_path / 'scores/1'}"]


def test_a_wide_tile_is_compared_and_not_searched(config_of, net, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "LARGEST_EXPLAINED_PX", 1000)
    path, config = config_of(png)
    report = compared(config, tmp_path, own.logits(net, own.pixels(path)))
    assert report.reference.causes == []
    assert report.reference.notes == [
        "no explanation is sought on tiles of more than 0.0 million px: compare smaller ones"
    ]


def test_bands_and_stretch_of_a_tiff_are_those_of_the_configuration(config_of, net, tmp_path):
    values = np.random.default_rng(0).integers(0, 3000, (4, 64, 96)).astype(np.uint16)
    _, config = config_of(
        lambda folder: write_tiff(folder / "t.tif", values, photometric="MINISBLACK"),
        data__bands=[4, 3, 2], data__stretch={"range": [0, 3000]},
    )  # fmt: skip
    inputs = np.rint(values[[3, 2, 1]].astype(np.float32) * (255 / 3000)).transpose(1, 2, 0) / 255
    report = compared(config, tmp_path, own.logits(net, inputs))
    assert report.passes, report.findings
    report = compared(config, tmp_path, own.logits(net, inputs[..., ::-1]))
    assert "set data.bands: [2, 3, 4]" in report.findings[0].message
