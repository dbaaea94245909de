"""Is a cache worth it? Its cost against the time that it saves a training run: forecast from trials, or from a finished run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kdpipe.configs.schema import Config, TeacherView
from kdpipe.pipeline.precompute.costs import StageOneCosts, teacher_seconds
from kdpipe.pipeline.precompute.subjects import predictions_per_sample

HARDLY = 0.1  # share of a run's time: saving less is not worth a second command and the disk


@dataclass(frozen=True)
class Worth:
    """
    Seconds of stage one, of a student's step and of the teacher's predictions, and how often a run needs them.

    `step_seconds` is a step of the student from the cache; `tile_seconds` the teacher's prediction of a whole tile of the mean size, as
    `--kd online` needs it; `crop_seconds` that of a crop of `train.crop`, the least that a live teacher must predict. With
    `teacher_view: crop`, both are of a crop.
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
        """Stage one plus the run."""
        return self.precompute_seconds + self.steps * self.step_seconds

    @property
    def online_step_seconds(self) -> float:
        """A step in which the teacher predicts the whole tile of every view, as `--kd online` does."""
        return self.step_seconds + self.samples_per_step * self.views_per_sample * self.tile_seconds

    @property
    def crops_step_seconds(self) -> float:
        """A step in which the teacher predicts only the crops: the least that a live teacher costs."""
        return self.step_seconds + self.samples_per_step * self.crop_seconds

    @property
    def cheapest_step_seconds(self) -> float:
        """A step with the live teacher, whichever way is cheaper."""
        return min(self.online_step_seconds, self.crops_step_seconds)

    @property
    def paid_after_epochs(self) -> float:
        """Epochs after which stage one costs less than the live teacher."""
        per_epoch = (self.cheapest_step_seconds - self.step_seconds) * self.steps / self.epochs
        return self.precompute_seconds / per_epoch

    @property
    def saved_share(self) -> float:
        """Share of the time with a live teacher that the cache saves; negative where it costs more."""
        return 1 - self.cached_seconds / (self.steps * self.cheapest_step_seconds)

    @property
    def verdict(self) -> str:
        """`yes`, `hardly` or `no`."""
        return "yes" if self.saved_share >= HARDLY else "hardly" if self.saved_share >= 0 else "no"

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        derived = [
            "cached_seconds",
            "online_step_seconds",
            "crops_step_seconds",
            "paid_after_epochs",
            "saved_share",
            "verdict",
        ]
        return asdict(self) | {name: getattr(self, name) for name in derived}


def worth_of_run(config: Config, costs: StageOneCosts, step_seconds: float, steps: int, epochs: float) -> Worth:
    """Worth of a finished run, from its measured step, waiting for data included, and the recorded cost of stage one."""
    tile, crop = teacher_seconds(config, costs.teacher_seconds, costs.tiles, costs.pixels)
    return worth_of(config, costs.seconds, step_seconds, tile, crop, steps, epochs)


def worth_of(
    config: Config, precompute: float, step: float, tile: float, crop: float, steps: int, epochs: float
) -> Worth:
    """Worth of a cache from the seconds of stage one, of a step, and of the teacher's prediction of a tile and of a crop."""
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
