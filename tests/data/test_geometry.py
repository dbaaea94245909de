"""Views against an independent slow version: torch resizes the whole tile, a loop or a slice takes the crop."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdpipe.data.geometry import Plan, Resampler, View, orient, scaled_size

IGNORE = 255
# float32 weights times values up to 255 are off by a few 1e-5, which decides a rounding only that close to a tie.
ROUNDING = 0.5 + 1e-3


def windowed(array, resampler, axis=0):
    y, x, h, w = resampler.window
    return array[(slice(None),) * axis + (slice(y, y + h), slice(x, x + w))]


def resized(array_CHW, height, width, mode):
    """The whole tile resized by torch, in float64."""
    tensor = torch.from_numpy(array_CHW.astype(np.float64))[None]
    align = {"align_corners": False} if mode == "bilinear" else {}
    return torch.nn.functional.interpolate(tensor, size=(height, width), mode=mode, **align)[0].numpy()


def mirrored_crop(array_CHW, view):
    """Element by element: walk on from the border in the opposite direction, the border pixel twice."""

    def bounce(i, length):
        position, step = 0, 1
        for _ in range(i):
            if 0 <= position + step < length:
                position += step
            else:
                step = -step
        return position

    rows = [bounce(view.top + i, array_CHW.shape[1]) for i in range(view.height)]
    columns = [bounce(view.left + j, array_CHW.shape[2]) for j in range(view.width)]
    return array_CHW[:, rows][:, :, columns]


def nearest_labels(labels, view, scaled):
    """Pixel by pixel, in exact integers."""
    height, width = labels.shape
    result = np.full((view.height, view.width), IGNORE)
    for i in range(view.height):
        for j in range(view.width):
            if view.top + i < scaled[0] and view.left + j < scaled[1]:
                row = (2 * (view.top + i) + 1) * height // (2 * scaled[0])
                column = (2 * (view.left + j) + 1) * width // (2 * scaled[1])
                result[i, j] = labels[row, column]
    return result


def random_probs(rng, classes, height, width):
    probs = rng.random((classes, height, width), dtype=np.float32) ** 8
    return probs / probs.sum(axis=0)


@st.composite
def tile_and_view(draw):
    height, width = draw(st.integers(1, 45)), draw(st.integers(1, 45))
    scale = draw(st.one_of(st.sampled_from([0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 1 / 3]), st.floats(0.1, 4)))
    scaled_height, scaled_width = scaled_size(height, width, scale)
    view = View(
        tile=0,
        scale=scale,
        top=draw(st.integers(0, scaled_height - 1)),
        left=draw(st.integers(0, scaled_width - 1)),
        height=draw(st.integers(1, 60)),
        width=draw(st.integers(1, 60)),
    )
    return height, width, view


@settings(max_examples=150, deadline=None)
@given(tile_and_view())
def test_view_is_the_crop_of_the_whole_tile_resized(case):
    height, width, view = case
    rng = np.random.default_rng(height * 64 + width)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    labels = rng.choice([0, 1, 2, 3, IGNORE], size=(height, width)).astype(np.int32)
    probs = random_probs(rng, 5, height, width)
    resampler = Resampler(view, height, width)
    scaled = scaled_size(height, width, view.scale)

    found = resampler.image(windowed(image, resampler))
    assert found.dtype == np.uint8
    reference = mirrored_crop(resized(image.transpose(2, 0, 1), *scaled, "bilinear"), view)
    assert found.shape == (view.height, view.width, 3)
    assert np.abs(found.transpose(2, 0, 1) - reference).max() <= ROUNDING

    mask = resampler.mask(windowed(labels, resampler), IGNORE)
    assert mask.dtype == np.int32
    np.testing.assert_array_equal(mask, nearest_labels(labels, view, scaled))

    inside = resampler.inside()
    assert inside.dtype == np.bool_
    rows, columns = np.mgrid[view.top : view.top + view.height, view.left : view.left + view.width]
    np.testing.assert_array_equal(inside, (rows < scaled[0]) & (columns < scaled[1]))

    target = resampler.target(windowed(probs, resampler, axis=1))
    assert target.dtype == np.float32
    reference = np.where(inside, mirrored_crop(resized(probs, *scaled, "bilinear"), view), 0)
    np.testing.assert_allclose(target, reference, atol=1e-6)  # a few float32 ulps of a probability
    assert target.min() >= 0
    np.testing.assert_allclose(target.sum(axis=0), inside, atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(tile_and_view())
def test_pixels_that_are_interpolated_from_one_without_data_are_not_inside(case):
    height, width, view = case
    data = np.random.default_rng(height * 64 + width).random((height, width)) > 0.1
    resampler, scaled = Resampler(view, height, width), scaled_size(height, width, view.scale)
    missing = mirrored_crop(resized(~data[None], *scaled, "bilinear"), view)[0]
    rows, columns = np.mgrid[view.top : view.top + view.height, view.left : view.left + view.width]
    # A share of the four pixels is at least 1 / (2 * 180)^2; torch gives pixels beside an exact one shares of about 1e-15.
    expected = (rows < scaled[0]) & (columns < scaled[1]) & (missing < 1e-9)
    found = resampler.inside(windowed(data, resampler))
    assert found.dtype == np.bool_
    np.testing.assert_array_equal(found, expected)


def test_scaled_size_is_rounded_and_at_least_one_pixel():
    assert scaled_size(47, 5, 0.75) == (35, 4)  # 35.25, 3.75
    assert scaled_size(5, 47, 0.75) == (4, 35)
    assert scaled_size(45, 47, 0.5) == (22, 24)  # 22.5, 23.5: half to even
    assert scaled_size(1, 3, 0.1) == (1, 1)


@pytest.mark.parametrize("scale", [0.5, 0.75, 1.25, 2.0])
def test_nearest_labels_agree_with_torch_s_nearest_exact(scale):
    labels = np.random.default_rng(0).integers(0, 6, (41, 57)).astype(np.int32)
    height, width = scaled_size(41, 57, scale)
    resampler = Resampler(View(0, scale, 0, 0, height, width), 41, 57)
    expected = resized(labels[None], height, width, "nearest-exact")[0]
    np.testing.assert_array_equal(resampler.mask(windowed(labels, resampler), IGNORE), expected)


def test_view_at_scale_1_is_a_plain_slice_to_the_bit():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (41, 57, 3), dtype=np.uint8)
    probs = random_probs(rng, 7, 41, 57)
    resampler = Resampler(View(0, 1.0, 5, 9, 20, 30), 41, 57)
    assert resampler.window == (5, 9, 20, 30)
    np.testing.assert_array_equal(resampler.image(windowed(image, resampler)), image[5:25, 9:39])
    target = resampler.target(windowed(probs, resampler, axis=1))
    np.testing.assert_array_equal(target, probs[:, 5:25, 9:39])


@settings(max_examples=100, deadline=None)
@given(tile_and_view())
def test_window_lies_in_the_tile_and_holds_no_more_than_the_crop_needs(case):
    height, width, view = case
    y, x, h, w = Resampler(view, height, width).window
    assert y >= 0
    assert x >= 0
    assert 1 <= h <= height - y
    assert 1 <= w <= width - x
    scaled_height, _ = scaled_size(height, width, view.scale)
    if view.top + view.height <= scaled_height:  # no padding: the crop's extent, and a neighbour on either side
        assert h <= view.height * height / scaled_height + 3


def test_image_mask_and_target_of_a_view_coincide():
    """Coordinates as colours, a mask by quadrants of them, and the mask as one-hot target."""
    height, width = 61, 83
    rows, columns = np.mgrid[:height, :width]
    image = np.dstack([4 * rows, 3 * columns, rows + columns]).astype(np.uint8)
    labels = (2 * (rows >= 30) + (columns >= 40)).astype(np.int32)
    onehot = np.eye(4, dtype=np.float32)[labels].transpose(2, 0, 1)
    for scale in (0.5, 0.75, 1.0, 1.25, 1.5):
        resampler = Resampler(View(0, scale, int(30 * scale) - 12, int(40 * scale) - 15, 24, 31), height, width)
        found = resampler.image(windowed(image, resampler)).astype(np.float64)
        row, column = found[..., 0] / 4, found[..., 1] / 3
        # Within half a pixel of the border between classes the nearest pixel and the interpolated colour may differ.
        clear = (np.abs(row - 29.5) > 0.7) & (np.abs(column - 39.5) > 0.7)
        by_colour = 2 * (row >= 29.5) + (column >= 39.5)
        mask = resampler.mask(windowed(labels, resampler), IGNORE)
        target = resampler.target(windowed(onehot, resampler, axis=1))
        assert np.unique(mask).tolist() == [0, 1, 2, 3]
        np.testing.assert_array_equal(mask[clear], by_colour[clear])
        np.testing.assert_array_equal(target.argmax(axis=0)[clear], mask[clear])


def test_tile_of_one_pixel_fills_any_crop():
    resampler = Resampler(View(0, 0.5, 0, 0, 3, 4), 1, 1)
    np.testing.assert_array_equal(resampler.image(np.array([[[7, 8, 9]]], np.uint8)), np.full((3, 4, 3), [7, 8, 9]))
    assert resampler.inside().sum() == 1
    mask = resampler.mask(np.array([[2]], np.int32), IGNORE)
    assert (mask == IGNORE).sum() == 11
    target = resampler.target(np.array([[[0.25]], [[0.75]]], np.float32))
    assert target[:, 0, 0].tolist() == [0.25, 0.75]
    assert target.sum() == 1


@pytest.mark.parametrize("flip_h", [False, True])
@pytest.mark.parametrize("flip_v", [False, True])
@pytest.mark.parametrize("rot90", range(4))
@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int32, np.float32, np.int64])
def test_orientation_flips_then_turns_counter_clockwise(flip_h, flip_v, rot90, dtype):
    array = np.random.default_rng(0).integers(0, 2 if dtype == np.bool_ else 100, (3, 5, 5)).astype(dtype)
    plan = Plan(crop=5, views=(), flip_h=flip_h, flip_v=flip_v, rot90=rot90)
    expected = array.copy()
    if flip_h:
        expected = np.array([[row[::-1] for row in channel] for channel in expected])
    if flip_v:
        expected = np.array([channel[::-1] for channel in expected])
    for _ in range(rot90):  # the right column becomes the top row
        expected = np.array([[[channel[i][4 - j] for i in range(5)] for j in range(5)] for channel in expected])
    for found, wanted in (
        (orient(array[2], plan), expected[2]),
        (orient(array.transpose(1, 2, 0), plan), expected.transpose(1, 2, 0)),
    ):
        assert found.flags.c_contiguous and found.dtype == dtype
        np.testing.assert_array_equal(found, wanted)


def test_pixels_of_another_window_fail_an_assertion():
    resampler = Resampler(View(0, 1.0, 0, 0, 4, 4), 10, 12)
    with pytest.raises(AssertionError, match=r"expected the pixels of window \(0, 0, 4, 4\), found \(10, 12\)"):
        resampler.image(np.zeros((10, 12, 3), np.uint8))
