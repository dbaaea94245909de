"""
Logits as integers, from which the soft target follows for any temperature and any class map.

Softmax sees no more of a pixel's logits than how far each lies below the largest. That depth `d` is stored as `2**bits - 1 - k`
with `d = D (k / (2**bits - 1))²`: steps are small near the largest logit, where a step moves probabilities, and wide where
little probability is left. The largest logit of every pixel is `2**bits - 1`, which missing data are not.

Not covered: where the integers are stored (see `layout.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdpipe.cache.encoding.simplex import FLOAT32_SLACK, bands, total

# D: the depth below which all is the same, in nats. At T 4 a class that lies there has at most exp(-8) and exp(-16) of the
# likeliest one's probability. A real teacher's logits reach down to 13; with 8 bits, a larger D costs accuracy (bound ~ √D).
DEPTH = {8: 32.0, 16: 64.0}
LOGIT_SLACK = 1e-5  # of float32 at that depth


@dataclass(frozen=True)
class Softening:
    """
    How logits become a soft target: `softmax(z / temperature) @ class_map`.

    `class_map` is float32 `(C_t, C_s)`, rows in the order of the cache's channels, each of which sums to one.
    """

    temperature: float
    class_map: NDArray[np.float32]


def encode(logits_CHW: NDArray[np.float32], bits: int) -> NDArray[Any]:
    """
    Integers `(C, H, W)`, uint8 or uint16, of logits, float32: the largest of a pixel is `2**bits - 1`.

    Raises `ValueError` for logits that are not finite.
    """
    if not np.isfinite(logits_CHW).all():
        raise ValueError("logits must be finite")
    stored_CHW: NDArray[Any] = np.empty(logits_CHW.shape, dtype=np.uint8 if bits <= 8 else np.uint16)
    for rows in bands(*logits_CHW.shape[1:]):
        exact_CHW = logits_CHW[:, rows].astype(np.float64)
        depth_CHW = exact_CHW.max(axis=0) - exact_CHW
        stored_CHW[:, rows] = total(bits) - np.rint(total(bits) * np.sqrt(np.minimum(depth_CHW / DEPTH[bits], 1)))
    return stored_CHW


def decode(units_CHW: NDArray[Any], bits: int) -> NDArray[np.float32]:
    """Logits `(C, H, W)`, float32, of which the largest of every pixel is zero."""
    logits_CHW: NDArray[np.float32] = np.subtract(np.float32(total(bits)), units_CHW, order="C")
    logits_CHW *= logits_CHW
    logits_CHW *= np.float32(-DEPTH[bits] / total(bits) ** 2)
    return logits_CHW


def soft_targets(units_CHW: NDArray[Any], bits: int, softening: Softening) -> NDArray[np.float32]:
    """Soft targets `(C_s, H, W)`, float32, that sum to one over axis 0, of stored integers `(C_t, H, W)`."""
    weights_THW = decode(units_CHW, bits)
    weights_THW /= np.float32(softening.temperature)
    np.exp(weights_THW, out=weights_THW)  # a third of the time of looking them up
    targets_SHW: NDArray[np.float32] = np.tensordot(softening.class_map.T, weights_THW, axes=1)
    targets_SHW /= weights_THW.sum(axis=0)
    return targets_SHW


def has_largest(units_CHW: NDArray[Any], bits: int) -> bool:
    """Whether every pixel has a class of the largest logit: zeros read in the place of missing data have none."""
    return bool((units_CHW.max(axis=0) == total(bits)).all())


def logit_bound(bits: int) -> float:
    """
    The largest possible error of a decoded logit below the pixel's largest, of those that are not deeper than `DEPTH`.

    With `u = N √(d / D)` and `|u - k| <= 1/2`: `|d - d_k| = D / N² |u - k| (u + k) <= √(d D) / N + D / (4 N²)`.
    """
    return DEPTH[bits] / total(bits) * (1 + 1 / (4 * total(bits))) + LOGIT_SLACK


def error_bound(bits: int, num_classes: int, temperature: float) -> float:
    """
    The largest possible `|decoded - p|` of any probability after softmax at a temperature and any class map.

    FORMAT.md derives it: `√D / N · K / √T + D / (4 N² T)` for rounding, with `K` the largest value of
    `P (1 - P) √(2 ln(C² P / (4 (1 - P))))` over P, and `(C - 1) exp(-D / T)` for what is deeper than D.
    """
    depth, steps = DEPTH[bits], total(bits)
    share = np.linspace(0, 1, 10_001)[1:-1]  # so fine that its largest value is that of all P to 1e-8
    spread = np.log(num_classes**2 / 4 * share / (1 - share))
    largest = float((share * (1 - share) * np.sqrt(2 * np.maximum(spread, 0))).max())
    rounding = math.sqrt(depth / temperature) / steps * largest + depth / (4 * steps**2 * temperature)
    return min(1.0, rounding + (num_classes - 1) * math.exp(-depth / temperature)) + FLOAT32_SLACK
