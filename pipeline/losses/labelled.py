"""The loss of the labels: weighted cross entropy, focal, Dice, Jaccard, Tversky and Lovász losses, over the labelled pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kdpipe.configs.schema.losses import USUAL_LABELLED_LOSS, refuse_unknown_losses
from kdpipe.pipeline.distributed import sums_over_ranks

SMOOTH = (
    0.05  # label smoothing of the cross entropy and smoothing of the region losses, from the recipe (GeoSeg's configs)
)
FOCUS = 2.0  # gamma of the focal loss, the best of Lin et al. 2017, arXiv 1708.02002, table 1b
# Dice, Jaccard and Tversky are `1 - (TP + s) / (TP + a FP + b FN + s)`; a and b. Tversky's are the best of Salehi et al. 2017,
# arXiv 1706.05721: what is missed costs more than what is too much.
REGION_LOSSES = {"dice": (0.5, 0.5), "jaccard": (1.0, 1.0), "tversky": (0.3, 0.7)}
LEAST_WEIGHT = 1e-12  # far below the weight of any labelled pixel


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
