"""Samples equal a slow assembly of their plan, are aligned, and do not depend on the worker that makes them."""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdpipe.configs import parse_config
from kdpipe.configs.errors import DataError
from kdpipe.data import dataset as dataset_module
from kdpipe.data.dataset import TrainTiles, ValTiles, batches_of_equal_size, epoch_order
from kdpipe.data.geometry import Resampler, scaled_size
from kdpipe.data.rasters import image_size, read_image, read_mask
from kdpipe.data.stretch import resolve_stretch
from kdpipe.data.tiles import Tile, list_tiles

DUBAI = Path(__file__).parents[3] / "shared/data/dubai"
NAMES = ["Background", "Forest", "Grassland", "Cropland", "Settlement", "SemiNatural"]
IGNORE = 255
SIZES = [(61, 83), (83, 61), (61, 83), (150, 47), (29, 31)]


def make_config(train_roots, **sections):
    raw = {
        "name": "test",
        "classes": {"names": NAMES, "ignore_index": IGNORE},
        "data": {"train": train_roots, **sections.pop("data", {})},
        "teacher": {"architecture": "unet", "encoder": "resnet18", "checkpoint": "x.pth", "classes": ["a", "b"]},
        "class_map": {"a": {"Forest": 1}, "b": {"Cropland": 1}},
        "cache": {"path": "x.zarr"},
        "student": {"architecture": "unet", "encoder": "resnet18"},
        **sections,
    }
    return parse_config(raw, origin="test")


class OneHotMasks:
    """The tiles' labels as soft targets of 7 channels, the seventh for ignored pixels; records the windows read."""

    def __init__(self, tiles):
        self.tiles = {tile.id: tile for tile in tiles}
        self.windows = []

    def read(self, tile_id, window):
        y, x, h, w = window
        self.windows.append((tile_id, window))
        labels = read_mask(self.tiles[tile_id].mask, 6, IGNORE)[y : y + h, x : x + w]
        return np.eye(7, dtype=np.float32)[np.where(labels == IGNORE, 6, labels)].transpose(2, 0, 1)

    def entropy_error(self, tile_id, window):
        assert (tile_id, window) == self.windows[-1]
        return 0.01 * window[2] + (1 + list(self.tiles).index(tile_id))


def blocky_labels(rng, height, width):
    blocks = rng.choice([0, 1, 3, 4, 5, IGNORE], size=(height // 8 + 1, width // 8 + 1)).astype(np.uint8)
    return np.kron(blocks, np.ones((8, 8), np.uint8))[:height, :width]


@pytest.fixture
def root(tmp_path):
    """Tiles whose red channel encodes the label: 40 * label, 240 where ignored."""
    rng = np.random.default_rng(7)
    for folder in ("images", "masks"):
        (tmp_path / "T" / folder).mkdir(parents=True)
    for i, size in enumerate(SIZES):
        labels = blocky_labels(rng, *size)
        image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        image[..., 0] = np.where(labels == IGNORE, 240, labels * 40)
        Image.fromarray(image).save(tmp_path / f"T/images/{i}.png")
        Image.fromarray(labels).save(tmp_path / f"T/masks/{i}.png")
    return tmp_path / "T"


def make_dataset(root, with_targets=True, sizes=None, **train):
    config = make_config([str(root)], train={"crop": 48, "photometric": 0, **train})
    tiles = list_tiles(config.data, "train")
    return TrainTiles(tiles, config, targets=OneHotMasks(tiles) if with_targets else None, sizes=sizes)


def resized(array_CHW, height, width):
    tensor = torch.from_numpy(array_CHW.astype(np.float64))[None]
    return torch.nn.functional.interpolate(tensor, size=(height, width), mode="bilinear", align_corners=False)[
        0
    ].numpy()


def slow_sample(dataset, plan):
    """The plan applied to whole tiles resized by torch; the image is not rounded, and NaN in padding."""
    image, target = np.full((3, plan.crop, plan.crop), np.nan), np.zeros((7, plan.crop, plan.crop))
    mask = np.full((plan.crop, plan.crop), IGNORE)
    inside = np.zeros((plan.crop, plan.crop), bool)
    for view in plan.views:
        tile = dataset.tiles[view.tile]
        pixels, labels = read_image(tile.image), read_mask(tile.mask, 6, IGNORE)
        height, width = scaled_size(*labels.shape, view.scale)
        onehot = np.eye(7)[np.where(labels == IGNORE, 6, labels)].transpose(2, 0, 1)
        whole = {
            "image": resized(pixels.transpose(2, 0, 1), height, width),
            "target": resized(onehot, height, width),
            "mask": torch.nn.functional.interpolate(
                torch.from_numpy(labels)[None, None].double(), size=(height, width), mode="nearest-exact"
            )[0, 0].numpy(),
        }
        h, w = min(view.height, height - view.top), min(view.width, width - view.left)
        to = (..., slice(view.out_top, view.out_top + h), slice(view.out_left, view.out_left + w))
        source = (..., slice(view.top, view.top + h), slice(view.left, view.left + w))
        image[to], target[to], mask[to], inside[to] = (
            whole["image"][source],
            whole["target"][source],
            whole["mask"][source],
            True,
        )
    arrays = [image, target, mask, inside]
    if plan.flip_h:
        arrays = [array[..., ::-1] for array in arrays]
    if plan.flip_v:
        arrays = [array[..., ::-1, :] for array in arrays]
    return [np.rot90(array, plan.rot90, axes=(-2, -1)) for array in arrays]


@pytest.mark.parametrize("mosaic", [0, 1])
def test_a_sample_equals_its_plan_applied_to_whole_tiles(root, mosaic):
    dataset = make_dataset(root, mosaic=mosaic)
    padded = 0
    for k in range(30):
        sample = dataset[k]
        image, target, mask, inside = slow_sample(dataset, dataset.plan(k))
        assert {key: (value.dtype, value.shape) for key, value in sample.items()} == {
            "image": (np.uint8, (3, 48, 48)),
            "mask": (np.int64, (48, 48)),
            "inside": (np.bool_, (48, 48)),
            "target": (np.float32, (7, 48, 48)),
            "entropy_error": (np.float32, ()),
        }
        np.testing.assert_array_equal(sample["inside"], inside)
        np.testing.assert_array_equal(sample["mask"], mask)
        np.testing.assert_allclose(sample["target"], target, atol=1e-6)
        assert np.abs(sample["image"] - image)[:, inside].max() <= 0.5 + 1e-3  # rounded, near a tie by float32
        assert (sample["mask"][~inside] == IGNORE).all()
        assert (sample["target"][:, ~inside] == 0).all()
        np.testing.assert_allclose(sample["target"].sum(axis=0), inside, atol=1e-6)
        padded += not inside.all()
    assert 3 < padded < 28  # both kinds were seen


def test_image_mask_and_target_stay_aligned(root):
    """Where the target is certain, no border between labels is near, and the colour must encode the label's."""
    dataset = make_dataset(root, mosaic=0.5)
    for k in range(40):
        sample = dataset[k]
        certain = sample["target"].max(axis=0) == 1
        label = sample["target"].argmax(axis=0)
        assert certain.mean() > 0.05
        np.testing.assert_array_equal(sample["mask"][certain], np.where(label == 6, IGNORE, label)[certain])
        np.testing.assert_array_equal(sample["image"][0][certain], (label * 40)[certain])


def test_targets_are_read_by_window_only(root):
    dataset = make_dataset(root, mosaic=0, scales=[1.0], crop=32, max_class_share=1)
    for k in range(10):
        plan = dataset.plan(k)
        dataset.targets.windows.clear()
        dataset[k]
        (view,) = plan.views
        height, width = SIZES[view.tile]
        window = (view.top, view.left, min(32, height), min(32, width))
        assert dataset.targets.windows == [(f"T/{view.tile}", window)]


def test_a_sample_number_determines_epoch_and_tile(root):
    dataset = make_dataset(root, with_targets=False, crops_per_tile=3, mosaic=0)
    assert len(dataset) == 15
    assert [dataset.plan(k).views[0].tile for k in range(30)] == [0, 1, 2, 3, 4] * 6
    assert len({dataset.plan(k) for k in range(30)}) == 30
    assert "target" not in dataset[0]
    with pytest.raises(IndexError, match="counted from 0 over all epochs, found -1"):
        dataset[-1]


def test_plan_depends_on_seed_epoch_and_index_only(root):
    dataset = make_dataset(root, mosaic=0.5)
    plans = [dataset.plan(k) for k in range(12)]
    again = make_dataset(root, mosaic=0.5, sizes=SIZES)
    for k in reversed(range(12)):
        again[k]
        assert again.plan(k) == plans[k]
    other = TrainTiles(dataset.tiles, dataset._config.model_copy(update={"seed": 43}))
    assert all(other.plan(k) != plans[k] for k in range(12))


def assert_equal_samples(one, other):
    assert one.keys() == other.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], other[key], err_msg=key)


def test_plan_replays_the_sample_with_its_colours(root):
    dataset = make_dataset(root, photometric=1, mosaic=0.5)
    for k in range(4):
        plan = dataset.plan(k)
        assert plan.photometric_seed is not None
        sample = dataset[k]
        assert_equal_samples(sample, pickle.loads(pickle.dumps(dataset)).render(plan))
        plain = make_dataset(root, photometric=0, mosaic=0.5)[k]
        assert (sample["image"] != plain["image"]).any()
        assert_equal_samples({**sample, "image": 0}, {**plain, "image": 0})  # colours change, and nothing else


@pytest.mark.long
def test_samples_are_the_same_from_no_worker_and_from_two(root):
    dataset = make_dataset(root, mosaic=0.5)
    order = [3, 9, 1, 7, 5, 0]

    def batches(**options):
        return list(torch.utils.data.DataLoader(dataset, batch_size=2, sampler=order, **options))

    alone = batches(num_workers=0)
    spawned = batches(num_workers=2, multiprocessing_context="spawn")
    assert len(alone) == len(spawned) == 3
    for one, other in zip(alone, spawned, strict=True):
        assert one.keys() == other.keys() == {"image", "mask", "inside", "target", "entropy_error"}
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert alone[0]["image"].dtype == torch.uint8
    assert alone[0]["mask"].dtype == torch.int64
    assert alone[0]["inside"].dtype == torch.bool


def test_tile_without_mask_has_ignored_labels_and_its_target(root):
    tiles = [Tile("T/0", root / "images/0.png", None)]

    class Uniform:
        def read(self, tile_id, window):
            return np.full((6, *window[2:]), 1 / 6, np.float32)

        def entropy_error(self, tile_id, window):
            return 0.0

    config = make_config([str(root)], train={"crop": 48, "photometric": 0, "mosaic": 0.5})
    dataset = TrainTiles(tiles, config, targets=Uniform())
    for k in range(6):
        sample = dataset[k]
        assert (sample["mask"] == IGNORE).all()
        np.testing.assert_allclose(sample["target"].sum(axis=0), sample["inside"], atol=1e-6)


def test_entropy_error_is_the_mean_of_the_windows_over_the_pixels_inside(root):
    dataset = make_dataset(root, mosaic=1)
    for k in range(4):
        total = pixels = 0
        for view in dataset.plan(k).views:
            tile = dataset.tiles[view.tile]
            resampler = Resampler(view, *image_size(tile.image))
            dataset.targets.read(tile.id, resampler.window)
            inside = int(resampler.inside().sum())
            total += inside * dataset.targets.entropy_error(tile.id, resampler.window)
            pixels += inside
        assert dataset[k]["entropy_error"] == pytest.approx(total / pixels, rel=1e-6)


def test_image_and_mask_of_different_size_are_refused(root):
    Image.fromarray(np.zeros((61, 82), np.uint8)).save(root / "masks/0.png")
    dataset = make_dataset(root, with_targets=False, mosaic=0)
    message = r"the mask /.*masks/0\.png is 61 x 82 px, but its image /.*images/0\.png is 61 x 83"
    with pytest.raises(DataError, match=message):
        dataset[0]
    with pytest.raises(DataError, match=message):
        ValTiles(dataset.tiles, dataset._config)[0]


def test_image_changed_since_it_was_listed_is_refused(root):
    dataset = make_dataset(root, with_targets=False, mosaic=0, max_class_share=1, sizes=[(60, 83), *SIZES[1:]])
    with pytest.raises(
        DataError, match=r"0\.png is 61 x 83 px, but its header said 60 x 83 earlier in this run: the file has changed"
    ):
        dataset[0]


def test_no_tile_is_an_error(root):
    with pytest.raises(DataError, match="there is no tile to train on"):
        TrainTiles([], make_config([str(root)]))


def test_validation_tiles_are_whole_and_unaltered(root):
    config = make_config([str(root)])
    tiles = list_tiles(config.data, "train")
    dataset = ValTiles([*tiles, Tile("T/x", tiles[1].image, None)], config)
    assert len(dataset) == 6
    assert dataset.sizes() == [*SIZES, SIZES[1]]
    for i, tile in enumerate(tiles):
        sample = dataset[i]
        assert sample["tile"] == i
        np.testing.assert_array_equal(sample["image"], np.asarray(Image.open(tile.image)).transpose(2, 0, 1))
        np.testing.assert_array_equal(sample["mask"], np.asarray(Image.open(tile.mask)))
        assert sample["mask"].dtype == np.int64
    assert (dataset[5]["mask"] == IGNORE).all()
    assert dataset[5]["mask"].shape == SIZES[1]


def test_stretch_and_bands_reach_the_samples(root):
    config = make_config([str(root)], data={"bands": (3, 3, 1), "stretch": {"range": [0, 510]}})
    dataset = ValTiles(list_tiles(config.data, "train"), config, resolve_stretch(config.data, []))
    pixels = np.asarray(Image.open(root / "images/3.png"))[..., [2, 2, 0]].transpose(2, 0, 1)
    np.testing.assert_array_equal(dataset[3]["image"], np.rint(pixels / 2))
    train = TrainTiles(dataset.tiles, config, resolve_stretch(config.data, []))
    assert train[0]["image"].max() <= 128


def test_epoch_order_is_a_different_permutation_for_each_seed_and_epoch():
    orders = {(seed, epoch): tuple(epoch_order(50, seed, epoch).tolist()) for seed in range(3) for epoch in range(4)}
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len(set(orders.values())) == 12
    assert orders[1, 2] == tuple(epoch_order(50, 1, 2).tolist())
    assert orders[1, 2] != tuple(np.random.default_rng([1, 2, 0]).permutation(50).tolist())


def test_batches_hold_tiles_of_one_size_and_each_tile_once():
    sizes = [(4, 5), (5, 4), (4, 5), (4, 5), (5, 4), (6, 6), (4, 5)]
    assert batches_of_equal_size(sizes, 2) == [[0, 2], [1, 4], [3, 6], [5]]
    assert batches_of_equal_size(sizes, 1) == [[i] for i in range(7)]
    assert batches_of_equal_size(sizes, 99) == [[0, 2, 3, 6], [1, 4], [5]]
    assert batches_of_equal_size([], 4) == []


@pytest.mark.long
def test_the_layer_imports_neither_torch_nor_albumentations():
    code = (
        "import sys, kdpipe.data.dataset, kdpipe.data.stretch; "
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'albumentations', 'cv2', 'zarr', 'click', 'rasterio'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(not DUBAI.is_dir(), reason=f"the real tiles are not at {DUBAI}")
def test_real_tiles_give_samples_that_obey_the_recipe():
    config = make_config(
        [str(DUBAI / "Train")], data={"unlabelled": [str(DUBAI / "Unlabelled")]}, train={"photometric": 0}
    )
    tiles = list_tiles(config.data, "train")
    assert len(tiles) == 45
    dataset = TrainTiles(tiles, config)
    labelled, varied = 0, 0
    for k in (0, 13, 27, 35, 40, 44):
        sample = dataset[k]
        assert sample["image"].shape == (3, 512, 512)
        assert set(np.unique(sample["mask"])) <= {0, 1, 4, 5, IGNORE}
        counts = np.bincount(sample["mask"][sample["mask"] != IGNORE], minlength=6)
        labelled += counts.sum() > 0
        varied += counts.sum() > 0 and counts.max() <= 0.75 * counts.sum()
    assert labelled >= 4
    assert varied >= labelled - 2


def test_tiles_without_mask_have_their_own_number_of_crops(root):
    labelled = make_dataset(root, with_targets=False, crops_per_tile=3, unlabelled_crops_per_tile=1, mosaic=0)
    assert len(labelled) == 15
    tiles = [Tile(tile.id, tile.image, tile.mask if number < 2 else None) for number, tile in enumerate(labelled.tiles)]
    config = make_config(
        [str(root)], train={"crops_per_tile": 3, "unlabelled_crops_per_tile": 1, "mosaic": 0, "crop": 32}
    )
    mixed = TrainTiles(tiles, config)
    assert [mixed.plan(k).views[0].tile for k in range(2 * len(mixed))] == [0, 1, 2, 3, 4, 0, 1, 0, 1] * 2


def test_a_tile_is_decoded_once_for_all_samples(root, monkeypatch):
    decoded = []
    for name in ("read_image_with_data", "read_mask"):
        original = getattr(dataset_module, name)

        def counted(path, *args, original=original):
            decoded.append(path)
            return original(path, *args)

        monkeypatch.setattr(dataset_module, name, counted)
    dataset = make_dataset(root, with_targets=False, mosaic=0.5)
    for k in range(3 * len(dataset)):
        dataset[k]
    assert sorted(decoded) == sorted(path for tile in dataset.tiles for path in (tile.image, tile.mask))
