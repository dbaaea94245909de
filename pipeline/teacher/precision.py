"""`teacher.precision: auto`: bf16 where the device is fast at it and the soft targets hardly change, else fp32."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from kdpipe.cache.recipe import CacheRecipe
from kdpipe.configs.errors import DataError, KdpipeError
from kdpipe.configs.schema import Config
from kdpipe.data.rasters import Stretch, read_image
from kdpipe.data.tiles import Tile
from kdpipe.pipeline.devices import is_fast_at_bf16
from kdpipe.pipeline.teacher.frozen import open_teacher

SAMPLE, SAMPLE_PX = 3, 512  # tiles on which the precisions are compared, and the side of their windows
MAX_TRIED = 100  # tiles that are tried until `SAMPLE` readable ones are found


def resolve(
    config: Config, recipe: CacheRecipe, tiles: Sequence[Tile], stretch: Stretch, device: torch.device
) -> CacheRecipe:
    """
    The recipe of a new cache with `auto` precisions decided, for all teachers together, as their logits are averaged.

    `recipe` holds fp32 in their place (see `complete_recipe`). Raises what `open_teacher` raises.
    """
    return resolve_on(config, recipe, drawn(tiles, config.seed), stretch, device)


def drawn(tiles: Sequence[Tile], seed: int) -> list[Tile]:
    """At most `MAX_TRIED` tiles, in the order in which `resolve` tries them."""
    return [tiles[index] for index in np.random.default_rng(seed).permutation(len(tiles))[:MAX_TRIED]]


def resolve_on(
    config: Config, recipe: CacheRecipe, tried: Sequence[Tile], stretch: Stretch, device: torch.device
) -> CacheRecipe:
    """`resolve` with the tiles that `drawn` returns."""
    _, *halves = candidates(config, recipe)
    if not halves or not is_fast_at_bf16(device):
        return recipe
    (half,) = halves
    images_NHWC = _sample(config, tried, stretch)
    if images_NHWC is None:
        return recipe
    return half if _targets_stay(config, recipe, half, images_NHWC, device) else recipe


def candidates(config: Config, recipe: CacheRecipe) -> list[CacheRecipe]:
    """The recipes between which `resolve` decides: the given one, whose `auto` precisions are fp32, and that with bf16 if any is `auto`."""
    auto = [member.precision == "auto" and member.predictions is None for member in config.members.values()]
    if not any(auto):
        return [recipe]
    records = zip(recipe.teachers, auto, strict=True)
    teachers = [record.model_copy(update={"precision": "bf16"}) if chosen else record for record, chosen in records]
    return [recipe, recipe.model_copy(update={"teachers": teachers})]


def _targets_stay(
    config: Config, recipe: CacheRecipe, half: CacheRecipe, images_NHWC: NDArray[np.uint8], device: torch.device
) -> bool:
    """
    Whether bf16 moves the soft targets of each image by at most half a step of the cache's integers, on average.

    Single pixels may move by several steps. With 16 bits no network passes.
    """
    exact, short = (open_teacher(config, r, device) for r in (recipe, half))
    try:
        moved_NCHW = np.abs(exact.soft_targets(images_NHWC) - short.soft_targets(images_NHWC))
    except KdpipeError:  # logits that are not finite
        return False
    return bool(moved_NCHW.mean(axis=(1, 2, 3)).max() <= 0.5 / (2**recipe.bits - 1))


def _sample(config: Config, tried: Sequence[Tile], stretch: Stretch) -> NDArray[np.uint8] | None:
    """Windows `(N, H, W, 3)` from the middle of the first readable tiles, of the largest common size; None if none is readable."""
    images: list[NDArray[np.uint8]] = []
    for tile in tried:
        try:
            images.append(read_image(tile.image, config.data.bands, stretch, config.data.alpha))
        except DataError:  # stage one will name it
            continue
        if len(images) == SAMPLE:
            break
    if not images:
        return None
    height, width = (min(SAMPLE_PX, *(image.shape[axis] for image in images)) for axis in (0, 1))
    corners = [((image.shape[0] - height) // 2, (image.shape[1] - width) // 2) for image in images]
    return np.stack(
        [image[top : top + height, left : left + width] for image, (top, left) in zip(images, corners, strict=True)]
    )
