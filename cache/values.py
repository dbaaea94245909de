"""What the integers of a cache stand for, by its kind: how they are made of the teacher's answer, and what comes back."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdpipe.cache import logits, rest, simplex
from kdpipe.cache.logits import DEPTH, Softening
from kdpipe.cache.manifest import CacheRecipe, LogitsRecipe, Manifest, Recipe


def encode(values_CHW: NDArray[np.float32], recipe: CacheRecipe) -> tuple[NDArray[Any], NDArray[np.float64] | None]:
    """
    The integers of a tile to store, and what rounding took from the entropy (None where that depends on a temperature to come).

    `values_CHW` is float32: soft targets, or logits if that is the recipe's kind. Raises `ValueError` where they are not.
    """
    assert values_CHW.shape[0] == len(recipe.channels), f"{values_CHW.shape} for {recipe.channels}"
    if isinstance(recipe, LogitsRecipe):
        return logits.encode(values_CHW, recipe.bits), None
    units_CHW = simplex.encode(values_CHW, recipe.levels)
    lost = simplex.entropy_error(values_CHW, units_CHW, recipe.levels)
    if isinstance(recipe, Recipe):
        rest.leave_out(units_CHW, recipe.chunk_px)
    return units_CHW, lost


def units(stored_CHW: NDArray[Any], recipe: CacheRecipe, corner: tuple[int, int] = (0, 0)) -> NDArray[Any]:
    """
    The integers of all classes, of those that are stored, which are overwritten; `corner` is where in the tile the first pixel lies.

    Raises `ValueError`, saying what is wrong, for what no tile can have, such as the zeros of a missing chunk.
    """
    if isinstance(recipe, Recipe):
        rest.fill_in(stored_CHW, recipe.levels, recipe.chunk_px, corner)
    elif isinstance(recipe, LogitsRecipe):
        if not logits.has_largest(stored_CHW, recipe.bits):
            raise ValueError("pixels have no class of the largest logit")
    elif not simplex.is_simplex(stored_CHW, recipe.levels):
        raise ValueError("its values do not sum to one")
    return stored_CHW


def soft_targets(units_CHW: NDArray[Any], recipe: CacheRecipe, softening: Softening | None) -> NDArray[np.float32]:
    """Soft targets, float32, that sum to one over axis 0; `softening` is what a cache of logits needs and no other has."""
    if isinstance(recipe, LogitsRecipe):
        assert softening is not None
        return logits.soft_targets(units_CHW, recipe.bits, softening)
    return simplex.decode(units_CHW, recipe.levels)


def error_bound(recipe: CacheRecipe) -> float:
    """What the manifest states: the largest possible error of a stored probability, or of a stored logit."""
    if isinstance(recipe, LogitsRecipe):
        return logits.logit_bound(recipe.bits)
    return simplex.error_bound(recipe.levels, len(recipe.classes))


def probability_bound(manifest: Manifest, temperature: float) -> float:
    """The largest possible error of a soft target's entry; of logits it depends on the temperature that they are read at."""
    recipe = manifest.recipe
    if isinstance(recipe, LogitsRecipe):
        return logits.error_bound(recipe.bits, len(recipe.channels), temperature)
    return manifest.error_bound


def decoding(recipe: CacheRecipe) -> str:
    """For whoever opens the cache with another program: how a value is read."""
    if isinstance(recipe, LogitsRecipe):
        top = simplex.total(recipe.bits)
        return f"z = -{DEPTH[recipe.bits]:g} * (({top} - value) / {top})**2; p = softmax(z / T); axes: teacher class, row, column"
    scale = f"p = value / {recipe.levels}; "
    if isinstance(recipe, Recipe):
        mark = np.iinfo(recipe.dtype).max
        scale += f"{mark} is what the pixel's other values leave of {recipe.levels}; "
    return f"{scale}axes: class, row, column"
