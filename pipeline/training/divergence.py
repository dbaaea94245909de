"""Diverging losses, infinite, NaN or growing: errors and hints with the keys to change and their values."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kdpipe.configs.errors import TrainingDiverged
from kdpipe.configs.schema import Config, Precision
from kdpipe.pipeline.losses import LossTerms

MIN_STEPS = 100  # a tenth of fewer steps is too small a sample
# The last tenth must exceed the first by this many standard errors: by chance in one of 260 runs of `MIN_STEPS` with a level loss.
STANDARD_ERRORS = 3.0
TIMES = 3.0  # the loss of a single batch may be a third of the mean by chance, hardly less


def refuse_divergence(
    terms: LossTerms, targets_NCHW: Tensor | None, step: int, config: Config, precision: Precision, folder: Path
) -> None:
    """
    Raise `TrainingDiverged` if the loss of a step is infinite or NaN, naming the keys to change and their values.

    If the soft targets are not finite, or a `distill.loss` of the user's own alone, the error names them instead of any key.
    """
    if torch.isfinite(terms.total):
        return
    hard, soft = terms.hard.item(), terms.soft.item()
    found = f"the loss became {terms.total.item()} at step {step} (hard {hard:.4g}, distillation {soft:.4g})"
    if targets_NCHW is not None and not torch.isfinite(targets_NCHW).all():
        raise TrainingDiverged(
            f"{found}: the soft targets of this batch are not finite, which no setting can fix; "
            "run `kdpipe verify-cache --level full`"
        )
    if config.distill.own_loss and math.isfinite(hard) and not math.isfinite(soft):
        raise TrainingDiverged(
            f"{found}: {config.distill.loss} (distill.loss) returned {soft}, while the loss of the labels is finite; look in it for "
            "divisions by zero and logarithms of zero"
        )
    raise TrainingDiverged(
        f"{found}; try {', or '.join(_advice(config, precision))}. Start again with --overwrite: a resumed run would repeat the "
        f"same step. Checkpoints up to the last one saved are in {folder}"
    )


def growth_hint(losses: Sequence[float], config: Config, precision: Precision) -> str | None:
    """
    A line for the end of a run whose loss grew without becoming infinite; None for other runs.

    A loss has grown if its mean over the last tenth of the steps exceeds that over the first tenth by `STANDARD_ERRORS` of their
    difference, or the loss of the first step, before any update, `TIMES` over (it may leap up within the first tenth).
    """
    tenth = len(losses) // 10
    if len(losses) < MIN_STEPS:
        return None
    first, last = losses[:tenth], losses[-tenth:]
    grown = statistics.fmean(last) - statistics.fmean(first)
    error = ((statistics.variance(first) + statistics.variance(last)) / tenth) ** 0.5
    if grown <= STANDARD_ERRORS * error and statistics.fmean(last) <= TIMES * losses[0]:
        return None
    return (
        f"the loss grew: its mean over the last {tenth} steps is {statistics.fmean(last):.4g}, over the first {tenth} "
        f"{statistics.fmean(first):.4g}, at the first step {losses[0]:.4g}; the run diverges. "
        f"Try {', or '.join(_advice(config, precision))}"
    )


def _advice(config: Config, precision: Precision) -> list[str]:
    train = config.train
    advice = [f"train.lr: {train.lr / 10:.2g} (now {train.lr:g})"]
    if train.backbone_lr > 0:
        advice[0] += f" and train.backbone_lr: {train.backbone_lr / 10:.2g} (now {train.backbone_lr:g})"
    if train.clip_norm is None or train.clip_norm > 1:
        advice.append(f"train.clip_norm: 1.0 (now {'none' if train.clip_norm is None else f'{train.clip_norm:g}'})")
    if precision != "fp32":
        advice.append(f"train.precision: fp32 (now {precision})")
    if config.distill.mode != "none" and "kl" in config.distill.soft_losses and config.distill.temperature > 4:
        advice.append(f"distill.temperature: 2 (now {config.distill.temperature:g}, squared in the loss)")
    return advice
