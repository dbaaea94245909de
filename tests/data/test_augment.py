"""Drawing samples: the class-share rule, the mosaic, flips and turns, and the change of colours."""

import numpy as np
import pytest

from kdpipe.configs import schema
from kdpipe.data.augment import CROP_TRIES, change_colours, is_varied, sample_plan
from kdpipe.data.geometry import View

IGNORE = 255
SIZES = [(70, 91), (40, 50), (33, 128), (200, 64), (31, 31)]


def draw(seed, train, masks=None, tile=0, sizes=SIZES):
    return sample_plan(
        np.random.default_rng(seed),
        tile,
        len(sizes),
        train,
        IGNORE,
        size_of=lambda i: sizes[i],
        mask_of=lambda i: None if masks is None else masks[i],
    )


def labels_of(views, masks):
    """The labels under views of scale 1, sliced."""
    return np.concatenate([masks[v.tile][v.top : v.top + v.height, v.left : v.left + v.width].ravel() for v in views])


def test_single_views_fill_the_crop_at_every_scale_and_position():
    train = schema.Train(crop=48, mosaic=0, scales=[0.5, 1.0, 1.5])
    plans = [draw(seed, train) for seed in range(600)]
    views = [view for plan in plans for view in plan.views]
    assert len(views) == 600
    assert {(v.tile, v.height, v.width, v.out_top, v.out_left) for v in views} == {(0, 48, 48, 0, 0)}
    shares = [np.mean([v.scale == scale for v in views]) for scale in train.scales]
    np.testing.assert_allclose(shares, 1 / 3, atol=0.08)  # four standard deviations of 600 draws
    assert {v.top for v in views if v.scale == 1.0} == set(range(70 - 48 + 1))
    assert {(v.top, v.left) for v in views if v.scale == 0.5} == {(0, 0)}  # 35 x 46 px: smaller than the crop


def test_flips_and_turns_have_the_stated_probabilities_and_are_independent():
    plans = [draw(seed, schema.Train(crop=32)) for seed in range(3200)]
    counts = np.zeros((2, 2, 4))
    for plan in plans:
        counts[int(plan.flip_h), int(plan.flip_v), plan.rot90] += 1
    np.testing.assert_allclose(counts, 200, atol=60)  # over four standard deviations of a count of 200


def test_mosaic_shows_four_tiles_that_cover_the_crop_once():
    train = schema.Train(crop=64, mosaic=1)
    others, splits = set(), set()
    for seed in range(300):
        views = draw(seed, train, tile=2).views
        assert len(views) == 4
        assert views[0].tile == 2
        others.update(view.tile for view in views[1:])
        covered = np.zeros((64, 64), int)
        for view in views:
            covered[view.out_top : view.out_top + view.height, view.out_left : view.out_left + view.width] += 1
        assert (covered == 1).all()
        splits.update([views[0].height, views[0].width])
    assert others == set(range(len(SIZES)))
    assert splits == set(range(16, 49))
    assert len({view.scale for view in draw(1, train).views}) > 1


def test_mosaic_has_the_stated_probability():
    share = np.mean([len(draw(seed, schema.Train(crop=32, mosaic=0.25)).views) == 4 for seed in range(1000)])
    assert abs(share - 0.25) < 0.055  # four standard deviations


def test_crop_is_drawn_again_while_one_class_fills_it():
    rng = np.random.default_rng(3)
    labels = np.zeros((200, 200), np.int32)
    labels[:, 120:] = rng.integers(0, 4, (200, 80))  # the left 120 columns are of one class
    ruled = schema.Train(crop=40, mosaic=0, scales=[1.0], max_class_share=0.6)
    free = schema.Train(crop=40, mosaic=0, scales=[1.0], max_class_share=1)

    def share(seed, train):
        values = labels_of(draw(seed, train, [labels], sizes=[(200, 200)]).views, [labels])
        return np.bincount(values).max() / values.size

    assert np.mean([share(seed, free) > 0.6 for seed in range(200)]) > 0.5
    assert np.mean([share(seed, ruled) > 0.6 for seed in range(200)]) < 0.02  # 0.7 ** 10 and less


def test_the_last_draw_stays_if_none_satisfies_the_rule():
    labels = np.zeros((90, 90), np.int32)
    asked = []

    def mask_of(tile):
        asked.append(tile)
        return labels

    train = schema.Train(crop=40, mosaic=0)
    plan = sample_plan(np.random.default_rng(0), 0, 1, train, IGNORE, size_of=lambda i: (90, 90), mask_of=mask_of)
    assert len(plan.views) == 1
    assert len(asked) == CROP_TRIES == 10


@pytest.mark.parametrize(
    ("labels", "share", "varied"),
    [
        ([[0, 0, 0, 1]], 0.75, True),
        ([[0, 0, 0, 1]], 0.74, False),
        ([[0, 0, 0, 0]], 0.99, False),
        ([[0, 0, 0, 0]], 1.0, False),  # two classes, whatever the share
        ([[0, 0, IGNORE, 1]], 0.67, True),  # 2 of 3 labelled ones
        ([[0, 0, IGNORE, 1]], 0.66, False),
        ([[IGNORE, IGNORE, IGNORE, IGNORE]], 0.75, False),
        ([[1, IGNORE, IGNORE, IGNORE]], 0.75, False),
    ],
)
def test_class_share_counts_labelled_pixels_only(labels, share, varied):
    view = View(0, 1.0, 0, 0, 1, 4)
    assert is_varied((view,), share, IGNORE, lambda tile: np.array(labels, np.int32)) is varied


def test_class_share_spans_the_whole_mosaic_without_tiles_that_lack_a_mask():
    masks = [np.zeros((8, 8), np.int32), np.ones((8, 8), np.int32), None]
    zero, one, none = (View(tile, 1.0, 0, 0, 4, 4) for tile in range(3))
    assert is_varied((zero, one), 0.5, IGNORE, lambda tile: masks[tile])
    assert not is_varied((zero, zero), 0.5, IGNORE, lambda tile: masks[tile])
    assert not is_varied((zero, none), 0.5, IGNORE, lambda tile: masks[tile])
    assert is_varied((none, none), 0.5, IGNORE, lambda tile: masks[tile])


def test_padding_does_not_count_as_labelled():
    view = View(0, 1.0, 0, 0, 9, 9)  # of a tile of 2 x 2 px
    assert is_varied((view,), 0.5, IGNORE, lambda tile: np.array([[0, 1], [1, 0]], np.int32))


def test_a_share_of_1_reads_no_mask():
    def mask_of(tile):
        raise AssertionError("asked for a mask")

    train = schema.Train(crop=32, max_class_share=1, mosaic=0.5)
    for seed in range(20):
        sample_plan(np.random.default_rng(seed), 0, 5, train, IGNORE, size_of=lambda i: SIZES[i], mask_of=mask_of)


def test_same_generator_same_plan():
    train = schema.Train(crop=40, mosaic=0.5)
    assert [draw(seed, train) for seed in range(20)] == [draw(seed, train) for seed in range(20)]
    assert len({draw(seed, train) for seed in range(20)}) == 20


def test_colours_change_with_the_stated_probability():
    share = np.mean(
        [draw(seed, schema.Train(crop=32, photometric=0.25)).photometric_seed is not None for seed in range(1000)]
    )
    assert abs(share - 0.25) < 0.055
    assert draw(0, schema.Train(crop=32, photometric=0)).photometric_seed is None


def test_colours_replay_from_their_seed_and_change_moderately():
    rng = np.random.default_rng(0)
    image = np.repeat(np.repeat(rng.integers(60, 190, (8, 9, 3), dtype=np.uint8), 8, 0), 8, 1)
    kept = image.copy()
    seen = set()
    for seed in [*range(12), 2**32 - 1]:
        changed = change_colours(image, seed)
        assert changed.dtype == np.uint8
        assert changed.shape == image.shape
        np.testing.assert_array_equal(changed, change_colours(image, seed))
        assert 0 < np.abs(changed.astype(int) - image).mean() < 50
        seen.add(changed.tobytes())
    np.testing.assert_array_equal(image, kept)
    assert len(seen) == 13
