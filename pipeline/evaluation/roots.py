"""Arms scored by root: each run's last checkpoint on each folder of labelled tiles, paired by seed and class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdpipe.configs.errors import DataError, summarise
from kdpipe.pipeline.evaluation.differences import ArmScores, compare_with_baseline, scores_by_class
from kdpipe.pipeline.evaluation.evaluate import Evaluation, RootScores, evaluate, student_model
from kdpipe.pipeline.progress import Progress, Silent
from kdpipe.pipeline.runs.layout import LAST
from kdpipe.pipeline.runs.record import Run


@dataclass(frozen=True)
class RootComparison:
    """The arms on one root of tiles, or on all of them together, the baseline first; `trained_on` names runs that saw it in training."""

    root: str
    tiles: int
    arms: list[ArmScores]
    trained_on: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        arms = [arm.as_dict() for arm in self.arms]
        return {"root": self.root, "tiles": self.tiles, "trained_on": self.trained_on, "arms": arms}


def compare_roots(
    arms: Mapping[str, Mapping[int, Run]],
    folders: Mapping[int, Path],
    device: torch.device,
    roots: Sequence[str] = (),
    *,
    window: int | None = None,
    progress: Progress | None = None,
) -> list[RootComparison]:
    """
    The arms on each of `roots`, folders with images and masks, and on all together if they are several.

    Args:
        arms: runs by label and seed, the baseline first.
        folders: the runs' folders by `id(run)`, each with a `last.ckpt`.
        device: where the students predict.
        roots: none for `data.val`.
        window: side in px of the windows in which the students predict; None for whole tiles.
        progress: shows each run, and how many tiles are done.

    Raises `DataError` where a run has no `last.ckpt`, before anything is computed; otherwise as `evaluate` does.
    """
    progress = progress or Silent()
    files = {id(run): folders[id(run)] / LAST for runs in arms.values() for run in runs.values()}
    missing = [str(file) for file in files.values() if not file.is_file()]
    if missing:
        raise DataError(
            f"--by root scores the last checkpoint of each run, and there is no {summarise(missing, 3)}: copy it from where the run was "
            "trained, or leave out the run"
        )
    scored: dict[str, dict[int, Evaluation]] = {label: {} for label in arms}
    for label, runs in arms.items():
        for seed, run in runs.items():
            progress.say(f"{run.name}: {files[id(run)]}")
            model = student_model(files[id(run)], device, tta=None, window=window, alone=True, say=progress.say)
            scored[label][seed] = evaluate(model.limited(None), roots, progress=progress)
    first = next(iter(next(iter(scored.values())).values()))
    found = [
        _root({label: {seed: e.roots[i] for seed, e in by_seed.items()} for label, by_seed in scored.items()}, arms)
        for i in range(len(first.roots))
    ]
    if len(found) > 1:
        together = {label: {seed: e.together for seed, e in by_seed.items()} for label, by_seed in scored.items()}
        found.append(_root(together, arms))
    return found


def _root(scored: Mapping[str, Mapping[int, RootScores]], arms: Mapping[str, Mapping[int, Run]]) -> RootComparison:
    found = [
        ArmScores(
            label=label,
            iou=scores_by_class({seed: (root.scores.miou, root.scores.iou) for seed, root in by_seed.items()}),
        )
        for label, by_seed in scored.items()
    ]
    compare_with_baseline(found)
    first = next(iter(next(iter(scored.values())).values()))
    seen = [arms[label][s].name for label, by_seed in scored.items() for s, root in by_seed.items() if root.trained_on]
    return RootComparison(first.root, first.tiles, found, seen)
