"""
Arms after equal seconds of training, where a step of one takes longer than a step of the other.

The budget is the time of the shortest run, and each run counts with its last validation within it. Not covered: the learning rate of
a run cut short has not come down yet, so a slower arm would do better if its schedule ended at the budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kdpipe.configs.errors import summarise
from kdpipe.pipeline.evaluation.differences import ArmScores, compare_with_baseline, scores_by_class
from kdpipe.pipeline.runs.record import Run, Validation
from kdpipe.pipeline.text import duration_text

MIN_SHARE = 0.8  # of the budget: a run whose last validation lies before that would count with too little training


@dataclass(frozen=True)
class EqualSeconds:
    """Arms that can be compared after `seconds` of training, the baseline first, and why the others cannot, by label."""

    seconds: float
    arms: list[ArmScores] = field(default_factory=list)
    untold: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"seconds": self.seconds, "arms": [arm.as_dict() for arm in self.arms], "untold": self.untold}


def at_equal_seconds(arms: Mapping[str, Mapping[int, Run]]) -> EqualSeconds:
    """
    The arms, runs by label and seed with the baseline first, after the training time of their shortest run.

    An arm cannot be told where a run of it, or of the baseline, has no validation in the last fifth of that time, or where runs were
    trained on several devices.
    """
    runs = [run for members in arms.values() for run in members.values()]
    budget = min(run.history[-1].seconds for run in runs)
    baseline, *others = arms
    found, untold = [], {}
    for label in (baseline, *others):
        reason = _why_untold([*arms[baseline].values(), *arms[label].values()], budget)
        if reason is not None:
            untold[label] = reason
            continue
        last = {seed: _last_within(run, budget) for seed, run in arms[label].items()}
        by_seed = {seed: (v.miou, v.iou) for seed, v in last.items() if v is not None}
        found.append(ArmScores(label=label, iou=scores_by_class(by_seed)))
    if found:
        compare_with_baseline(found)
    return EqualSeconds(budget, found, {label: reason for label, reason in untold.items() if label != baseline})


def _why_untold(runs: Sequence[Run], budget: float) -> str | None:
    devices = sorted({run.device for run in runs})
    if len(devices) > 1:
        return f"the runs were trained on different devices ({', '.join(devices)})"
    sparse = {
        run.name: f"{run.name} {f'after {duration_text(last.seconds)}' if last else 'none'}"
        for run in runs
        if (last := _last_within(run, budget)) is None or last.seconds < MIN_SHARE * budget
    }
    if not sparse:
        return None
    return (
        f"the validations are too sparse; within that time, the last one was: {summarise(sparse.values(), 3)}. Validate more often, by "
        "a smaller train.val_every_epochs"
    )


def _last_within(run: Run, budget: float) -> Validation | None:
    return next((found for found in reversed(run.history) if found.seconds <= budget), None)
