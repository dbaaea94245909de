"""
Whether distillation can pay: what the teacher knows, on scenes with labels, beyond a student that was trained without it.

A student learns from soft targets at most what the teacher knows. So its gain is bounded by the teacher's lead over the same student
without a teacher, on scenes that neither has seen; kdpipe cannot know which scenes the teacher has seen. Not covered: what unlabelled
tiles add, beyond showing the teacher's knowledge of more scenes.

Shapes: K tiles, B baselines, R resamples, C classes, T teacher classes; L labels, P predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from kdpipe.configs.errors import ConfigError
from kdpipe.configs.schema import Config
from kdpipe.data.dataset import ValTiles
from kdpipe.data.rasters import Stretch
from kdpipe.data.stretch import resolve_stretch
from kdpipe.data.tiles import Tile, limited, list_tiles
from kdpipe.pipeline.evaluation.confusion import count_pairs
from kdpipe.pipeline.evaluation.evaluate import (
    MEMORY_ADVICE,
    Model,
    check_roots,
    is_among,
    labelled_tiles,
    student_model,
)
from kdpipe.pipeline.memory import fits_in_memory, sized
from kdpipe.pipeline.precompute.expected_recipe import complete_recipe
from kdpipe.pipeline.precompute.subjects import PredictedTile, predicted_tiles, require_predictions
from kdpipe.pipeline.progress import Progress, Silent
from kdpipe.pipeline.teacher.frozen import FrozenTeacher, open_teacher
from kdpipe.pipeline.verify.class_map import TeacherClass, check_class_map, count_teacher_classes

RESAMPLES = 1000
CONFIDENCE = 0.95
MIN_TILES = 5  # fewer cannot tell how much a lead depends on the choice of tiles
MIN_LEAD = 0.02  # of mIoU: seeds differ by more
MIN_SHARE = 0.01  # of the labelled pixels: rarer classes decide nothing

Advice = Literal["distil", "distil with care", "correct the class map", "not worth it", "cannot tell"]


@dataclass(frozen=True)
class Lead:
    """
    IoU of teacher and baseline in 0..1, None for a class without a label, and the teacher's lead.

    `low` and `high` bound 95 % of the leads over resampled tiles and baselines; None for fewer than `MIN_TILES` tiles.
    """

    teacher: float | None
    baseline: float | None
    lead: float | None
    low: float | None
    high: float | None

    @property
    def is_clear(self) -> bool:
        """Whether the teacher is better in 95 % of the resamples."""
        return self.low is not None and self.low > 0

    @property
    def is_behind(self) -> bool:
        """Whether the teacher is worse in 95 % of the resamples."""
        return self.high is not None and self.high < 0


@dataclass(frozen=True)
class Scene:
    """The teacher's lead on one root of tiles, in mIoU and by class; `behind` names the frequent classes in which it is worse."""

    root: str
    tiles: int
    miou: Lead
    classes: dict[str, Lead]
    behind: list[str]
    advice: Advice


@dataclass(frozen=True)
class Forecast:
    """The scenes, all of them `together`, and the teacher classes that the labels contradict."""

    baselines: list[str]
    scenes: list[Scene]
    together: Scene
    contradicted: list[TeacherClass]

    @property
    def advice(self) -> Advice:
        """A wrong class map comes first, since it may explain all else."""
        return "correct the class map" if self.contradicted else self.together.advice

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "advice": self.advice}


def forecast(
    config: Config,
    baselines: Sequence[str | Path],
    roots: Sequence[str] = (),
    device: torch.device | None = None,
    *,
    window: int | None = None,
    progress: Progress | None = None,
) -> Forecast:
    """
    The lead of a config's teacher, through its class map, over students that were trained without it.

    Args:
        config: whose teacher is meant.
        baselines: checkpoints of `train-student --kd none`, one for each seed.
        roots: folders with images and masks, best one for each scene; none for `data.val`.
        device: where the networks compute; None for the CPU.
        window: side in px of the windows in which the students predict; None for whole tiles.
        progress: shows how many tiles are done.

    Raises `ConfigError` for a baseline that was distilled, has other classes, or was trained on one of the roots; otherwise as
    `evaluate` does.
    """
    progress, device = progress or Silent(), device or torch.device("cpu")
    roots = list(roots) or config.data.val
    check_roots(roots)
    students = [student_model(path, device, tta=None, window=window, alone=True) for path in baselines]
    for path, student in zip(baselines, students, strict=True):
        _refuse_unfit(str(path), student, config, roots)
    tiles_of = {root: limited(labelled_tiles(root, config)[0], config.data.limit) for root in roots}
    stretch = resolve_stretch(config.data, list_tiles(config.data, "train"))
    stored = predicted_tiles(config, stretch) if config.has_predictions else None
    if stored is not None:
        require_predictions(config, [stored(tile) for tiles in tiles_of.values() for tile in tiles])
    teacher = open_teacher(config, complete_recipe(config, stretch, None), device)
    by_teacher, by_students = {}, {}
    channels: list[NDArray[np.int64]] = []
    with progress.bar("forecast", sum(map(len, tiles_of.values())), "tiles") as advance:
        for root, tiles in tiles_of.items():
            counted = []
            for found in _counts(tiles, teacher, students, config, stretch, stored):
                counted.append(found)
                advance(1)
            of_teacher, of_students, of_channels = zip(*counted, strict=True)
            by_teacher[root], by_students[root] = np.stack(of_teacher), np.stack(of_students)
            channels += of_channels
    rng = np.random.default_rng(config.seed)
    scenes = [scene(root, by_teacher[root], by_students[root], config, rng) for root in roots]
    together = scenes[0]
    if len(scenes) > 1:
        ours, theirs = (np.concatenate(list(found.values())) for found in (by_teacher, by_students))
        together = scene("all roots", ours, theirs, config, rng)
    contradicted = [row for row in check_class_map(np.stack(channels), config) if row.clearly_better]
    return Forecast([str(path) for path in baselines], scenes, together, contradicted)


def scene(
    root: str,
    teacher_KLP: NDArray[np.int64],
    baselines_KBLP: NDArray[np.int64],
    config: Config,
    rng: np.random.Generator,
) -> Scene:
    """The teacher's lead from the confusion matrices of each tile, its own and those of the baselines, and the advice that follows."""
    names = config.classes.names
    count, num_baselines = baselines_KBLP.shape[:2]
    teacher, baselines = teacher_KLP.astype(np.float64), baselines_KBLP.astype(np.float64)  # BLAS sums no integers

    def iou_of(
        weights_K: NDArray[np.int64], chosen_B: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """IoU of the teacher and of the mean baseline by class, each tile counted as often as its weight."""
        theirs_BLP = np.tensordot(weights_K, baselines, axes=1)[chosen_B]
        return _iou(np.tensordot(weights_K, teacher, axes=1)), _iou(theirs_BLP).mean(axis=0)

    teacher_C, baseline_C = iou_of(np.ones(count, np.int64), np.arange(num_baselines))
    leads_RC = np.empty((RESAMPLES, len(names)))
    for resample in leads_RC:  # tiles and baselines are drawn alike for both networks: a lead is a paired difference
        weights_K = np.bincount(rng.integers(count, size=count), minlength=count)
        ours_C, theirs_C = iou_of(weights_K, np.asarray(rng.integers(num_baselines, size=num_baselines)))
        resample[:] = ours_C - theirs_C
    scored = np.array([name not in config.classes.not_scored for name in names])
    miou = _lead(_mean(teacher_C, scored), _mean(baseline_C, scored), _mean(leads_RC, scored), count)
    classes = {name: _lead(teacher_C[c], baseline_C[c], leads_RC[:, c], count) for c, name in enumerate(names)}
    labelled_L = teacher_KLP.sum(axis=(0, 2))
    shares = dict(zip(names, labelled_L / max(1, labelled_L.sum()), strict=True))
    behind = [name for name, lead in classes.items() if lead.is_behind and shares[name] >= MIN_SHARE]
    return Scene(root, count, miou, classes, behind, _advice(miou, behind))


def _advice(miou: Lead, behind: list[str]) -> Advice:
    if miou.lead is None or miou.low is None or miou.high is None:
        return "cannot tell"
    if miou.is_clear and miou.lead >= MIN_LEAD:
        return "distil with care" if behind else "distil"
    if miou.lead < MIN_LEAD:
        return "not worth it"
    return "cannot tell"


def _iou(confusion_LP: NDArray[np.float64]) -> NDArray[np.float64]:
    """IoU `(..., C)` of confusion matrices `(..., C, C)`, NaN for a class without a label, as in `confusion.scores`."""
    hits, labelled, predicted = (
        np.diagonal(confusion_LP, axis1=-2, axis2=-1),
        confusion_LP.sum(-1),
        confusion_LP.sum(-2),
    )
    return np.where(labelled > 0, hits / np.maximum(labelled + predicted - hits, 1), np.nan)


def _mean(values_C: NDArray[np.float64], scored_C: NDArray[np.bool_]) -> Any:
    """The mean over the last axis of the scored classes that have labels; NaN if there are none."""
    known_C = scored_C & ~np.isnan(values_C)
    return np.where(known_C, values_C, 0).sum(axis=-1) / np.where(known_C.any(axis=-1), known_C.sum(axis=-1), np.nan)


def _lead(teacher: float, baseline: float, leads_R: NDArray[np.float64], tiles: int) -> Lead:
    if np.isnan(teacher) or np.isnan(baseline):
        return Lead(None, None, None, None, None)
    known_R = leads_R[~np.isnan(leads_R)]
    if tiles < MIN_TILES or not len(known_R):
        return Lead(float(teacher), float(baseline), float(teacher - baseline), None, None)
    low, high = np.quantile(known_R, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Lead(float(teacher), float(baseline), float(teacher - baseline), float(low), float(high))


def _counts(
    tiles: Sequence[Tile],
    teacher: FrozenTeacher,
    students: Sequence[Model],
    config: Config,
    stretch: Stretch,
    stored: Callable[[Tile], PredictedTile] | None,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """Pixels of each tile by label and the teacher's class, by label and each baseline's, and by label and teacher channel."""
    shown = [ValTiles(tiles, config, stretch)] + [ValTiles(tiles, s.config, s.stretch) for s in students]
    for i, tile in enumerate(tiles):
        first, *others = (samples[i] for samples in shown)
        seen_HWB: NDArray[Any] = np.ascontiguousarray(first["image"].transpose(1, 2, 0))
        labels_HW = first["mask"]
        if stored is not None:  # only pixels with a prediction count, for the students too
            subject = stored(tile)
            seen_HWB, labels_HW = subject.seen(seen_HWB), subject.labels().astype(np.int64)
        teachers_LP, channels_CT = _by_teacher(teacher, seen_HWB, labels_HW, config, tile)
        theirs_BLP = [
            _pairs(labels_HW, _predicted(s, other["image"], tile), config)
            for s, other in zip(students, others, strict=True)
        ]
        yield teachers_LP, np.stack(theirs_BLP), channels_CT


def _by_teacher(
    teacher: FrozenTeacher, seen_HWB: NDArray[Any], labels_HW: NDArray[np.int64], config: Config, tile: Tile
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pixels by label and predicted student class, and by label and predicted teacher class."""
    with fits_in_memory(f"while the teacher predicted {tile.id}, {sized('tile', 1, *labels_HW.shape)}", MEMORY_ADVICE):
        logits_1THW = teacher.logits(seen_HWB[None])
        predicted_HW = teacher.probabilities_of(logits_1THW)[0].argmax(axis=0)
        channels_HW = logits_1THW[0].argmax(dim=0).cpu().numpy()
    return _pairs(labels_HW, predicted_HW, config), count_teacher_classes(channels_HW, labels_HW, config)


def _predicted(model: Model, image_CHW: NDArray[np.uint8], tile: Tile) -> NDArray[np.int64]:
    with fits_in_memory(f"while {model.description} predicted {tile.id}", MEMORY_ADVICE):
        predicted_HW: NDArray[np.int64] = model.predict(np.ascontiguousarray(image_CHW.transpose(1, 2, 0))).argmax(
            axis=0
        )
    return predicted_HW


def _pairs(labels_HW: NDArray[np.int64], predicted_HW: NDArray[np.integer[Any]], config: Config) -> NDArray[np.int64]:
    num_classes = len(config.classes.names)
    return count_pairs(labels_HW, predicted_HW, num_classes, num_classes, config.classes.ignore_index)


def _refuse_unfit(path: str, student: Model, config: Config, roots: Sequence[str]) -> None:
    mode = student.config.distill.mode
    if mode != "none":
        raise ConfigError(
            f"{path} was trained with a teacher (distill.mode {mode}): a forecast needs a student that was trained without one, by "
            "kdpipe train-student --kd none"
        )
    if student.config.classes.names != config.classes.names:
        raise ConfigError(
            f"{path} predicts {', '.join(student.config.classes.names)}, and the config {', '.join(config.classes.names)}: train the "
            "baseline with this config and --kd none"
        )
    seen = [root for root in roots if is_among(root, student.trained_on)]
    if seen:
        raise ConfigError(
            f"{path} was trained on {', '.join(seen)}, where it seems better than on other scenes: name scenes that it has not seen"
        )
