"""Pixels that a file declares to hold no data are left out of samples, losses and scores; expected values are NumPy's or Pillow's."""

import json

import numpy as np
import pytest
import rasterio
import torch
from helpers.commands import run_command
from helpers.files import read_raster, write_scene
from PIL import Image
from rasterio.enums import ColorInterp

from kdpipe.cache.encoding.simplex import mean_over_pixels
from kdpipe.configs import parse_config
from kdpipe.data.dataset import TrainTiles, ValTiles
from kdpipe.data.rasters import open_rows, read_data, read_image, read_image_with_data
from kdpipe.data.recorded_views import RecordedViews
from kdpipe.data.scenes import open_scene
from kdpipe.data.stretch import resolve_stretch
from kdpipe.data.tiles import list_tiles

H, W, IGNORE = 60, 76, 255
RNG = np.random.default_rng(3)
RGB = RNG.integers(1, 255, (3, H, W), dtype=np.uint8)
LABELS = RNG.integers(0, 3, (H // 4, W // 4)).repeat(4, 0).repeat(4, 1).astype(np.uint8)
HOLE = np.zeros((H, W), np.bool_)
HOLE[:21] = HOLE[40:47, 33:] = True
ALPHA = np.where(HOLE, 0, 200).astype(np.uint8)
AUX = '<PAMRasterBand band="{}"><NoDataValue>{}</NoDataValue></PAMRasterBand>'


def tif(path, bands, colours=None, **options):
    write_scene(path, np.stack(bands), **options)
    if colours:
        with rasterio.open(path, "r+") as raster:
            raster.colorinterp = [ColorInterp[name] for name in colours]
    return path


def alpha_beside_nodata(path):
    return tif(path.with_suffix(".tif"), [*RGB, ALPHA], ["red", "green", "blue", "alpha"], nodata=0)


def alpha_of_five(path):
    return tif(path.with_suffix(".tif"), [*RGB, RGB[1], ALPHA], ["red", "green", "blue", "undefined", "alpha"])


def float_alpha(path):
    bands = np.float32([*RGB, ALPHA / 200])
    bands[:3, HOLE] = np.nan  # hidden, so neither nodata nor an error
    return tif(path.with_suffix(".tif"), bands, ["red", "green", "blue", "alpha"])


def mask_in_the_file(path):
    return tif(path.with_suffix(".tif"), RGB, mask=~HOLE)


def mask_beside_the_file(path):
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False):
        found = tif(path.with_suffix(".tif"), RGB)
        with rasterio.open(found, "r+") as raster:
            raster.write_mask(~HOLE)
    assert found.with_name(found.name + ".msk").exists()
    return found


def nodata_of_integers(path):
    bands = np.where(HOLE, 0, RGB.astype(np.uint16))
    bands[0, ~HOLE] *= LABELS[~HOLE] != 1  # nodata in one band only: a pixel with data
    return tif(path.with_suffix(".tif"), bands, nodata=0)


def nodata_that_is_nan(path):
    return tif(path.with_suffix(".tif"), np.where(HOLE, np.nan, np.float32(RGB)), nodata=np.nan)


def nodata_beside_the_file(path):
    bands = np.where(HOLE, np.int16([-9999, -1, -2])[:, None, None], RGB)
    found = tif(path.with_suffix(".tif"), bands)
    declared = "".join(AUX.format(band, value) for band, value in ((1, -9999), (2, -1), (3, -2)))
    found.with_name(found.name + ".aux.xml").write_text(f"<PAMDataset>{declared}</PAMDataset>")
    return found


def rgba_png(path):
    Image.fromarray(np.dstack([*RGB, ALPHA])).save(path.with_suffix(".png"))
    return path.with_suffix(".png")


KINDS = [
    alpha_beside_nodata, alpha_of_five, float_alpha, mask_in_the_file, mask_beside_the_file, nodata_of_integers,
    nodata_that_is_nan, nodata_beside_the_file, rgba_png,
]  # fmt: skip


@pytest.fixture
def root(tmp_path):
    """A root with one tile, `T/images/a`, that has no data in `HOLE`; returns a function of the way in which it says so."""

    def make(write, name="T"):
        for folder in ("images", "masks"):
            (tmp_path / name / folder).mkdir(parents=True)
        Image.fromarray(LABELS).save(tmp_path / name / "masks/a.png")
        return write(tmp_path / name / "images/a"), tmp_path / name

    return make


def make_config(root, stretch=None, **train):
    return parse_config(
        {
            "name": "test",
            "classes": {"names": ["a", "b", "c"], "ignore_index": IGNORE},
            "data": {"train": [str(root)], **({"stretch": stretch} if stretch else {})},
            "teacher": {"architecture": "unet", "encoder": "resnet18", "checkpoint": "x.pth", "classes": ["a", "b"]},
            "class_map": {"a": {"a": 1}, "b": {"b": 1}},
            "cache": {"path": "x.zarr", "views": 8},
            "distill": {"teacher_view": "crop"},
            "student": {"architecture": "unet", "encoder": "resnet18"},
            "train": {"crop": 64, "photometric": 0, "mosaic": 0, "max_class_share": 1, **train},
        },
        origin="test",
    )


def stretch_of(path):
    return None if read_raster(path).dtype == np.uint8 else [(0.0, 255.0)] * 3


@pytest.mark.parametrize("write", KINDS)
def test_pixels_without_data_are_those_of_numpy_in_tiles_strips_and_scenes(root, write):
    path, _ = root(write)
    stretch = stretch_of(path)
    image, data = read_image_with_data(path, stretch=stretch)
    np.testing.assert_array_equal(data, ~HOLE)
    np.testing.assert_array_equal(read_data(path), ~HOLE)
    np.testing.assert_array_equal(image[~HOLE], read_raster(path)[:3].transpose(1, 2, 0)[~HOLE])
    for opened in (open_rows(path, stretch=stretch), open_scene(str(path), (1, 2, 3), stretch)):
        with opened as rows:
            parts = [rows.read_with_data(top, min(top + 25, H)) for top in range(0, H, 25)]
        np.testing.assert_array_equal(np.concatenate([part[0] for part in parts]), image)
        np.testing.assert_array_equal(np.concatenate([part[1] for part in parts]), ~HOLE)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_what_transparent_pixels_store_reaches_the_teacher_as_if_there_were_no_alpha(root, dtype):
    """So a cache that was computed before they were left out is still what the teacher says."""
    stretch = None if dtype == "uint8" else [(3, 240)] * 3
    images = []
    for name, bands, colours in (("a", [*RGB], None), ("b", [*RGB, ALPHA], ["red", "green", "blue", "alpha"])):
        path, _ = root(
            lambda path, b=bands, c=colours: tif(path.with_suffix(".tif"), np.array(b).astype(dtype), c), name
        )
        images.append(read_image(path, stretch=stretch))
    np.testing.assert_array_equal(*images)


def test_an_image_whose_pixels_all_hold_data_has_no_array_for_it(root):
    for name, write in {
        "plain": lambda path: tif(path.with_suffix(".tif"), RGB),
        "unused nodata": lambda path: tif(path.with_suffix(".tif"), RGB, nodata=255),
        "opaque": lambda path: tif(path.with_suffix(".tif"), [*RGB, ALPHA | 1], ["red", "green", "blue", "alpha"]),
    }.items():
        path, _ = root(write, name)
        assert read_image_with_data(path)[1] is None
        assert read_data(path) is None


@pytest.mark.parametrize("write", [alpha_of_five, nodata_beside_the_file])
def test_percentiles_are_of_pixels_with_data(root, write):
    _, folder = root(write)
    config = make_config(folder, {"percentiles": [2, 98]})
    found = resolve_stretch(config.data, list_tiles(config.data, "train"))
    np.testing.assert_allclose(found, [np.percentile(band[~HOLE], [2, 98]) for band in RGB])


class Uniform:
    """Soft targets by column, so that they tell where they come from."""

    @staticmethod
    def whole():
        first = np.broadcast_to(np.linspace(0.1, 0.9, W, dtype=np.float32), (H, W))
        return np.stack([first, (1 - first) / 2, (1 - first) / 2])

    def read(self, tile_id, window):
        y, x, h, w = window
        return self.whole()[:, y : y + h, x : x + w]

    def entropy_error(self, tile_id, window):
        return 0.25


def turned(array, plan):
    """The array flipped and turned as the plan says, in NumPy."""
    array = array[..., ::-1] if plan.flip_h else array
    array = array[..., ::-1, :] if plan.flip_v else array
    return np.rot90(array, plan.rot90, axes=(-2, -1))


@pytest.mark.parametrize("write", [alpha_beside_nodata, nodata_of_integers, rgba_png])
def test_a_sample_has_neither_label_nor_target_where_there_is_no_data(root, write):
    path, folder = root(write)
    config = make_config(folder, scales=[1.0])
    tiles = list_tiles(config.data, "train")
    dataset = TrainTiles(tiles, config, stretch_of(path), targets=Uniform())
    oriented = set()
    for k in range(12):
        plan, sample = dataset.plan(k), dataset[k]
        (view,) = plan.views
        inside = np.zeros((64, 64), np.bool_)
        inside[: H - view.top] = ~HOLE[view.top :, view.left : view.left + 64]
        mask, target = np.full((64, 64), IGNORE), np.zeros((3, 64, 64), np.float32)
        mask[:H] = LABELS[:, view.left : view.left + 64]
        target[:, :H] = Uniform.whole()[..., view.left : view.left + 64]
        np.testing.assert_array_equal(sample["inside"], turned(inside, plan))
        np.testing.assert_array_equal(sample["mask"], turned(np.where(inside, mask, IGNORE), plan))
        np.testing.assert_allclose(sample["target"], turned(target * inside, plan), atol=1e-6)
        assert sample["entropy_error"] == np.float32(0.25)
        oriented.add((plan.flip_h, plan.flip_v, plan.rot90))
    assert len(oriented) > 4


def test_what_lies_under_transparent_pixels_changes_no_label_target_or_pixel_beside_them(root):
    """All scales and mosaics; what is hidden differs, and so do its labels."""
    samples = {}
    for name, value in (("T", 255), ("U", 0)):

        def write(path, value=value):
            return tif(
                path.with_suffix(".tif"), [*np.where(HOLE, value, RGB), ALPHA], ["red", "green", "blue", "alpha"]
            )

        _, folder = root(write, name)
        Image.fromarray(np.where(HOLE, np.uint8(value % 254), LABELS)).save(folder / "masks/a.png")
        config = make_config(folder, mosaic=0.5, max_class_share=0.75)
        dataset = TrainTiles(list_tiles(config.data, "train"), config, targets=Uniform())
        samples[name] = [dataset[k] for k in range(20)]
    missing = 0
    for one, other in zip(samples["T"], samples["U"], strict=True):
        for key in ("inside", "mask", "target", "entropy_error"):
            np.testing.assert_array_equal(one[key], other[key], err_msg=key)
        inside = one["inside"]
        np.testing.assert_array_equal(one["image"][:, inside], other["image"][:, inside])
        missing += int((~inside).sum())
    assert missing > 0


def test_an_opaque_alpha_band_changes_no_bit_of_samples_and_recorded_views(root):
    """A tile that declares alpha and hides nothing gives what a tile without alpha gives, digests of views included."""
    _, plain = root(lambda path: tif(path.with_suffix(".tif"), RGB), "plain/T")
    _, opaque = root(
        lambda path: tif(path.with_suffix(".tif"), [*RGB, ALPHA | 1], ["red", "green", "blue", "alpha"]), "opaque/T"
    )
    found = []
    for folder in (plain, opaque):
        config = make_config(folder, mosaic=0.5, max_class_share=0.75, photometric=1)
        tiles = list_tiles(config.data, "train")
        dataset, views = TrainTiles(tiles, config, targets=Uniform()), RecordedViews(tiles, config)
        found.append([*(dataset[k] for k in range(6)), *({"pixels": view.pixels()} for view in views.all_views())])
    for one, other in zip(*found, strict=True):
        for key in one:
            np.testing.assert_array_equal(one[key], other[key], err_msg=key)


def test_a_tile_without_any_data_gives_samples_that_count_for_nothing(root):
    _, folder = root(lambda path: tif(path.with_suffix(".tif"), [*RGB, ALPHA * 0], ["red", "green", "blue", "alpha"]))
    config = make_config(folder, max_class_share=0.75)
    sample = TrainTiles(list_tiles(config.data, "train"), config, targets=Uniform())[0]
    assert not sample["inside"].any()
    assert (sample["mask"] == IGNORE).all()
    assert sample["entropy_error"] == 0
    assert mean_over_pixels(np.ones((1, 1)), sample["inside"]) == 0  # what a cache of recorded views says


def test_crops_show_more_than_one_class_where_there_is_data(root):
    """Below its hole the tile holds one class, and the labels in the hole do not make a crop varied."""

    def write(path):
        hole = np.zeros((H, W), np.bool_)
        hole[:, :30] = True
        return tif(
            path.with_suffix(".tif"), [*RGB, np.where(hole, 0, 255).astype(np.uint8)], ["red", "green", "blue", "alpha"]
        )

    _, folder = root(write)
    labels = np.ones((H, W), np.uint8)
    labels[:, :30] = 2
    labels[:, 56:] = 0
    Image.fromarray(labels).save(folder / "masks/a.png")
    config = make_config(folder, max_class_share=0.9, crop=32, scales=[1.0])
    dataset = TrainTiles(list_tiles(config.data, "train"), config)
    lefts = [dataset.plan(k).views[0].left for k in range(30)]
    assert min(lefts) + 32 > 56  # by all labels, crops from column 12 on would hold two classes


@pytest.mark.parametrize("write", KINDS)
def test_validation_labels_are_ignored_where_there_is_no_data(root, write):
    path, folder = root(write)
    config = make_config(folder)
    sample = ValTiles(list_tiles(config.data, "train"), config, stretch_of(path))[0]
    np.testing.assert_array_equal(sample["mask"], np.where(HOLE, IGNORE, LABELS))
    np.testing.assert_array_equal(sample["image"], read_image(path, stretch=stretch_of(path)).transpose(2, 0, 1))


def test_both_losses_are_those_of_the_pixels_with_data_alone(root):
    """The loss and its gradient, against torch's own on the pixels with data, one by one."""
    from kdpipe.pipeline.losses import distillation_loss
    from kdpipe.pipeline.training.loaders import collate_packed, unpacked

    _, folder = root(alpha_of_five)
    config = make_config(folder)
    dataset = TrainTiles(list_tiles(config.data, "train"), config, targets=Uniform())
    batch = collate_packed([dataset[k] for k in (0, 1)])
    logits = torch.randn(2, 3, 64, 64, generator=torch.manual_seed(0), requires_grad=True)
    target = unpacked(batch["target"], batch["inside"])
    found = distillation_loss(
        logits, batch["mask"], batch["inside"], target, None, alpha=0.7, temperature=2.0, ignore_index=IGNORE
    )
    found.total.backward()

    inside, known = batch["inside"], batch["mask"] != IGNORE
    assert 0.1 < inside.float().mean() < 0.9
    assert torch.equal(known, inside)  # every pixel with data is labelled here
    pixels = logits.detach().permute(0, 2, 3, 1)[inside].requires_grad_()
    labels = batch["mask"][known]
    soft = torch.nn.functional.kl_div(
        (pixels / 2).log_softmax(1), target.permute(0, 2, 3, 1)[inside], reduction="batchmean"
    )
    smooth = torch.nn.functional.cross_entropy(pixels, labels, label_smoothing=0.05)
    probs, onehot = pixels.softmax(1), torch.nn.functional.one_hot(labels, 3)
    dice = 1 - ((probs * onehot).sum(0) + 0.05) / ((probs.sum(0) + onehot.sum(0)) / 2 + 0.05)
    expected = 0.3 * (smooth + dice.mean()) + 0.7 * 4 * soft
    expected.backward()
    torch.testing.assert_close(found.total, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits.grad.permute(0, 2, 3, 1)[inside], pixels.grad, rtol=1e-4, atol=1e-8)
    assert not logits.grad.permute(0, 2, 3, 1)[~inside].any()


def test_labels_of_stage_one_s_subjects_are_ignored_where_there_is_no_data(root):
    from kdpipe.pipeline.precompute.subjects import WholeTile

    path, folder = root(nodata_that_is_nan)
    config = make_config(folder)
    (tile,) = list_tiles(config.data, "train")
    np.testing.assert_array_equal(WholeTile(tile, config, stretch_of(path)).labels(), np.where(HOLE, IGNORE, LABELS))


def test_scores_count_pixels_with_data_alone(root):
    """The confusion matrix of `evaluate`, for a model whose class is the pixel's red, modulo three."""
    from kdpipe.pipeline.evaluation.evaluate import Model, evaluate

    path, folder = root(alpha_beside_nodata)
    config = make_config(folder)

    def predict(image_HWC):
        return np.eye(3, dtype=np.float32)[image_HWC[..., 0] % 3].transpose(2, 0, 1)

    found = evaluate(Model("stub", [], predict, config, None, []), [str(folder)]).together.confusion_LP
    predicted, labels = read_raster(path)[0][~HOLE] % 3, LABELS[~HOLE]
    np.testing.assert_array_equal(
        found, [[(labels == i) @ (predicted == j).astype(int) for j in range(3)] for i in range(3)]
    )


def test_init_counts_pixels_without_data(root, tmp_path):
    from kdpipe.data.survey import list_root, survey_root

    for write in (alpha_of_five, mask_beside_the_file):
        _, folder = root(write, write.__name__)
        found = list_root(str(folder))
        survey_root(found)
        assert (found.pixels, found.pixels_without_data) == (H * W, HOLE.sum())
    Image.fromarray(np.ascontiguousarray(RGB.transpose(1, 2, 0))).save(folder / "images/b.png")
    Image.fromarray(LABELS).save(folder / "masks/b.png")
    done = run_command("init", folder, "--out", tmp_path / "mine.yaml", "--json", tmp_path / "a.json")
    share = 100 * HOLE.sum() / (2 * H * W)
    said = " ".join(done.stdout.split())
    assert (
        f"Note: {share:.1f} % of the pixels of 2 images hold no data by their alpha, masks or nodata: no loss" in said
    )
    (found,) = json.loads((tmp_path / "a.json").read_text())["roots"]
    assert (found["pixels"], found["pixels_without_data"]) == (2 * H * W, HOLE.sum())
