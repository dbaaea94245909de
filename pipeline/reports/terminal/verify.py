"""Verification as tables and text: findings, parity, the class map against the labels, and the suggested map."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table

from kdpipe.configs.errors import count_text
from kdpipe.pipeline.reports.terminal.scores import score_table
from kdpipe.pipeline.text import limit_text, percent_cell, percent_text

if TYPE_CHECKING:
    from kdpipe.pipeline.verify.class_map import Suggestion
    from kdpipe.pipeline.verify.gate import Report
    from kdpipe.pipeline.verify.parity import TileParity
    from kdpipe.pipeline.verify.reference import ReferenceReport

SHOWN_SHARE = 0.005  # of a teacher class's labels: less would be shown as 0 %
TILE_COLUMN = 19  # characters of a tile's id beside the figures of parity
SHOWN_FINDINGS = 20  # the rest is in --json


def verify_tables(report: Report) -> Iterator[Table | str]:
    """Measurements and findings of a verification."""
    if report.parity:
        yield _parity_table(report.parity)
    if report.teacher_classes:
        table = Table(title="Teacher classes against the labels", title_justify="left")
        texts = ("teacher class", "configured", "labels fit best")
        for column in ("teacher class", "configured", "agree", "labels fit best", "share", "gain"):
            table.add_column(column, justify="left" if column in texts else "right")
        for row in report.teacher_classes:
            table.add_row(
                row.name, row.configured, percent_text(row.configured_share), row.fitting,
                percent_text(row.fitting_share), f"{100 * row.gain:+.1f}" + (" !" if row.clearly_better else ""),
            )  # fmt: skip
        yield table
    if report.labels:
        title = f"Cached targets against the labels of {count_text(report.label_tiles, report.noun)}"
        found = report.labels
        yield score_table(title, found.iou, found.f1, found.left_out, (found.miou, found.mean_f1))
    if report.reference:
        yield _reference_table(report.reference)
        yield from report.reference.notes
    if not report.cache_checked:
        yield f"There is no cache {report.cache}: only the teacher was compared."
    if report.findings:
        where = report.cache if report.cache_checked or report.reference is None else report.reference.folder
        of_trial = f", of which {_looked_at(report)} were looked at" if report.limit is not None else ""
        yield f"{count_text(len(report.findings), 'findings')} in {where}{of_trial}:"
        for finding in report.findings[:SHOWN_FINDINGS]:
            yield f"  {finding.code}{f' {finding.tile}' if finding.tile else ''}: {finding.message}"
        if len(report.findings) > SHOWN_FINDINGS:
            yield f"  and {len(report.findings) - SHOWN_FINDINGS} more; all of them with --json FILE"
    elif not report.cache_checked and report.reference:
        count = count_text(len(report.reference.tiles), "tiles")
        yield f"PASS (reference): the teacher predicts what {report.reference.folder} holds of {count}"
    else:
        bound = f", |Δp| at most {report.error_bound:.5f} from encoding" if report.error_bound else ""
        yield f"PASS ({report.level}): {_looked_at(report)}, fingerprint {(report.fingerprint or '')[:16]}{bound}"
        if report.limit is not None and report.tiles < report.configured:
            yield "The other tiles were not looked at: verify without --limit before you train on all of them."


def _looked_at(report: Report) -> str:
    return f"{count_text(report.tiles, report.noun)}{limit_text(report.limit, report.configured)}"


def suggestion_tables(result: Suggestion) -> Iterator[Table | str]:
    """The labels of each teacher class beside its configured row, and the suggested map as YAML."""
    table = Table(
        title=f"Labels by teacher class, {result.pixels:,} labelled px of {count_text(result.tiles, 'tiles')}",
        title_justify="left",
    )
    for column in ("teacher class", "px", "labels, %", "configured, %"):
        table.add_column(column, justify="right" if column == "px" else "left", no_wrap=column == "px")
    for row in result.rows:
        labels = {name: count / row.pixels for name, count in row.counts.items() if count}
        common = sorted(labels, key=labels.__getitem__, reverse=True)
        shown = {name: labels[name] for name in common if labels[name] >= SHOWN_SHARE}
        table.add_row(
            row.teacher_class, f"{row.pixels:,}", _shares_text(shown) + (" !" if row.disagrees else ""),
            _shares_text(row.configured) or "to be filled in",
        )  # fmt: skip
    yield table
    if any(row.disagrees for row in result.rows):
        yield "!: most labels are of another class."
        yield "Is the order of teacher.classes that of the checkpoint's channels?"
    yield f"Shares below {result.min_entry} are dropped and the others scaled up."
    if any(row.kept for row in result.rows):
        yield f"Classes on less than {100 * result.min_share:g} % of the pixels keep their configured row."
    if any(row.unfilled for row in result.rows):
        yield "Is each class where you expect it? If not, check the order of teacher.classes."
    yield "Shares include the teacher's mistakes: write {Class: 1} where you know better."
    yield ""
    yield result.as_yaml()


def _shares_text(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {percent_cell(share, 0)}" for name, share in shares.items())


def _parity_table(rows: list[TileParity]) -> Table:
    """One row per tile, then the worst and the strictest tolerance; fits 80 columns."""
    table = Table(title="Cached against live targets", title_justify="left", padding=(0, 0, 0, 1))
    for column in ("tile", "max |Δp|", "mean |Δp|", "KL", "argmax", "Δ loss", "grad. cos"):
        table.add_column(column, justify="left" if column == "tile" else "right")
    for row in rows:
        figures = _parity_figures(
            row.max_abs.value, row.mean_abs.value, row.kl.value, row.argmax_agreement, row.loss_difference.value,
            row.gradient_cosine.value,
        )  # fmt: skip
        table.add_row(_end_of(row.tile), *figures)
    table.add_section()
    worst = _parity_figures(
        max(row.max_abs.value for row in rows), max(row.mean_abs.value for row in rows), max(row.kl.value for row in rows),
        min(row.argmax_agreement for row in rows), max(row.loss_difference.value for row in rows),
        min(row.gradient_cosine.value for row in rows),
    )  # fmt: skip
    table.add_row("worst", *worst)
    allowed = _parity_figures(
        min(row.max_abs.tolerance for row in rows), min(row.mean_abs.tolerance for row in rows),
        min(row.kl.tolerance for row in rows), None, min(row.loss_difference.tolerance for row in rows),
        max(row.gradient_cosine.tolerance for row in rows),
    )  # fmt: skip
    table.add_row("allowed", *allowed)
    mean_agreement = sum(row.argmax_agreement for row in rows) / len(rows)
    decided = min(row.decided_agreement.value for row in rows)
    changed = sum(row.class_change.value for row in rows) / len(rows)
    rounded = sum(row.cached_class_change for row in rows) / len(rows)
    moved, most = sum(row.moved_mean for row in rows) / len(rows), max(row.moved_most for row in rows)
    table.caption = (
        f"argmax agrees on {percent_text(mean_agreement, 2)} of all pixels, "
        f"and on {percent_text(decided, 2)} of those that are decided by more than |Δp| allows; "
        f"{percent_text(moved, 2)} of a pixel's probability lies in other classes than the teacher's, at most {percent_text(most, 2)}; "
        f"the temperature changes the class of {percent_text(changed, 2)} of all pixels, with rounding {percent_text(rounded, 2)}"
    )
    table.caption_justify = "left"
    return table


def _reference_table(found: ReferenceReport) -> Table:
    """One row per tile that was compared with its owner's scores; fits 80 columns."""
    table = Table(title="The teacher against its owner's script", title_justify="left", padding=(0, 0, 0, 1))
    several = len({row.teacher for row in found.tiles}) > 1
    columns = [*(["teacher"] if several else []), "tile", "scores", "max |Δp|", "mean |Δp|", "argmax", "allowed"]
    for column in columns:
        table.add_column(column, justify="left" if column in ("teacher", "tile", "scores") else "right")
    for row in found.tiles:
        fails = "" if row.max_abs.passes else " !"
        table.add_row(
            *([row.teacher] if several else []), _end_of(row.tile), row.kind, f"{row.max_abs.value:.1e}{fails}",
            f"{row.mean_abs:.1e}", percent_text(row.argmax_agreement, 2), f"{row.max_abs.tolerance:.1e}",
        )  # fmt: skip
    return table


def _end_of(tile_id: str) -> str:
    """The end of an id, as far as the column is wide: it tells tiles and views apart."""
    return tile_id if len(tile_id) <= TILE_COLUMN else f"…{tile_id[1 - TILE_COLUMN :]}"


def _parity_figures(
    max_abs: float, mean_abs: float, kl: float, agreement: float | None, loss: float, cosine: float
) -> tuple[str, ...]:
    return f"{max_abs:.1e}", f"{mean_abs:.1e}", f"{kl:.1e}", percent_text(agreement, 2), f"{loss:.1e}", f"{cosine:.5f}"
