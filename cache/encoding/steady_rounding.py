"""
Rounding of soft targets that changes from row to row as rarely as the error bound allows, so that they compress well.

A value of the row above is kept wherever it is within the tolerance, so that differences between rows are mostly zero (see
`row_deltas.py`). Each block of `KEY_ROW_PX` rows begins with plain rounding and is independent of the others. Kept values lag
behind where probabilities rise or fall, so half of the columns are processed from top to bottom and half from bottom to top, and
the lag cancels out over a crop.

Not covered: plain rounding by largest remainder, and the sum of a pixel's integers (see `simplex.py`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdpipe.cache.encoding import simplex
from kdpipe.cache.encoding.row_deltas import KEY_ROW_PX

STRIPE_PX = 16  # adjacent columns processed in the same direction; 4 px take 1 to 2 % more bytes for the same bias
MAX_BITS = 8  # with more, float32 is too coarse for the tolerance


def error_bound(bits: int, levels: int, num_classes: int) -> float:
    """The largest possible `|decoded - p|` of a target stored at 4, 6 or 8 bits: the tolerance plus the error of float32."""
    return _tolerance(bits, levels, num_classes) + simplex.FLOAT32_SLACK


def encode(probs_CHW: NDArray[np.float32], bits: int, levels: int) -> NDArray[Any]:
    """
    Fixed-point integers `(C, H, W)`, uint8, that sum to `levels` over axis 0, none off by more than `error_bound`.

    Pixels that 8 bits would move too much of (see `simplex.MOST_MOVED`; only with more than ten classes) are rounded plainly.

    `probs_CHW` is float32 in 0..1 and sums to one over axis 0; `ValueError` otherwise. The first row processed in each block (the
    top one, or the bottom one in columns processed upwards) is rounded as in `simplex.encode`.
    """
    simplex.refuse_other_than_distributions(probs_CHW)
    stored_CHW: NDArray[Any] = np.empty(probs_CHW.shape, dtype=simplex.storage_type(bits))
    room_units = room(bits, levels, len(probs_CHW))
    for rows in simplex.bands(*probs_CHW.shape[1:], num_classes=len(probs_CHW)):
        band_ChW, out_ChW = probs_CHW[:, rows], stored_CHW[:, rows]
        whole = band_ChW.shape[1] - band_ChW.shape[1] % KEY_ROW_PX
        for part in (slice(0, whole), slice(whole, None)):
            if out_ChW[:, part].size:
                _encode_blocks(band_ChW[:, part], levels, room_units, out_CHW=out_ChW[:, part])
        if may_move_too_much(bits, levels, len(probs_CHW)):
            plainly_hW = simplex.moves_too_much(band_ChW, out_ChW, levels)
            out_ChW[:, plainly_hW] = simplex.encode(band_ChW[:, plainly_hW][:, None], levels)[:, 0]
    return stored_CHW


def may_move_too_much(bits: int, levels: int, num_classes: int) -> bool:
    """Whether integers within the tolerance can move more of a pixel than 8 bits promise; fewer bits promise nothing."""
    return bits == MAX_BITS and num_classes * _tolerance(bits, levels, num_classes) / 2 > simplex.MOST_MOVED


def room(bits: int, levels: int, num_classes: int) -> np.float32:
    """The tolerance in units: how far an integer may be from the exact value."""
    return np.float32(_tolerance(bits, levels, num_classes) * levels)


def _tolerance(bits: int, levels: int, num_classes: int) -> float:
    """
    The larger of `1 / (2**bits - 1)` and the worst error of plain rounding.

    With less, some pixels could not be made to sum to `levels`.
    """
    return max(1 / simplex.total(bits), (1 - 1 / num_classes) / levels)


def _encode_blocks(probs_CHW: NDArray[np.float32], levels: int, room: np.float32, out_CHW: NDArray[Any]) -> None:
    """
    Encode blocks of equal height, row by row in all of them at once, into `out_CHW`.

    Kept values rarely sum to `levels`. The likeliest classes of a block are adjusted first: the more classes stay as they are,
    the fewer bytes. Shapes: K blocks, R rows of a block in the order of processing.
    """
    num_classes, height, width = probs_CHW.shape
    rows = min(KEY_ROW_PX, height)
    # Entries are at least -1e-4 (`SUM_TOLERANCE`), so these values are positive, or so close to zero that truncation gives 0. For
    # all others truncation rounds down.
    scaled_CKRW = probs_CHW.reshape(num_classes, -1, rows, width) * np.float32(levels)
    scaled_CKRW += room
    highest_CKRW = scaled_CKRW.astype(np.int16)
    # ceil(scaled - room) is computed as floor(scaled - room) + 1. For an exact integer this is one too high, but still within the
    # tolerance.
    scaled_CKRW += 1 - 2 * room
    # Integer sums are exact, so the order of a block's classes does not depend on which blocks are encoded with it. A column's sum
    # within one block fits in int16.
    sums_CK = highest_CKRW.sum(axis=2, dtype=np.int16).sum(axis=2, dtype=np.int64)
    order_KC = (-sums_CK.T).argsort(axis=1, kind="stable")
    upwards_W = np.arange(width) // STRIPE_PX % 2 == 1
    lowest_RCKW, highest_RCKW = _by_rows(scaled_CKRW, order_KC), _by_rows(highest_CKRW, order_KC)
    _turn(lowest_RCKW, upwards_W)
    _turn(highest_RCKW, upwards_W)

    def row_of_blocks(row: int) -> NDArray[np.float32]:
        return np.where(upwards_W, probs_CHW[:, rows - 1 - row :: rows], probs_CHW[:, row::rows])

    plain_CKW = simplex.encode(row_of_blocks(0), levels)
    units_RCKW = np.empty_like(lowest_RCKW)
    for block, order in enumerate(order_KC):
        units_RCKW[0, :, block] = plain_CKW[order, block]
    for row in range(1, rows):
        units_CKW = np.maximum(units_RCKW[row - 1], lowest_RCKW[row], out=units_RCKW[row])
        np.minimum(units_CKW, highest_RCKW[row], out=units_CKW)
        excess_KW = units_CKW.sum(axis=0, dtype=np.int16) - np.int16(levels)
        for units_KW, lowest_KW, highest_KW in zip(units_CKW, lowest_RCKW[row], highest_RCKW[row], strict=True):
            wanted_KW = units_KW - excess_KW
            np.maximum(wanted_KW, lowest_KW, out=units_KW)
            np.minimum(units_KW, highest_KW, out=units_KW)
            np.subtract(units_KW, wanted_KW, out=excess_KW)
        if excess_KW.any():  # entries that sum to a little more or less than one may leave no room
            stuck = np.nonzero(excess_KW)
            plain_Cn = simplex.encode(row_of_blocks(row)[:, stuck[0], stuck[1]][:, None], levels)[:, 0]
            units_CKW[:, stuck[0], stuck[1]] = np.take_along_axis(plain_Cn, order_KC[stuck[0]].T, axis=0)
    _turn(units_RCKW, upwards_W)
    for block, order in enumerate(order_KC):
        top = block * rows
        out_CHW[order, top : top + rows] = units_RCKW[:, :, block].transpose(1, 0, 2)


def _by_rows(values_CKRW: NDArray[Any], order_KC: NDArray[np.int64]) -> NDArray[np.int16]:
    """The values truncated to integers, with the row as first axis, and the classes of each block in the block's order."""
    num_classes, blocks, rows, width = values_CKRW.shape
    out_RCKW = np.empty((rows, num_classes, blocks, width), dtype=np.int16)
    for block, order in enumerate(order_KC):
        for place, channel in enumerate(order):
            out_RCKW[:, place, block] = values_CKRW[channel, block]
    return out_RCKW


def _turn(values_RCKW: NDArray[np.int16], upwards_W: NDArray[np.bool_]) -> None:
    """Reverse the rows of the columns that are processed upwards, in place."""
    half = len(values_RCKW) // 2
    first_rCKW, last_rCKW = values_RCKW[:half], values_RCKW[::-1][:half]
    changes_rCKW = (first_rCKW ^ last_rCKW) & -upwards_W.astype(np.int16)  # a third of the time of `np.where`
    first_rCKW ^= changes_rCKW
    last_rCKW ^= changes_rCKW
