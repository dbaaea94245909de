"""
Soft targets on their way from a loader to the device: 16-bit integers, half of what float32 takes to copy between processes and
over the bus, decoded where the loss is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import default_collate

STEPS = 2**16 - 1  # what a probability of one becomes


def collate_packed(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch of samples as `default_collate` makes it, with `target` packed."""
    batch: dict[str, Tensor] = default_collate(
        [{**sample, "target": packed(sample["target"])} if "target" in sample else sample for sample in samples]
    )
    return batch


def packing_bound(num_classes: int) -> float:
    """How far an entry may move: the half step of its own rounding, and as much for each class whose rounding changes the sum."""
    return (1 + num_classes) / 2 / STEPS


def packed(target_CHW: NDArray[np.float32]) -> NDArray[np.int16]:
    """
    Probabilities in steps of 1/65535, unsigned in the bits of int16, since few devices compute with uint16.

    Until it is `unpacked` an entry moves by at most `packing_bound`. A pixel that holds no numbers becomes zero.
    """
    steps_CHW = target_CHW * np.float32(STEPS)
    odd_HW = ~np.isfinite(steps_CHW.sum(axis=0))
    if odd_HW.any():
        steps_CHW[:, odd_HW] = 0
    bits_CHW: NDArray[np.int16] = np.rint(steps_CHW, out=steps_CHW).astype(np.uint16).view(np.int16)
    return bits_CHW


def unpacked(packed_NCHW: Tensor, inside_NHW: Tensor) -> Tensor:
    """
    Probabilities, float32, that sum to one over axis 1, of `packed` ones; zero on padding, which is not `inside_NHW`.

    Where a pixel held no numbers it has NaN, so that the loss says so.
    """
    steps_NCHW = (packed_NCHW.int() & STEPS).float()
    probs_NCHW = steps_NCHW / steps_NCHW.sum(dim=1, keepdim=True)
    return probs_NCHW.masked_fill(~inside_NHW[:, None], 0)
