"""What `train-student` logged step by step, read back from Lightning's `metrics.csv`."""

from __future__ import annotations

import csv
from pathlib import Path

METRICS = "metrics.csv"


def logged_curves(logs: Path) -> dict[str, list[tuple[float, float]]]:
    """
    Every logged figure as `(step, value)`, in the order of steps; empty where nothing is logged below `logs`.

    A run that was resumed has one `version_*` folder a start. They are joined from the newest back to the one that begins at
    the first step; where two of them have a step, the newer one counts.
    """
    curves: dict[str, dict[float, float]] = {}
    known_from: int | None = None
    for version in sorted(logs.glob("version_*"), key=_number, reverse=True):
        rows = _rows(version / METRICS)
        if not rows:
            continue
        first = int(rows[0]["step"])
        for row in rows:
            step = int(row["step"])
            if known_from is not None and step >= known_from:
                continue
            for name, text in row.items():
                if text and name not in ("step", "epoch"):
                    curves.setdefault(name, {})[step] = float(text)
        known_from = first
        if first <= 1:
            break
    return {name: sorted(points.items()) for name, points in curves.items()}


def _number(version: Path) -> int:
    end = version.name.removeprefix("version_")
    return int(end) if end.isdigit() else -1


def _rows(file: Path) -> list[dict[str, str]]:
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as lines:
        return [row for row in csv.DictReader(lines) if row.get("step")]
