"""
The distillation loss.

Shapes: N batch, C student classes, H W pixels. In a distributed run every mean is over the batch of all ranks: a loss is computed from
sums that go through `sums_over_ranks` before they are divided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kdpipe.pipeline.distributed import sums_over_ranks

AUXILIARY_WEIGHT = 0.4  # UNetFormer, Wang et al. 2022, section 4
SMOOTH = 0.05  # label smoothing of the cross entropy and smoothing of Dice, from the recipe (GeoSeg's configs)


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
) -> LossTerms:
    """
    `(1 - alpha) * hard + alpha * T² * KL(p || softmax(s / T))`; without targets `hard` alone.

    `mask_NHW` is int64 with `ignore_index` where there is no label, `inside_NHW` bool, False on padding and where an image holds no
    data; `targets_NCHW` is float32 and sums to one over axis 1 wherever `inside`; `entropy_error_N` is the entropy that they lost to
    rounding, in nats, mean over each sample's inside pixels. `hard` is zero for a batch without a labelled pixel.
    An auxiliary head's logits add `AUXILIARY_WEIGHT` times their own hard loss to `hard`.
    Source: Hinton et al. 2015, arXiv 1503.02531, section 2 (T² keeps the gradients' scale).
    """
    hard = hard_loss(logits_NCHW, mask_NHW, ignore_index)
    if auxiliary_NCHW is not None:
        hard = hard + AUXILIARY_WEIGHT * hard_loss(auxiliary_NCHW, mask_NHW, ignore_index)
    if targets_NCHW is None:
        return LossTerms(total=hard, hard=hard, soft=torch.zeros_like(hard))
    soft = soft_loss(logits_NCHW, targets_NCHW, inside_NHW, temperature, entropy_error_N)
    return LossTerms(total=(1 - alpha) * hard + alpha * temperature**2 * soft, hard=hard, soft=soft)


def soft_loss(
    logits_NCHW: Tensor,
    targets_NCHW: Tensor,
    inside_NHW: Tensor,
    temperature: float,
    entropy_error_N: Tensor | None = None,
) -> Tensor:
    """
    `KL(p || softmax(s / T))`, summed over classes, averaged over the pixels inside (see `distillation_loss`); a scalar, in float32.

    Zero if no pixel is inside; `0 log 0` is 0. `KL = -Σ p log q - H(p)`: rounding took `entropy_error_N` from H(p), a constant to the
    student, which is subtracted so that the loss has the value of the unrounded target.
    """
    log_q_NCHW = F.log_softmax(logits_NCHW.float() / temperature, dim=1)
    # Summed separately: the difference by class would be one more array of this size, and its gradient another.
    kl_NHW = torch.xlogy(targets_NCHW, targets_NCHW).sum(dim=1) - (targets_NCHW * log_q_NCHW).sum(dim=1)
    pixels_N = inside_NHW.sum(dim=(1, 2))
    total = (kl_NHW * inside_NHW).sum()
    if entropy_error_N is not None:
        total = total - (entropy_error_N * pixels_N).sum()
    total, pixels = sums_over_ranks(total, pixels_N.sum())
    return (total / pixels.clamp(min=1)).float()


def hard_loss(logits_NCHW: Tensor, mask_NHW: Tensor, ignore_index: int) -> Tensor:
    """
    Smoothed cross entropy plus soft Dice, over the labelled pixels; a scalar, in float32.

    The cross entropy is divided by the labelled pixels, where smp's divides by all. Dice is smp's: the mean over classes of
    `1 - (Σ q y + s) / ((Σ q + Σ y) / 2 + s)`, s being `SMOOTH`, zero for a class that no pixel has; q are the probabilities, y the
    one-hot labels, the sums over the batch. Zero, with a gradient of zero, if no pixel is labelled.
    """
    logits_NCHW = logits_NCHW.float()
    num_classes = logits_NCHW.shape[1]
    known_NHW = mask_NHW != ignore_index
    entropy = F.cross_entropy(logits_NCHW, mask_NHW, ignore_index=ignore_index, label_smoothing=SMOOTH, reduction="sum")
    probs_NCHW = logits_NCHW.softmax(dim=1) * known_NHW[:, None]
    # An eighth of the bytes of `one_hot`, and `ignore_index` matches no class.
    labels_NCHW = mask_NHW[:, None] == torch.arange(num_classes, device=mask_NHW.device)[:, None, None]
    over = (0, 2, 3)
    entropy, pixels, both_C, probs_C, labels_C = sums_over_ranks(
        entropy,
        known_NHW.sum(),
        (probs_NCHW * labels_NCHW).sum(over),
        probs_NCHW.sum(over),
        labels_NCHW.sum(over),
    )
    dice_C = 1 - (both_C + SMOOTH) / ((probs_C + labels_C) / 2 + SMOOTH)
    return (entropy / pixels.clamp(min=1) + (dice_C * (labels_C > 0)).mean()).float()
