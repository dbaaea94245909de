"""`train.average`: the average of a student's weights over the steps of a run, with batch norm statistics of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

from kdpipe.configs.schema import Config
from kdpipe.data.dataset import TrainTiles
from kdpipe.data.survey import evenly
from kdpipe.pipeline.distributed import Alone
from kdpipe.pipeline.models.normalize import student_inputs
from kdpipe.pipeline.runs.checkpoint import Averaged

LAST_SHARE = (
    0.25  # of a run's steps, which `mean` averages: those of Izmailov et al. 2018, arXiv 1803.05407, section 4.1
)
# Of `ema`: a horizon of 1000 steps, that of fewer in the first ones (Tarvainen and Valpola 2017, arXiv 1703.01780, raise it likewise).
MOST_DECAY, RISE = 0.999, 10
BATCH_NORM_BATCHES = (
    16  # of the run's batch size, for new statistics: a forward pass of each, the time of some five steps
)


class WeightAverage:
    """
    The average of a student's weights: `mean` of the last quarter of the run's steps, or `ema` of all.

    The statistics of batch norms are not averaged but computed anew, from fixed training crops, when they are needed.

    Args:
        samples: of training; their images alone are used.
        total_steps: of the run.
    """

    def __init__(
        self, student: nn.Module, config: Config, samples: TrainTiles, total_steps: int, device: torch.device, fabric: Fabric
    ) -> None:  # fmt: skip
        self._config, self._samples, self._device = config, samples, device
        self.first = 1 if config.train.average == "ema" else total_steps - math.ceil(LAST_SHARE * total_steps) + 1
        self._averaged = AveragedModel(student, multi_avg_fn=self._add)
        self.model = Alone(self._averaged.module, fabric)
        self._has_statistics = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in student.modules())
        self._is_renewed = False

    @property
    def steps(self) -> int:
        """How many steps are averaged."""
        return int(self._averaged.n_averaged)

    def update(self, student: nn.Module, step: int) -> None:
        """Take in the weights after step number `step`, counted from 1; those before `first` are not averaged."""
        if step >= self.first:
            self._averaged.update_parameters(student)
            self._is_renewed = False

    def state(self) -> Averaged | None:
        """The averaged weights with their own statistics of batch norms; None before the first step that is averaged."""
        if not self.steps:
            return None
        if self._has_statistics and not self._is_renewed:
            torch.manual_seed(self._config.seed)  # of dropout; each step seeds it again
            update_bn(self._batches(), self.model)
        self._is_renewed = True
        return Averaged(self._averaged.module.state_dict(), self.steps, self.first)

    def restore(self, averaged: Averaged | None) -> str | None:
        """Go on from what a checkpoint holds; returns a sentence where that is the average of other steps, and begins anew."""
        if averaged is None:
            return None
        if averaged.first != self.first:
            return (
                f"note: the run is of another length now, and averages the weights from step {self.first} on, no longer from step "
                f"{averaged.first}: the average begins anew"
            )
        self._averaged.module.load_state_dict(dict(averaged.state))
        self._averaged.n_averaged.fill_(averaged.steps)
        return None

    def _add(self, averages: Sequence[Tensor], weights: Sequence[Tensor], steps: Tensor | int) -> None:
        done = int(steps)
        share = 1 / (done + 1)
        if self._config.train.average == "ema":
            share = 1 - min(MOST_DECAY, (1 + done) / (RISE + done))
        torch._foreach_lerp_(list(averages), list(weights), share)

    def _batches(self) -> Iterator[Tensor]:
        size = self._config.train.batch_size
        assert size != "auto"  # it is resolved
        chosen = evenly(range(len(self._samples)), BATCH_NORM_BATCHES * size)
        for start in range(0, len(chosen) - size + 1, size):
            images = torch.stack([torch.from_numpy(self._samples[k]["image"]) for k in chosen[start : start + size]])
            yield student_inputs(images.to(self._device), self._config)
