"""A comparison of runs as tables and text."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from kdpipe.configs.errors import count_text
from kdpipe.pipeline.evaluation.compare import MEAN, Comparison, one_seed_text
from kdpipe.pipeline.reports.html.comparison import cache_text, points_text, reached_text
from kdpipe.pipeline.text import pace_text, percent_cell


def comparison_tables(comparison: Comparison) -> Iterator[Table | str]:
    """Scores by arm, then by class, then the settings of each arm; three arms fit 80 columns."""
    interval = " [95 %]" if comparison.has_intervals else ""
    arms = Table(title=f"After {count_text(comparison.steps, 'steps')}: mIoU in percent", title_justify="left")
    for column in ("arm", "seeds", "mIoU", f"difference{interval}", "step (median)", "reaches baseline's mIoU"):
        arms.add_column(column, justify="left" if column == "arm" else "right")
    for arm in comparison.arms:
        arms.add_row(
            arm.label, str(len(arm.runs)), percent_cell(arm.mean_iou(MEAN)),
            points_text(arm.differences[MEAN]) if arm.differences else "baseline",
            pace_text(arm.seconds_per_step()), reached_text(arm) if arm.differences else "",
        )  # fmt: skip
    yield arms
    classes = Table(title=f"IoU by class: baseline, and differences{interval}", title_justify="left")
    for column in ("class", *(arm.label for arm in comparison.arms)):
        classes.add_column(column, justify="left" if column == "class" else "right")
    for name in [*comparison.classes, MEAN]:
        rest = [points_text((arm.differences or {}).get(name)) for arm in comparison.arms[1:]]
        classes.add_row(name, percent_cell(comparison.arms[0].mean_iou(name)), *rest)
    yield classes
    if not comparison.has_intervals:
        yield one_seed_text(comparison.arms[0].first.seed)
    for arm in comparison.arms:
        settings = ", ".join(f"{key} {value}" for key, value in arm.settings.items())
        yield f"{arm.label}: {cache_text(arm)}" + (f"; {settings}" if settings else "")
