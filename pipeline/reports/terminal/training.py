"""A run of stage two as tables and text: its scores, times and learning curves."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from typing import TYPE_CHECKING

import numpy as np
import uniplot
from rich.table import Table

from kdpipe.configs.errors import count_text
from kdpipe.pipeline.reports.terminal.scores import score_table
from kdpipe.pipeline.reports.terminal.stage_one import worth_lines
from kdpipe.pipeline.runs.curves import Curve
from kdpipe.pipeline.text import pace_text, percent_text, run_time_text, stage_one_time_text, step_time_text

if TYPE_CHECKING:
    from kdpipe.pipeline.training.summary import Summary

TITLES = {
    "train_loss": "train loss",
    "train_hard_loss": "its part from labels",
    "train_kd_loss": "its part from soft targets",
    "val_mIoU": "validation mIoU",
}
HEIGHT, SMALLEST_WIDTH, LARGEST_WIDTH = 6, 24, 60  # of a plot, in characters
FRAME, LABEL, GAP = 2, 10, 2


def training_tables(summary: Summary) -> Iterator[Table | str]:
    """Scores, times and files of a run, and whether its cache was worth it."""
    final = summary.final
    if final:
        note = f"overall accuracy {percent_text(final['overall_accuracy'])}"
        title, means = f"{summary.name}: validation after step {summary.steps}", (final["miou"], final["mean_f1"])
        yield score_table(title, final["iou"], final["f1"], final["left_out"], means, note)
    best = ""
    if summary.best_miou is not None:
        best = f", best mIoU {percent_text(summary.best_miou)} at step {summary.best_step}"
    yield f"{count_text(summary.steps, 'steps')}{best}"
    if summary.limit is not None:
        yield f"a trial on at most {count_text(summary.limit, 'tiles')}: its scores say nothing about a run on all of them"
    times = [run_time_text(summary.wall_seconds)]
    if summary.seconds_per_step:
        times.append(step_time_text(summary.seconds_per_step))
    if summary.worth:
        times.append(stage_one_time_text(summary.worth.precompute_seconds))
    yield "; ".join(times)
    if summary.teacher_seconds_per_step:
        yield f"the live teacher takes {pace_text(summary.teacher_seconds_per_step)} of a step; a cache pays for it once"
    if summary.other_modes:
        others = ", ".join(f"{pace_text(seconds)} in {name}" for name, seconds in summary.other_modes.items())
        yield f"step of the same student: {others}"
    yield f"weights in {summary.weights}, logs in {summary.logs}"
    if summary.worth:
        yield from worth_lines(summary.worth, summary.cache_bytes)


def curves_text(curves: dict[str, Curve], width: int, *, only_ascii: bool = False) -> str:
    """
    The curves as plain text without colours, two per row, or one where `width` characters are too few.

    Each point is the mean of the steps that share half a character. A curve without a finite value is left out, and so are the
    parts of a loss that has only one. Empty if nothing is left.
    """
    finite = {
        name: {step: value for step, value in curves[name].items() if np.isfinite(value)}
        for name in TITLES
        if name in curves
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
    """A curve in at most `width` columns: title, plot with its bounds to the right, first and last step."""
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
    # uniplot would round the bounds: 0.5 to 0 where a plot has few lines.
    top, bottom = (f"{bound:.3g}" for bound in (values.max(), values.min()))
    if top == bottom:
        lines[1 + HEIGHT // 2] += f" {top}"
    else:
        lines[1] += f" {top}"
        lines[HEIGHT] += f" {bottom}"
    first, last = (str(step) for step in bounds)
    return [f" {title}", *lines, f" {first}{last.rjust(inner - len(first)) if first != last else ''}"]
