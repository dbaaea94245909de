"""
Logits of an image of any size, averaged over views (flips, turns, scales), in the image's own frame.

Shapes: N images, C classes, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from kdpipe.pipeline.models.limits.sizes import fixed_side, told

STRIDE = 32  # encoders of five stages halve the image five times

# (quarter turns, mirror left-right) of the views; d4 is the symmetry group of the square.
TTA_VIEWS: dict[str, list[tuple[int, bool]]] = {
    "none": [(0, False)],
    "flips": [(0, False), (0, True), (2, False), (2, True)],
    "d4": [(turns, mirror) for turns in range(4) for mirror in (False, True)],
}


def averaged_logits(
    model: Callable[[Tensor], Tensor], inputs_NCHW: Tensor, *, tta: str, scales: Sequence[float]
) -> Tensor:
    """Logits `(N, C, H, W)`, float32, averaged over the views of `tta` at each of `scales`; the mean is taken before softmax."""
    height, width = inputs_NCHW.shape[-2:]
    total: Tensor | None = None
    for scale in scales:
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        scaled = inputs_NCHW if size == (height, width) else _resize(inputs_NCHW, size)
        for turns, mirror in TTA_VIEWS[tta]:
            logits = _turned_back(padded_logits(model, _turned(scaled, turns, mirror)), turns, mirror)
            logits = logits if size == (height, width) else _resize(logits, (height, width))
            total = logits if total is None else total + logits
    assert total is not None
    return total / (len(scales) * len(TTA_VIEWS[tta]))


def padded_logits(model: Callable[[Tensor], Tensor], inputs_NCHW: Tensor) -> Tensor:
    """
    Logits `(N, C, H, W)`, float32, of images of any size: mirrored on the right and below to a multiple of 32 px, then cropped.

    A network that takes one size only is given smaller images mirrored to that size, and one that prepares its images itself (its
    attribute `prepares_images` is true) all images as they are. Raises `SizeRefused` for a size that the network refuses.
    """
    height, width = inputs_NCHW.shape[-2:]
    if getattr(model, "prepares_images", False):
        return model(inputs_NCHW).float()
    padded = mirrored_to(inputs_NCHW, fixed_side(model))
    with told(model, padded.shape):
        logits: Tensor = model(padded.contiguous(memory_format=torch.channels_last))
    return logits[..., :height, :width].float()


def mirrored_to(x_NCHW: Tensor, side: int | None) -> Tensor:
    """Images mirrored on the right and below to `side` px, or to multiples of 32 px where they are larger or it is None."""
    for dim, size in ((-2, x_NCHW.shape[-2]), (-1, x_NCHW.shape[-1])):
        target = side if side is not None and size <= side else -(-size // STRIDE) * STRIDE
        if target != size:
            x_NCHW = x_NCHW.index_select(dim, _mirrored(size, target, x_NCHW.device))
    return x_NCHW


def _mirrored(size: int, target: int, device: torch.device) -> Tensor:
    """Indices `0..target-1` reflected into `0..size-1` at the border pixels, as often as needed (any size; 1 has period 1)."""
    period = max(1, 2 * (size - 1))
    position = torch.arange(target, device=device) % period
    return torch.minimum(position, period - position)


def _turned(x: Tensor, turns: int, mirror: bool) -> Tensor:
    return torch.rot90(x.flip(-1) if mirror else x, turns, dims=(-2, -1))


def _turned_back(x: Tensor, turns: int, mirror: bool) -> Tensor:
    x = torch.rot90(x, -turns, dims=(-2, -1))
    return x.flip(-1) if mirror else x


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
