"""From soft targets or logits to the integers that are stored, and back, by the kind of cache."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdpipe.cache.encoding import implied_class, logits, many_classes, row_deltas, simplex, steady_rounding
from kdpipe.cache.encoding.logits import DEPTH, Softening
from kdpipe.cache.recipe import CacheRecipe, LogitsRecipe


def encode(values_CHW: NDArray[np.float32], recipe: CacheRecipe) -> tuple[NDArray[Any], NDArray[np.float64] | None]:
    """
    The integers of a tile as they are stored, uint8 or uint16 `(C, H, W)`, and the entropy error of each block.

    `values_CHW` is float32: soft targets, or logits if the recipe says so; `ValueError` if they are invalid. The entropy error
    is that of `simplex.entropy_error`, and None for logits, where it depends on the temperature at which they are read.
    """
    assert values_CHW.shape[0] == len(recipe.channels), f"{values_CHW.shape} for {recipe.channels}"
    return encode_units(*units_of(values_CHW, recipe), recipe)


def units_of(values_CHW: NDArray[np.float32], recipe: CacheRecipe) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """The integers of all classes of a tile, and the entropy error of each block, empty for logits."""
    if isinstance(recipe, LogitsRecipe):
        return logits.encode(values_CHW, recipe.bits), np.empty((0, 0))
    if recipe.has_parts:
        units_CHW: NDArray[Any] = many_classes.encode(values_CHW, recipe.levels)
    elif recipe.bits <= steady_rounding.MAX_BITS:
        units_CHW = steady_rounding.encode(values_CHW, recipe.bits, recipe.levels)
    else:
        units_CHW = simplex.encode(values_CHW, recipe.levels)
    return units_CHW, simplex.entropy_error(values_CHW, units_CHW, recipe.levels)


def encode_units(
    units_CHW: NDArray[Any], lost: NDArray[np.float64], recipe: CacheRecipe
) -> tuple[NDArray[Any], NDArray[np.float64] | None]:
    """The result of `encode` from that of `units_of`, whose integers are overwritten."""
    if isinstance(recipe, LogitsRecipe):
        return units_CHW, None
    implied_class.leave_out(units_CHW, recipe.chunk_px)
    row_deltas.take_differences(units_CHW)
    return units_CHW, lost


def encode_bands(
    bands: Iterable[NDArray[np.float32]], recipe: CacheRecipe, height: int
) -> Iterator[tuple[NDArray[Any], NDArray[np.float64] | None]]:
    """
    The result of `encode` for each row of chunks of a tile that comes in bands `(C, h, W)` from the top, `height` rows in all.

    Little more than one row of chunks and one band is in memory.
    """
    waiting: list[NDArray[np.float32]] = []
    left = height
    for band_ChW in bands:
        waiting.append(band_ChW)
        while left and sum(part_ChW.shape[1] for part_ChW in waiting) >= min(recipe.chunk_px, left):
            rows = min(recipe.chunk_px, left)
            joined_ChW = np.concatenate(waiting, axis=1)
            waiting = [joined_ChW[:, rows:].copy()]  # a view would keep the whole array alive
            yield encode(joined_ChW[:, :rows], recipe)
            left -= rows
    assert not left and not any(part_ChW.size for part_ChW in waiting), f"{left} of {height} rows did not come"


def units(stored_CHW: NDArray[Any], recipe: CacheRecipe, corner: tuple[int, int] = (0, 0)) -> NDArray[Any]:
    """
    The integers of all classes from the stored ones, which are overwritten.

    `corner` is the row and column of the first pixel in the tile; its row must be one that `first_row` returns.
    Raises `ValueError`, naming the cause, for integers that no tile has, such as the zeros of a missing chunk.
    """
    if isinstance(recipe, LogitsRecipe):
        if not logits.has_largest(stored_CHW, recipe.bits):
            raise ValueError("pixels have no class of the largest logit")
        return stored_CHW
    assert first_row(recipe, corner[0]) == corner[0], f"row {corner[0]} is not a key row"
    row_deltas.add_up(stored_CHW)
    implied_class.fill_in(stored_CHW, recipe.levels, recipe.chunk_px, corner)
    return stored_CHW


def first_row(recipe: CacheRecipe, row: int) -> int:
    """The row of a tile where reading must begin to decode `row`: the last key row at or above it; for logits, `row`."""
    return row if isinstance(recipe, LogitsRecipe) else row - row % recipe.key_row_px


def soft_targets(units_CHW: NDArray[Any], recipe: CacheRecipe, softening: Softening | None) -> NDArray[np.float32]:
    """Soft targets, float32 `(C, H, W)`, that sum to one over axis 0; `softening` is required for logits and only used there."""
    if isinstance(recipe, LogitsRecipe):
        assert softening is not None
        return logits.soft_targets(units_CHW, recipe.bits, softening)
    return simplex.decode(units_CHW, recipe.levels)


def error_bound(recipe: CacheRecipe) -> float:
    """The largest possible error of a stored probability or logit, as the manifest states it."""
    if isinstance(recipe, LogitsRecipe):
        return logits.logit_bound(recipe.bits)
    if recipe.bits <= steady_rounding.MAX_BITS:
        whole = recipe.levels // many_classes.PARTS if recipe.has_parts else recipe.levels
        return steady_rounding.error_bound(recipe.bits, whole, len(recipe.classes))
    return simplex.error_bound(recipe.levels, len(recipe.classes))


def decoding(recipe: CacheRecipe) -> str:
    """The rule for decoding a value, in one line, for users of other Zarr readers."""
    if isinstance(recipe, LogitsRecipe):
        top = simplex.total(recipe.bits)
        return f"z = -{DEPTH[recipe.bits]:g} * (({top} - value) / {top})**2; p = softmax(z / T); axes: teacher class, row, column"
    modulus, mark = 2 ** (8 * recipe.dtype.itemsize), np.iinfo(recipe.dtype).max
    return (
        f"stored: value minus that of the row above, modulo {modulus}, but in every {recipe.key_row_px}th row from the first; "
        f"p = value / {recipe.levels}; {mark} is what the pixel's other values leave of {recipe.levels}; axes: class, row, column"
    )
