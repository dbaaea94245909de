"""Calibration: how far confidence is from accuracy, from counts that add up over tiles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BINS = 15  # of equal width over 0..1, as in Guo et al. 2017


@dataclass(frozen=True)
class Bin:
    """The pixels whose confidence lies in `low..high`: their number, mean confidence and accuracy."""

    low: float
    high: float
    pixels: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Calibration:
    """The expected calibration error in 0..1, and the bins of its reliability diagram."""

    error: float
    bins: list[Bin]


def calibration_counts(
    labels_HW: NDArray[np.integer[Any]],
    predicted_HW: NDArray[np.integer[Any]],
    confidence_HW: NDArray[np.float32],
    ignore_index: int,
) -> NDArray[np.float64]:
    """
    Counts by bin of confidence, float64 `(3, BINS)`: labelled pixels, the sum of their confidence, correct ones among them.

    `confidence_HW` is the probability, 0..1, of the predicted class. A bin includes its lower edge, and the last one also 1.
    Pixels of `ignore_index` do not count. The counts of tiles add up.
    """
    known = labels_HW != ignore_index
    confidence = confidence_HW[known].astype(np.float64)
    right = labels_HW[known] == predicted_HW[known]
    bins = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    return np.stack([np.bincount(bins, weights, BINS) for weights in (np.ones_like(confidence), confidence, right)])


def calibration(counts_3B: NDArray[np.float64]) -> Calibration:
    """
    The calibration from `calibration_counts`: the mean over pixels of |accuracy - mean confidence| of their bin.

    NaN without a labelled pixel. Source: Naeini, Cooper and Hauskrecht 2015 (AAAI), and Guo et al. 2017, arXiv
    1706.04599, equation 3.
    """
    pixels, confidence, right = counts_3B
    total = pixels.sum()
    edges = np.linspace(0, 1, BINS + 1)
    bins = [
        Bin(float(low), float(high), int(n), float(c / n) if n else None, float(r / n) if n else None)
        for low, high, n, c, r in zip(edges, edges[1:], pixels, confidence, right, strict=False)
    ]
    return Calibration(error=float(np.abs(right - confidence).sum() / total) if total else float("nan"), bins=bins)
