"""What stage two minimises, as configured: the losses of labels and of soft targets, with the weights of classes and pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdpipe.configs.errors import ConfigError, count_text
from kdpipe.configs.schema import Config
from kdpipe.data.dataset import TrainSample, TrainTiles, read_labels
from kdpipe.data.declared.check import THREADS
from kdpipe.data.rasters import image_size, read_data
from kdpipe.data.survey import evenly
from kdpipe.data.tiles import Tile
from kdpipe.pipeline.losses import DistillLoss, LossTerms, distillation_loss
from kdpipe.pipeline.losses.soft import hardened, trust_in
from kdpipe.pipeline.models.external.own_module import find_source, import_own
from kdpipe.pipeline.progress import Progress
from kdpipe.pipeline.runs.checkpoint import Record
from kdpipe.pipeline.runs.record import OwnLoss

MOST_COUNTED = 1000  # masks, decoded in some ten seconds: by then shares of classes hardly change
FEWEST, MOST = 0.1, 10.0  # a class of a few pixels must not outweigh all others


class Objective:
    """
    The loss of a run, for batches on `device`.

    `class_weights` and `class_trust` are those of each class by name, None without `train.class_weights` and `distill.class_trust`;
    `own_loss` says which file a `distill.loss` of the user's own comes from. Raises `ConfigError` where that cannot be imported.
    """

    def __init__(
        self,
        config: Config,
        device: torch.device,
        class_weights: Mapping[str, float] | None = None,
        class_trust: Mapping[str, float] | None = None,
    ) -> None:
        self._config, self.class_weights, self.class_trust = config, class_weights, class_trust
        shares = [class_trust.get(name, 1.0) for name in config.classes.names] if class_trust else None
        self._class_trust_C = torch.tensor(shares, device=device) if shares else None
        weights = [(class_weights or {}).get(name, 1.0) for name in config.classes.names]
        # Weights of one for all are no weights, to the last bit.
        self._weights_C = torch.tensor(weights, device=device) if any(weight != 1 for weight in weights) else None
        self.own_loss, self._function = _own_loss(config)

    def __call__(
        self,
        output: Tensor | tuple[Tensor, Tensor],
        mask_NHW: Tensor,
        inside_NHW: Tensor,
        targets_NCHW: Tensor | None,
        entropy_error_N: Tensor | None = None,
    ) -> LossTerms:
        """The terms of a batch from a student's `output`, logits or a pair of them and its auxiliary head's (see `distillation_loss`)."""
        logits_NCHW, auxiliary_NCHW = output if isinstance(output, tuple) else (output, None)
        config, distill, trust_NHW = self._config, self._config.distill, None
        temperature = distill.temperature
        if targets_NCHW is not None:
            trust_NHW = trust_in(
                targets_NCHW, distill.temperature, distill.trust, distill.trust_threshold, self._class_trust_C
            )
            if distill.targets == "hard":  # which no temperature softens, and of which rounding took no entropy
                targets_NCHW, entropy_error_N, temperature = hardened(targets_NCHW), None, 1.0
        return distillation_loss(
            logits_NCHW, mask_NHW, inside_NHW, targets_NCHW, entropy_error_N, alpha=distill.alpha, temperature=temperature,
            ignore_index=config.classes.ignore_index, auxiliary_NCHW=auxiliary_NCHW, labelled_loss=config.train.labelled_loss,
            class_weights_C=self._weights_C, soft_losses=distill.soft_losses, trust_NHW=trust_NHW, own_loss=self._function,
        )  # fmt: skip

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps of it; nothing for the usual losses."""
        found = {
            "class_weights": dict(self.class_weights) if self.class_weights is not None else None,
            "class_trust": dict(self.class_trust) if self.class_trust is not None else None,
            "own_loss": self.own_loss.model_dump() if self.own_loss is not None else None,
        }
        return {key: value for key, value in found.items() if value is not None}


def changed_loss_note(before: Record | None, own_loss: OwnLoss | None) -> str | None:
    """A line for a resumed run whose `distill.loss` comes from a file that has changed since; None for other runs."""
    if before is None or before.own_loss is None or own_loss is None or before.own_loss.sha256 == own_loss.sha256:
        return None
    return (
        f"warning: since this run began, the file of distill.loss has changed: {own_loss.path} (sha256 was "
        f"{before.own_loss.sha256[:12]}…, is {own_loss.sha256[:12]}…). The run goes on with the loss as it is now, and does not reach the "
        "weights of an uninterrupted one unless it computes the same"
    )


def class_weights_of(
    config: Config, tiles: Sequence[Tile], recorded: Mapping[str, float] | None, progress: Progress
) -> dict[str, float] | None:
    """
    The weight of each class by name; None without `train.class_weights`.

    Those of `auto` are `recorded` in a run that is resumed, else counted in the masks of `tiles`: of each labelled tile, or of
    `MOST_COUNTED` evenly spread ones. Raises `DataError` for a mask that cannot be read.
    """
    chosen, names = config.train.class_weights, config.classes.names
    if chosen is None:
        return None
    if chosen != "auto":
        return {name: chosen.get(name, 1.0) for name in names}
    if recorded is not None:
        return dict(recorded)
    masks = evenly([tile for tile in tiles if tile.mask is not None], MOST_COUNTED)
    with progress.bar("labels", len(masks), "masks") as advance, ThreadPoolExecutor(THREADS) as threads:
        counts = []
        for found in threads.map(lambda tile: _count(tile, config), masks):
            counts.append(found)
            advance(1)
    weights = balanced(np.array(counts).reshape(-1, len(names)))
    shown = ", ".join(f"{name} {weight:.3g}" for name, weight in zip(names, weights, strict=True))
    progress.say(f"train.class_weights auto: {shown}; from {count_text(len(masks), 'masks')}")
    return dict(zip(names, weights, strict=True))


def class_trust_of(
    config: Config, samples: TrainTiles, recorded: Mapping[str, float] | None, progress: Progress
) -> dict[str, float] | None:
    """
    How far the teacher is believed where it says each class, by name; None without `distill.class_trust`, or without a teacher.

    Those of `auto` are `recorded` in a run that is resumed, else the teacher's precisions (see `precisions`) in the first crop of each
    labelled tile, or of `MOST_COUNTED` evenly spread ones, of `samples`, which have targets.
    """
    chosen, names = config.distill.class_trust, config.classes.names
    if chosen is None or config.distill.mode == "none":
        return None
    if chosen != "auto":
        return {name: chosen.get(name, 1.0) for name in names}
    if recorded is not None:
        return dict(recorded)
    labelled = evenly([i for i, tile in enumerate(samples.drawn_tiles) if tile.mask is not None], MOST_COUNTED)
    confusion_CC = np.zeros((len(names), len(names)), np.int64)
    with progress.bar("teacher's precision", len(labelled), "crops") as advance:
        for i in labelled:
            confusion_CC += _confusion(samples[i], len(names), config.classes.ignore_index)
            advance(1)
    shares = precisions(confusion_CC)
    shown = ", ".join(f"{name} {share:.2f}" for name, share in zip(names, shares, strict=True))
    progress.say(f"distill.class_trust auto: {shown}; from {count_text(len(labelled), 'labelled crops')}")
    return dict(zip(names, shares, strict=True))


def precisions(confusion_CC: NDArray[np.int64]) -> list[float]:
    """
    The share of the pixels given to each class that are labelled so, from a confusion matrix (rows labels, columns predictions).

    A class that is never predicted on a labelled pixel has the share of all classes together; 1 without any label.
    """
    right_C, predicted_C = np.diag(confusion_CC), confusion_CC.sum(axis=0)
    overall = right_C.sum() / predicted_C.sum() if predicted_C.sum() else 1.0
    shares_C = np.where(predicted_C > 0, right_C / np.maximum(predicted_C, 1), overall)
    return [float(share) for share in shares_C]


def _confusion(sample: TrainSample, num_classes: int, ignore_index: int) -> NDArray[np.int64]:
    """Labelled pixels by label (rows) and by the most likely class of the soft target (columns), int64 `(C, C)`."""
    known_HW = (sample["mask"] != ignore_index) & sample["inside"]
    pairs = sample["mask"][known_HW] * num_classes + sample["target"].argmax(axis=0)[known_HW]
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def balanced(counts_KC: NDArray[np.int64]) -> list[float]:
    """
    Weights by median frequency balancing from the labelled pixels of each class in K tiles, within `FEWEST` and `MOST`.

    The frequency of a class is its share of the labelled pixels of the tiles that show it; its weight is the median of all frequencies
    divided by its own. A class that no tile shows has 1.
    Source: Eigen and Fergus 2015, arXiv 1411.4734, on semantic labels.
    """
    shown_KC = counts_KC > 0
    pixels_C = (counts_KC.sum(axis=1)[:, None] * shown_KC).sum(axis=0)
    is_shown_C = pixels_C > 0
    if not is_shown_C.any():
        return [1.0] * counts_KC.shape[1]
    frequency_C = counts_KC.sum(axis=0) / np.maximum(pixels_C, 1)
    median = np.median(frequency_C[is_shown_C])
    weight_C = np.clip(median / np.where(is_shown_C, frequency_C, median), FEWEST, MOST)
    return [float(weight) for weight in np.where(is_shown_C, weight_C, 1.0)]


def _count(tile: Tile, config: Config) -> NDArray[np.int64]:
    """The labelled pixels of each class, int64 `(C,)`, as training sees them: where the image holds data."""
    data_HW = read_data(tile.image, config.data.bands, config.data.alpha)
    labels_HW = read_labels(tile, config, image_size(tile.image), data_HW)
    known = labels_HW[labels_HW != config.classes.ignore_index]
    return np.bincount(known, minlength=len(config.classes.names))


def _own_loss(config: Config) -> tuple[OwnLoss | None, DistillLoss | None]:
    """A `distill.loss` of the user's own, and its source; None for both where the run has none."""
    name = config.distill.own_loss
    if name is None or config.distill.mode == "none":
        return None, None
    function = import_own(name, "distill.loss", "a loss")
    source = find_source(name)
    if source is None:
        raise ConfigError(
            f"distill.loss: {name} comes from no file, whose digest the run would record: put it in a module"
        )
    return OwnLoss(name=name, path=str(source.path), sha256=source.sha256, version=source.version), function
