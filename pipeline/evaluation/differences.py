"""
Differences between arms over paired seeds: their mean and interval, whether they gain or lose, and how many seeds would settle it.

Not covered: that of twenty differences which are none, one gains or loses by chance at 95 %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from scipy import special

CONFIDENCE = 0.95
MEAN = "mean"  # names the mIoU among the classes' IoU
MOST_SEEDS = 100  # more than anybody trains

Verdict = Literal["gained", "lost", "cannot tell"]


@dataclass(frozen=True)
class Difference:
    """
    The mean over paired seeds of (this arm's IoU - the baseline's), in 0..1, and the 95 % interval of that mean.

    The interval is Student's t of the paired differences, with one degree of freedom less than pairs; None for one pair.
    """

    mean: float
    low: float | None
    high: float | None
    by_seed: dict[int, float]

    @property
    def verdict(self) -> Verdict:
        """Whether the interval lies above 0, below it, or includes it; one pair cannot tell."""
        if self.low is not None and self.low > 0:
            return "gained"
        if self.high is not None and self.high < 0:
            return "lost"
        return "cannot tell"

    @property
    def seeds_to_settle(self) -> int | None:
        """
        The fewest seeds whose interval would exclude 0 if mean and standard deviation of the differences stayed as they are.

        None where the verdict is known, for one pair, and where more than `MOST_SEEDS` would be needed.
        """
        if self.low is None or self.verdict != "cannot tell":
            return None
        counts_N = np.arange(2, MOST_SEEDS + 1)
        settled_N = counts_N[_half_width(list(self.by_seed.values()), counts_N) < abs(self.mean)]
        return int(settled_N[0]) if len(settled_N) else None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "verdict": self.verdict, "seeds_to_settle": self.seeds_to_settle}


@dataclass(kw_only=True)
class ArmScores:
    """An arm's IoU on some tiles, by class and `MEAN` and then by seed, and its differences from the baseline, which has None."""

    label: str
    iou: dict[str, dict[int, float | None]]
    differences: dict[str, Difference] | None = None

    def mean_iou(self, name: str) -> float | None:
        """The mean over seeds of a class's IoU; None if no seed has one."""
        found = [value for value in self.iou[name].values() if value is not None]
        return float(np.mean(found)) if found else None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        differences = {name: d.as_dict() for name, d in (self.differences or {}).items()}
        return {"label": self.label, "iou": self.iou, "differences": None if self.differences is None else differences}


def scores_by_class(
    by_seed: Mapping[int, tuple[float | None, Mapping[str, float | None]]],
) -> dict[str, dict[int, float | None]]:
    """The IoU by class and `MEAN`, and then by seed, of runs given by seed as `(mIoU, IoU by class)`."""
    classes = list(dict.fromkeys(name for _, iou in by_seed.values() for name in iou))
    by_class = {name: {seed: iou[name] for seed, (_, iou) in by_seed.items()} for name in classes}
    return {**by_class, MEAN: {seed: miou for seed, (miou, _) in by_seed.items()}}


def compare_with_baseline(arms: Sequence[ArmScores]) -> None:
    """Give all arms but the first, which is the baseline, their differences from it: of the classes that a pair of seeds has."""
    baseline, *others = arms
    for arm in others:
        found = {name: paired_difference(ours, baseline.iou[name]) for name, ours in arm.iou.items()}
        arm.differences = {name: difference for name, difference in found.items() if difference is not None}


def paired_difference(ours: Mapping[int, float | None], theirs: Mapping[int, float | None]) -> Difference | None:
    """The difference over the seeds for which both have a score; None if there is no such seed."""
    by_seed = {
        seed: ours[seed] - theirs[seed]  # type: ignore[operator]
        for seed in sorted(ours.keys() & theirs.keys())
        if ours[seed] is not None and theirs[seed] is not None
    }
    if not by_seed:
        return None
    values = list(by_seed.values())
    mean = float(np.mean(values))
    if len(values) == 1:
        return Difference(mean, None, None, by_seed)
    half = float(_half_width(values, len(values)))
    return Difference(mean, mean - half, mean + half, by_seed)


def _half_width(values: Sequence[float], count: Any) -> Any:
    """Half the interval of the mean of `count` values, a number or an array, that have the standard deviation of `values`."""
    return special.stdtrit(count - 1, (1 + CONFIDENCE) / 2) * float(np.std(values, ddof=1)) / np.sqrt(count)
