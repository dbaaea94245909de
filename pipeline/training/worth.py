"""
Is a cache worth it: what it costs, and what it saves of a training run; before it from short trials of the real networks, after
it from what was measured.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdpipe.configs.errors import ConfigError, OutOfMemory
from kdpipe.configs.schema import Config, TeacherView
from kdpipe.pipeline.distributed import computed_precision
from kdpipe.pipeline.memory import fits_in_memory, training_advice
from kdpipe.pipeline.precompute.costs import StageOneCosts, teacher_seconds
from kdpipe.pipeline.precompute.subjects import predictions_per_sample
from kdpipe.pipeline.progress import Progress
from kdpipe.pipeline.teacher.frozen import FrozenTeacher
from kdpipe.pipeline.training.batch_size import resolve_batch_size, take_steps
from kdpipe.pipeline.training.loaders import batches_per_epoch, steps_in

TIMED_STEPS = 3  # of which the first, with its allocations, is left out
HARDLY = 0.1  # of a run's time: less is not worth a second command and the disk


@dataclass(frozen=True)
class Worth:
    """
    Seconds of the trials, or of what was run, and how often a run repeats them.

    `step_seconds` is a step of the student on a batch that is there already; `tile_seconds` the teacher's answer to a whole
    tile of the mean size, which `--kd online` asks for; `crop_seconds` to `train.crop`, all that an online script must ask. Where
    `teacher_view` is `crop`, both are to a crop.
    """

    precompute_seconds: float
    step_seconds: float
    tile_seconds: float
    crop_seconds: float
    samples_per_step: int
    views_per_sample: float
    steps: int
    epochs: float
    teacher_view: TeacherView = "tile"

    @property
    def cached_seconds(self) -> float:
        """Stage one and the run."""
        return self.precompute_seconds + self.steps * self.step_seconds

    @property
    def online_step_seconds(self) -> float:
        """A step in which the teacher answers the whole tile of every view, as `--kd online` has it."""
        return self.step_seconds + self.samples_per_step * self.views_per_sample * self.tile_seconds

    @property
    def crops_step_seconds(self) -> float:
        """A step in which the teacher answers the crops alone: the least that a live teacher costs."""
        return self.step_seconds + self.samples_per_step * self.crop_seconds

    @property
    def cheapest_step_seconds(self) -> float:
        """A step with the live teacher, the cheaper way."""
        return min(self.online_step_seconds, self.crops_step_seconds)

    @property
    def paid_after_epochs(self) -> float:
        """Epochs after which stage one has cost less than the live teacher."""
        per_epoch = (self.cheapest_step_seconds - self.step_seconds) * self.steps / self.epochs
        return self.precompute_seconds / per_epoch

    @property
    def saved_share(self) -> float:
        """What the cache saves of the time with a live teacher; negative where it costs more."""
        return 1 - self.cached_seconds / (self.steps * self.cheapest_step_seconds)

    @property
    def verdict(self) -> str:
        """`yes`, `hardly` or `no`."""
        return "yes" if self.saved_share >= HARDLY else "hardly" if self.saved_share >= 0 else "no"

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        derived = (
            "cached_seconds",
            "online_step_seconds",
            "crops_step_seconds",
            "paid_after_epochs",
            "saved_share",
            "verdict",
        )
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}


def measure(
    config: Config, device: torch.device, teacher: FrozenTeacher, image_HWC: NDArray[np.uint8], samples: int,
    precompute_seconds: float, tile_seconds: float, progress: Progress,
) -> Worth | str:  # fmt: skip
    """
    Time the student's step and the teacher on a crop of `image_HWC`; the rest is known. `samples` are those of an epoch.

    Why not, in a sentence, where a step of the student cannot be taken on this machine.
    """
    advice = training_advice(config, computed_precision(config, device))
    try:
        config = resolve_batch_size(config, device, progress)
        batch_size, accumulate = config.train.batch_size, config.train.accumulate
        assert batch_size != "auto"  # it is resolved
        per_epoch = batches_per_epoch(config, samples)
        with fits_in_memory("while timing the student", advice):
            step_seconds = accumulate * min(take_steps(config, device, batch_size, TIMED_STEPS)[1:])
    except (OutOfMemory, ConfigError) as err:
        return f"a step of the student cannot be timed here: {err}"
    side = config.train.crop
    crop_HWC = np.ascontiguousarray(image_HWC[:side, :side])
    for _ in range(2):  # the first sets up kernels for an image of this size, on CUDA for seconds
        start = time.perf_counter()
        teacher.soft_targets(crop_HWC[None])
        crop_seconds = (time.perf_counter() - start) * side**2 / crop_HWC[..., 0].size
    steps = steps_in(config, per_epoch)
    epochs = steps * accumulate / per_epoch
    return _worth(config, precompute_seconds, step_seconds, tile_seconds, crop_seconds, steps, epochs)


def worth_of_run(config: Config, costs: StageOneCosts, step_seconds: float, steps: int, epochs: float) -> Worth:
    """Of a run that has ended, whose step took so long with its loading, by what stage one cost."""
    tile, crop = teacher_seconds(config, costs.teacher_seconds, costs.tiles, costs.pixels)
    return _worth(config, costs.seconds, step_seconds, tile, crop, steps, epochs)


def _worth(
    config: Config, precompute: float, step: float, tile: float, crop: float, steps: int, epochs: float
) -> Worth:
    return Worth(
        precompute_seconds=precompute,
        step_seconds=step,
        tile_seconds=tile,
        crop_seconds=crop,
        samples_per_step=config.train.samples_per_step,
        views_per_sample=predictions_per_sample(config),
        steps=steps,
        epochs=epochs,
        teacher_view=config.distill.teacher_view,
    )
