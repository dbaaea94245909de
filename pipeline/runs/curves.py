"""The learning curves of a run, read from the `metrics.csv` that Lightning writes at each of its starts."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from kdpipe.configs.files import open_file
from kdpipe.pipeline.runs.layout import METRICS

Curve = dict[int, float]  # a figure by step, in the order of steps
TRAIN_LOSS = "train_loss"  # logged once a step


def read_curves(logs: str | Path) -> dict[str, Curve]:
    """
    Every logged figure of the run whose logs lie in the folder `logs`, by name; empty where there are none.

    A resumed run has a folder `version_N` for each start. They are joined from the newest back to the one that begins at step 1; a step
    that was run again after a kill counts as it was last run. A version that is damaged is left out: a run that has reached its end
    must not fail over its curves.
    """
    curves: dict[str, Curve] = {}
    before: float = float("inf")  # steps of older versions count below this one
    for version in sorted(Path(logs).glob("version_*"), key=_number, reverse=True):
        found = _version(version / METRICS)
        if not found:
            continue
        for name, curve in found.items():
            joined = curves.setdefault(name, {})
            joined |= {step: value for step, value in curve.items() if step < before and step not in joined}
        if steps := found.get(TRAIN_LOSS):
            before = min(before, *steps)
        else:  # only the validation at the end of a run that was complete already
            before = min(before, 1 + min(step for curve in found.values() for step in curve))
        if before <= 1:
            break
    return {name: dict(sorted(curve.items())) for name, curve in curves.items() if curve}


def _number(version: Path) -> int:
    end = version.name.removeprefix("version_")
    return int(end) if end.isdigit() else -1


def _version(file: Path) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    try:
        with open_file(file) as opened, io.TextIOWrapper(opened, encoding="utf-8", newline="") as lines:
            for row in csv.DictReader(lines):
                for name, text in row.items():
                    if text and name not in ("step", "epoch"):
                        curves.setdefault(name, {})[int(row["step"])] = float(text)
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        return {}
    return curves
