"""
Scores of a trained student, or of the mapped teacher, on labelled tiles: for each root of tiles, and for all together.

Tiles are predicted and counted one by one, so that memory depends on the largest tile and not on their number. Every score
comes from sums of counts over pixels, never from means over tiles. Not covered: which of two runs is better, which takes
several seeds.

Shapes: H W a tile's pixels, C classes, L labels, P predictions, B bins of confidence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdpipe.configs.errors import ConfigError, DataError, KdpipeError, count_text
from kdpipe.configs.schema import Config, Percentiles
from kdpipe.data.dataset import ValTiles
from kdpipe.data.rasters import Stretch
from kdpipe.data.stretch import resolve_stretch
from kdpipe.data.tiles import Tile, folders_of, limited, list_tiles, without_limit
from kdpipe.pipeline.evaluation.boundary import BoundaryScores, boundary_counts, boundary_scores
from kdpipe.pipeline.evaluation.calibration import BINS, Calibration, calibration, calibration_counts
from kdpipe.pipeline.evaluation.confusion import Scores, count_pairs, scores
from kdpipe.pipeline.inputs import check_headers
from kdpipe.pipeline.memory import fits_in_memory, sized
from kdpipe.pipeline.models.limits.sizes import fixed_side
from kdpipe.pipeline.models.normalize import student_inputs
from kdpipe.pipeline.models.views import STRIDE, averaged_logits
from kdpipe.pipeline.models.windows import blended_logits, window_of
from kdpipe.pipeline.precompute.expected_recipe import complete_recipe
from kdpipe.pipeline.precompute.subjects import PredictedTile, predicted_tiles, require_predictions
from kdpipe.pipeline.progress import Progress, Silent
from kdpipe.pipeline.runs.checkpoint import load_trained
from kdpipe.pipeline.runs.elsewhere import refuse_undescribed, trained_elsewhere
from kdpipe.pipeline.teacher.frozen import open_teacher

BOUNDARY_WIDTH_PX = 3  # what annotators of sub-metre imagery agree to
ALL_ROOTS = "all roots"  # names the scores of all together
MEMORY_ADVICE = ("--window 512, or a smaller one than now", "--device cpu")

Predict = Callable[[NDArray[Any]], NDArray[np.float32]]
"""From an image, uint8 `(H, W, B)`, or its stored prediction, to the probabilities of the student's classes, float32 `(C, H, W)`."""


@dataclass(frozen=True)
class Network:
    """A network and how it is run: on windows of `window` px or on whole tiles (None), averaged over `tta` and `scales`."""

    checkpoint: str
    window: int | None
    tta: str
    scales: list[float]

    def __post_init__(self) -> None:
        if self.window is not None and self.window % STRIDE:
            raise ConfigError(
                f"--window must be a multiple of {STRIDE} px, so that windows lie in the network's grid; found {self.window}"
            )


@dataclass(frozen=True)
class Model:
    """A student, or the one or several networks of a teacher, ready to be evaluated."""

    description: str
    networks: list[Network]
    predict: Predict
    config: Config
    stretch: Stretch
    trained_on: list[str]  # roots
    # Of a teacher whose predictions were made before: the tile with its prediction, which `predict` is given in place of an image.
    predicted: Callable[[Tile], PredictedTile] | None = None
    has_confidence: bool = True  # a network that answers with classes has none

    def limited(self, limit: int | None) -> Model:
        """The same model where `data.limit` is another: for a student, not the one that it was trained with."""
        data = self.config.data.model_copy(update={"limit": limit})
        return replace(self, config=self.config.model_copy(update={"data": data}))


@dataclass
class Counts:
    """Sums over tiles from which every score follows."""

    confusion_LP: NDArray[np.int64]
    boundary_4C: NDArray[np.int64]
    calibration_3B: NDArray[np.float64]

    @classmethod
    def zero(cls, num_classes: int) -> Counts:
        """Counts of no tile."""
        return cls(
            np.zeros((num_classes, num_classes), np.int64), np.zeros((4, num_classes), np.int64), np.zeros((3, BINS))
        )

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.confusion_LP + other.confusion_LP,
            self.boundary_4C + other.boundary_4C,
            self.calibration_3B + other.calibration_3B,
        )


@dataclass
class RootScores:
    """The scores on one root of tiles, or on all roots, and the ids of the tiles that could not count; `tiles` of `labelled` are scored."""

    root: str
    tiles: int
    confusion_LP: NDArray[np.int64]
    scores: Scores
    boundary: BoundaryScores
    calibration: Calibration
    without_mask: list[str] = field(default_factory=list)
    without_label: list[str] = field(default_factory=list)
    trained_on: bool = False
    labelled: int = 0


@dataclass
class Evaluation:
    """The scores of one model on each root; `together` is scored from the counts of all roots."""

    model: str
    networks: list[Network]
    classes: list[str]
    roots: list[RootScores]
    together: RootScores
    limit: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        roots, together = [_plain(root) for root in self.roots], _plain(self.together)
        return {**asdict(self), "roots": roots, "together": together}


def student_model(
    checkpoint: str | Path,
    device: torch.device,
    *,
    tta: str | None,
    window: int | None,
    alone: bool = False,
    config: Config | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Model:
    """
    The student of a checkpoint of `train-student`, in float32; no TTA and whole tiles where `tta` and `window` are None, or windows of the
    only size that the network takes.

    With `config`, the file is one of another origin that it describes: weights, or an exported network (see `trained_elsewhere`). Logits
    are averaged over views in the image's own frame, as for a teacher, and softmax comes last. With `alone`, images are read for the
    student alone, and may lack the bands that only its teacher saw. `say` is that of `load_trained`. Raises `CheckpointError` where the
    file is no such checkpoint.
    """
    if config is None:
        refuse_undescribed(checkpoint)
        trained = load_trained(checkpoint, say)
    else:
        trained = trained_elsewhere(checkpoint, config, say)
    trained = trained.alone() if alone else trained
    config = trained.config
    window = window_of(fixed_side(trained.student), window, str(checkpoint))
    network = Network(str(checkpoint), window, tta or "none", scales=[1.0])
    return Model(
        description=trained.description,
        networks=[network],
        predict=_student_predict(trained.student, network, config, device),
        config=config,
        stretch=trained.stretch,
        trained_on=[] if trained.file else _wholly_trained_on(config),
    )


def teacher_model(config: Config, device: torch.device, *, tta: str | None, window: int | None) -> Model:
    """
    The mapped teacher, `softmax(z) @ M`, to compare a student with; several teachers predict as one.

    T is 1, whatever `distill.temperature` is, because T softens targets and not predictions. `tta` and `window` replace
    those of each configured teacher where they are not None; `scales` and `precision` stay as configured. Raises
    `CheckpointError` where a teacher's file cannot be used.
    """
    given = {key: value for key, value in (("tta", tta), ("window", window)) if value is not None}
    config = config.model_copy(
        update={
            "teacher": config.teacher.model_copy(update=given) if config.teacher else None,
            "teachers": [member.model_copy(update=given) for member in config.teachers],
            "distill": config.distill.model_copy(update={"temperature": 1.0}),
        }
    )
    # Percentiles are taken from the training tiles; any other stretch needs none of them.
    by_tiles = isinstance(config.data.stretch, Percentiles)
    stretch = resolve_stretch(config.data, list_tiles(config.data, "train") if by_tiles else [])
    teacher = open_teacher(config, complete_recipe(config, stretch, None), device)
    return Model(
        description=f"the teacher of {config.name}",
        networks=[Network(m.origin, m.window, m.tta, m.scales) for m in config.members.values()],
        predict=lambda image_HWC: teacher.soft_targets(image_HWC[None])[0],
        config=config,
        stretch=stretch,
        trained_on=[],  # unknown: a config does not name the teacher's training data
        predicted=predicted_tiles(config, stretch) if config.has_predictions else None,
    )


def evaluate(
    model: Model,
    roots: Sequence[str] = (),
    *,
    boundary_width_px: int = BOUNDARY_WIDTH_PX,
    progress: Progress | None = None,
) -> Evaluation:
    """
    The scores of a model on each of `roots`, folders with images and masks, and on all of them together.

    Without roots, `data.val` of the model's config is scored. Tiles without a mask are left out and named in the result. With
    `data.limit`, so many tiles of each root are scored (see `Model.limited`).
    Raises `ConfigError` where there is no root or one is given twice, `DataError` where files cannot be used or a root has
    nothing to score, `KdpipeError` where a prediction is not finite.
    """
    progress = progress or Silent()
    config, names = model.config, model.config.classes.names
    roots = list(roots) or config.data.val
    check_roots(roots)
    tiles_of = {root: labelled_tiles(root, config) for root in roots}
    labelled = {root: len(tiles) for root, (tiles, _) in tiles_of.items()}
    tiles_of = {root: (limited(tiles, config.data.limit), rest) for root, (tiles, rest) in tiles_of.items()}
    check_headers(config, [], [tile for tiles, _ in tiles_of.values() for tile in tiles], progress)
    if model.predicted is not None:
        require_predictions(config, [model.predicted(tile) for tiles, _ in tiles_of.values() for tile in tiles])
    results = []
    with progress.bar("evaluate", sum(len(tiles) for tiles, _ in tiles_of.values()), "tiles") as advance:
        total = Counts.zero(len(names))
        for root, (tiles, without_mask) in tiles_of.items():
            counts, without_label = Counts.zero(len(names)), []
            dataset = ValTiles(tiles, config, model.stretch)
            for i, tile in enumerate(tiles):
                sample = dataset[i]
                of_tile = _count(model, sample["image"], sample["mask"], boundary_width_px, tile)
                if not of_tile.confusion_LP.any():
                    without_label.append(tile.id)
                counts += of_tile
                advance(1)
            result = _scored(root, len(tiles), counts, config, boundary_width_px)
            result.labelled = labelled[root]
            result.without_mask, result.without_label = without_mask, without_label
            result.trained_on = is_among(root, model.trained_on)
            results.append(result)
            total += counts
    together = _scored(ALL_ROOTS, sum(r.tiles for r in results), total, config, boundary_width_px)
    together.labelled = sum(labelled.values())
    together.without_mask = [tile for result in results for tile in result.without_mask]
    together.without_label = [tile for result in results for tile in result.without_label]
    together.trained_on = any(result.trained_on for result in results)
    return Evaluation(
        model=model.description, networks=model.networks, classes=names, roots=results, together=together, limit=config.data.limit
    )  # fmt: skip


def _plain(root: RootScores) -> dict[str, Any]:
    """The scores of a root as plain values for JSON."""
    rest = {key: value for key, value in asdict(root).items() if key != "confusion_LP"}
    return {**rest, "pixels": int(root.confusion_LP.sum()), "confusion": root.confusion_LP.tolist()}


def _student_predict(student: nn.Module, network: Network, config: Config, device: torch.device) -> Predict:
    student = student.to(device).to(memory_format=torch.channels_last)

    def logits(images_NCHW: Tensor) -> Tensor:
        inputs_NCHW = student_inputs(images_NCHW.to(device), config)
        # fp32 means fp32: with TF32, the last digit of a score would depend on the device.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            return averaged_logits(student, inputs_NCHW, tta=network.tta, scales=network.scales)

    @torch.inference_mode()
    def predict(image_HWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        image_NCHW = torch.from_numpy(image_HWC).permute(2, 0, 1)[None]
        window = network.window
        logits_NCHW = logits(image_NCHW) if window is None else blended_logits(logits, image_NCHW, window)
        probs_CHW: NDArray[np.float32] = torch.softmax(logits_NCHW, dim=1)[0].cpu().numpy()
        return probs_CHW

    return predict


def _count(
    model: Model, image_CHW: NDArray[np.uint8], labels_HW: NDArray[np.int64], boundary_width_px: int, tile: Tile
) -> Counts:
    """The counts of one tile; where a prediction was made before, of its pixels that have one."""
    image_HWC: NDArray[Any] = np.ascontiguousarray(image_CHW.transpose(1, 2, 0))
    if model.predicted is not None:
        subject = model.predicted(tile)
        image_HWC, labels_HW = subject.seen(image_HWC), subject.labels().astype(np.int64)
    num_classes, ignore_index = len(model.config.classes.names), model.config.classes.ignore_index
    with fits_in_memory(f"while evaluating {sized('tile', 1, *labels_HW.shape)}", MEMORY_ADVICE):
        probs_CHW = model.predict(image_HWC)
    if not np.isfinite(probs_CHW).all():
        raise KdpipeError(
            f"{model.description} predicts {tile.id} with numbers that are not finite, which cannot be scored"
        )
    predicted_HW, confidence_HW = probs_CHW.argmax(axis=0), probs_CHW.max(axis=0)
    return Counts(
        count_pairs(labels_HW, predicted_HW, num_classes, num_classes, ignore_index),
        boundary_counts(labels_HW, predicted_HW, num_classes, ignore_index, boundary_width_px),
        calibration_counts(labels_HW, predicted_HW, confidence_HW, ignore_index)
        if model.has_confidence
        else np.zeros((3, BINS)),
    )


def _scored(root: str, tiles: int, counts: Counts, config: Config, boundary_width_px: int) -> RootScores:
    classes = config.classes
    result = RootScores(
        root=root,
        tiles=tiles,
        confusion_LP=counts.confusion_LP,
        scores=scores(counts.confusion_LP, classes.names, classes.not_scored),
        boundary=boundary_scores(counts.boundary_4C, classes.names, classes.not_scored, boundary_width_px),
        calibration=calibration(counts.calibration_3B),
    )
    if set(result.scores.left_out) == set(classes.names):
        reasons = ", ".join(f"{name} {reason}" for name, reason in result.scores.left_out.items())
        raise DataError(f"{root} has nothing to score in its {count_text(tiles, 'tiles')} with a mask: {reasons}")
    return result


def check_roots(roots: Sequence[str]) -> None:
    """Refuse none, and one that is given twice, by `ConfigError`."""
    if not roots:
        raise ConfigError("there is nothing to evaluate on: name a ROOT, a folder of tiles, as data.val names none")
    folders = [Path(root).resolve() for root in roots]
    for i, folder in enumerate(folders):
        if folder in folders[:i]:
            raise ConfigError(f"the root {folder} is given twice: its tiles would count twice")


def _wholly_trained_on(config: Config) -> list[str]:
    """The roots whose tiles were all trained on: those without a list of tiles."""
    data, split = config.data, config.data.split
    train = [] if split is not None and split.train else data.train
    return [*train, *([] if split is not None and split.unlabelled else data.unlabelled)]


def is_among(root: str, roots: Sequence[str]) -> bool:
    """Whether a root is one of `roots`, however their paths are written."""
    return Path(root).resolve() in {Path(other).resolve() for other in roots}


def labelled_tiles(root: str, config: Config) -> tuple[list[Tile], list[str]]:
    """The tiles of one root that have a mask, and the ids of those that have none."""
    only = {"train": [root], "val": [], "unlabelled": [], "allow_missing_masks": True, "split": None, "limit": None}
    data = config.data.model_copy(update=only)
    tiles = list_tiles(data, "train")
    if config.data.split is not None and config.data.split.val and is_among(root, config.data.val):
        listed = {tile.image for tile in list_tiles(without_limit(config.data), "val")}
        tiles = [tile for tile in tiles if tile.image in listed]
    labelled = [tile for tile in tiles if tile.mask is not None]
    if not labelled:
        raise DataError(
            f"none of the {count_text(len(tiles), 'images')} of {root} has a mask: scores need {folders_of(root, data)[1]}, with masks "
            "named "
            "like the images"
        )
    return labelled, [tile.id for tile in tiles if tile.mask is None]
