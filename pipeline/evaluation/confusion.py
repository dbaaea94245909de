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
    mean_precision: float
    mean_recall: float
    overall_accuracy: float
    iou: dict[str, float | None]
    f1: dict[str, float | None]
    precision: dict[str, float | None]
    recall: dict[str, float | None]
    left_out: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def scores(confusion_LP: NDArray[np.int64], names: list[str], not_scored: list[str]) -> Scores:
    """
    Scores from a confusion matrix `(C, C)` of pixel counts: rows are labels, columns predictions.

    IoU is TP / (TP + FP + FN), F1 is 2 TP / (2 TP + FP + FN), precision TP / (TP + FP), recall TP / (TP + FN). The
    precision of a class that is labelled and never predicted is 0, as torchmetrics and scikit-learn have it. Classes in
    `not_scored`, and classes without one labelled pixel, are left out of the means; overall accuracy counts every labelled
    pixel. NaN if nothing is scored.
    """
    confusion = confusion_LP.astype(np.float64)
    hits, labelled, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    left_out = dict.fromkeys(not_scored, "not scored")
    left_out |= {name: "absent from the labels" for name, count in zip(names, labelled, strict=True) if count == 0}
    scored = [name for name in names if name not in left_out]

    def share(of: NDArray[np.float64], whole: NDArray[np.float64]) -> dict[str, float | None]:
        shares = of / np.maximum(whole, 1)  # pixels are whole numbers: below 1 is 0 of 0
        return {name: float(s) if count else None for name, s, count in zip(names, shares, labelled, strict=True)}

    iou = share(hits, labelled + predicted - hits)
    f1 = share(2 * hits, labelled + predicted)
    precision, recall = share(hits, predicted), share(hits, labelled)
    return Scores(
        miou=mean([iou[name] for name in scored]),
        mean_f1=mean([f1[name] for name in scored]),
        mean_precision=mean([precision[name] for name in scored]),
        mean_recall=mean([recall[name] for name in scored]),
        overall_accuracy=float(hits.sum() / labelled.sum()) if labelled.sum() else float("nan"),
        iou=iou,
        f1=f1,
        precision=precision,
        recall=recall,
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


def mean(values: list[float | None]) -> float:
    """The mean of the values that are not None; NaN of none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else float("nan")
