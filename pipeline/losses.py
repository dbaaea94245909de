"""
The losses of stage two, from labels and from soft targets.

Shapes: N batch, C student classes, H W pixels. In a distributed run every mean is over the batch of all ranks: a loss is computed from
sums that go through `sums_over_ranks` before they are divided. Two are no sums, the Lovász loss and a distillation loss of the user's
own: of these it is the mean over the ranks whose part of the batch has a pixel that counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kdpipe.configs.errors import ConfigError
from kdpipe.configs.schema.losses import USUAL_LABELLED_LOSS, refuse_unknown_losses
from kdpipe.pipeline.distributed import sums_over_ranks
from kdpipe.pipeline.memory import is_out_of_memory

AUXILIARY_WEIGHT = 0.4  # UNetFormer, Wang et al. 2022, section 4
SMOOTH = (
    0.05  # label smoothing of the cross entropy and smoothing of the region losses, from the recipe (GeoSeg's configs)
)
FOCUS = 2.0  # gamma of the focal loss, the best of Lin et al. 2017, arXiv 1708.02002, table 1b
# Dice, Jaccard and Tversky are `1 - (TP + s) / (TP + a FP + b FN + s)`; a and b. Tversky's are the best of Salehi et al. 2017,
# arXiv 1706.05721: what is missed costs more than what is too much.
REGION_LOSSES = {"dice": (0.5, 0.5), "jaccard": (1.0, 1.0), "tversky": (0.3, 0.7)}
LEAST_WEIGHT = 1e-12  # far below the weight of any labelled pixel

DistillLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps logits (N, C, H, W), soft targets (N, C, H, W), both float32, and the pixels that count, bool (N, H, W), to a scalar."""


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
    own_loss: DistillLoss | None = None,
) -> LossTerms:
    """
    `(1 - alpha) * hard + alpha * T² * KL(p || softmax(s / T))`; without targets `hard` alone.

    `mask_NHW` is int64 with `ignore_index` where there is no label, `inside_NHW` bool, False on padding and where an image holds no
    data; `targets_NCHW` is float32 and sums to one over axis 1 wherever `inside`; `entropy_error_N` is the entropy that they lost to
    rounding, in nats, mean over each sample's inside pixels. `hard` is zero for a batch without a labelled pixel.
    An auxiliary head's logits add `AUXILIARY_WEIGHT` times their own hard loss to `hard`, which `labelled_loss` and `class_weights_C`
    make up (see `hard_loss`). `own_loss` takes the place of `T² * KL`; raises `ConfigError` where it does not return what it should.
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
        soft = _own(own_loss, logits_NCHW, targets_NCHW, inside_NHW)
        return LossTerms(total=(1 - alpha) * hard + alpha * soft, hard=hard, soft=soft)
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


def hard_loss(
    logits_NCHW: Tensor,
    mask_NHW: Tensor,
    ignore_index: int,
    losses: Mapping[str, float] = USUAL_LABELLED_LOSS,
    class_weights_C: Tensor | None = None,
) -> Tensor:
    """
    The weighted sum of `losses` over the labelled pixels, smoothed cross entropy plus soft Dice by default; a scalar, in float32.

    All are those of smp with smoothing `SMOOTH`, where that has it. Cross entropy and focal loss are divided by the labelled pixels,
    where smp's cross entropy divides by all. Dice is the mean over classes of `1 - (Σ q y + s) / ((Σ q + Σ y) / 2 + s)`, zero for a
    class that no pixel has; q are the probabilities, y the one-hot labels, the sums over the batch.

    `class_weights_C`, float32, weigh the pixels of the cross entropy by their label, whose mean becomes a weighted mean, and the classes
    of the focal loss as smp does. The region losses weigh all classes alike, whatever their size.

    Zero, with a gradient of zero, if no pixel is labelled.
    """
    refuse_unknown_losses(losses)
    logits_NCHW = logits_NCHW.float()
    num_classes = logits_NCHW.shape[1]
    known_NHW = mask_NHW != ignore_index
    sums = {"pixels": known_NHW.sum()}
    if "ce" in losses:
        sums |= _cross_entropy(logits_NCHW, mask_NHW, known_NHW, ignore_index, class_weights_C)
    if REGION_LOSSES.keys() & losses.keys():
        probs_NCHW = logits_NCHW.softmax(dim=1) * known_NHW[:, None]
        # An eighth of the bytes of `one_hot`, and `ignore_index` matches no class.
        labels_NCHW = mask_NHW[:, None] == torch.arange(num_classes, device=mask_NHW.device)[:, None, None]
        over = (0, 2, 3)
        sums |= {
            "both": (probs_NCHW * labels_NCHW).sum(over),
            "probs": probs_NCHW.sum(over),
            "labels": labels_NCHW.sum(over),
        }
    if "focal" in losses:
        sums["focal"] = _focal(logits_NCHW, mask_NHW, ignore_index, class_weights_C)
    if "lovasz" in losses:
        sums["labelled ranks"] = known_NHW.any().int()
        sums["lovasz"] = _lovasz(logits_NCHW, mask_NHW, ignore_index) if known_NHW.any() else logits_NCHW.sum() * 0
    sums = dict(zip(sums, sums_over_ranks(*sums.values()), strict=True))

    pixels = sums["pixels"].clamp(min=1)
    found: dict[str, Tensor] = {}
    if "ce" in losses:
        found["ce"] = sums["entropy"] / (sums["weight"].clamp(min=LEAST_WEIGHT) if "weight" in sums else pixels)
    for name in [name for name in REGION_LOSSES if name in losses]:
        found[name] = _region(name, sums["both"], sums["probs"], sums["labels"])
    if "focal" in losses:
        found["focal"] = sums["focal"] / pixels
    if "lovasz" in losses:
        found["lovasz"] = sums["lovasz"] / sums["labelled ranks"].clamp(min=1)
    first, *others = (losses[name] * loss for name, loss in found.items())
    return sum(others, start=first).float()


def _cross_entropy(
    logits_NCHW: Tensor, mask_NHW: Tensor, known_NHW: Tensor, ignore_index: int, weights_C: Tensor | None
) -> dict[str, Tensor]:
    """
    The sum of the smoothed `entropy`; with weights the weighted one, and the sum of the `weight`s.

    The whole entropy of a pixel is weighed by its label. torch weighs the smoothed part by the other classes, so that frequent classes
    would be smoothed many times more than rare ones.
    """

    def entropy(reduction: str) -> Tensor:
        return F.cross_entropy(
            logits_NCHW, mask_NHW, ignore_index=ignore_index, label_smoothing=SMOOTH, reduction=reduction
        )

    if weights_C is None:
        return {"entropy": entropy("sum")}
    weights_NHW = weights_C[mask_NHW.masked_fill(~known_NHW, 0)] * known_NHW
    return {"entropy": (entropy("none") * weights_NHW).sum(), "weight": weights_NHW.sum()}


def _region(name: str, both_C: Tensor, probs_C: Tensor, labels_C: Tensor) -> Tensor:
    """A region loss, mean over classes, from sums over the batch: of `q y`, of q and of y."""
    too_much, missed = REGION_LOSSES[name]
    if too_much == missed == 0.5:
        area_C = (probs_C + labels_C) / 2
    else:
        area_C = both_C + too_much * (probs_C - both_C) + missed * (labels_C - both_C)
    loss_C = 1 - (both_C + SMOOTH) / (area_C + SMOOTH)
    return (loss_C * (labels_C > 0)).mean()


def _focal(logits_NCHW: Tensor, mask_NHW: Tensor, ignore_index: int, weights_C: Tensor | None) -> Tensor:
    """The sum over pixels of smp's focal loss, the mean over classes of each one's sigmoid against the rest."""
    from segmentation_models_pytorch.losses import FocalLoss

    weights: Any = weights_C  # smp takes tensors too
    loss = FocalLoss("multiclass", gamma=FOCUS, ignore_index=ignore_index, reduction="sum", class_weights=weights)
    summed: Tensor = loss(logits_NCHW, mask_NHW)
    return summed


def _lovasz(logits_NCHW: Tensor, mask_NHW: Tensor, ignore_index: int) -> Tensor:
    """The Lovász-Softmax loss of smp over the classes that occur (Berman et al. 2018, arXiv 1705.08790); a pixel must be labelled."""
    from segmentation_models_pytorch.losses import LovaszLoss

    loss: Tensor = LovaszLoss("multiclass", ignore_index=ignore_index)(logits_NCHW, mask_NHW)
    return loss


def _own(loss: DistillLoss, logits_NCHW: Tensor, targets_NCHW: Tensor, inside_NHW: Tensor) -> Tensor:
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
