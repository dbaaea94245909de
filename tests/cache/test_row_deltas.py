"""Differences between rows are lossless, and a window needs no row above its key row."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kdpipe.cache.encoding.row_deltas import KEY_ROW_PX, add_up, take_differences


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 200), st.integers(1, 9), st.sampled_from(["u1", "u2"]), st.integers(0, 2**32 - 1)
)
def test_values_are_recovered_from_any_key_row_on(num_classes, height, width, dtype, seed):
    units = np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, (num_classes, height, width), dtype=dtype)
    stored = units.copy()
    take_differences(stored)
    top = seed % height // KEY_ROW_PX * KEY_ROW_PX
    from_there = stored[:, top:].copy()
    add_up(stored)
    np.testing.assert_array_equal(stored, units)
    add_up(from_there)
    np.testing.assert_array_equal(from_there, units[:, top:])


def test_every_64th_row_stays_and_the_others_become_differences_from_the_row_above():
    units = np.arange(3 * 130, dtype=np.uint16).reshape(3, 130, 1) * 7 % 256
    units = units.astype(np.uint8)
    stored = units.copy()
    take_differences(stored)
    for row in range(130):
        above = 0 if row in (0, 64, 128) else units[:, row - 1].astype(int)
        np.testing.assert_array_equal(stored[:, row], (units[:, row].astype(int) - above) % 256)
