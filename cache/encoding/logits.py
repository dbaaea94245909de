"""
Logits as integers, from which soft targets follow at any temperature and with any class map.

Softmax only depends on how far each logit of a pixel lies below the largest. That depth `d` is stored as `2**bits - 1 - k`
with `d = D (k / (2**bits - 1))²`: steps are small near the largest logit, where they move probabilities, and wide where
little probability is left. The largest logit of every pixel is `2**bits - 1`, so zeros in place of missing data are noticed.

Not covered: where the integers are stored (see `tile.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdpipe.cache.encoding.simplex import FLOAT32_SLACK, bands, total

# D: all deeper logits are stored alike, in nats. At T 4 a class at that depth has at most exp(-8), or exp(-16), of the likeliest
# one's probability. A real teacher's logits reach down to 13; with 8 bits a larger D costs accuracy (bound ~ √D).
DEPTH = {8: 32.0, 16: 64.0}
LOGIT_SLACK = 1e-5  # the error of float32 at that depth


@dataclass(frozen=True)
class Softening:
    """
    How logits become a soft target: `softmax(z) @ class_map`, to the power of `1 / temperature`, normalised to sum to one.

    `class_map` is float32 `(C_t, C_s)`, with rows in the order of the cache's channels, each summing to one.
    """

    temperature: float
    class_map: NDArray[np.float32]


def encode(logits_CHW: NDArray[np.float32], bits: int) -> NDArray[Any]:
    """
    Integers `(C, H, W)`, uint8 or uint16, from float32 logits; the largest of each pixel is `2**bits - 1`.

    Raises `ValueError` for logits that are not finite.
    """
    if not np.isfinite(logits_CHW).all():
        raise ValueError("logits must be finite")
    stored_CHW: NDArray[Any] = np.empty(logits_CHW.shape, dtype=np.uint8 if bits <= 8 else np.uint16)
    for rows in bands(*logits_CHW.shape[1:], num_classes=len(logits_CHW)):
        exact_CHW = logits_CHW[:, rows].astype(np.float64)
        depth_CHW = exact_CHW.max(axis=0) - exact_CHW
        stored_CHW[:, rows] = total(bits) - np.rint(total(bits) * np.sqrt(np.minimum(depth_CHW / DEPTH[bits], 1)))
    return stored_CHW


def decode(units_CHW: NDArray[Any], bits: int) -> NDArray[np.float32]:
    """Logits, float32 `(C, H, W)`, shifted so that the largest of every pixel is zero."""
    logits_CHW: NDArray[np.float32] = np.subtract(np.float32(total(bits)), units_CHW, order="C")
    logits_CHW *= logits_CHW
    logits_CHW *= np.float32(-DEPTH[bits] / total(bits) ** 2)
    return logits_CHW


def soft_targets(units_CHW: NDArray[Any], bits: int, softening: Softening) -> NDArray[np.float32]:
    """Soft targets, float32 `(C_s, H, W)`, that sum to one over axis 0, from stored integers `(C_t, H, W)`."""
    weights_THW = decode(units_CHW, bits)
    np.exp(
        weights_THW, out=weights_THW
    )  # at least exp(-DEPTH), which float32 holds; a third of the time of a lookup table
    targets_SHW: NDArray[np.float32] = np.tensordot(softening.class_map.T, weights_THW, axes=1)
    if softening.temperature == 1:
        targets_SHW /= weights_THW.sum(axis=0)
        return targets_SHW
    targets_SHW /= targets_SHW.max(axis=0)  # so that no power overflows
    np.power(targets_SHW, np.float32(1 / softening.temperature), out=targets_SHW)
    targets_SHW /= targets_SHW.sum(axis=0)
    return targets_SHW


def is_one_to_one(class_map: NDArray[np.float32]) -> bool:
    """Whether a class map `(C_t, C_s)` only renames classes, so that it does not matter whether T is applied before or after it."""
    return bool(((class_map == 0) | (class_map == 1)).all() and ((class_map > 0).sum(axis=0) <= 1).all())


def has_largest(units_CHW: NDArray[Any], bits: int) -> bool:
    """Whether every pixel has a class with the largest logit; zeros in place of missing data do not."""
    return bool((units_CHW.max(axis=0) == total(bits)).all())


def logit_bound(bits: int) -> float:
    """
    The largest possible error of a decoded logit, relative to the pixel's largest, unless it is deeper than `DEPTH`.

    With `u = N √(d / D)` and `|u - k| <= 1/2`: `|d - d_k| = D / N² |u - k| (u + k) <= √(d D) / N + D / (4 N²)`.
    """
    return DEPTH[bits] / total(bits) * (1 + 1 / (4 * total(bits))) + LOGIT_SLACK


def error_bound(bits: int, num_classes: int, num_student_classes: int, temperature: float) -> float:
    """
    The largest possible `|decoded - p|` of any soft target's entry, with any map from `num_classes` of the teacher (C_t) to
    `num_student_classes` (C_s).

    `√D / N · K / T + D / (4 N² T)` for rounding, with `K` the maximum of `P (1 - P) √(2 L(P))` over P, and a term for logits
    deeper than D; FORMAT.md derives it.
    """
    depth, steps, T = DEPTH[bits], total(bits), temperature
    share = np.linspace(0, 1, 10_001)[1:-1]  # fine enough for the maximum to 1e-8
    spread = np.full_like(share, 2 * math.log(num_classes / 2))
    if T == 1:
        spread += np.log(share / (1 - share))
        deep = (num_classes - 1) * math.exp(-depth)
    elif T > 1:
        spread += (T - 1) * math.log(num_student_classes - 1) - T * np.log(share * (1 - share))
        spread += 2 * np.log(share**T + (1 - share) ** T)
        deep = num_student_classes * ((num_classes - 1) * math.exp(-depth) / num_student_classes) ** (1 / T)
    else:
        spread += 2 * (1 - T) * math.log(num_student_classes) - T * np.log(share * (1 - share))
        deep = num_student_classes * (num_classes - 1) * math.exp(-depth) / T
    largest = float((share * (1 - share) * np.sqrt(2 * np.maximum(spread, 0))).max())
    rounding = math.sqrt(depth) / steps * largest / T + depth / (4 * steps**2 * T)
    return min(1.0, rounding + deep) + FLOAT32_SLACK
