"""`train.cutmix` and `train.colour_shift`: what they show, by hand, and that nothing changes without them."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from kdpipe.configs.errors import ConfigError
from kdpipe.data.augment import shift_colours, views_per_sample
from kdpipe.data.dataset import TrainTiles
from kdpipe.data.geometry import Plan
from kdpipe.data.tiles import Tile, list_tiles

IGNORE = 255


class Stored:
    """A soft target that differs by tile, with an entropy that differs by tile, and none in the first columns of tile `gap`."""

    def __init__(self, tiles, gap=None):
        self.numbers = {tile.id: number for number, tile in enumerate(tiles)}
        self.gap = gap

    def read(self, tile_id, window):
        _, left, height, width = window
        first = 0.1 + 0.8 * np.broadcast_to((left + np.arange(width)) / 200, (height, width))
        probs = np.stack([first, 1 - first, *[np.zeros((height, width))] * 4]).astype(np.float32)
        probs = np.roll(probs, self.numbers[tile_id], axis=0)
        if self.gap == self.numbers[tile_id]:
            probs[:, :, : max(0, 40 - left)] = 0
        return probs

    def entropy_error(self, tile_id, window):
        return 1.0 + self.numbers[tile_id]


@pytest.fixture
def tiles(make_config, landscape):
    return list_tiles(make_config(data__unlabelled=[str(landscape / "Unlabelled")]).data, "train")


def dataset(make_config, tiles, gap=None, **train):
    settings = {"crop": 64, "photometric": 0, "mosaic": 0.0, "max_class_share": 1.0, "cutmix": 1.0, **train}
    config = make_config(**{f"train__{key}": value for key, value in settings.items()})
    return TrainTiles(tiles, config, targets=Stored(tiles, gap))


def unturned(plan):
    return replace(plan, flip_h=False, flip_v=False, rot90=0, shift_seed=None)


@pytest.mark.parametrize("gap", [None, 0, 3])
def test_the_box_shows_another_view_and_the_rest_the_crop(make_config, tiles, gap):
    samples = dataset(make_config, tiles, gap)
    shares, labelled = [], set()
    for k in range(24):
        plan = unturned(samples.plan(k))
        below, box = plan.views
        assert box.height == box.width <= plan.crop
        shares.append(box.height * box.width / plan.crop**2)
        alone = samples.render(replace(plan, views=(below,)))
        # The box on its own: the same view in the corner of an otherwise empty crop.
        other = samples.render(Plan(crop=plan.crop, views=(box,)))
        inside = np.zeros((plan.crop, plan.crop), bool)
        inside[box.out_top : box.out_top + box.height, box.out_left : box.out_left + box.width] = True
        found = samples.render(plan)
        for key in ("image", "mask", "inside", "target"):
            np.testing.assert_array_equal(found[key], np.where(inside, other[key], alone[key]), err_msg=f"{k} {key}")
        taught = found["inside"]
        errors = np.where(
            inside, samples.targets.numbers[tiles[box.tile].id], samples.targets.numbers[tiles[below.tile].id]
        )
        assert found["entropy_error"] == pytest.approx((1 + errors[taught]).mean() if taught.any() else 0, rel=1e-6)
        labelled.add((tiles[below.tile].mask is not None, tiles[box.tile].mask is not None))
    assert 0.08 < min(shares) < 0.2
    assert 0.4 < max(shares) < 0.52
    assert labelled == {(a, b) for a in (True, False) for b in (True, False)}


def test_without_the_keys_the_plans_are_those_of_before(make_config, tiles):
    plain = dataset(make_config, tiles, mosaic=0.5, cutmix=0.0)
    mixed = dataset(make_config, tiles, mosaic=0.5, cutmix=0.5, colour_shift=0.5)
    plans = [(plain.plan(k), mixed.plan(k)) for k in range(40)]
    for one, other in plans:
        assert one.shift_seed is None
        assert len(one.views) in (1, 4)
        assert one == replace(other, views=other.views[: len(one.views)], shift_seed=None)
    boxes = sum(len(other.views) > len(one.views) for one, other in plans)
    shifts = sum(other.shift_seed is not None for _, other in plans)
    assert 10 < boxes < 30
    assert 10 < shifts < 30
    assert views_per_sample(make_config(train__mosaic=0.5, train__cutmix=0.25).train) == 2.75


def test_a_shift_of_unlabelled_tiles_alone_leaves_the_labelled_ones(make_config, tiles):
    samples = dataset(make_config, tiles, cutmix=0.0, colour_shift=0.0, unlabelled_colour_shift=1.0)
    for k in range(len(samples)):
        plan = samples.plan(k)
        assert (plan.shift_seed is not None) is (tiles[plan.views[0].tile].mask is None)
    assert all(
        dataset(make_config, tiles, cutmix=0.0, colour_shift=1.0).plan(k).shift_seed is not None for k in range(9)
    )


def test_a_shift_is_of_gamma_mean_and_deviation_and_touches_no_label(make_config, tiles):
    samples = dataset(make_config, tiles, cutmix=0.0, colour_shift=1.0)
    plan = samples.plan(0)
    shifted, plain = samples[0], samples.render(replace(plan, shift_seed=None))
    assert (shifted["image"] != plain["image"]).mean() > 0.5
    for key in ("mask", "inside", "target", "entropy_error"):
        np.testing.assert_array_equal(shifted[key], plain[key])
    rng = np.random.default_rng(plan.shift_seed)
    image = plain["image"].astype(float) / 255
    drawn = [rng.uniform(-a, a) + rng.uniform(-b, b, 3) for a, b in ((0.4, 0.15), (0.3, 0.1), (0.12, 0.06))]
    for band in range(3):
        x = image[band] ** np.exp(drawn[0][band])
        expected = x.mean() + drawn[2][band] + np.exp(drawn[1][band]) * (x - x.mean())
        np.testing.assert_allclose(shifted["image"][band], 255 * expected.clip(0, 1), atol=0.501)


def test_a_shift_is_as_strong_as_between_scenes():
    """Means move by up to a fifth of the range, deviations by a third, and images of any number of bands keep their order."""
    rng = np.random.default_rng(0)
    image = rng.normal(120, 40, (64, 64, 5)).clip(0, 255).astype(np.uint8)
    means, deviations = [], []
    for seed in range(200):
        found = shift_colours(image, seed)
        assert found.dtype == np.uint8
        order = np.argsort(image[..., 2].ravel(), kind="stable")
        assert (np.diff(found[..., 2].ravel()[order].astype(int)) >= 0).all(), "brighter pixels stay brighter"
        means.append(found.mean((0, 1)) - image.mean((0, 1)))
        deviations.append(found.std((0, 1)) / image.std((0, 1)))
    assert 15 < np.std(means) < 45
    assert 0.1 < np.std(deviations) < 0.5
    assert np.corrcoef(np.array(means).T)[0, 1] > 0.5, "mostly the same in all bands"


@pytest.mark.parametrize("key", ["colour_shift", "unlabelled_colour_shift", "cutmix"])
def test_recorded_views_show_the_teacher_the_same_crops_so_the_keys_are_refused(make_config, key):
    with pytest.raises(ConfigError, match=rf"train\.{key} changes crops after the teacher saw the tile"):
        make_config(**{f"train__{key}": 0.5}, distill__teacher_view="crop", cache__views=4)
    kept = make_config().model_dump()["train"]
    assert key not in kept


def test_a_tile_without_pixels_of_its_own_size_is_mixed_too(make_config, tmp_path):
    """A tile smaller than the box is padded, and the padding is neither labelled nor taught."""
    folder = tmp_path / "small"
    folder.mkdir()
    Image.fromarray(np.full((20, 22, 3), 9, np.uint8)).save(folder / "a.png")
    samples = dataset(make_config, [Tile("a", folder / "a.png", None)], scales=[1.0])
    sample = samples[0]
    assert 0 < sample["inside"].sum() < 2 * 20 * 22
    assert (sample["mask"] == IGNORE).all()
    np.testing.assert_allclose(sample["target"].sum(0), sample["inside"], atol=1e-6)
