"""The logs of one start of a run: a CSV file, and TensorBoard's."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from kdpipe.configs.schema import Config
from kdpipe.pipeline.runs import layout


class Logs:
    """`metrics.csv` and TensorBoard's files of one start of a run, in a new folder `version_N`."""

    def __init__(self, config: Config) -> None:
        name = f"{config.group}/{config.name}"
        self._csv = CSVLogger(layout.LOGS_DIR, name=name)
        self._tensorboard = TensorBoardLogger(layout.LOGS_DIR, name=name, version=self._csv.version)
        self.folder = self._csv.log_dir

    @property
    def tensorboard(self) -> Any:
        """TensorBoard's `SummaryWriter`."""
        return self._tensorboard.experiment

    def log(self, figures: dict[str, Any], step: int) -> None:
        """Log figures after `step` steps."""
        for logger in (self._csv, self._tensorboard):
            logger.log_metrics(figures, step=step)

    def save(self) -> None:
        """Write `metrics.csv` up to now; called with each checkpoint, so that the log of a resumed run has no gap."""
        self._csv.save()

    def close(self) -> None:
        """Write everything that is logged; TensorBoard's thread would otherwise write later, even after an error."""
        for logger in (self._csv, self._tensorboard):
            logger.finalize("success")
