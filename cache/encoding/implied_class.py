"""
One class of every pixel is not stored: the values of a pixel sum to a known number, so the others imply it.

Not covered: how probabilities become integers (see `simplex.py` and `steady_rounding.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray


def leave_out(units_CHW: NDArray[Any], chunk_px: int) -> None:
    """
    Replace one class of each chunk by the largest value of the data type, which no probability has, in place.

    It is the class that changes most often from row to row (the lowest of equals), which takes about the most bytes.
    """
    for rows, columns in _squares((0, 0), units_CHW, chunk_px):
        chunk_Chw = units_CHW[:, rows, columns]
        changes_C = np.count_nonzero(chunk_Chw[:, 1:] != chunk_Chw[:, :-1], axis=(1, 2))
        chunk_Chw[changes_C.argmax()] = np.iinfo(units_CHW.dtype).max


def fill_in(stored_CHW: NDArray[Any], levels: int, chunk_px: int, corner: tuple[int, int] = (0, 0)) -> None:
    """
    Fill in the class that `leave_out` replaced, in place: what the other classes leave of `levels`.

    `corner` is the row and column of the first pixel in the tile. Raises `ValueError` where a chunk does not have exactly one
    class left out, like zeros in place of missing data, or the others of a pixel sum to more than `levels`.
    """
    import cv2  # takes 0.1 s

    mark, left_out = np.iinfo(stored_CHW.dtype).max, []
    for rows, columns in _squares(corner, stored_CHW, chunk_px):
        chunk_Chw = stored_CHW[:, rows, columns]
        class_hw = chunk_Chw[chunk_Chw[:, 0, 0].argmax()]
        if class_hw.min() < mark:
            raise ValueError("its values do not sum to one")
        class_hw[...] = 0
        left_out.append((rows, columns, class_hw))
    # OpenCV's sums saturate at the largest value, which is more than `levels`, instead of wrapping around.
    sums_HW = cv2.add(stored_CHW[0], stored_CHW[1])
    for values_HW in stored_CHW[2:]:
        cv2.add(sums_HW, values_HW, dst=sums_HW)
    if sums_HW.max() > levels:
        raise ValueError("its values do not sum to one")
    rest_HW = np.subtract(levels, sums_HW, out=sums_HW)
    for rows, columns, class_hw in left_out:
        class_hw[...] = rest_HW[rows, columns]


def _squares(corner: tuple[int, int], window_CHW: NDArray[Any], chunk_px: int) -> Iterator[tuple[slice, ...]]:
    """Rows and columns of each chunk's part of a window whose first pixel is at `corner` of the tile."""
    sides = []
    for start, length in zip(corner, window_CHW.shape[1:], strict=True):
        cuts = [0, *range(chunk_px - start % chunk_px, length, chunk_px), length]
        sides.append([slice(*ends) for ends in itertools.pairwise(cuts)])
    return itertools.product(*sides)
