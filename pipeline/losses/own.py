"""A distillation loss of the user's own: called in float32, and refused where it does not return what it should."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdpipe.configs.errors import ConfigError
from kdpipe.pipeline.distributed import sums_over_ranks
from kdpipe.pipeline.memory import is_out_of_memory

DistillLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps logits (N, C, H, W), soft targets (N, C, H, W), both float32, and the pixels that count, bool (N, H, W), to a scalar."""


def own_loss_of(loss: DistillLoss, logits_NCHW: Tensor, targets_NCHW: Tensor, inside_NHW: Tensor) -> Tensor:
    """A distillation loss of the user's own, in float32 whatever the precision of the network; zero if no pixel is inside."""
    counts = inside_NHW.any()
    value: Any = logits_NCHW.float().sum() * 0
    if counts:
        with torch.autocast(logits_NCHW.device.type, enabled=False):
            try:
                value = loss(logits_NCHW.float(), targets_NCHW.float(), inside_NHW)
            except Exception as err:  # whatever its own code raises
                if is_out_of_memory(err) or isinstance(err, ConfigError):
                    raise
                raise ConfigError(f"{_named(loss)} raised {type(err).__name__}: {err}; --debug shows where") from err
        _refuse_other_than_scalar(loss, value, has_gradient=logits_NCHW.requires_grad and torch.is_grad_enabled())
    value, ranks = sums_over_ranks(value, counts.int())
    own: Tensor = (value / ranks.clamp(min=1)).float()
    return own


def _refuse_other_than_scalar(loss: DistillLoss, value: Any, *, has_gradient: bool) -> None:
    expected = f"{_named(loss)} should return a scalar tensor that is computed from the student's logits"
    if not isinstance(value, Tensor):
        raise ConfigError(f"{expected}, found {type(value).__name__}")
    if value.ndim:
        raise ConfigError(f"{expected}, found shape {tuple(value.shape)}: take its mean over the pixels that count")
    if has_gradient and not value.requires_grad:
        raise ConfigError(
            f"{expected}, found one without a gradient: no detach(), item() or no_grad() may lie between them"
        )


def _named(loss: DistillLoss) -> str:
    kind = loss if hasattr(loss, "__qualname__") else type(loss)
    return f"distill.loss: {kind.__module__}:{kind.__qualname__}"
