"""What networks of other libraries return, as logits at the size of the image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdpipe.configs.errors import ConfigError

NAMES = ("logits", "out")  # of the logits in an output: transformers' and torchvision's


class AtImageSize(nn.Module):
    """
    A network whose logits `(N, C, H, W)` have the size of its images, whatever it returns.

    Args:
        network: from images `(N, B, H, W)` to logits `(N, C, h, w)`, or to a mapping or an object that holds them as `logits` or `out`.
        num_classes: C.
        key: the key of the configuration that names the network, for errors.
        say: called once with a sentence if the logits are coarser than the image. They are enlarged bilinearly, pixels as areas
            (`align_corners=False`).

    Raises `ConfigError` from a forward pass that returns anything else.
    """

    def __init__(self, network: nn.Module, num_classes: int, key: str, say: Callable[[str], None]) -> None:
        super().__init__()
        self.network = network
        self.prepares_images = getattr(network, "prepares_images", False)
        self._num_classes = num_classes
        self._key = key
        self._say = _Once(say)

    def forward(self, images_NBHW: Tensor) -> Tensor:
        logits = logits_in(self.network(images_NBHW), self._key)
        if self._num_classes == 2 and logits.ndim == 4 and logits.shape[1] == 1:
            logits = of_two_classes(logits)
        count, _, height, width = images_NBHW.shape
        if logits.ndim != 4 or len(logits) != count or logits.shape[1] != self._num_classes:
            raise ConfigError(
                f"{self._key} should return logits of shape (N, C, h, w) = ({count}, {self._num_classes}, h, w), one channel for each of "
                f"classes; found {tuple(logits.shape)}"
            )
        if not logits.is_floating_point():
            raise ConfigError(f"{self._key} should return logits, floating-point numbers; found {logits.dtype}")
        if logits.shape[-2:] == (height, width):
            return logits
        self._say(
            f"{self._key}: its logits have {logits.shape[-2]} x {logits.shape[-1]} px for an image of {height} x {width} px, and are "
            "enlarged bilinearly"
        )
        return F.interpolate(logits.float(), size=(height, width), mode="bilinear", align_corners=False)


class _Once:
    """Says the first sentence alone. Copies of a network share it: they say no more, and a terminal that is spoken to cannot be copied."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say: Callable[[str], None] | None = say

    def __call__(self, sentence: str) -> None:
        say, self._say = self._say, None
        if say is not None:
            say(sentence)

    def __deepcopy__(self, memo: object) -> _Once:
        return self


def of_two_classes(z_N1HW: Tensor) -> Tensor:
    """The logits 0 and z `(N, 2, H, W)` of a sigmoid's one channel z, whose softmax is exactly 1 - σ(z) and σ(z)."""
    return torch.cat([torch.zeros_like(z_N1HW), z_N1HW], dim=1)


def logits_in(output: Any, key: str) -> Tensor:
    """The logits in a network's output; raises `ConfigError` where it has none."""
    if isinstance(output, Tensor):
        return output
    for name in NAMES:
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    holds = f" with the keys {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
    raise ConfigError(
        f"{key} should return logits, or a mapping or an object that holds them as {' or '.join(NAMES)}; found "
        f"{type(output).__name__}{holds}"
    )
