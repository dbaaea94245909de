"""What the integers of a cache stand for, by its kind: how they are made of the teacher's answer, and what comes back."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdpipe.cache import logits, simplex
from kdpipe.cache.logits import DEPTH, Softening
from kdpipe.cache.manifest import CacheRecipe, LogitsRecipe, Manifest


def encode(values_CHW: NDArray[np.float32], recipe: CacheRecipe) -> tuple[NDArray[Any], NDArray[np.float64] | None]:
    """
    The integers of a tile, and what rounding took from the entropy (None where that depends on a temperature to come).

    `values_CHW` is float32: soft targets, or logits if that is the recipe's kind. Raises `ValueError` where they are not.
    """
    assert values_CHW.shape[0] == len(recipe.channels), f"{values_CHW.shape} for {recipe.channels}"
    if isinstance(recipe, LogitsRecipe):
        return logits.encode(values_CHW, recipe.bits), None
    units_CHW = simplex.encode(values_CHW, recipe.bits)
    return units_CHW, simplex.entropy_error(values_CHW, units_CHW, recipe.bits)


def soft_targets(units_CHW: NDArray[Any], recipe: CacheRecipe, softening: Softening | None) -> NDArray[np.float32]:
    """Soft targets, float32, that sum to one over axis 0; `softening` is what a cache of logits needs and no other has."""
    if isinstance(recipe, LogitsRecipe):
        assert softening is not None
        return logits.soft_targets(units_CHW, recipe.bits, softening)
    return simplex.decode(units_CHW, recipe.bits)


def flaw(units_CHW: NDArray[Any], recipe: CacheRecipe) -> str | None:
    """What is wrong with integers that no tile can have, such as the zeros of a missing chunk; None if nothing is."""
    if isinstance(recipe, LogitsRecipe):
        return None if logits.has_largest(units_CHW, recipe.bits) else "pixels have no class of the largest logit"
    return None if simplex.is_simplex(units_CHW, recipe.bits) else "its values do not sum to one"


def error_bound(recipe: CacheRecipe) -> float:
    """What the manifest states: the largest possible error of a stored probability, or of a stored logit."""
    if isinstance(recipe, LogitsRecipe):
        return logits.logit_bound(recipe.bits)
    return simplex.error_bound(recipe.bits, len(recipe.classes))


def probability_bound(manifest: Manifest, temperature: float) -> float:
    """The largest possible error of a soft target's entry; of logits it depends on the temperature that they are read at."""
    recipe = manifest.recipe
    if isinstance(recipe, LogitsRecipe):
        return logits.error_bound(recipe.bits, len(recipe.channels), temperature)
    return manifest.error_bound


def decoding(recipe: CacheRecipe) -> str:
    """For whoever opens the cache with another program: how a value is read."""
    top = simplex.total(recipe.bits)
    if isinstance(recipe, LogitsRecipe):
        return f"z = -{DEPTH[recipe.bits]:g} * (({top} - value) / {top})**2; p = softmax(z / T); axes: teacher class, row, column"
    return f"p = value / {top}; axes: class, row, column"
