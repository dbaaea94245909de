"""
The learning curves of a run as text: its losses and its validation's mIoU against steps.

They are read from `metrics.csv`: that of the run, and of those that it goes on from.
"""

from __future__ import annotations

import csv
from itertools import zip_longest
from pathlib import Path

import numpy as np
import uniplot

TITLES = {
    "train_loss": "train loss",
    "train_hard_loss": "its part from labels",
    "train_kd_loss": "its part from soft targets",
    "val_mIoU": "validation mIoU",
}
HEIGHT, SMALLEST_WIDTH, LARGEST_WIDTH = 6, 24, 60  # of a curve, in characters
FRAME, LABEL, GAP = 2, 10, 2
Curve = dict[int, float]  # a figure by step


def read_curves(logs: str | Path) -> dict[str, Curve]:
    """
    The figures of `TITLES` that a run logged into its folder `version_N`, by name, and of the versions that it resumed.

    A version goes on from the one before it where its first step is not the run's first. Steps that were done again after a kill
    count as they were done last. Empty where there is no log, or it cannot be read.
    """
    folder = Path(logs)
    number = int(folder.name.removeprefix("version_"))
    curves: dict[str, Curve] = {}
    last: float = np.inf
    for version in range(number, -1, -1):
        found = _logged(folder.with_name(f"version_{version}"))
        steps = [step for curve in found.values() for step in curve]
        for name, curve in found.items():
            earlier = {step: value for step, value in curve.items() if step <= last}
            curves[name] = earlier | curves.get(name, {})
        if steps and last == np.inf:
            last = max(steps)
        if steps and min(steps) <= 1:
            break
    return {name: dict(sorted(curves[name].items())) for name in TITLES if curves.get(name)}


def curves_text(curves: dict[str, Curve], width: int, *, only_ascii: bool = False) -> str:
    """
    The curves as plain text without colours, two beside each other, or one below the other where `width` characters are too few.

    Each point is the mean of the steps in half a character. A curve without a finite value is left out, and so are the parts of a
    loss that has just one. Empty where nothing is left.
    """
    finite = {
        name: {step: value for step, value in curve.items() if np.isfinite(value)} for name, curve in curves.items()
    }
    if not any(finite.get("train_kd_loss", {}).values()):
        finite = {name: curve for name, curve in finite.items() if name not in ("train_hard_loss", "train_kd_loss")}
    shown = {name: curve for name, curve in finite.items() if curve}
    if not shown:
        return ""
    columns = 2 if width >= 2 * SMALLEST_WIDTH + GAP else 1
    each = max(SMALLEST_WIDTH, min(LARGEST_WIDTH, (width - GAP * (columns - 1)) // columns))
    bounds = min(min(curve) for curve in shown.values()), max(max(curve) for curve in shown.values())
    plots = [_plot(TITLES[name], curve, bounds, each, only_ascii=only_ascii) for name, curve in shown.items()]
    lines = ["Learning curves, against steps"]
    for row in (plots[i : i + columns] for i in range(0, len(plots), columns)):
        rows = zip_longest(*row, fillvalue="")
        lines += [(" " * GAP).join(part.ljust(each) for part in parts).rstrip() for parts in rows]
    return "\n".join(lines)


def _plot(title: str, curve: Curve, bounds: tuple[int, int], width: int, *, only_ascii: bool) -> list[str]:
    """Lines of at most `width` characters: the title, the curve in a frame with its bounds at its right, and the first and last step."""
    inner = width - FRAME - LABEL
    parts = np.array_split(np.array(list(curve.items())), min(len(curve), 2 * inner))
    steps, values = np.array([part.mean(axis=0) for part in parts]).T
    text = uniplot.plot_to_string(
        xs=steps,
        ys=values,
        x_min=bounds[0],
        x_max=bounds[1],
        y_min=values.min(),
        y_max=values.max(),
        x_gridlines=[],
        y_gridlines=[],
        x_labels=False,
        y_labels=False,
        lines=True,
        color=False,
        width=inner,
        height=HEIGHT,
        character_set="ascii" if only_ascii else "braille",
    )
    lines = (text.translate(str.maketrans("┌┐└┘─│", "++++-|")) if only_ascii else text).splitlines()
    # The labels are ours: uniplot rounds its own, and calls 0.5 a 0 where a curve has few lines.
    top, bottom = (f"{bound:.3g}" for bound in (values.max(), values.min()))
    if top == bottom:
        lines[1 + HEIGHT // 2] += f" {top}"
    else:
        lines[1] += f" {top}"
        lines[HEIGHT] += f" {bottom}"
    first, last = (str(step) for step in bounds)
    return [f" {title}", *lines, f" {first}{last.rjust(inner - len(first)) if first != last else ''}"]


def _logged(version: Path) -> dict[str, Curve]:
    found: dict[str, Curve] = {name: {} for name in TITLES}
    try:
        with (version / "metrics.csv").open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for name, curve in found.items():
                    if text := row.get(name):
                        curve[int(row["step"])] = float(text)
    except (OSError, ValueError, KeyError, csv.Error):
        return {}  # curves are no reason to end a run that has reached its end
    return found
