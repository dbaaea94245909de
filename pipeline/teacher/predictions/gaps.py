"""Soft targets for training that are none where a tile has no prediction."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kdpipe.cache import SoftTargetCache


class WithoutGaps:
    """The soft targets of a cache, zero in all classes of a pixel without a target, which the loss then leaves out."""

    def __init__(self, cache: SoftTargetCache) -> None:
        self._cache = cache

    def read(self, tile_id: str, window: tuple[int, int, int, int]) -> NDArray[np.float32]:
        """`SoftTargetCache.read`, zero in pixels without a target."""
        probs_CHW = self._cache.read(tile_id, window)
        gaps_HW = self._cache.gaps(tile_id, window)
        if gaps_HW is not None:
            probs_CHW[:, gaps_HW] = 0
        return probs_CHW

    def entropy_error(self, tile_id: str, window: tuple[int, int, int, int]) -> float:
        """`SoftTargetCache.entropy_error`."""
        return self._cache.entropy_error(tile_id, window)
