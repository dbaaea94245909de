"""
A forward pass without values, which shows in a fraction of a second whether a network takes images of a size.

Tensors of the meta device have shapes and no numbers, so that it costs the same for every size, and neither memory nor statistics of
batch norms change.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.func import functional_call

from kdpipe.configs.errors import count_text
from kdpipe.pipeline.memory import is_out_of_memory
from kdpipe.pipeline.models.limits.sizes import reason

STEP_PX, MOST_PX = 32, 1024  # multiples of the coarsest stride, up to a size that every network takes


@torch.no_grad()
def refusal(network: nn.Module, shape: Sequence[int], *, training: bool = False) -> str | None:
    """
    Why a network does not take a batch of `shape` (N, C, H, W) in words that follow its name, or None if it does.

    What fails on the meta device for another cause than its size is computed on the network's own before it is believed; a lack of
    memory there is none of the network.
    """
    was_training = network.training
    tensors = dict(itertools.chain(network.named_parameters(), network.named_buffers()))
    try:
        network.train(training)
        try:
            _call(network, {name: torch.empty_like(value, device="meta") for name, value in tensors.items()}, shape)
        except Exception as err:
            return reason(err, network, shape) or _confirmed(network, tensors, shape)
        return None
    finally:
        network.train(was_training)


def _confirmed(network: nn.Module, tensors: dict[str, torch.Tensor], shape: Sequence[int]) -> str | None:
    try:
        _call(network, {name: value.clone() for name, value in tensors.items()}, shape)
    except (ValueError, RuntimeError, AssertionError, MemoryError) as err:
        if is_out_of_memory(err):
            return None
        return (
            reason(err, network, shape)
            or f"cannot compute {count_text(shape[0], 'images')} of {shape[2]} x {shape[3]} px ({err})"
        )
    return None


def _call(network: nn.Module, tensors: dict[str, torch.Tensor], shape: Sequence[int]) -> None:
    device = next(iter(tensors.values())).device if tensors else torch.device("cpu")
    functional_call(network, tensors, (torch.zeros(tuple(shape), device=device),))


def smallest_side(network: nn.Module, count: int, channels: int, *, training: bool, above: int = 0) -> int | None:
    """The side in px of the smallest square images, a multiple of 32 and larger than `above`, that a network takes; None for none."""
    sides: Iterable[int] = range(above // STEP_PX * STEP_PX + STEP_PX, MOST_PX + 1, STEP_PX)
    return next(
        (side for side in sides if refusal(network, (count, channels, side, side), training=training) is None), None
    )
