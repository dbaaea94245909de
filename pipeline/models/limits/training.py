"""The sizes of crops, batches and validation tiles that a student refuses, told with the keys to set before the first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from kdpipe.configs.schema import Config
from kdpipe.pipeline.models.limits.sizes import SizeRefused, fixed_side
from kdpipe.pipeline.models.limits.trial import STEP_PX, refusal, smallest_side


def refuse_crops(student: nn.Module, config: Config, count: int) -> None:
    """Raise `SizeRefused` where a student cannot train on batches of `count` crops, with the key to set."""
    crop, channels = config.train.crop, _channels(config)
    text = refusal(student, (count, channels, crop, crop), training=True)
    if text is None:
        return
    side = fixed_side(student)
    if side is not None and side != crop:
        remedy = f"set train.crop: {side} (now {crop})"
    elif count == 1 and refusal(student, (2, channels, crop, crop), training=True) is None:
        # Pooling to one pixel happens in a small crop, or whatever the crop's size.
        larger = refusal(student, (1, channels, 2 * crop, 2 * crop), training=True) is None
        remedy = (
            f"set train.batch_size to 2 or more (now 1){f', or train.crop: {2 * crop} (now {crop})' if larger else ''}"
        )
    else:
        smallest = smallest_side(student, max(count, 2), channels, training=True, above=crop)
        remedy = f"set train.crop: {smallest} (now {crop})" if smallest else "choose another student.architecture"
    raise SizeRefused(f"student: {config.student.network} {text}; {remedy}")


def trains_on(student: nn.Module, config: Config, count: int) -> bool:
    """Whether a student can train on batches of `count` crops."""
    crop = config.train.crop
    return refusal(student, (count, _channels(config), crop, crop), training=True) is None


def refuse_tiles(
    student: nn.Module, config: Config, sizes: Callable[[], Sequence[tuple[str, tuple[int, int]]]]
) -> None:
    """
    Raise `SizeRefused` where a student cannot predict a validation tile as a whole; `sizes` returns the names and `(H, W)`.

    Most students take all sizes, for which `sizes` is not called.
    """
    channels, side = _channels(config), fixed_side(student)
    if side is None and refusal(student, (1, channels, STEP_PX, STEP_PX)) is None:
        return
    known: set[tuple[int, int]] = set()
    for name, (height, width) in sizes():
        padded = (-(-height // STEP_PX) * STEP_PX, -(-width // STEP_PX) * STEP_PX)
        if padded in known:
            continue
        known.add(padded)
        where = f"validation predicts whole tiles, and {name} has {height} x {width} px"
        if side is not None and max(padded) > side:
            raise SizeRefused(
                f"student: {config.student.network} takes images of {side} x {side} px only; {where}: cut the tiles of data.val to at most "
                f"{side} x {side} px, or set data.val: []"
            )
        if side is None and (text := refusal(student, (1, channels, *padded))):
            raise SizeRefused(f"student: {config.student.network} {text}; {where}: leave such tiles out of data.val")


def _channels(config: Config) -> int:
    return len(config.data.places(config.student.bands))
