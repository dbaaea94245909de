"""
Do boundaries lie where the labels have them? Counts that add up over tiles, and the boundary F1 from them.

A *boundary pixel* of a class has that class and a neighbour (of its four) of another one. Where the labels end there is no
boundary: neither the edge of the image nor that of an unlabelled area makes one. A boundary pixel is *met* if the other map
has a boundary pixel of the same class within `width_px`, Euclidean distance between pixel centres. It *counts* only if all
that lies within `width_px` of it is labelled, the image's outside being unlabelled: else whether it is met is not known.

The definition is the one of Csurka, Larlus and Perronnin 2013, "What is a good evaluation measure for semantic
segmentation?" (BMVC), with two choices: unlabelled areas, as above, and pixels summed over all tiles before
precision and recall are taken, where they take the mean of the images' scores.

Shapes: H W px of a tile, C classes, N boundary pixels.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
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
    Per-class boundary scores in 0..1, and the mean F1 over the scored classes that have a boundary in the labels.

    None for a class without one; `left_out` says which classes are not in the mean and why.
    """

    width_px: int
    mean_f1: float | None
    f1: dict[str, float | None]
    precision: dict[str, float | None]
    recall: dict[str, float | None]
    left_out: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def boundary_counts(
    labels_HW: NDArray[np.integer[Any]],
    answers_HW: NDArray[np.integer[Any]],
    num_classes: int,
    ignore_index: int,
    width_px: int,
) -> NDArray[np.int64]:
    """
    By class, int64 `(4, C)`: boundary pixels of the answers, those of them that are met, of the labels, those met.

    Labels are class indices or `ignore_index`, answers class indices. Counts of tiles are added up.
    """
    labelled_HW = labels_HW != ignore_index
    to_unlabelled_HW = distance_transform_edt(np.pad(labelled_HW, 1))[1:-1, 1:-1]
    counted_HW = to_unlabelled_HW > width_px
    of_answers_HW = _boundary(answers_HW, np.ones_like(labelled_HW))
    of_labels_HW = _boundary(labels_HW, labelled_HW)
    counts_4C = np.zeros((4, num_classes), dtype=np.int64)
    for i, own_HW, other_HW in ((0, of_answers_HW, of_labels_HW), (2, of_labels_HW, of_answers_HW)):
        for c in range(num_classes):
            own_N2 = np.argwhere((own_HW == c) & counted_HW)
            # A tree, and not a second distance transform of every class: boundaries are few among the pixels.
            distance_N, _ = KDTree(np.argwhere(other_HW == c)).query(own_N2, distance_upper_bound=width_px + 1)
            counts_4C[i : i + 2, c] = len(own_N2), np.count_nonzero(distance_N <= width_px)
    return counts_4C


def boundary_scores(
    counts_4C: NDArray[np.int64], names: list[str], not_scored: list[str], width_px: int
) -> BoundaryScores:
    """
    The scores from `boundary_counts`: precision of the answers' boundary pixels, recall of the labels', and F1 of both.

    Where a class has a boundary in the labels alone, all three are 0.
    """
    answered, answered_met, labelled, labelled_met = counts_4C.astype(np.float64)
    precision, recall = answered_met / np.maximum(answered, 1), labelled_met / np.maximum(labelled, 1)
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
    """The class of each boundary pixel, int64 `(H, W)`, else `NONE`; neither of the two neighbours may be unknown."""
    edge_HW = np.zeros(classes_HW.shape, dtype=np.bool_)
    for here, there in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        differ = (classes_HW[here] != classes_HW[there]) & known_HW[here] & known_HW[there]
        edge_HW[here] |= differ
        edge_HW[there] |= differ
    return np.where(edge_HW, classes_HW, NONE).astype(np.int64)
