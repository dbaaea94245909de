"""
Parity: cached and live soft targets compared, tile by tile, and the effect of their difference on a student.

Every tolerance follows from δ, the largest allowed difference between a cached and a live probability: the encoding's bound
plus the difference that the teacher's arithmetic may show when it is run again elsewhere (`PRECISION_SLACK`).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from kdpipe.configs.schema import Config
from kdpipe.pipeline.losses import soft_loss
from kdpipe.pipeline.models.normalize import student_inputs
from kdpipe.pipeline.models.views import padded_logits

# The most that a probability moves when the same weights run on another device, batch or library version. float32: a
# network's logits agree to about 1e-4, of which softmax passes on at most half. float16 and bfloat16 keep 11 and 8 bits.
PRECISION_SLACK = {"fp32": 5e-4, "fp16": 2e-2, "bf16": 1.5e-1}
CLASS_SLACK = 1e-6  # two probabilities that are closer may change places by the rounding of float32
GRADIENT_CROP_PX = 256  # side of the middle of a tile: its gradient through the student fits any machine


@dataclass(frozen=True)
class Measure:
    """A figure and its tolerance: the most it may be, or the least if `at_least`."""

    value: float
    tolerance: float
    at_least: bool = False

    @property
    def passes(self) -> bool:
        """Whether the figure is within its tolerance; NaN is not."""
        return self.value >= self.tolerance if self.at_least else self.value <= self.tolerance


@dataclass(frozen=True)
class TileParity:
    """
    The comparison of one tile. `kl` is KL(cached || live) in nats, averaged over pixels.

    `class_change` is the share of pixels whose likeliest class at T 1 is not the likeliest of the live target; the temperature must
    not change it. `moved_mean` and `moved_most` are the shares of a pixel's probability that the cached target has in other classes than
    the live one: half the sum of |Δp| over classes. `cached_class_change` is that share of pixels for the cached target, where rounding
    may decide between nearly equal classes.
    """

    tile: str
    max_abs: Measure
    mean_abs: Measure
    kl: Measure
    decided_agreement: Measure
    loss_difference: Measure
    gradient_cosine: Measure
    class_change: Measure
    argmax_agreement: float
    cached_class_change: float
    moved_mean: float
    moved_most: float

    def measures(self) -> dict[str, Measure]:
        """The figures that have a tolerance, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Measure)}

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        passes = {name: measure.passes for name, measure in self.measures().items()}
        return {**asdict(self), "passes": all(passes.values())}


def compare(
    tile: str, cached_CHW: NDArray[np.float32], live_CHW: NDArray[np.float32], probs_CHW: NDArray[np.float32],
    image_HWC: NDArray[np.uint8], student: nn.Module, config: Config, bound: float, lost: float, precision: str, device: torch.device,
) -> TileParity:  # fmt: skip
    """
    Compare a tile's cached soft targets with the live ones, both float32 `(C, H, W)`, at the encoding's error `bound`.

    `probs_CHW` are the teacher's probabilities of the student's classes, which are the live targets at T 1.
    The distillation loss of `student` and its gradient are computed in the tile's `middle_window`, from either target;
    `lost` is the entropy that rounding took there.
    """
    delta = bound + PRECISION_SLACK[precision]
    difference = np.abs(cached_CHW - live_CHW)
    num_classes = live_CHW.shape[0]
    top_two = np.partition(live_CHW, num_classes - 2, axis=0)[-2:]
    moved_HW = difference.sum(axis=0, dtype=np.float64) / 2
    agree = cached_CHW.argmax(axis=0) == live_CHW.argmax(axis=0)
    # The likeliest class cannot change where the two best are further apart than both may move.
    decided = top_two[1] - top_two[0] > 2 * delta
    floor = np.maximum(live_CHW, delta)
    tiny = np.float32(1e-30)
    kl = cached_CHW * (np.log(np.maximum(cached_CHW, tiny)) - np.log(np.maximum(live_CHW, tiny)))
    loss, cosine = _student_effect(cached_CHW, live_CHW, image_HWC, student, config, delta, lost, device)
    return TileParity(
        tile=tile,
        max_abs=Measure(float(difference.max()), delta),
        # Rounding is unbiased: half the bound on average, and so is the drift of the arithmetic.
        mean_abs=Measure(float(difference.mean()), delta / 2),
        # KL is (c - p)² / p to second order; below δ a probability moves by no more than δ.
        kl=Measure(float(kl.sum(axis=0).mean()), float((delta**2 / floor).sum(axis=0).mean())),
        decided_agreement=Measure(float(agree[decided].mean()) if decided.any() else 1.0, 1.0, at_least=True),
        loss_difference=loss,
        gradient_cosine=cosine,
        class_change=Measure(_class_change(probs_CHW, live_CHW), 0.0),
        argmax_agreement=float(agree.mean()),
        cached_class_change=_class_change(probs_CHW, cached_CHW),
        moved_mean=float(moved_HW.mean()),
        moved_most=float(moved_HW.max()),
    )


def _class_change(probs_CHW: NDArray[np.float32], target_CHW: NDArray[np.float32]) -> float:
    """The share of pixels whose likeliest class of `probs_CHW` is less likely than another in `target_CHW`, by more than float32 errs."""
    of_likeliest_HW = np.take_along_axis(target_CHW, probs_CHW.argmax(axis=0)[None], axis=0)[0]
    return float((of_likeliest_HW < target_CHW.max(axis=0) - CLASS_SLACK).mean())


def middle_window(height: int, width: int) -> tuple[int, int, int, int]:
    """`(top, left, h, w)` of the middle of a tile, where the student runs; multiples of 32 px if the tile has as many."""
    h, w = (min(side, GRADIENT_CROP_PX) // 32 * 32 or side for side in (height, width))
    return (height - h) // 2, (width - w) // 2, h, w


def _student_effect(
    cached_CHW: NDArray[np.float32], live_CHW: NDArray[np.float32], image_HWC: NDArray[np.uint8],
    student: nn.Module, config: Config, delta: float, lost: float, device: torch.device,
) -> tuple[Measure, Measure]:  # fmt: skip
    """
    The relative difference of the distillation loss, and the cosine between the gradients of the student's parameters.

    Tolerances: except for its entropy, the loss is linear in the target, so that it moves by at most the mean over pixels
    of the sum over classes of `δ (|log q| + |log p| + 1)`. The gradient with respect to the student's logits is
    proportional to `q - p`; moved by `δ` in every entry, it turns by an angle of at most `δ √(C H W) / |q - p|`. The
    gradient of the parameters is a linear image of it, for which twice that angle is allowed.
    """
    top, left, height, width = middle_window(*live_CHW.shape[1:])
    window = (slice(top, top + height), slice(left, left + width))
    image = torch.from_numpy(np.ascontiguousarray(image_HWC[window])).to(device).permute(2, 0, 1)[None]
    inputs = student_inputs(image, config)
    temperature = config.distill.temperature
    losses, gradients = [], []
    for target_CHW, correction in ((cached_CHW, lost), (live_CHW, 0.0)):
        target = torch.from_numpy(np.ascontiguousarray(target_CHW[:, *window])).to(device)[None]
        logits = padded_logits(student, inputs)  # only a tile below 32 px is padded
        inside = torch.ones_like(target[:, 0], dtype=torch.bool)
        loss = temperature**2 * soft_loss(
            logits, target, inside, temperature, torch.tensor([correction], device=device)
        )
        parameters = [p for p in student.parameters() if p.requires_grad]
        gradient = torch.autograd.grad(loss, parameters, allow_unused=True)
        gradients.append(torch.cat([g.flatten() for g in gradient if g is not None]).double())
        losses.append(loss.item())
        if target_CHW is live_CHW:
            live, q = target, F.softmax(logits.detach() / temperature, dim=1)
    log_terms = q.clamp(min=1e-12).log().abs() + live.clamp(min=delta).log().abs() + 1
    loss_tolerance = temperature**2 * delta * log_terms.sum(dim=1).mean().item()
    angle = delta * math.sqrt(q.numel()) / (q - live).norm().item()
    cosine = F.cosine_similarity(gradients[0], gradients[1], dim=0).item()
    return (
        Measure(abs(losses[0] - losses[1]) / losses[1], loss_tolerance / losses[1]),
        Measure(cosine, math.cos(min(2 * angle, math.pi / 2)), at_least=True),
    )
