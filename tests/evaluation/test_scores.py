"""Boundary F1 against a comparison of every pixel with every other, calibration against torchmetrics, and hand numbers."""

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import (
    multiclass_calibration_error,
    multiclass_precision,
    multiclass_recall,
)

from kdpipe.pipeline.evaluation.boundary import boundary_counts, boundary_scores
from kdpipe.pipeline.evaluation.calibration import BINS, calibration, calibration_counts
from kdpipe.pipeline.evaluation.confusion import count_pairs, scores

C, IGNORE = 4, 255
NAMES = list("abcd")


def blobs(seed, height=17, width=23):
    """Labels with unlabelled patches, and predictions: the labels shifted and disturbed. Neither is square."""
    rng = np.random.default_rng(seed)
    labels = np.kron(rng.integers(C, size=(5, 6)), np.ones((4, 4), int))[:height, :width]
    predicted = np.roll(labels, rng.integers(-2, 3, size=2), axis=(0, 1))
    predicted[rng.random((height, width)) < 0.03] = rng.integers(C)
    labels = labels.copy()
    for _ in range(rng.integers(4)):
        y, x = rng.integers(height), rng.integers(width)
        labels[y : y + 3, x : x + 2] = IGNORE
    return labels, predicted


def brute_force(labels, predicted, width_px):
    """The definition, literally: a loop over pixels, and for each a loop over all others."""
    height, width = labels.shape
    pixels = [(y, x) for y in range(height) for x in range(width)]

    def inside(y, x):
        return 0 <= y < height and 0 <= x < width

    def is_boundary(of, y, x):
        if of[y, x] == IGNORE:
            return False
        near = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
        return any(inside(*p) and of[p] != IGNORE and of[p] != of[y, x] for p in near)

    def all_labelled(y, x):
        reach = range(-width_px, width_px + 1)
        around = [(y + i, x + j) for i in reach for j in reach if i * i + j * j <= width_px * width_px]
        return all(inside(*p) and labels[p] != IGNORE for p in around)

    counts = np.zeros((4, C), int)
    for row, own, other in ((0, predicted, labels), (2, labels, predicted)):
        others = [p for p in pixels if is_boundary(other, *p)]
        for y, x in pixels:
            if is_boundary(own, y, x) and all_labelled(y, x):
                counts[row, own[y, x]] += 1
                counts[row + 1, own[y, x]] += any(
                    np.hypot(y - v, x - u) <= width_px and other[v, u] == own[y, x] for v, u in others
                )
    return counts


@pytest.mark.parametrize("width_px", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_boundary_counts_are_those_of_comparing_every_pixel_with_every_other(seed, width_px):
    labels, predicted = blobs(seed)
    found = boundary_counts(labels, predicted, C, IGNORE, width_px)
    np.testing.assert_array_equal(found, brute_force(labels, predicted, width_px))
    assert found[::2].sum() > 0


def halves(column, height=20, width=30):
    """Class 0 left of `column`, class 1 from there on."""
    return np.repeat((np.arange(width) >= column).astype(int)[None], height, axis=0)


@pytest.mark.parametrize(("shift", "width_px", "f1"), [(0, 1, 1), (2, 2, 1), (-3, 3, 1), (3, 2, 0), (4, 3, 0)])
def test_a_boundary_may_be_off_by_the_width_and_no_more(shift, width_px, f1):
    found = boundary_scores(
        boundary_counts(halves(15), halves(15 + shift), C, IGNORE, width_px), NAMES, ["b"], width_px
    )
    assert found.f1 == {"a": f1, "b": f1, "c": None, "d": None}
    assert found.mean_f1 == f1
    assert found.left_out == {
        "b": "not scored", "c": "no boundary in the labels", "d": "no boundary in the labels"
    }  # fmt: skip


def test_precision_is_of_the_predicted_boundary_and_recall_of_the_labelled_one():
    predicted = halves(15)
    predicted[:, 25:] = 0  # a second boundary, which the labels have not: half of each class's
    found = boundary_scores(boundary_counts(halves(15), predicted, C, IGNORE, 2), NAMES, [], 2)
    assert (found.precision["a"], found.recall["a"]) == (0.5, 1.0)
    assert found.f1["a"] == pytest.approx(2 / 3)


def test_neither_the_edge_of_the_image_nor_of_unlabelled_areas_is_a_boundary():
    labels = np.zeros((20, 30), int)
    labels[:, 20:] = IGNORE
    predicted = np.zeros((20, 30), int)
    predicted[:, 20:] = 1  # beyond the labels: not known to be wrong
    assert not boundary_counts(labels, predicted, C, IGNORE, 3).any()


def test_a_boundary_near_an_unlabelled_pixel_does_not_count_within_the_width():
    labels = halves(15)
    before = boundary_counts(labels, labels, C, IGNORE, 3)
    labels[10, 13] = IGNORE
    # Column 14 is 1 px away and loses rows 10 ± 2 (1 + 4 < 9, 1 + 9 > 9); column 15 is 2 px away: 4 + 4 < 9, 4 + 9 > 9.
    after = boundary_counts(labels, halves(15), C, IGNORE, 3)
    np.testing.assert_array_equal(before[2] - after[2], [5, 5, 0, 0])
    assert before[2, 0] == 20 - 2 * 3  # nor do the pixels whose surroundings lie beyond the image


def test_a_class_with_a_boundary_in_the_labels_alone_scores_zero():
    predicted = np.zeros((20, 30), int)
    found = boundary_scores(boundary_counts(halves(15), predicted, C, IGNORE, 2), NAMES, [], 2)
    assert (found.precision["b"], found.recall["b"], found.f1["b"]) == (0, 0, 0)


def test_without_a_boundary_in_the_labels_there_is_no_mean():
    labels = np.zeros((20, 30), int)
    found = boundary_scores(boundary_counts(labels, halves(15), C, IGNORE, 2), NAMES, [], 2)
    assert found.mean_f1 is None
    assert set(found.left_out) == set(NAMES)


def softmax(logits, axis):
    exp = np.exp(logits - logits.max(axis=axis, keepdims=True))
    return (exp / exp.sum(axis=axis, keepdims=True)).astype(np.float32)


def test_calibration_error_is_torchmetrics_own_summed_over_tiles():
    rng = np.random.default_rng(0)
    total, all_probs, all_labels = 0, [], []
    for size in ((20, 30), (11, 7)):
        probs = softmax(rng.normal(0, 3, (C, *size)), axis=0)
        labels = np.where(rng.random(size) < 0.5, probs.argmax(axis=0), rng.integers(C, size=size))
        labels[:4] = IGNORE
        total = total + calibration_counts(labels, probs.argmax(axis=0), probs.max(axis=0), IGNORE)
        all_probs.append(probs.reshape(C, -1).T)
        all_labels.append(labels.ravel())
    found = calibration(total)
    probs, labels = torch.from_numpy(np.concatenate(all_probs)), torch.from_numpy(np.concatenate(all_labels))
    expected = multiclass_calibration_error(probs, labels, C, n_bins=BINS, norm="l1", ignore_index=IGNORE)
    assert found.error == pytest.approx(expected.item(), abs=1e-6)
    assert found.error > 0.05
    assert sum(b.pixels for b in found.bins) == (labels != IGNORE).sum()


def test_bins_hold_their_lower_edge_and_the_last_one_certainty():
    labels, predicted = np.array([[0, 0, 1]]), np.array([[0, 1, 1]])
    found = calibration(calibration_counts(labels, predicted, np.array([[0.4, 0.5, 1.0]], np.float32), IGNORE))
    filled = {i: (b.pixels, b.confidence, b.accuracy) for i, b in enumerate(found.bins) if b.pixels}
    assert filled == {6: (1, pytest.approx(0.4), 1.0), 7: (1, 0.5, 0.0), 14: (1, 1.0, 1.0)}
    assert found.error == pytest.approx((0.6 + 0.5 + 0.0) / 3)
    assert (found.bins[0].confidence, found.bins[0].accuracy) == (None, None)


def test_calibration_of_no_pixel_is_not_a_number():
    assert np.isnan(calibration(np.zeros((3, BINS))).error)


def test_precision_and_recall_are_torchmetrics_own():
    rng = np.random.default_rng(1)
    labels, predicted = rng.integers(0, C, (2, 20, 30))
    predicted[predicted == 2] = 0  # never predicted: its precision is 0
    labels[0, :9] = IGNORE
    found = scores(count_pairs(labels, predicted, C, C, IGNORE), NAMES, [])
    a, b = torch.from_numpy(predicted), torch.from_numpy(labels)
    for ours, theirs, mean in (
        (found.precision, multiclass_precision, found.mean_precision),
        (found.recall, multiclass_recall, found.mean_recall),
    ):
        np.testing.assert_allclose(list(ours.values()), theirs(a, b, C, average=None, ignore_index=IGNORE), atol=1e-6)
        assert mean == pytest.approx(theirs(a, b, C, average="macro", ignore_index=IGNORE).item())
    assert found.precision["c"] == 0
