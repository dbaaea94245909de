"""A comparison of runs as tables and text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table

from kdpipe.configs.errors import count_text
from kdpipe.pipeline.evaluation.compare import Comparison, one_seed_text
from kdpipe.pipeline.evaluation.differences import MEAN, ArmScores
from kdpipe.pipeline.reports.html.comparison import cache_text, reached_text
from kdpipe.pipeline.reports.verdicts import points_text, root_lines, root_title, seconds_lines, verdict_lines
from kdpipe.pipeline.text import pace_text, percent_cell


def comparison_tables(comparison: Comparison) -> Iterator[Table | str]:
    """Scores by arm, then by class, at equal seconds and by root, then the settings of each arm; three arms fit 80 columns."""
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
    yield _class_table(f"IoU by class: baseline, and differences{interval}", comparison.arms)
    yield from verdict_lines(comparison.arms)
    yield from seconds_lines(comparison)
    for root in comparison.roots:
        yield _class_table(f"{root_title(root)}; IoU: baseline, and differences{interval}", root.arms)
        yield from root_lines(root)
    if not comparison.has_intervals:
        yield one_seed_text(comparison.arms[0].first.seed)
    for arm in comparison.arms:
        settings = ", ".join(f"{key} {value}" for key, value in arm.settings.items())
        yield f"{arm.label}: {cache_text(arm)}" + (f"; {settings}" if settings else "")


def _class_table(title: str, arms: Sequence[ArmScores]) -> Table:
    """The baseline's IoU and the differences of the other arms, by class and in the mean."""
    table = Table(title=title, title_justify="left")
    for column in ("class", *(arm.label for arm in arms)):
        table.add_column(column, justify="left" if column == "class" else "right")
    baseline, *others = arms
    for name in baseline.iou:
        table.add_row(
            name,
            percent_cell(baseline.mean_iou(name)),
            *(points_text((arm.differences or {}).get(name)) for arm in others),
        )
    return table
