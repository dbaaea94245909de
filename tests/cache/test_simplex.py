"""Probabilities become integers that sum exactly to the levels, within the error that their bits promise."""

import itertools
from functools import partial

import numpy as np
import pytest
from helpers.caches import distributions
from helpers.rounding import largest_remainder
from hypothesis import given, settings
from hypothesis import strategies as st

from kdpipe.cache.encoding import steady_rounding
from kdpipe.cache.encoding.simplex import (
    FLOAT32_SLACK,
    decode,
    encode,
    entropy_error,
    error_bound,
    levels_of,
    storage_type,
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1, width=32), min_size=2, max_size=9), st.sampled_from([4, 6, 8, 16]))
def test_integers_sum_exactly_and_stay_within_the_bound(weights, bits):
    weights = np.array(weights, dtype=np.float64) + 1e-6
    probs = (weights / weights.sum()).astype(np.float32)[:, None, None]
    levels = levels_of(bits, len(weights))
    units = encode(probs, levels)
    assert units.dtype == storage_type(bits)
    assert int(units.sum(dtype=np.int64)) == levels < np.iinfo(units.dtype).max
    largest = np.abs(decode(units, levels) - probs).max()
    assert largest <= error_bound(levels, len(weights)) <= 1 / (2**bits - 1) + 2 * FLOAT32_SLACK


@pytest.mark.parametrize("levels", [213, 255, 65535])
def test_rounding_is_by_largest_remainder_ties_to_the_lower_class(levels):
    probs = distributions(5, 6, 7)
    probs[:, 0, 0] = 0.2
    probs[:, 0, 1] = [0.5, 0.5, 0, 0, 0]
    units = encode(probs, levels)
    for y, x in itertools.product(range(6), range(7)):
        assert units[:, y, x].tolist() == largest_remainder(probs[:, y, x], levels)
    assert units[:, 0, 1].tolist() == [levels // 2 + 1, levels // 2, 0, 0, 0]


def test_the_bound_is_tight():
    probs = np.full((6, 1, 1), 1 / 6, dtype=np.float32)
    probs[:, 0, 0] = (np.array([42, 42, 42, 42, 43, 43]) + np.array([1, 1, 1, 1, 1, 1]) / 6 * 1) / 255
    error = np.abs(decode(encode(probs, 255), 255) - probs).max()
    assert 0.99 * error_bound(255, 6) < error <= error_bound(255, 6)


@pytest.mark.parametrize(
    ("bits", "num_classes", "levels"),
    [(8, 2, 128), (8, 3, 170), (8, 6, 213), (6, 6, 53), (4, 6, 13), (16, 6, 54613), (8, 255, 254), (8, 256, 254)],
)
def test_levels_are_the_fewest_that_keep_the_bound_of_the_bits(bits, num_classes, levels):
    assert levels_of(bits, num_classes) == levels
    promised = 1 / (2**bits - 1)
    assert error_bound(levels - 1, num_classes) - FLOAT32_SLACK > promised
    if num_classes < 256:  # with more, a byte has too few values, and the bound is a little larger
        assert error_bound(levels, num_classes) - FLOAT32_SLACK <= promised * (1 + 1e-12)


@pytest.mark.parametrize("rounded", [partial(encode, levels=170), partial(steady_rounding.encode, bits=8, levels=170)])
@pytest.mark.parametrize("bad", [np.nan, -0.5, 0.9])
def test_values_that_are_not_a_distribution_are_refused(rounded, bad):
    probs = distributions(3, 4, 5)
    probs[1, 2, 3] = bad
    with pytest.raises(ValueError, match="must be distributions over axis 0"):
        rounded(probs)


def entropy_lost(probs, decoded):
    """H(p) - H(decoded p) of every pixel, in float64."""
    stored = decoded.astype(float)
    exact, rounded = (-(p * np.log(np.where(p > 0, p, 1))).sum(axis=0) for p in (probs.astype(float), stored))
    return exact - rounded


@pytest.mark.parametrize("levels", [192, 65535])
def test_entropy_error_is_the_mean_difference_of_entropies_block_by_block(levels):
    probs = distributions(4, 70, 131, sharpness=6.0)
    units = encode(probs, levels)
    lost = entropy_lost(probs, decode(units, levels))
    blocks = entropy_error(probs, units, levels)
    assert blocks.shape == (2, 3)
    for row, column in itertools.product(range(2), range(3)):
        expected = lost[row * 64 : row * 64 + 64, column * 64 : column * 64 + 64].mean()
        assert blocks[row, column] == pytest.approx(expected, abs=1e-7)


def test_a_scene_encoded_in_bands_has_the_same_values(monkeypatch):
    probs = distributions(5, 300, 70)
    units, lost = encode(probs, 255), entropy_error(probs, encode(probs, 255), 255)
    monkeypatch.setattr("kdpipe.cache.encoding.simplex.BAND_PX", 64 * 70 * 2)  # bands of 128, 128 and 44 rows
    np.testing.assert_array_equal(encode(probs, 255), units)
    np.testing.assert_array_equal(entropy_error(probs, units, 255), lost)
