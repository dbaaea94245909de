"""
Comparison of runs over seeds: the differences between arms in IoU, with the interval that the number of seeds allows.

An arm is the set of runs that differ only in seed and name. Arms are compared by pairs of runs of one seed: at the last step, after
equal seconds of training, and by root where `roots` has scored them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from kdpipe.configs.errors import DataError, summarise
from kdpipe.pipeline.evaluation.differences import MEAN, ArmScores, compare_with_baseline, scores_by_class
from kdpipe.pipeline.evaluation.equal_seconds import EqualSeconds, at_equal_seconds
from kdpipe.pipeline.runs.record import Run, Validation
from kdpipe.pipeline.runs.resumable import flat_keys

if TYPE_CHECKING:
    from kdpipe.pipeline.evaluation.roots import RootComparison  # which imports torch

# Keys that may differ within an arm: a run's name and how it is fed. Caches are told apart by their fingerprint.
NOT_AN_ARMS = (
    "name",
    "group",
    "seed",
    "cache.path",
    "train.workers",
    "train.val_batch_size",
    "train.checkpoint_every_steps",
)


@dataclass(kw_only=True)
class Arm(ArmScores):
    """Runs of one configuration over seeds, with their IoU after the last step and its differences from the baseline's."""

    runs: dict[int, Run]
    settings: dict[str, Any] = field(default_factory=dict)  # dotted keys in which the arm differs from the baseline
    reaches: Validation | None = None  # the first validation whose mean mIoU is at least the baseline's last

    @property
    def first(self) -> Run:
        """The run of the smallest seed."""
        return next(iter(self.runs.values()))

    def seconds_per_step(self) -> float:
        """The mean over seeds of the median seconds of a step; of the mean seconds where a run recorded no median."""
        return float(
            np.mean(
                [
                    run.history[-1].seconds / run.history[-1].steps
                    if run.seconds_per_step is None
                    else run.seconds_per_step
                    for run in self.runs.values()
                ]
            )
        )

    def curve(self) -> list[Validation]:
        """The mean over seeds of each validation that all of them have."""
        common = set.intersection(*({found.steps for found in run.history} for run in self.runs.values()))
        return [_mean_validation(self.runs.values(), step) for step in sorted(common)]


@dataclass
class Comparison:
    """Arms, the baseline first."""

    steps: int
    classes: list[str]
    arms: list[Arm]
    equal_seconds: EqualSeconds
    roots: list[RootComparison] = field(default_factory=list)  # where asked for

    @property
    def runs(self) -> dict[str, dict[int, Run]]:
        """The runs by arm and seed."""
        return {arm.label: arm.runs for arm in self.arms}

    @property
    def has_intervals(self) -> bool:
        """Whether any arm shares two seeds or more with the baseline."""
        return any(d.low is not None for arm in self.arms for d in (arm.differences or {}).values())

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "steps": self.steps,
            "baseline": self.arms[0].label,
            "arms": [
                {
                    "runs": {seed: run.name for seed, run in arm.runs.items()},
                    "settings": arm.settings,
                    "cache": arm.first.model_dump()["cache"],
                    **arm.as_dict(),
                    "seconds_per_step": arm.seconds_per_step(),
                    "curve": [point.model_dump() for point in arm.curve()],
                    "reaches_baseline": arm.reaches.model_dump() if arm.reaches else None,
                }
                for arm in self.arms
            ],
            "equal_seconds": self.equal_seconds.as_dict(),
            "roots": [root.as_dict() for root in self.roots],
        }


def compare(runs: Sequence[Run], baseline: str | None = None) -> Comparison:
    """
    Group runs into arms and compare each with the baseline.

    `baseline` names an arm or one of its runs. By default it is the arm without distillation if there is exactly one, else
    the first run's arm. Raises `DataError` for fewer than two arms, for runs that differ in length, classes or validation
    data, for unfinished runs, and for two runs of one seed in an arm.
    """
    _refuse_unlike(runs)
    arms = _arms(runs)
    if len(arms) < 2:
        raise DataError(
            f"all {len(runs)} runs belong to one arm, {arms[0].label}: they differ in nothing but "
            f"{', '.join(NOT_AN_ARMS)}; add runs of another configuration"
        )
    first = _baseline(arms, baseline)
    arms.sort(key=lambda arm: arm is not first)
    classes = list(runs[0].history[-1].iou)
    compare_with_baseline(arms)
    for arm in arms[1:]:
        _refuse_unpaired(arm, first)
        arm.settings = _settings(arm, first)
        goal = first.mean_iou(MEAN)
        arm.reaches = next((p for p in arm.curve() if p.miou is not None and goal is not None and p.miou >= goal), None)
    return Comparison(runs[0].total_steps, classes, arms, at_equal_seconds({arm.label: arm.runs for arm in arms}))


def one_seed_text(seed: int) -> str:
    """The warning beside a comparison that rests on one seed."""
    return (
        "One seed proves nothing: two runs that differ only in their seed score differently too. Before you believe a "
        f"difference, train each configuration with three seeds or more, by --set seed=N and --set name=…; so far there is "
        f"seed {seed}."
    )


def _refuse_unlike(runs: Sequence[Run]) -> None:
    if len(runs) < 2:
        raise DataError(f"a comparison needs at least two runs, found {len(runs)}")
    unfinished = [
        f"{r.name} ({r.history[-1].steps} of {r.total_steps})" for r in runs if r.history[-1].steps < r.total_steps
    ]
    if unfinished:
        raise DataError(f"unfinished runs cannot be compared: {summarise(unfinished)} steps; finish them with --resume")
    _refuse_other_lengths(runs)
    for what, value_of in (
        ("classes", lambda run: list(run.history[-1].iou)),
        ("data.val", lambda run: run.config["data"]["val"]),
        ("data.limit", lambda run: run.config["data"].get("limit")),
        ("classes.not_scored", lambda run: run.config["classes"]["not_scored"]),
    ):
        values: dict[str, str] = {}
        for run in runs:
            values.setdefault(json.dumps(value_of(run)), run.name)
        if len(values) > 1:
            found = "; ".join(f"{name} has {value}" for value, name in values.items())
            raise DataError(f"only runs with the same {what} can be compared: {found}")


def _refuse_other_lengths(runs: Sequence[Run]) -> None:
    """Raise `DataError` where runs differ in steps, with the command by which the shortest goes on to the length of the longest."""
    shortest, longest = (chosen(runs, key=lambda run: run.total_steps) for chosen in (min, max))
    if shortest.total_steps == longest.total_steps:
        return
    found = {run.total_steps: run.name for run in reversed(runs)}
    told = "; ".join(f"{name} has {steps}" for steps, name in sorted(found.items()))
    train = shortest.config.get("train", {})
    epochs = -(-train.get("epochs", 1) * longest.total_steps // shortest.total_steps)  # as many as that surely takes
    group = shortest.config.get("group", "default")
    raise DataError(
        f"only runs with the same steps can be compared: {told}. Let the shorter one go on, where its data lie as they did:\n\n"
        f"    kdpipe train-student -c model_weights/{group}/{shortest.name}/config.yaml --resume \\\n"
        f"        --set train.epochs={epochs} --set train.max_steps={longest.total_steps}"
    )


def _arms(runs: Sequence[Run]) -> list[Arm]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(_key(run), sort_keys=True), []).append(run)
    arms = []
    for members in groups.values():
        by_seed: dict[int, Run] = {}
        for run in members:
            if run.seed in by_seed:
                raise DataError(
                    f"{by_seed[run.seed].name} and {run.name} are two runs of one configuration and one seed ({run.seed}), "
                    "which would count twice: leave one out"
                )
            by_seed[run.seed] = run
        last = {seed: run.history[-1] for seed, run in sorted(by_seed.items())}
        iou = scores_by_class({seed: (found.miou, found.iou) for seed, found in last.items()})
        arms.append(Arm(label=_label(members), iou=iou, runs=dict(sorted(by_seed.items()))))
    labels = [arm.label for arm in arms]
    for arm in arms:
        if labels.count(arm.label) > 1:
            arm.label = arm.first.name
    labels = [arm.label for arm in arms]
    for i, arm in enumerate(arms):
        if earlier := labels[:i].count(arm.label):  # runs of one name in several groups
            arm.label = f"{arm.label} ({earlier + 1})"
    return arms


def _key(run: Run) -> dict[str, Any]:
    settings = {key: value for key, value in flat_keys(run.config).items() if key not in NOT_AN_ARMS}
    return {**settings, "cache": run.cache.fingerprint if run.cache else None}


def _label(runs: Sequence[Run]) -> str:
    """The runs' common name without the seed: `kd` for `kd-s42` and `kd-s43`, or for `s42-kd` and `s43-kd`."""
    names = {re.sub(rf"[-_.]?(s|seed)?[-_.]?{run.seed}(?!\d)", "", run.name).strip("-_.") or run.name for run in runs}
    return names.pop() if len(names) == 1 else runs[0].name


def _baseline(arms: list[Arm], name: str | None) -> Arm:
    if name is not None:
        chosen = [arm for arm in arms if name == arm.label or any(run.name == name for run in arm.runs.values())]
        if not chosen:
            raise DataError(f"--baseline: no run is called {name!r}; arms: {', '.join(arm.label for arm in arms)}")
        return chosen[0]
    without = [arm for arm in arms if arm.first.mode == "none"]
    return without[0] if len(without) == 1 else arms[0]


def _settings(arm: Arm, baseline: Arm) -> dict[str, Any]:
    ours, theirs = (flat_keys(a.first.config) for a in (arm, baseline))
    return {
        key: ours.get(key)
        for key in sorted(ours.keys() | theirs.keys())
        if key not in NOT_AN_ARMS and ours.get(key) != theirs.get(key)
    }


def _refuse_unpaired(arm: Arm, baseline: Arm) -> None:
    if MEAN not in (arm.differences or {}):
        raise DataError(
            f"{arm.label} (seeds {list(arm.runs)}) and {baseline.label} (seeds {list(baseline.runs)}) have no seed in common: "
            "differences are taken between runs of one seed"
        )


def _mean_validation(runs: Any, step: int) -> Validation:
    points = [next(found for found in run.history if found.steps == step) for run in runs]

    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known else None

    return Validation(
        steps=step,
        seconds=float(np.mean([point.seconds for point in points])),
        miou=mean([point.miou for point in points]),
        overall_accuracy=mean([point.overall_accuracy for point in points]),
        iou={name: mean([point.iou[name] for point in points]) for name in points[0].iou},
    )
