"""The brushes of the generated landscape keep what their docstrings promise."""

import numpy as np
import pytest

from kdpipe.data.landscape.brushes import curve, displaced, fractal_noise, highest, parcels, polygons, shifted, stroke


def test_fractal_noise_is_standardised_and_smooth_over_its_cells():
    noise = fractal_noise(120, 170, np.random.default_rng(0), cell_px=40, octaves=1)
    assert noise.shape == (120, 170)
    assert noise.dtype == np.float32
    assert noise.mean() == pytest.approx(0, abs=1e-4)  # float32 sums
    assert noise.std() == pytest.approx(1, abs=1e-4)
    assert np.abs(np.diff(noise, axis=1)).max() < 0.25  # a cell of 40 px spans about 2 standard deviations


def test_highest_covers_its_share():
    field = np.arange(200, dtype=np.float32).reshape(10, 20)
    np.testing.assert_array_equal(highest(field, 0.25), field >= 150)
    assert not highest(field, 0.0).any()


def test_parcels_are_convex_and_know_their_borders():
    """Voronoi cells are convex, so that a line between two pixels of one parcel stays in it (to the pixel)."""
    plots = parcels(130, 170, np.random.default_rng(1), length_px=50, width_px=30)
    assert set(np.unique(plots.index)) == set(range(plots.count))
    assert 130 * 170 / 1500 * 0.8 < plots.count < 130 * 170 / 1500 * 2  # edge parcels are cut
    assert plots.border_px.min() >= 0
    changes = plots.index[:, 1:] != plots.index[:, :-1]
    assert plots.border_px[:, 1:][changes].max() < 2.5  # px, where a neighbour belongs to another parcel
    rng = np.random.default_rng(2)
    for label in range(plots.count):
        rows, cols = np.nonzero(plots.index == label)
        a, b = rng.integers(0, len(rows), 2)
        middle = plots.index[(rows[a] + rows[b]) // 2, (cols[a] + cols[b]) // 2]
        near = plots.border_px[(rows[a] + rows[b]) // 2, (cols[a] + cols[b]) // 2] < 3  # the lattice is slightly bent
        assert middle == label or near


def test_curve_joins_its_ends_and_a_stroke_follows_it():
    way = curve(np.array([5.0, 50.0]), np.array([95.0, 50.0]), np.random.default_rng(0), bend=0.2)
    np.testing.assert_allclose(way[[0, -1]], [[5, 50], [95, 50]], atol=1e-9)
    line = stroke(100, 120, way, 5)
    assert line.shape == (100, 120)
    assert all(line[round(y), round(x)] for x, y in way[1:-1])
    assert 4 * 90 < line.sum() < 6 * 120  # its length is 90 to 120 px


def test_polygons_are_numbered_and_later_ones_lie_above():
    square = np.array([[2.0, 1.0], [6.0, 1.0], [6.0, 4.0], [2.0, 4.0]])
    filled = polygons(10, 14, [square, square + np.array([2, 0])])
    assert filled.shape == (10, 14)
    assert filled[0].max() == 0
    np.testing.assert_array_equal(filled[2, 1:10], [0, 1, 1, 2, 2, 2, 2, 2, 0])


def test_shift_moves_right_and_down_and_repeats_the_edge():
    field = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.testing.assert_array_equal(shifted(field, 1, 0)[0], [0, 0, 1, 2])
    np.testing.assert_array_equal(shifted(field, 0, 2)[:, 0], [0, 0, 0])
    np.testing.assert_array_equal(shifted(field, 0, -1)[:, 0], [4, 8, 8])


def test_displacement_reads_where_it_points():
    mask = np.arange(12, dtype=np.uint8).reshape(3, 4)
    right, down = np.full((3, 4), 1.2, np.float32), np.full((3, 4), -1.0, np.float32)
    np.testing.assert_array_equal(displaced(mask, right, down), [[1, 2, 3, 3], [1, 2, 3, 3], [5, 6, 7, 7]])
