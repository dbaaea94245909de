"""
The losses of stage two, from labels and from soft targets.

Shapes: N batch, C student classes, H W pixels. In a distributed run every mean is over the batch of all ranks: a loss is computed from
sums that go through `sums_over_ranks` before they are divided. Two are no sums, the Lovász loss and a distillation loss of the user's
own: of these it is the mean over the ranks whose part of the batch has a pixel that counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdpipe.configs.schema.losses import USUAL_LABELLED_LOSS, USUAL_SOFT_LOSS
from kdpipe.pipeline.losses.labelled import hard_loss
from kdpipe.pipeline.losses.own import DistillLoss, own_loss_of
from kdpipe.pipeline.losses.soft import soft_loss, soft_region_losses

__all__ = ["DistillLoss", "LossTerms", "distillation_loss", "hard_loss", "mean_terms", "soft_loss"]

AUXILIARY_WEIGHT = 0.4  # UNetFormer, Wang et al. 2022, section 4


@dataclass(frozen=True)
class LossTerms:
    """The loss to minimise and its two parts, scalars; a part that does not apply is zero."""

    total: Tensor
    hard: Tensor
    soft: Tensor


def mean_terms(terms: Sequence[LossTerms]) -> LossTerms:
    """The loss terms of an optimizer step: the means over its accumulated batches, without gradients."""
    return LossTerms(
        *(torch.stack([getattr(t, name).detach() for t in terms]).mean() for name in ("total", "hard", "soft"))
    )


def distillation_loss(
    logits_NCHW: Tensor,
    mask_NHW: Tensor,
    inside_NHW: Tensor,
    targets_NCHW: Tensor | None,
    entropy_error_N: Tensor | None = None,
    *,
    alpha: float,
    temperature: float,
    ignore_index: int,
    auxiliary_NCHW: Tensor | None = None,
    labelled_loss: Mapping[str, float] = USUAL_LABELLED_LOSS,
    class_weights_C: Tensor | None = None,
    soft_losses: Mapping[str, float] = USUAL_SOFT_LOSS,
    trust_NHW: Tensor | None = None,
    own_loss: DistillLoss | None = None,
) -> LossTerms:
    """
    `(1 - alpha) * hard + alpha * T² * KL(p || softmax(s / T))`; without targets `hard` alone.

    `mask_NHW` is int64 with `ignore_index` where there is no label, `inside_NHW` bool, False on padding and where an image holds no
    data; `targets_NCHW` is float32 and sums to one over axis 1 wherever `inside`; `entropy_error_N` is the entropy that they lost to
    rounding, in nats, mean over each sample's inside pixels. `hard` is zero for a batch without a labelled pixel.
    An auxiliary head's logits add `AUXILIARY_WEIGHT` times their own hard loss to `hard`, which `labelled_loss` and `class_weights_C`
    make up (see `hard_loss`). `soft_losses` are weights: of `kl`, which stands for `T² * KL`, and of the region losses `dice` and
    `jaccard` (see `soft_region_losses`). `trust_NHW`, in 0..1, weighs the pixels of them all. `own_loss` takes their place; raises
    `ConfigError` where it does not return what it should. The term `soft` is KL without T² where that is all, else all that alpha weighs.
    Source: Hinton et al. 2015, arXiv 1503.02531, section 2 (T² keeps the gradients' scale).
    """
    hard = hard_loss(logits_NCHW, mask_NHW, ignore_index, labelled_loss, class_weights_C)
    if auxiliary_NCHW is not None:
        hard = hard + AUXILIARY_WEIGHT * hard_loss(
            auxiliary_NCHW, mask_NHW, ignore_index, labelled_loss, class_weights_C
        )
    if targets_NCHW is None:
        return LossTerms(total=hard, hard=hard, soft=torch.zeros_like(hard))
    if own_loss is not None:
        soft = own_loss_of(own_loss, logits_NCHW, targets_NCHW, inside_NHW)
        return LossTerms(total=(1 - alpha) * hard + alpha * soft, hard=hard, soft=soft)
    if soft_losses == USUAL_SOFT_LOSS:
        soft = soft_loss(logits_NCHW, targets_NCHW, inside_NHW, temperature, entropy_error_N, trust_NHW)
        return LossTerms(total=(1 - alpha) * hard + alpha * temperature**2 * soft, hard=hard, soft=soft)
    soft = torch.zeros_like(hard)
    if regions := {name: weight for name, weight in soft_losses.items() if name != "kl"}:
        soft = soft_region_losses(logits_NCHW, targets_NCHW, inside_NHW, temperature, regions, trust_NHW)
    if "kl" in soft_losses:
        kl = soft_loss(logits_NCHW, targets_NCHW, inside_NHW, temperature, entropy_error_N, trust_NHW)
        soft = soft + soft_losses["kl"] * temperature**2 * kl
    return LossTerms(total=(1 - alpha) * hard + alpha * soft, hard=hard, soft=soft)
