"""Scores of a segmentation from its confusion matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Scores:
    """
    Scores by class in 0..1, None for a class that no label names, and their means over the scored classes.

    `left_out` maps each class that is not in the means to the reason.
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


def scores(confusion_LP: NDArray[np.int64], names: list[str], not_scored: list[str]) -> Scores:
    """
    Scores from a confusion matrix `(C, C)` of pixel counts: rows are labels, columns predictions.

    IoU is TP / (TP + FP + FN), F1 is 2 TP / (2 TP + FP + FN), precision TP / (TP + FP), recall TP / (TP + FN). The
    precision of a class that is labelled but never predicted is 0, as in torchmetrics and scikit-learn. Classes in
    `not_scored`, and classes without one labelled pixel, are left out of the means; overall accuracy counts every labelled
    pixel. NaN if nothing is scored.
    """
    confusion = confusion_LP.astype(np.float64)
    hits, labelled, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    left_out = dict.fromkeys(not_scored, "not scored")
    left_out |= {name: "absent from the labels" for name, count in zip(names, labelled, strict=True) if count == 0}
    scored = [name for name in names if name not in left_out]

    def share(of: NDArray[np.float64], whole: NDArray[np.float64]) -> dict[str, float | None]:
        shares = of / np.maximum(whole, 1)  # pixels are whole numbers: less than 1 means 0 of 0
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
    predictions: NDArray[np.integer[Any]],
    num_labels: int,
    num_predictions: int,
    ignore_index: int,
) -> NDArray[np.int64]:
    """
    Pixel counts of each pair of a label and a prediction, int64 `(num_labels, num_predictions)`, without `ignore_index`.

    Both arrays hold class indices and have one shape. If labels and predictions share their classes, this is the confusion
    matrix.
    """
    known = labels != ignore_index
    pairs = labels[known].astype(np.int64) * num_predictions + predictions[known].astype(np.int64)
    return np.bincount(pairs, minlength=num_labels * num_predictions).reshape(num_labels, num_predictions)


def mean(values: list[float | None]) -> float:
    """The mean of the values that are not None; NaN if there are none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else float("nan")
