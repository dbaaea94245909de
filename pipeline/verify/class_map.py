"""
Does the class map say what the labels say: a wrong channel order shows itself here, and nowhere else.

Shapes: T teacher classes, S student classes (labels).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdpipe.configs.schema import Config
from kdpipe.pipeline.evaluation.confusion import count_pairs, scores

MIN_SHARE = 0.005  # of the labelled pixels: what a teacher class must cover before anything is said about it
MIN_GAIN = 0.02  # of mIoU, from assigning one teacher class otherwise, before it counts as clearly better
RESAMPLES = 200  # of the tiles, with replacement
CONFIDENCE = 0.05  # quantile of the resampled gains that must be positive as well


@dataclass(frozen=True)
class TeacherClass:
    """What the labels say where the teacher answers with one of its classes; shares in 0..1, gain in mIoU."""

    name: str
    pixels: int
    configured: str
    configured_share: float
    fitting: str
    fitting_share: float
    gain: float
    clearly_better: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def count_answers(
    answers_HW: NDArray[np.integer[Any]], labels_HW: NDArray[np.integer[Any]], config: Config
) -> NDArray[np.int64]:
    """
    Pixel counts `(S, T)` of each label and teacher answer in one labelled tile; pixels without label do not count.

    `answers_HW` are places in `teacher_classes`.
    """
    num_labels, num_answers = len(config.classes.names), len(config.teacher_classes)
    return count_pairs(labels_HW, answers_HW, num_labels, num_answers, config.classes.ignore_index)


def check_class_map(counts_KST: NDArray[np.int64], config: Config) -> list[TeacherClass]:
    """
    For every teacher class that answers often enough: the configured student class, and the one that fits the labels best.

    `counts_KST` are the pixel counts of label S and teacher answer T in each of K tiles. Another class is clearly better if
    assigning the teacher class to it raises mIoU by `MIN_GAIN` over all tiles, and raises it at all in 95 % of the
    resamplings of the tiles. Classes that share the configured row are no alternatives: a split row is meant as it is.
    """
    shares_TS = config.class_map_matrix()
    assigned_T = shares_TS.argmax(axis=1)
    counts_ST = counts_KST.sum(axis=0)
    names = config.classes.names
    rng = np.random.default_rng(config.seed)
    resampled = rng.integers(len(counts_KST), size=(RESAMPLES, len(counts_KST)))
    result = []
    for t, teacher_name in enumerate(config.teacher_classes):
        pixels = int(counts_ST[:, t].sum())
        if pixels == 0 or pixels < MIN_SHARE * counts_ST.sum():
            continue
        alternatives = [s for s in range(len(names)) if shares_TS[t, s] == 0]
        gains = {s: _gain(counts_ST, assigned_T, t, s, config) for s in alternatives}
        best = max(gains, key=lambda s: gains[s]) if gains else int(assigned_T[t])
        gain = gains.get(best, 0.0)
        clearly = False
        if gain >= MIN_GAIN:
            sampled = [_gain(counts_KST[rows].sum(axis=0), assigned_T, t, best, config) for rows in resampled]
            clearly = bool(np.quantile(sampled, CONFIDENCE) > 0)
        fitting = best if gain > 0 else int(assigned_T[t])
        configured_share = float((counts_ST[:, t] * (shares_TS[t] > 0)).sum() / pixels)
        result.append(
            TeacherClass(
                name=teacher_name,
                pixels=pixels,
                configured=", ".join(names[s] for s in np.flatnonzero(shares_TS[t])),
                configured_share=configured_share,
                fitting=names[fitting],
                fitting_share=float(counts_ST[fitting, t] / pixels),
                gain=max(gain, 0.0),
                clearly_better=clearly,
            )
        )
    return result


def _gain(counts_ST: NDArray[np.int64], assigned_T: NDArray[np.intp], t: int, s: int, config: Config) -> float:
    """How much mIoU rises if teacher class `t` stands for student class `s`."""
    changed_T = assigned_T.copy()
    changed_T[t] = s
    return _miou(counts_ST, changed_T, config) - _miou(counts_ST, assigned_T, config)


def _miou(counts_ST: NDArray[np.int64], assigned_T: NDArray[np.intp], config: Config) -> float:
    """The mIoU over all classes that occur in the labels: here those in `not_scored` count too, they can be confused."""
    confusion_SS = np.zeros((len(counts_ST), len(counts_ST)), dtype=np.int64)
    for t, s in enumerate(assigned_T):
        confusion_SS[:, s] += counts_ST[:, t]
    return scores(confusion_SS, config.classes.names, []).miou
