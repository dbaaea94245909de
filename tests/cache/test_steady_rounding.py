"""Steady rounding keeps values from row to row within the error bound, and takes fewer bytes than plain rounding."""

import math

import numpy as np
import pytest
from helpers.caches import distributions
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs.zstd import Zstd

from kdpipe.cache.encoding import simplex
from kdpipe.cache.encoding.row_deltas import KEY_ROW_PX, take_differences
from kdpipe.cache.encoding.steady_rounding import encode, error_bound


@settings(max_examples=80, deadline=None)
@given(
    st.integers(2, 9), st.integers(1, 150), st.integers(1, 30), st.sampled_from([4, 6, 8]),
    st.sampled_from([0.1, 3.0, 30.0]), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_every_entry_is_within_the_bound_and_every_pixel_sums_to_the_levels(
    num_classes, height, width, bits, sharpness, seed
):
    levels = simplex.levels_of(bits, num_classes)
    probs = distributions(num_classes, height, width, seed, sharpness)
    units = encode(probs, bits, levels)
    assert units.dtype == np.uint8 and (units.sum(axis=0, dtype=np.int64) == levels).all()
    largest = np.abs(units / float(levels) - probs).max()
    assert largest <= error_bound(bits, levels, num_classes) <= 1 / (2**bits - 1) + 2e-6
    plain = simplex.encode(probs, levels)
    for top in range(0, height, KEY_ROW_PX):
        last = min(top + KEY_ROW_PX, height) - 1
        np.testing.assert_array_equal(units[:, top, :16], plain[:, top, :16])
        np.testing.assert_array_equal(units[:, last, 16:], plain[:, last, 16:])


def rounded_slowly(probs, levels, room):
    """A block of one column, pixel by pixel: keep what may be kept, then adjust the likeliest classes first."""
    exact = probs.astype(np.float32) * np.float32(levels)  # (class, row)
    highest = [[math.floor(np.float32(value + room)) for value in values] for values in exact]
    order = sorted(range(len(probs)), key=lambda c: (-sum(highest[c]), c))
    rows = [simplex.encode(probs[:, :1, None], levels)[:, 0, 0].tolist()]
    for row in range(1, probs.shape[1]):
        lowest = [max(0, math.ceil(exact[c, row] - room)) for c in range(len(probs))]
        now = [min(max(rows[-1][c], lowest[c]), highest[c][row]) for c in range(len(probs))]
        for c in order:
            excess = sum(now) - levels
            now[c] = min(max(now[c] - excess, lowest[c]), highest[c][row])
        rows.append(now)
    return np.array(rows).T


@pytest.mark.parametrize(("bits", "num_classes"), [(8, 6), (6, 4), (4, 3)])
def test_the_rounding_is_that_of_format_md_pixel_by_pixel(bits, num_classes):
    levels = simplex.levels_of(bits, num_classes)
    rng = np.random.default_rng(bits)
    walk = rng.normal(0, 0.05, (num_classes, 64)).cumsum(axis=1)
    probs = (np.exp(walk) / np.exp(walk).sum(axis=0)).astype(np.float32)
    found = encode(probs[:, :, None], bits, levels)[:, :, 0]
    np.testing.assert_array_equal(found, rounded_slowly(probs, levels, levels / (2**bits - 1)))
    assert (found != simplex.encode(probs[:, :, None], levels)[:, :, 0]).any()


def test_stripes_of_16_columns_alternate_in_direction_so_that_lags_cancel_out():
    row = np.linspace(0, 0.9, 64, dtype=np.float32)
    probs = np.tile(np.stack([row, 1 - row])[:, :, None], (1, 1, 40))
    units = encode(probs, 8, 128)
    upside_down = encode(np.ascontiguousarray(probs[:, ::-1]), 8, 128)[:, ::-1]
    np.testing.assert_array_equal(units[:, :, 16:32], upside_down[:, :, :16])
    np.testing.assert_array_equal(units[:, :, 32:], units[:, :, :8])
    row = np.linspace(0.2, 0.25, 64, dtype=np.float32)  # three classes, two of which fall by an eighth of a level a row
    probs = np.tile(np.stack([row, (1 - row) / 2, (1 - row) / 2])[:, :, None], (1, 1, 32))
    errors = (encode(probs, 8, 170) - 170 * probs)[1:].mean(axis=1)
    down, up = errors[:, :16].mean(axis=1), errors[:, 16:].mean(axis=1)
    assert (np.abs(down) > 0.1).all() and np.abs(down + up).max() < 1e-3


def test_blocks_are_independent(monkeypatch):
    probs = distributions(5, 300, 70)
    whole = encode(probs, 8, 204)
    for top in range(0, 300, KEY_ROW_PX):
        rows = slice(top, top + KEY_ROW_PX)
        np.testing.assert_array_equal(encode(probs[:, rows], 8, 204), whole[:, rows])
    monkeypatch.setattr("kdpipe.cache.encoding.simplex.BAND_PX", KEY_ROW_PX * 70 * 2)  # bands of 128, 128 and 44 rows
    np.testing.assert_array_equal(encode(probs, 8, 204), whole)


@pytest.mark.parametrize("total", [1 - 9e-5, 1 + 9e-5])
@pytest.mark.parametrize("num_classes", [2, 3, 6, 254, 300])
def test_entries_that_sum_to_almost_one_are_rounded(num_classes, total):
    levels = simplex.levels_of(8, num_classes)
    probs = distributions(num_classes, 70, 20, sharpness=0.1) * np.float32(total)
    units = encode(probs, 8, levels)
    assert (units.sum(axis=0, dtype=np.int64) == levels).all()
    assert np.abs(units / float(levels) - probs).max() <= error_bound(8, levels, num_classes) + 1e-4


def test_a_smooth_tile_takes_a_fifth_fewer_bytes_than_with_plain_rounding():
    row, column = np.mgrid[:256, :256] / 256
    scores = np.stack([np.sin(5 * row + 2 * column), np.cos(3 * column - row), row * column, 1 - row])
    scores += np.random.default_rng(0).normal(0, 0.01, scores.shape)
    probs = (np.exp(scores) / np.exp(scores).sum(axis=0)).astype(np.float32)
    plain, steady = simplex.encode(probs, 192), encode(probs, 8, 192)
    take_differences(steady)
    sizes = [len(Zstd(3).encode(units)) for units in (plain, steady)]
    assert sizes[1] < 0.8 * sizes[0]
