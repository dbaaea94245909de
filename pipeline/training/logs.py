"""
The logs of one start of a run: `metrics.csv`, and TensorBoard's files, with pictures of a few fixed samples.

Pictures show what a student learns from and what it predicts, from the first validation on. A sample is predicted at the size of a
training crop; its middle is shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from numpy.typing import NDArray
from torch import Tensor, nn

from kdpipe.configs.schema import Config
from kdpipe.data.dataset import TrainTiles, ValTiles
from kdpipe.pipeline.models.normalize import student_inputs
from kdpipe.pipeline.models.views import padded_logits
from kdpipe.pipeline.pictures import (
    UNLABELLED,
    legend,
    paint_classes,
    paint_entropy,
    paint_errors,
    paint_soft_target,
    visible,
)
from kdpipe.pipeline.runs import layout

TRAIN_SHOWN, VAL_SHOWN = 3, 2  # samples
SIDE_PX = 256  # largest side of a picture: five samples then take 0.5 MB each time, and 0.8 MB once (PNG, Dubai tiles)
# TensorBoard shows 10 pictures of a tag, a random sample of them all (--samples_per_plugin): more would only fill disks.
PICTURES_A_RUN = 10


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


@dataclass(frozen=True)
class Sample:
    """A crop to show: image `(B, H, W)`, mask `(H, W)`, inside `(H, W)`, and the soft target `(C, H, W)` if there is one."""

    name: str
    image: NDArray[np.uint8]
    mask: NDArray[np.int64]
    inside: NDArray[np.bool_]
    target: NDArray[np.float32] | None


class BoardPictures:
    """
    Pictures of up to five samples: image, label, soft target and its entropy, the student's classes, its softened output, its errors.

    Args:
        config: `classes`, `data.visible`, `distill.temperature`, `student.normalize` and `train.crop` are used.
        dataset: the first epoch's samples of its first, middle and last tile are shown as the student sees them.
        val_tiles: the middle of the first and last tile is shown, without a soft target.
        total_steps: steps of the run; pictures are written at the first call in each tenth of them and after the last step.
    """

    def __init__(self, config: Config, dataset: TrainTiles, val_tiles: ValTiles, total_steps: int) -> None:
        self._config, self._dataset, self._val_tiles = config, dataset, val_tiles
        self._total = total_steps
        self._next_tenth = 0
        self._samples: list[Sample] = []

    @torch.inference_mode()
    def show(self, writer: Any, model: nn.Module, device: torch.device, step: int) -> None:
        """
        Write the pictures to a `SummaryWriter` if they are due after `step` steps; leaves `model` in eval mode.

        Draws no random number. Pictures that do not change are written once. Raises what reading a sample raises.
        """
        tenth = step * PICTURES_A_RUN // self._total
        if tenth < self._next_tenth:
            return
        self._next_tenth = tenth + 1
        model.eval()
        if not self._samples:
            self._samples = self._read()
            del self._dataset, self._val_tiles  # they hold decoded tiles
            writer.add_image("classes", np.asarray(legend(self._config.classes.names)), step, dataformats="HWC")
            for sample in self._samples:
                _add(writer, sample, self._given(sample), step)
        for sample in self._samples:
            inputs = student_inputs(torch.from_numpy(sample.image)[None].to(device), self._config)
            _add(writer, sample, self._predicted(sample, padded_logits(model, inputs)[0].float()), step)

    def _read(self) -> list[Sample]:
        samples = []
        tiles = self._dataset.drawn_tiles
        for number in _spread(len(tiles), TRAIN_SHOWN):
            crop = self._dataset[number]
            samples.append(Sample(tiles[number].id, crop["image"], crop["mask"], crop["inside"], crop.get("target")))
        for number in _spread(len(self._val_tiles), VAL_SHOWN):
            whole = self._val_tiles[number]
            image, mask = (_middle(array, self._config.train.crop) for array in (whole["image"], whole["mask"]))
            samples.append(
                Sample(self._val_tiles.tiles[number].id, image, mask, np.ones(mask.shape, dtype=np.bool_), None)
            )
        return samples

    def _given(self, sample: Sample) -> dict[str, NDArray[np.uint8]]:
        pictures = {"1 image": visible(sample.image.transpose(1, 2, 0), self._config.data.visible_places)}
        if (sample.mask != self._config.classes.ignore_index).any():
            pictures["2 label"] = paint_classes(sample.mask, len(self._config.classes.names))
        if sample.target is not None:
            pictures["3 soft target"] = paint_soft_target(sample.target)
            pictures["4 entropy of the soft target"] = paint_entropy(sample.target)
        return pictures

    def _predicted(self, sample: Sample, logits_CHW: Tensor) -> dict[str, NDArray[np.uint8]]:
        classes = self._config.classes
        predicted_HW = logits_CHW.argmax(dim=0).cpu().numpy()
        softened_CHW = torch.softmax(logits_CHW / self._config.distill.temperature, dim=0).cpu().numpy()
        pictures = {
            "5 student": paint_classes(predicted_HW, len(classes.names)),
            "6 student, soft": paint_soft_target(softened_CHW),
        }
        if (sample.mask != classes.ignore_index).any():
            pictures["7 errors"] = paint_errors(predicted_HW, sample.mask, len(classes.names))
        return pictures


def _add(writer: Any, sample: Sample, pictures: dict[str, NDArray[np.uint8]], step: int) -> None:
    # TensorBoard groups tags by what stands before the first slash.
    name = sample.name.replace("/", " ")
    for title, painted_HW3 in pictures.items():
        if title != "1 image":  # pixels outside of the tile have no prediction
            painted_HW3 = np.where(sample.inside[..., None], painted_HW3, np.array(UNLABELLED, dtype=np.uint8))
        shown_3HW = _middle(painted_HW3.transpose(2, 0, 1), SIDE_PX)
        writer.add_image(f"{name}/{title}", np.ascontiguousarray(shown_3HW), step)


def _spread(count: int, shown: int) -> list[int]:
    """At most `shown` numbers below `count`, evenly spread from the first to the last."""
    return sorted({int(number) for number in np.linspace(0, count - 1, shown)}) if count else []


def _middle(array: NDArray[Any], side: int) -> NDArray[Any]:
    """The middle of the last two axes, at most `side` long."""
    top, left = (max(0, length - side) // 2 for length in array.shape[-2:])
    return array[..., top : top + side, left : left + side]
