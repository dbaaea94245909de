"""The normalisation of 8-bit pixels; torch is imported where it computes, as recipes need only the two statistics."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from kdpipe.configs.schema import MeanStd, Normalize

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# The statistics that torchvision's, smp's and timm's ImageNet weights were trained with.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def mean_std(normalize: Normalize) -> tuple[list[float], list[float]]:
    """The mean and standard deviation of `x / 255` per channel that a configured `normalize` stands for."""
    if isinstance(normalize, MeanStd):
        return list(normalize.mean), list(normalize.std)
    if normalize == "imagenet":
        return list(IMAGENET_MEAN), list(IMAGENET_STD)
    return [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]


def normalized(images_NCHW: Tensor, normalize: Normalize) -> Tensor:
    """`(x / 255 - mean) / std`, float32 `(N, 3, H, W)`, from uint8 images."""
    mean, std = (_on_device(tuple(v), images_NCHW.device) for v in mean_std(normalize))
    return (images_NCHW.float() / 255 - mean) / std


@cache
def _on_device(channels: tuple[float, ...], device: torch.device) -> Tensor:
    """`(1, 3, 1, 1)`; cached, because a copy to a GPU waits for all that the GPU still has to do."""
    import torch

    with torch.inference_mode(False):
        return torch.tensor(channels, device=device).view(1, 3, 1, 1)
