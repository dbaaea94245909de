"""What the integers of a cache stand for, by its kind: how they are made of the teacher's answer, and what comes back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdpipe.cache.encoding import implied_class as rest
from kdpipe.cache.encoding import logits, simplex
from kdpipe.cache.encoding import row_deltas as key_rows
from kdpipe.cache.encoding import steady_rounding as steady
from kdpipe.cache.encoding.logits import DEPTH, Softening
from kdpipe.cache.manifest import Manifest
from kdpipe.cache.recipe import CacheRecipe, LogitsRecipe, Recipe, ThirdRecipe


def encode(values_CHW: NDArray[np.float32], recipe: CacheRecipe) -> tuple[NDArray[Any], NDArray[np.float64] | None]:
    """
    The integers of a tile to store, and what rounding took from the entropy (None where that depends on a temperature to come).

    `values_CHW` is float32: soft targets, or logits if that is the recipe's kind. Raises `ValueError` where they are not.
    """
    assert values_CHW.shape[0] == len(recipe.channels), f"{values_CHW.shape} for {recipe.channels}"
    return encode_units(*units_of(values_CHW, recipe), recipe)


def units_of(values_CHW: NDArray[np.float32], recipe: CacheRecipe) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """The integers of all classes of a tile, and what rounding took from the entropy, empty for logits."""
    if isinstance(recipe, LogitsRecipe):
        return logits.encode(values_CHW, recipe.bits), np.empty((0, 0))
    if recipe.bits <= steady.MAX_BITS:
        units_CHW = steady.encode(values_CHW, recipe.bits, recipe.levels)
    else:
        units_CHW = simplex.encode(values_CHW, recipe.levels)
    return units_CHW, simplex.entropy_error(values_CHW, units_CHW, recipe.levels)


def encode_units(
    units_CHW: NDArray[Any], lost: NDArray[np.float64], recipe: CacheRecipe
) -> tuple[NDArray[Any], NDArray[np.float64] | None]:
    """As `encode`, of what `units_of` gives, for which the integers are overwritten."""
    if isinstance(recipe, Recipe):
        rest.leave_out(units_CHW, recipe.chunk_px)
        key_rows.take_differences(units_CHW)
    return units_CHW, None if isinstance(recipe, LogitsRecipe) else lost


def encode_bands(
    bands: Iterable[NDArray[np.float32]], recipe: CacheRecipe, height: int
) -> Iterator[tuple[NDArray[Any], NDArray[np.float64] | None]]:
    """
    As `encode` of each row of chunks, of a tile of `height` rows that comes in bands `(C, h, W)` from the top.

    Little more than a row of chunks and a band is held.
    """
    waiting: list[NDArray[np.float32]] = []
    left = height
    for band_ChW in bands:
        waiting.append(band_ChW)
        while left and sum(part_ChW.shape[1] for part_ChW in waiting) >= min(recipe.chunk_px, left):
            rows = min(recipe.chunk_px, left)
            joined_ChW = np.concatenate(waiting, axis=1)
            waiting = [joined_ChW[:, rows:].copy()]  # a view would hold all of it
            yield encode(joined_ChW[:, :rows], recipe)
            left -= rows
    assert not left and not any(part_ChW.size for part_ChW in waiting), f"{left} of {height} rows did not come"


def units(stored_CHW: NDArray[Any], recipe: CacheRecipe, corner: tuple[int, int] = (0, 0)) -> NDArray[Any]:
    """
    The integers of all classes, of those that are stored, which are overwritten; `corner` is where in the tile the first pixel lies,
    in a row from which they can be told (see `first_row`).

    Raises `ValueError`, saying what is wrong, for what no tile can have, such as the zeros of a missing chunk.
    """
    if isinstance(recipe, Recipe):
        assert first_row(recipe, corner[0]) == corner[0], f"row {corner[0]} is none to start from"
        key_rows.add_up(stored_CHW)
    if isinstance(recipe, ThirdRecipe):
        rest.fill_in(stored_CHW, recipe.levels, recipe.chunk_px, corner)
    elif isinstance(recipe, LogitsRecipe):
        if not logits.has_largest(stored_CHW, recipe.bits):
            raise ValueError("pixels have no class of the largest logit")
    elif not simplex.is_simplex(stored_CHW, recipe.levels):
        raise ValueError("its values do not sum to one")
    return stored_CHW


def first_row(recipe: CacheRecipe, row: int) -> int:
    """The row of the tile from which on it must be read for `row` to be known: the key row above it, where there are any."""
    return row - row % recipe.key_row_px if isinstance(recipe, Recipe) else row


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
    if isinstance(recipe, Recipe) and recipe.bits <= steady.MAX_BITS:
        return steady.error_bound(recipe.bits, recipe.levels, len(recipe.classes))
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
    if isinstance(recipe, ThirdRecipe):
        mark = np.iinfo(recipe.dtype).max
        scale += f"{mark} is what the pixel's other values leave of {recipe.levels}; "
    if isinstance(recipe, Recipe):
        modulus, key_row_px = 2 ** (8 * recipe.dtype.itemsize), recipe.key_row_px
        rows = f"value minus that of the row above, modulo {modulus}, but in every {key_row_px}th row from the first"
        scale = f"stored: {rows}; {scale}"
    return f"{scale}axes: class, row, column"
