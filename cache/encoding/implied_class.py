"""
One class of every pixel left unsaid: the values of a pixel sum to a known number, so that the others say it.

Not covered: how probabilities become integers (see `simplex.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray


def leave_out(units_CHW: NDArray[Any], chunk_px: int) -> None:
    """
    Put the largest value of the data type, which no probability has, in the place of one class in each chunk, in place.

    That is the class that changes most often from one row to the next, the lowest of equals: about the one that costs most.
    """
    for rows, columns in _squares((0, 0), units_CHW, chunk_px):
        chunk_Chw = units_CHW[:, rows, columns]
        changes_C = np.count_nonzero(chunk_Chw[:, 1:] != chunk_Chw[:, :-1], axis=(1, 2))
        chunk_Chw[changes_C.argmax()] = np.iinfo(units_CHW.dtype).max


def fill_in(stored_CHW: NDArray[Any], levels: int, chunk_px: int, corner: tuple[int, int] = (0, 0)) -> None:
    """
    Put into the place of the class that `leave_out` left, in place, what the others leave of `levels`.

    `corner` is where in the tile the upper left pixel lies. Raises `ValueError` where a chunk has not exactly one class left out,
    as in zeros read in the place of missing data, or where the others of a pixel sum to more than `levels`.
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
    # OpenCV's sums end at the largest value, which is more than `levels`, instead of beginning anew at zero.
    sums_HW = cv2.add(stored_CHW[0], stored_CHW[1])
    for values_HW in stored_CHW[2:]:
        cv2.add(sums_HW, values_HW, dst=sums_HW)
    if sums_HW.max() > levels:
        raise ValueError("its values do not sum to one")
    rest_HW = np.subtract(levels, sums_HW, out=sums_HW)
    for rows, columns, class_hw in left_out:
        class_hw[...] = rest_HW[rows, columns]


def _squares(corner: tuple[int, int], window_CHW: NDArray[Any], chunk_px: int) -> Iterator[tuple[slice, ...]]:
    """Where the chunks lie in a window whose upper left pixel is at `corner` of the tile: rows and columns."""
    sides = []
    for start, length in zip(corner, window_CHW.shape[1:], strict=True):
        cuts = [0, *range(chunk_px - start % chunk_px, length, chunk_px), length]
        sides.append([slice(*ends) for ends in itertools.pairwise(cuts)])
    return itertools.product(*sides)
