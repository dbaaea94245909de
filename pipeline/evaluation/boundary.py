"""
Boundary F1: how well predicted boundaries match the labelled ones, from counts that add up over tiles.

A *boundary pixel* of a class has that class, and one of its four neighbours has another. The edge of the image or of an
unlabelled area is no boundary. A boundary pixel is *matched* if the other map has a boundary pixel of the same class within
`width_px`, the Euclidean distance between pixel centres. It *counts* only if every pixel within `width_px` of it is
labelled; pixels beyond the image are not. Otherwise its match could lie where nothing is known.

The definition follows Csurka, Larlus and Perronnin 2013, "What is a good evaluation measure for semantic segmentation?"
(BMVC), except for unlabelled areas, and in that pixels are summed over all tiles before precision and recall are taken;
the paper averages the scores of single images.

Shapes: H W px of a tile, C classes, N boundary pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt
from scipy.spatial import KDTree

from kdpipe.pipeline.evaluation.confusion import mean

NONE = -1  # no boundary pixel


@dataclass(frozen=True)
class BoundaryScores:
    """
    Boundary scores by class in 0..1, and the mean F1 over the scored classes that have a labelled boundary.

    A class without one has None; `left_out` maps each class that is not in the mean to the reason.
    """

    width_px: int
    mean_f1: float | None
    f1: dict[str, float | None]
    precision: dict[str, float | None]
    recall: dict[str, float | None]
    left_out: dict[str, str]


def boundary_counts(
    labels_HW: NDArray[np.integer[Any]],
    predicted_HW: NDArray[np.integer[Any]],
    num_classes: int,
    ignore_index: int,
    width_px: int,
) -> NDArray[np.int64]:
    """
    Counts by class, int64 `(4, C)`: predicted boundary pixels, matched ones among them, labelled ones, matched ones.

    Labels are class indices or `ignore_index`, predictions are class indices. The counts of tiles add up.
    """
    labelled_HW = labels_HW != ignore_index
    to_unlabelled_HW = distance_transform_edt(np.pad(labelled_HW, 1))[1:-1, 1:-1]
    counted_HW = to_unlabelled_HW > width_px
    of_predicted_HW = _boundary(predicted_HW, np.ones_like(labelled_HW))
    of_labels_HW = _boundary(labels_HW, labelled_HW)
    counts_4C = np.zeros((4, num_classes), dtype=np.int64)
    for i, own_HW, other_HW in ((0, of_predicted_HW, of_labels_HW), (2, of_labels_HW, of_predicted_HW)):
        for c in range(num_classes):
            own_N2 = np.argwhere((own_HW == c) & counted_HW)
            # A tree is faster than a distance transform for each class: boundary pixels are few.
            distance_N, _ = KDTree(np.argwhere(other_HW == c)).query(own_N2, distance_upper_bound=width_px + 1)
            counts_4C[i : i + 2, c] = len(own_N2), np.count_nonzero(distance_N <= width_px)
    return counts_4C


def boundary_scores(
    counts_4C: NDArray[np.int64], names: list[str], not_scored: list[str], width_px: int
) -> BoundaryScores:
    """
    The scores from `boundary_counts`: precision is the matched share of the predicted boundary pixels, recall of the labelled.

    A class that has a boundary in the labels alone scores 0.
    """
    predicted, predicted_matched, labelled, labelled_matched = counts_4C.astype(np.float64)
    precision, recall = predicted_matched / np.maximum(predicted, 1), labelled_matched / np.maximum(labelled, 1)
    f1 = 2 * precision * recall / np.where(precision + recall > 0, precision + recall, 1)
    left_out = dict.fromkeys(not_scored, "not scored")
    left_out |= {name: "no boundary in the labels" for name, n in zip(names, labelled, strict=True) if n == 0}

    def by_name(values: NDArray[np.float64]) -> dict[str, float | None]:
        return {name: float(v) if n else None for name, v, n in zip(names, values, labelled, strict=True)}

    scored = [value for name, value in by_name(f1).items() if name not in left_out]
    return BoundaryScores(
        width_px=width_px,
        mean_f1=mean(scored) if scored else None,
        f1=by_name(f1),
        precision=by_name(precision),
        recall=by_name(recall),
        left_out=left_out,
    )


def _boundary(classes_HW: NDArray[np.integer[Any]], known_HW: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The class of each boundary pixel, int64 `(H, W)`, elsewhere `NONE`; an unknown neighbour makes no boundary."""
    edge_HW = np.zeros(classes_HW.shape, dtype=np.bool_)
    for here, there in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        differ = (classes_HW[here] != classes_HW[there]) & known_HW[here] & known_HW[there]
        edge_HW[here] |= differ
        edge_HW[there] |= differ
    return np.where(edge_HW, classes_HW, NONE).astype(np.int64)
