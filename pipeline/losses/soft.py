"""
The losses of the soft targets, and how far each pixel's target is believed.

All are least, and zero, where the student says what the target says, whatever its entropy. The Dice and Jaccard losses of labels are
not: at a soft target their optimum is a hard prediction.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from kdpipe.configs.schema.losses import Trust
from kdpipe.pipeline.distributed import sums_over_ranks
from kdpipe.pipeline.losses.labelled import SMOOTH


def soft_loss(
    logits_NCHW: Tensor,
    targets_NCHW: Tensor,
    inside_NHW: Tensor,
    temperature: float,
    entropy_error_N: Tensor | None = None,
    trust_NHW: Tensor | None = None,
) -> Tensor:
    """
    `KL(p || softmax(s / T))`, summed over classes, averaged over the pixels inside (see `distillation_loss`); a scalar, in float32.

    Zero if no pixel is inside; `0 log 0` is 0. `KL = -Σ p log q - H(p)`: rounding took `entropy_error_N` from H(p), a constant to the
    student, which is subtracted so that the loss has the value of the unrounded target. `trust_NHW`, float32 in 0..1, weighs each pixel;
    the mean stays over all pixels inside, and the rounding is not corrected then.
    """
    log_q_NCHW = F.log_softmax(logits_NCHW.float() / temperature, dim=1)
    # Summed separately: the difference by class would be one more array of this size, and its gradient another.
    kl_NHW = torch.xlogy(targets_NCHW, targets_NCHW).sum(dim=1) - (targets_NCHW * log_q_NCHW).sum(dim=1)
    pixels_N = inside_NHW.sum(dim=(1, 2))
    total = (kl_NHW * inside_NHW).sum() if trust_NHW is None else (kl_NHW * inside_NHW * trust_NHW).sum()
    if entropy_error_N is not None and trust_NHW is None:
        total = total - (entropy_error_N * pixels_N).sum()
    total, pixels = sums_over_ranks(total, pixels_N.sum())
    return (total / pixels.clamp(min=1)).float()


def soft_region_losses(
    logits_NCHW: Tensor,
    targets_NCHW: Tensor,
    inside_NHW: Tensor,
    temperature: float,
    losses: Mapping[str, float],
    trust_NHW: Tensor | None = None,
) -> Tensor:
    """
    The weighted sum of the soft `dice` and `jaccard` losses of `losses`, of `softmax(s / T)` against p; a scalar, in float32.

    With `both = Σ q + Σ p`, `apart = Σ |q - p|`, sums over the batch's pixels inside, and s = `SMOOTH`, of each class:
    `dice = 1 - ((both - apart) / 2 + s) / (both / 2 + s)` and `jaccard = 1 - ((both - apart) / 2 + s) / ((both + apart) / 2 + s)`.
    At one-hot targets they are the losses of `hard_loss`, and like those the mean over all classes, zero for a class that is nowhere the
    target's most likely one: next to nothing of a class would weigh as much as a field of it. `trust_NHW` weighs each pixel in the sums.
    Sources: Wang et al. 2023, "Jaccard Metric Losses", arXiv 2302.05666, equation 8; Wang et al. 2023, "Dice Semimetric Losses", arXiv
    2303.16296, equation 7.
    """
    weights_N1HW = (inside_NHW.float() if trust_NHW is None else inside_NHW * trust_NHW)[:, None]
    q_NCHW = (logits_NCHW.float() / temperature).softmax(dim=1) * weights_N1HW
    p_NCHW = targets_NCHW * weights_N1HW
    over = (0, 2, 3)
    # Not an indexing by the pixels that count, which would make the CPU wait for the GPU.
    shown_C = torch.zeros(targets_NCHW.shape[1], device=targets_NCHW.device).index_add_(
        0, targets_NCHW.argmax(dim=1).flatten(), (weights_N1HW > 0).float().flatten()
    )
    both_C, apart_C, shown_C = sums_over_ranks(
        q_NCHW.sum(over) + p_NCHW.sum(over), (q_NCHW - p_NCHW).abs().sum(over), shown_C
    )
    common_C = (both_C - apart_C) / 2 + SMOOTH
    area_C = {"dice": both_C / 2 + SMOOTH, "jaccard": (both_C + apart_C) / 2 + SMOOTH}
    total = logits_NCHW.float().sum() * 0
    for name, weight in losses.items():
        total = total + weight * ((1 - common_C / area_C[name]) * (shown_C > 0)).mean()
    return total.float()


def hardened(targets_NCHW: Tensor) -> Tensor:
    """The most likely class of each pixel alone, one-hot, float32 `(N, C, H, W)`; zero where the target is zero."""
    hard_NCHW = torch.zeros_like(targets_NCHW).scatter_(1, targets_NCHW.argmax(dim=1, keepdim=True), 1.0)
    return hard_NCHW * (targets_NCHW.sum(dim=1, keepdim=True) > 0)


def trust_in(
    targets_NCHW: Tensor, temperature: float, trust: Trust, threshold: float, class_trust_C: Tensor | None
) -> Tensor | None:
    """
    How far the target of each pixel is believed, float32 `(N, H, W)` in 0..1; None where all are, entirely.

    By the probabilities at T 1, whatever `temperature` they are at: `confidence` is the largest one, `entropy` is `1 - H / ln C`, and
    `threshold` is 1 where the largest one reaches `threshold`, else 0. `class_trust_C` multiplies it by the trust in the most likely
    class of the pixel.
    """
    weights_NHW: Tensor | None = None
    if trust != "none":
        probs_NCHW = targets_NCHW
        if temperature != 1:
            powers_NCHW = targets_NCHW**temperature
            probs_NCHW = powers_NCHW / powers_NCHW.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        if trust == "entropy":
            entropy_NHW = -torch.xlogy(probs_NCHW, probs_NCHW).sum(dim=1)
            weights_NHW = (1 - entropy_NHW / torch.log(torch.tensor(float(probs_NCHW.shape[1])))).clamp(min=0, max=1)
        else:
            largest_NHW = probs_NCHW.amax(dim=1)
            weights_NHW = largest_NHW if trust == "confidence" else (largest_NHW >= threshold).float()
    if class_trust_C is not None:
        by_class_NHW = class_trust_C[targets_NCHW.argmax(dim=1)]
        weights_NHW = by_class_NHW if weights_NHW is None else weights_NHW * by_class_NHW
    return weights_NHW
