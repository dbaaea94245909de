"""
Probabilities as integers that sum exactly to a number of levels, so that a decoded target sums to one.

Not covered: which of the integers are stored (see `implied_class.py` and `row_deltas.py`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# A float32 softmax over tens of classes, times a class map, sums to one within a few 1e-7.
SUM_TOLERANCE = 1e-4
# In units: where a pixel's entries sum to more or less than this off, they are divided by their sum. With less, largest remainder has
# from none to all of the classes to serve.
MOST_OFF = 0.5
# Rounding errors of float32 together: in p * (2**bits - 1), in the quotient at decoding, and in the sum of the input.
FLOAT32_SLACK = 1e-6
# Largest error of a crop's entropy in nats, measured at 8 bits over crops of real tiles at scales of 0.5 to 1.5: 8e-3 with one
# value a tile, 1.6e-3 with blocks of 128 px, 5e-4 with 64 px, and the same with one value a pixel (due to interpolation).
ENTROPY_BLOCK_PX = 64
# Pixels of up to `BAND_CLASSES` classes that are processed at once, at some 120 bytes each (fewer of more classes): all at once, a
# scene of 100 megapixels takes 12 GB. This many fit in a core's cache.
BAND_PX, BAND_CLASSES = 2**18, 8
# Above as many classes remainders are sorted instead of compared in pairs: the same result, at 150 classes in a fortieth of the time.
MOST_PAIRED = 16
# The largest share of a pixel's probability, as total variation, that 8 bits move from one class to another. A student of 150 classes
# whose every entry is within 1/255 could otherwise be taught a distribution that is off by 15 %.
MOST_MOVED = 0.02


def total(bits: int) -> int:
    """The largest integer of this many bits."""
    return (1 << bits) - 1


def levels_of(bits: int, num_classes: int) -> int:
    """
    N, the sum of a pixel's integers: the fewest levels that keep every error within `1 / (2**bits - 1)` (see `error_bound`).

    Fewer levels take fewer bytes: 213 instead of 255 for six classes and 8 bits. The largest value of the data type is never
    reached, as it marks the implied class; this only matters for 255 classes and more.
    """
    fewest = -(-(num_classes - 1) * total(bits) // num_classes)
    return min(fewest, np.iinfo(storage_type(bits)).max - 1)


def storage_type(bits: int) -> np.dtype[Any]:
    """The data type of integers of this many bits: uint8 or uint16."""
    return np.dtype(np.uint8 if bits <= 8 else np.uint16)


def error_bound(levels: int, num_classes: int) -> float:
    """
    The largest possible `|decoded - p|` of a target rounded by `encode`, as at 16 bits; fewer bits use `steady_rounding`.

    Largest-remainder rounding gives the `r` missing units to the `r` largest fractional parts. In the worst case all are equal
    to `r / C`, and then the error is at most `1 - 1 / C` units.
    """
    return (1 - 1 / num_classes) / levels + FLOAT32_SLACK


def encode(probs_CHW: NDArray[np.float32], levels: int) -> NDArray[Any]:
    """
    Fixed-point integers `(C, H, W)`, uint8 or uint16, that sum to `levels` over axis 0.

    `probs_CHW` is float32 in 0..1 and sums to one over axis 0. Rounded by largest remainder (Hamilton's method); of equal
    remainders the lower class index wins, so that the result is deterministic.

    Raises `ValueError` for entries that are not a distribution.
    """
    refuse_other_than_distributions(probs_CHW)
    stored_CHW: NDArray[Any] = np.empty(probs_CHW.shape, dtype=np.min_scalar_type(levels))
    for rows in bands(*probs_CHW.shape[1:], num_classes=len(probs_CHW)):
        _encode_band(probs_CHW[:, rows], levels, out_CHW=stored_CHW[:, rows])
    return stored_CHW


def refuse_other_than_distributions(probs_CHW: NDArray[np.float32]) -> None:
    """Raise `ValueError` unless all entries are finite, not negative, and sum to one over axis 0."""
    for rows in bands(*probs_CHW.shape[1:]):
        off = np.abs(probs_CHW[:, rows].sum(axis=0) - 1).max(initial=0)
        # Negated, so that NaN is refused as well.
        if not (off <= SUM_TOLERANCE and probs_CHW[:, rows].min(initial=0) >= -SUM_TOLERANCE):
            raise ValueError("soft targets must be distributions over axis 0: finite, not negative, summing to one")


def _encode_band(probs_CHW: NDArray[np.float32], levels: int, out_CHW: NDArray[Any]) -> None:
    if levels * SUM_TOLERANCE > MOST_OFF:  # then entries may sum to too much or too little to be made up for
        sums_HW = probs_CHW.sum(axis=0)
        off_HW = np.abs(sums_HW - 1) * levels > MOST_OFF
        if off_HW.any():
            sums_HW[~off_HW] = 1
            probs_CHW = np.divide(probs_CHW, sums_HW)
    remainders_CHW = np.clip(probs_CHW, 0, 1, dtype=np.float32) * np.float32(levels)
    floors_CHW = np.floor(remainders_CHW)
    remainders_CHW -= floors_CHW
    out_CHW[:] = floors_CHW
    # int16 is fast, and enough: flooring takes less than one unit a class.
    missing_HW = (levels - floors_CHW.sum(axis=0)).astype(np.int16)
    served = _paired if len(probs_CHW) <= MOST_PAIRED else _sorted
    out_CHW += served(remainders_CHW, missing_HW)


def _paired(remainders_CHW: NDArray[np.float32], missing_HW: NDArray[np.int16]) -> NDArray[np.bool_]:
    """Which classes get one of the missing units of each pixel: those of the largest remainders, the lower of equals first."""
    rank_CHW = np.zeros(remainders_CHW.shape, dtype=np.int16)  # how many classes are served before
    for i in range(len(remainders_CHW)):
        for j in range(i):
            lower_first_HW = remainders_CHW[j] >= remainders_CHW[i]
            rank_CHW[i] += lower_first_HW
            rank_CHW[j] += ~lower_first_HW
    served_CHW: NDArray[np.bool_] = rank_CHW < missing_HW
    return served_CHW


def _sorted(remainders_CHW: NDArray[np.float32], missing_HW: NDArray[np.int16]) -> NDArray[np.bool_]:
    """The result of `_paired`, for many classes."""
    rising_HWC = np.sort(np.moveaxis(remainders_CHW, 0, -1))
    last_HW1 = len(remainders_CHW) - np.clip(missing_HW, 1, None)[:, :, None].astype(np.int64)
    least_HW = np.take_along_axis(rising_HWC, last_HW1, axis=-1)[:, :, 0]  # the smallest remainder that is served
    least_HW[missing_HW < 1] = np.inf
    served_CHW = remainders_CHW > least_HW
    equal_CHW = remainders_CHW == least_HW
    left_HW = missing_HW - served_CHW.sum(axis=0, dtype=np.int16)
    served_CHW |= equal_CHW & (equal_CHW.cumsum(axis=0, dtype=np.int16) <= left_HW)
    return served_CHW


def moves_too_much(probs_CHW: NDArray[np.float32], units_CHW: NDArray[Any], levels: int) -> NDArray[np.bool_]:
    """Pixels `(H, W)` in which `units_CHW` move more than `MOST_MOVED` of the probability: half the sum of `|decoded - p|`."""
    moved_HW = np.zeros(probs_CHW.shape[1:], dtype=np.float32)
    for probs_HW, units_HW in zip(probs_CHW, units_CHW, strict=True):  # in this order, as on other devices
        moved_HW += np.abs(probs_HW * np.float32(levels) - units_HW)
    too_much_HW: NDArray[np.bool_] = moved_HW > np.float32(2 * MOST_MOVED * levels)
    return too_much_HW


def bands(height: int, width: int, *, num_classes: int = BAND_CLASSES) -> list[slice]:
    """Slices of rows that cover `height`, each of whole blocks and about `BAND_PX` pixels, or fewer of many classes."""
    pixels = BAND_PX * BAND_CLASSES // max(BAND_CLASSES, num_classes)
    rows = max(1, pixels // (ENTROPY_BLOCK_PX * max(1, width))) * ENTROPY_BLOCK_PX
    return [slice(top, top + rows) for top in range(0, height, rows)]


def decode(units_CHW: NDArray[Any], levels: int) -> NDArray[np.float32]:
    """Probabilities `(C, H, W)`, float32: each integer divided by `levels`."""
    probs_CHW = np.empty(units_CHW.shape, dtype=np.float32)
    for probs_HW, units_HW in zip(probs_CHW, units_CHW, strict=True):  # class by class, while it is in the core's cache
        np.divide(units_HW, np.float32(levels), out=probs_HW, dtype=np.float32)
    return probs_CHW


def entropy_error(probs_CHW: NDArray[np.float32], units_CHW: NDArray[Any], levels: int) -> NDArray[np.float64]:
    """
    `H(p) - H(decoded p)` in nats, float64 `(ceil(H / block), ceil(W / block))`: the mean over each block of `ENTROPY_BLOCK_PX`.

    Blocks at the right and lower border are as small as the tile leaves them. Rounding preserves `Σ p log q` on average, but not
    `Σ p log p`: a probability below half a unit becomes zero. The student does not change this entropy, so gradients are not
    affected; the loss's value is off by this much.
    """
    size = probs_CHW.shape[1:]
    return np.concatenate(
        [_entropy_error_band(probs_CHW[:, rows], units_CHW[:, rows], levels) for rows in bands(*size)]
    )


def entropy_terms(levels: int) -> NDArray[np.float32]:
    """`q log q`, float32, of each integer from 0 to `levels`."""
    probs = np.arange(levels + 1, dtype=np.float64) / levels
    terms: NDArray[np.float32] = (probs * np.log(np.where(probs > 0, probs, 1))).astype(np.float32)
    return terms


def _entropy_error_band(probs_CHW: NDArray[np.float32], units_CHW: NDArray[Any], levels: int) -> NDArray[np.float64]:
    terms = entropy_terms(levels)
    lost_HW, wanted_HW = np.zeros((2, *probs_CHW.shape[1:]), dtype=np.float32)
    terms_HW = np.empty_like(lost_HW)
    for probs_HW, units_HW in zip(probs_CHW, units_CHW, strict=True):  # class by class, while it is in the core's cache
        np.maximum(probs_HW, np.float32(1e-30), out=terms_HW)
        np.log(terms_HW, out=terms_HW)
        terms_HW *= probs_HW
        wanted_HW += terms_HW
        # No integer lies beyond the table: "clip" only saves the check.
        lost_HW += terms.take(units_HW, mode="clip", out=terms_HW)
    lost_HW -= wanted_HW
    rows, columns = (np.arange(0, side, ENTROPY_BLOCK_PX) for side in lost_HW.shape)
    sums = np.add.reduceat(np.add.reduceat(lost_HW, rows, axis=0, dtype=np.float64), columns, axis=1)
    pixels = np.outer(
        *(np.diff(starts, append=side) for starts, side in zip((rows, columns), lost_HW.shape, strict=True))
    )
    means: NDArray[np.float64] = sums / pixels
    return means


def mean_over_window(blocks: NDArray[np.float64], window: tuple[int, int, int, int]) -> float:
    """
    The mean of `blocks`, as `entropy_error` returns them, over the pixels of a window `(top, left, height, width)`.

    A block counts with the number of its pixels that lie in the window.
    """
    top, left, height, width = window
    shares = [
        np.bincount(np.arange(start, start + length) // ENTROPY_BLOCK_PX, minlength=count) / length
        for start, length, count in zip((top, left), (height, width), blocks.shape, strict=True)
    ]
    return float(shares[0] @ blocks @ shares[1])


def mean_over_pixels(blocks: NDArray[np.float64], pixels_HW: NDArray[np.bool_]) -> float:
    """The mean of `blocks`, as `entropy_error` returns them, over the pixels of the tile that are True; 0 if none is."""
    rows, columns = (np.arange(0, side, ENTROPY_BLOCK_PX) for side in pixels_HW.shape)
    counts = np.add.reduceat(np.add.reduceat(pixels_HW, rows, axis=0, dtype=np.int64), columns, axis=1)
    return float((counts * blocks).sum() / max(1, counts.sum()))
