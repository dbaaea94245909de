"""Scores of a network on whole validation tiles."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix

from kdpipe.configs.schema import Config
from kdpipe.pipeline.distributed import any_rank, computed_precision, sums_over_ranks
from kdpipe.pipeline.evaluation.confusion import Scores, scores
from kdpipe.pipeline.memory import fits_in_memory, sized, validation_advice
from kdpipe.pipeline.models.normalize import student_inputs
from kdpipe.pipeline.models.views import padded_logits


@torch.inference_mode()
def validate(
    model: nn.Module, loader: Any, config: Config, device: torch.device, stop: threading.Event
) -> Scores | None:
    """
    Scores of `model` on whole tiles, padded by mirroring to what the network needs; leaves it in eval mode.

    Each rank of a distributed run predicts the tiles of its own loader, and all ranks get the scores of all tiles. None in all of them
    once `stop` is set in one.
    """
    num_classes = len(config.classes.names)
    counts = MulticlassConfusionMatrix(num_classes, ignore_index=config.classes.ignore_index).to(device)
    model.eval()
    advice = validation_advice(config, computed_precision(config, device))
    for batch in loader:
        if stop.is_set():
            break
        with fits_in_memory(f"while validating {batch_size_text(batch, 'tile')}", advice):
            logits = padded_logits(model, student_inputs(batch["image"], config))
        counts.update(logits.argmax(dim=1), batch["mask"])
    if any_rank(stop.is_set(), device):
        return None
    confusion: Any = counts.confmat  # not compute(), which would warn about a rank without a tile
    (whole,) = sums_over_ranks(confusion)
    return scores(whole.to(confusion.dtype).cpu().numpy(), config.classes.names, config.classes.not_scored)


def batch_size_text(batch: dict[str, Tensor], noun: str) -> str:
    """The size of a batch for errors: `4 tiles of 512 x 640 px`."""
    count, _, height, width = batch["image"].shape
    return sized(noun, count, height, width)
