"""
Probabilities as integers that sum exactly to `2**bits - 1`, so that a decoded target sums to one.

Not covered: where the integers are stored (see `layout.py`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# A float32 softmax over tens of classes, times a class map, sums to one within a few 1e-7.
SUM_TOLERANCE = 1e-4
# Rounding of float32 in p * (2**bits - 1), in the quotient at decoding and in the sum of the input, together.
FLOAT32_SLACK = 1e-6
# Over crops of real tiles at scales of 0.5 to 1.5, largest error of a crop's entropy at 8 bits, in nats: 8e-3 with one
# value a tile, 1.6e-3 with blocks of 128 px, 5e-4 with 64 px and no less with one value a pixel (interpolation is the rest).
ENTROPY_BLOCK_PX = 64
# Pixels whose intermediates are held at once, some 120 bytes each: without bands, 12 GB for a scene of 100 megapixels.
BAND_PX = 2**20


def total(bits: int) -> int:
    """What the integers of a pixel sum to."""
    return (1 << bits) - 1


def error_bound(bits: int, num_classes: int) -> float:
    """
    The largest possible `|decoded - p|` of any entry.

    Largest-remainder rounding hands the `r` missing units to the `r` largest fractional parts. The worst case is that all
    are equal to `r / C`, and then the error is at most `1 - 1 / C` units.
    """
    return (1 - 1 / num_classes) / total(bits) + FLOAT32_SLACK


def encode(probs_CHW: NDArray[np.float32], bits: int) -> NDArray[Any]:
    """
    Fixed-point integers `(C, H, W)`, uint8 or uint16, that sum to `2**bits - 1` over axis 0.

    `probs_CHW` is float32 in 0..1 and sums to one over axis 0. Rounded by largest remainder (Hamilton's method); of equal
    remainders the lower class index wins, so that the result is deterministic.

    Raises `ValueError` for entries that are not a distribution.
    """
    stored_CHW: NDArray[Any] = np.empty(probs_CHW.shape, dtype=np.uint8 if bits <= 8 else np.uint16)
    for rows in bands(*probs_CHW.shape[1:]):
        stored_CHW[:, rows] = _encode_band(probs_CHW[:, rows], bits)
    return stored_CHW


def _encode_band(probs_CHW: NDArray[np.float32], bits: int) -> NDArray[np.int32]:
    num_classes = probs_CHW.shape[0]
    sums_HW = probs_CHW.sum(axis=0)
    # Negated, so that NaN is refused as well.
    if not (np.abs(sums_HW - 1).max(initial=0) <= SUM_TOLERANCE and probs_CHW.min(initial=0) >= -SUM_TOLERANCE):
        raise ValueError("soft targets must be distributions over axis 0: finite, not negative, summing to one")
    scaled_CHW = np.clip(probs_CHW, 0, 1, dtype=np.float32) * np.float32(total(bits))
    floors_CHW = np.floor(scaled_CHW)
    remainders_CHW = scaled_CHW - floors_CHW
    units_CHW: NDArray[np.int32] = floors_CHW.astype(np.int32)
    missing_HW = total(bits) - units_CHW.sum(axis=0)
    rank_HW = np.empty(missing_HW.shape, dtype=np.int32)
    for i in range(num_classes):
        rank_HW[:] = 0
        for j in range(num_classes):
            if j < i:
                rank_HW += remainders_CHW[j] >= remainders_CHW[i]
            elif j > i:
                rank_HW += remainders_CHW[j] > remainders_CHW[i]
        units_CHW[i] += rank_HW < missing_HW
    return units_CHW


def bands(height: int, width: int) -> list[slice]:
    """Rows of whole blocks, about `BAND_PX` pixels at a time."""
    rows = max(1, BAND_PX // (ENTROPY_BLOCK_PX * max(1, width))) * ENTROPY_BLOCK_PX
    return [slice(top, top + rows) for top in range(0, height, rows)]


def decode(units_CHW: NDArray[Any], bits: int) -> NDArray[np.float32]:
    """Probabilities `(C, H, W)`, float32: each integer divided by `2**bits - 1`."""
    return units_CHW.astype(np.float32) / np.float32(total(bits))


def entropy_error(probs_CHW: NDArray[np.float32], units_CHW: NDArray[Any], bits: int) -> NDArray[np.float64]:
    """
    `H(p) - H(decoded)` in nats, the mean over each block of `ENTROPY_BLOCK_PX`: what rounding takes from the entropy.

    Float64 `(ceil(H / block), ceil(W / block))`; blocks at the right and lower border are as small as the tile leaves them.
    Rounding leaves `Σ p log q` as it is on average, but not `Σ p log p`: a probability below half a unit becomes zero.
    The entropy is a constant to the student, so that no gradient suffers; the loss's value is off by this much.
    """
    size = probs_CHW.shape[1:]
    return np.concatenate([_entropy_error_band(probs_CHW[:, rows], units_CHW[:, rows], bits) for rows in bands(*size)])


def _entropy_error_band(probs_CHW: NDArray[np.float32], units_CHW: NDArray[Any], bits: int) -> NDArray[np.float64]:
    levels = np.arange(total(bits) + 1, dtype=np.float64) / total(bits)
    stored = (levels * np.log(np.where(levels > 0, levels, 1))).astype(np.float32)
    exact_HW = (probs_CHW * np.log(np.maximum(probs_CHW, np.float32(1e-30)))).sum(axis=0)
    lost_HW = stored[units_CHW].sum(axis=0) - exact_HW
    rows, columns = (np.arange(0, side, ENTROPY_BLOCK_PX) for side in lost_HW.shape)
    sums = np.add.reduceat(np.add.reduceat(lost_HW, rows, axis=0, dtype=np.float64), columns, axis=1)
    pixels = np.outer(
        *(np.diff(starts, append=side) for starts, side in zip((rows, columns), lost_HW.shape, strict=True))
    )
    means: NDArray[np.float64] = sums / pixels
    return means


def mean_over_window(blocks: NDArray[np.float64], window: tuple[int, int, int, int]) -> float:
    """
    The mean over the pixels of `(top, left, height, width)` of what `blocks`, as `entropy_error` gives them, says of each.

    A block that the window cuts counts with the pixels that lie in the window.
    """
    top, left, height, width = window
    shares = [
        np.bincount(np.arange(start, start + length) // ENTROPY_BLOCK_PX, minlength=count) / length
        for start, length, count in zip((top, left), (height, width), blocks.shape, strict=True)
    ]
    return float(shares[0] @ blocks @ shares[1])


def mean_over_pixels(blocks: NDArray[np.float64], pixels_HW: NDArray[np.bool_]) -> float:
    """As `mean_over_window`, over the pixels of the tile that are True."""
    rows, columns = (np.arange(0, side, ENTROPY_BLOCK_PX) for side in pixels_HW.shape)
    counts = np.add.reduceat(np.add.reduceat(pixels_HW, rows, axis=0, dtype=np.int64), columns, axis=1)
    return float((counts * blocks).sum() / counts.sum())


def is_simplex(units_CHW: NDArray[Any], bits: int) -> bool:
    """Whether every pixel sums to `2**bits - 1`: zeros read in the place of missing data do not."""
    return bool((units_CHW.sum(axis=0, dtype=np.uint32) == total(bits)).all())
