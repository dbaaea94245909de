"""
Rounding of soft targets of many classes, which moves at most `simplex.MOST_MOVED` of any pixel's probability.

Where every class has an error within 1/255, twenty classes and more can add up to more than that. A level of 8 bits therefore has
`PARTS` parts. Most pixels are rounded to whole levels, whose zeros in the lower byte cost little; those that this would move too much of
are rounded to the coarsest step that does not.

Not covered: fewer classes, or other numbers of bits (see `steady_rounding.py` and `simplex.py`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdpipe.cache.encoding import simplex

# With N levels and C classes, rounding by largest remainder moves at most C / (4 N): half of the classes by half a level. At 8 bits and
# as many classes that is 1.96 %, with one more 2.06 %.
FEW = 19
PARTS = 256
STEPS = (256, 16, 1)  # in parts; 16 are enough for 325 classes, and one for 5200


def levels_of(bits: int, num_classes: int) -> int:
    """The sum of a pixel's integers: that of `simplex.levels_of`, with 8 bits of many classes `PARTS` times as much."""
    parts = PARTS if bits == 8 and num_classes > FEW else 1
    return parts * simplex.levels_of(bits, num_classes)


def encode(probs_CHW: NDArray[np.float32], levels: int) -> NDArray[np.uint16]:
    """
    Fixed-point integers `(C, H, W)`, uint16, that sum to `levels` over axis 0.

    `probs_CHW` is float32 in 0..1 and sums to one over axis 0; `ValueError` otherwise. Each pixel is rounded by largest remainder, to
    multiples of the first of `STEPS` that moves no more than `simplex.MOST_MOVED` of it.
    """
    stored_CHW = np.empty(probs_CHW.shape, dtype=np.uint16)
    for rows in simplex.bands(*probs_CHW.shape[1:], num_classes=len(probs_CHW)):
        band_ChW, out_ChW = probs_CHW[:, rows], stored_CHW[:, rows]
        out_ChW[:] = _rounded(band_ChW, levels, STEPS[0])
        for step in STEPS[1:]:
            finer_hW = simplex.moves_too_much(band_ChW, out_ChW, levels)
            if not finer_hW.any():
                break
            out_ChW[:, finer_hW] = _rounded(band_ChW[:, finer_hW][:, None], levels, step)[:, 0]
    return stored_CHW


def _rounded(probs_CHW: NDArray[np.float32], levels: int, step: int) -> NDArray[Any]:
    units_CHW: NDArray[Any] = simplex.encode(probs_CHW, levels // step).astype(np.uint16)
    units_CHW *= np.uint16(step)
    return units_CHW
