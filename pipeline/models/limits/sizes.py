"""Sizes that a network refuses, in words instead of an exception of torch or timm."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from kdpipe.configs.errors import ConfigError

BATCH_OF_ONE = "Expected more than 1 value per channel when training"
TOO_SMALL = re.compile(
    r"Output size is too small|Kernel size can't be greater than actual input size|Padding size should be less than"
)
FIXED = re.compile(r"Input (?:height|width|size) .*doesn't match model")


class SizeRefused(ConfigError):
    """A batch or an image of a size that the network cannot compute."""


def fixed_side(network: object) -> int | None:
    """The side in px of the only images, squares, that a network takes; None for one that takes several sizes."""
    if not isinstance(network, nn.Module):
        return None
    if network not in _sides:  # a network has hundreds of modules, and this is asked for every batch
        _sides[network] = next(filter(None, map(_fixed_side, network.modules())), None)
    return _sides[network]


_sides: WeakKeyDictionary[nn.Module, int | None] = WeakKeyDictionary()


def _fixed_side(module: nn.Module) -> int | None:
    # timm's embedding of patches, whose encoder has a fixed number of them.
    size: Any = getattr(module, "img_size", None)
    is_fixed = size is not None and getattr(module, "strict_img_size", False)
    return int(size[0]) if is_fixed and size[0] == size[1] else None


@contextmanager
def told(network: object, shape: Sequence[int]) -> Iterator[None]:
    """Turn what a network raises for a batch of this shape `(N, C, H, W)` into `SizeRefused`, where its size is the cause."""
    try:
        yield
    except (ValueError, RuntimeError, AssertionError) as err:
        text = reason(err, network, shape)
        if text is None:
            raise
        side = fixed_side(network)
        remedy = f". Windows of {side} px cut larger images: teacher.window or --window" if side else ""
        raise SizeRefused(f"the network {text}{remedy}") from err


def reason(err: BaseException, network: object, shape: Sequence[int]) -> str | None:
    """Why a network refuses a batch `(N, C, H, W)`: `takes images of 224 x 224 px only, …`; None for another cause than its size."""
    count, _, height, width = shape
    text, found = str(err), f"found {count} of {height} x {width} px"
    if BATCH_OF_ONE in text:
        return f"normalises over a batch and pools to one pixel, so that it cannot train on one image of {height} x {width} px"
    if FIXED.search(text):
        side = fixed_side(network)
        return f"takes images of {f'{side} x {side} px' if side else 'one size'} only, {found}"
    if TOO_SMALL.search(text):
        return f"halves its images until nothing is left, so that it needs larger ones, {found}"
    return None
