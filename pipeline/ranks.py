"""
The processes of a distributed run (DDP): which one this is, and sums over all of them, through which gradients go.

Outside of one, rank 0 of 1.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """How many processes train one student."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sums_over_ranks(*sums: Tensor) -> tuple[Tensor, ...]:
    """
    Each tensor's sum over all ranks: what a batch of all ranks' samples would have had; in float64, unchanged in a single process.

    The gradient to a rank's own part comes back multiplied by the number of ranks, because DDP takes the mean of their
    gradients: so a loss that is computed from such sums has, after DDP, the gradients of the whole batch. All ranks call it
    as often as each other.
    """
    if world_size() == 1:
        return sums
    parts = torch.cat([part.double().flatten() for part in sums])
    whole: Tensor = _SumOverRanks.apply(parts)
    split = torch.split(whole, [own.numel() for own in sums])
    return tuple(part.view(own.shape) for part, own in zip(split, sums, strict=True))


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, parts: Tensor) -> Tensor:
        whole = parts.clone()
        dist.all_reduce(whole)
        return whole

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        return gradients[0] * world_size()


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set in at least one rank: the same answer in all of them."""
    if world_size() == 1:
        return flag
    flags = torch.tensor([int(flag)], device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags.item())
