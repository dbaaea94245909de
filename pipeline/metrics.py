"""Scores of a segmentation from its confusion matrix."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Scores:
    """
    Per-class scores in 0..1, None for a class that no label names, and their means over the scored classes.

    `left_out` says which classes are not in the means and why.
    """

    miou: float
    mean_f1: float
    overall_accuracy: float
    iou: dict[str, float | None]
    f1: dict[str, float | None]
    left_out: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def scores(confusion_LP: NDArray[np.int64], names: list[str], not_scored: list[str]) -> Scores:
    """
    Scores from a confusion matrix `(C, C)` of pixel counts: rows are labels, columns predictions.

    IoU is TP / (TP + FP + FN), F1 is 2 TP / (2 TP + FP + FN). Classes in `not_scored`, and classes without one labelled
    pixel, are left out of the means; overall accuracy counts every labelled pixel. NaN if nothing is scored.
    """
    confusion = confusion_LP.astype(np.float64)
    hits, labelled, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    left_out = dict.fromkeys(not_scored, "not scored")
    left_out |= {name: "absent from the labels" for name, count in zip(names, labelled, strict=True) if count == 0}
    union, both = labelled + predicted - hits, labelled + predicted
    iou = {n: float(h / u) if c else None for n, h, u, c in zip(names, hits, union, labelled, strict=True)}
    f1 = {n: float(2 * h / b) if c else None for n, h, b, c in zip(names, hits, both, labelled, strict=True)}
    scored = [name for name in names if name not in left_out]
    return Scores(
        miou=_mean([iou[name] for name in scored]),
        mean_f1=_mean([f1[name] for name in scored]),
        overall_accuracy=float(hits.sum() / labelled.sum()) if labelled.sum() else float("nan"),
        iou=iou,
        f1=f1,
        left_out=left_out,
    )


def count_pairs(
    labels: NDArray[np.integer[Any]],
    answers: NDArray[np.integer[Any]],
    num_labels: int,
    num_answers: int,
    ignore_index: int,
) -> NDArray[np.int64]:
    """
    Pixel counts `(num_labels, num_answers)` of every pair of a label and an answer; labels of `ignore_index` do not count.

    Both arrays hold class indices and have one shape. With as many answers as labels this is the confusion matrix.
    """
    known = labels != ignore_index
    pairs = labels[known].astype(np.int64) * num_answers + answers[known].astype(np.int64)
    return np.bincount(pairs, minlength=num_labels * num_answers).reshape(num_labels, num_answers)


def _mean(values: list[float | None]) -> float:
    return float(np.mean([value for value in values if value is not None])) if values else float("nan")
