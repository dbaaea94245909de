"""Soft targets of stored predictions for training: none where a tile has no prediction."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kdpipe.cache import SoftTargetCache
from kdpipe.cache.recipe import LogitsRecipe
from kdpipe.configs.schema import Config

DECODED_SLACK = 1e-5  # the arithmetic of float32


class WithoutGaps:
    """
    The soft targets of a cache, zero in all classes of a pixel without a prediction, which the loss then leaves out.

    Such a pixel is cached as one whose logits are all zero. A pixel that a program predicted to be of any class alike is no different:
    it teaches nothing about classes, and is left out too.
    """

    def __init__(self, cache: SoftTargetCache, config: Config) -> None:
        self._cache = cache
        power_S = config.class_map_matrix().astype(np.float64).mean(axis=0) ** (1 / config.distill.temperature)
        self._undecided_S11 = (power_S / power_S.sum()).astype(np.float32)[:, None, None]
        recipe = cache.manifest.recipe
        # A stored soft target is one of the two integers beside the exact value.
        self._slack = DECODED_SLACK + (0.0 if isinstance(recipe, LogitsRecipe) else 1 / recipe.levels)

    def read(self, tile_id: str, window: tuple[int, int, int, int]) -> NDArray[np.float32]:
        """`SoftTargetCache.read`, zero in pixels without a prediction."""
        probs_CHW = self._cache.read(tile_id, window)
        gaps_HW = (np.abs(probs_CHW - self._undecided_S11) < self._slack).all(axis=0)
        if gaps_HW.any():
            probs_CHW[:, gaps_HW] = 0
        return probs_CHW

    def entropy_error(self, tile_id: str, window: tuple[int, int, int, int]) -> float:
        """`SoftTargetCache.entropy_error`."""
        return self._cache.entropy_error(tile_id, window)
