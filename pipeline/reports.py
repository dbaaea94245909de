"""Results as tables and text for people: what the commands print."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table

from kdpipe.pipeline.console import duration_text, size_text

if TYPE_CHECKING:
    from kdpipe.pipeline import estimate, precompute, training, verify
    from kdpipe.pipeline.parity import TileParity

SHOWN_FINDINGS = 20  # the rest is in --json


def estimate_text(forecast: estimate.Estimate) -> str:
    """What stage one will cost, and whether it fits."""
    free = "no limit known" if forecast.free_bytes is None else f"{size_text(forecast.free_bytes)} free"
    lines = [
        f"{forecast.tiles} tiles, {forecast.finished} finished, {forecast.tiles - forecast.finished} to do "
        f"({forecast.pixels / 1e6:.1f} MP)",
        f"about {size_text(forecast.bytes)} in {forecast.cache} ({free}: {'fits' if forecast.fits else 'DOES NOT FIT'})",
        f"about {duration_text(forecast.seconds)}; nothing was written",
    ]
    lines += [f"unreadable: {reason}" for reason in forecast.unreadable.values()]
    return "\n".join(lines)


def precompute_text(summary: precompute.Summary) -> str:
    """What stage one did."""
    if not summary.computed:
        return (
            f"nothing to do: {summary.kept} tiles, fingerprint {summary.fingerprint}"
            if summary.fingerprint
            else "nothing computed"
        )
    rate = f"{summary.computed / summary.seconds:.2f} tiles/s, {summary.pixels / summary.seconds / 1e6:.2f} MP/s"
    size = f"{size_text(summary.bytes_written)}, {summary.bytes_written / summary.pixels:.2f} bytes a pixel"
    state = f"complete, fingerprint {summary.fingerprint}" if summary.fingerprint else "not complete"
    return f"{summary.computed} tiles in {duration_text(summary.seconds)} ({rate}), {size}\n{summary.cache}: {state}"


def verify_tables(report: verify.Report) -> Iterator[Table | str]:
    """What verification measured and found."""
    if report.parity:
        yield _parity_table(report.parity)
    if report.teacher_classes:
        table = Table(title="Teacher classes against the labels", title_justify="left")
        for column in ("teacher says", "pixels", "configured", "labels agree", "labels fit best", "share", "mIoU gain"):
            table.add_column(
                column, justify="left" if column in ("teacher says", "configured", "labels fit best") else "right"
            )
        for row in report.teacher_classes:
            table.add_row(
                row.name, f"{row.pixels}", row.configured, _percent(row.configured_share), row.fitting,
                _percent(row.fitting_share), f"{100 * row.gain:+.1f}" + (" !" if row.clearly_better else ""),
            )  # fmt: skip
        yield table
    if report.labels:
        table = Table(title=f"Cached targets against the labels of {report.label_tiles} tiles", title_justify="left")
        table.add_column("class")
        table.add_column("IoU", justify="right")
        table.add_column("F1", justify="right")
        table.add_column("")
        for name, iou in report.labels.iou.items():
            table.add_row(name, _percent(iou), _percent(report.labels.f1[name]), report.labels.left_out.get(name, ""))
        table.add_row("mean", _percent(report.labels.miou), _percent(report.labels.mean_f1), "", end_section=True)
        yield table
    if report.findings:
        yield f"{len(report.findings)} findings in {report.cache}:"
        for finding in report.findings[:SHOWN_FINDINGS]:
            yield f"  {finding.code}{f' {finding.tile}' if finding.tile else ''}: {finding.message}"
        if len(report.findings) > SHOWN_FINDINGS:
            yield f"  and {len(report.findings) - SHOWN_FINDINGS} more; all of them with --json FILE"
    else:
        bound = f", |Δp| at most {report.error_bound:.5f} by encoding" if report.error_bound else ""
        yield f"PASS ({report.level}): {report.tiles} tiles, fingerprint {(report.fingerprint or '')[:16]}{bound}"


def training_tables(summary: training.Summary) -> Iterator[Table | str]:
    """What stage two reached."""
    final = summary.final
    if final:
        table = Table(title=f"{summary.name}: validation after step {summary.steps}", title_justify="left")
        table.add_column("class")
        table.add_column("IoU", justify="right")
        table.add_column("F1", justify="right")
        table.add_column("")
        for name, iou in final["iou"].items():
            table.add_row(name, _percent(iou), _percent(final["f1"][name]), final["left_out"].get(name, ""))
        table.add_row(
            "mean",
            _percent(final["miou"]),
            _percent(final["mean_f1"]),
            f"overall accuracy {_percent(final['overall_accuracy'])}",
        )
        yield table
    best = (
        f", best mIoU {_percent(summary.best_miou)} at step {summary.best_step}"
        if summary.best_miou is not None
        else ""
    )
    pace = f", {summary.seconds_per_step:.3f} s a step" if summary.seconds_per_step else ""
    yield f"{summary.steps} steps in {duration_text(summary.seconds)}{pace}{best}"
    yield f"weights in {summary.weights}, logs in {summary.logs}"


def _parity_table(rows: list[TileParity]) -> Table:
    table = Table(title="Cached against live targets (worst value allowed in brackets)", title_justify="left")
    columns = ("tile", "max |Δp|", "mean |Δp|", "KL", "argmax", "decided", "Δ loss", "gradient cos")
    for column in columns:
        table.add_column(column, justify="left" if column == "tile" else "right")
    for row in rows:
        table.add_row(
            row.tile,
            *(f"{m.value:.2e} ({m.tolerance:.0e})" for m in (row.max_abs, row.mean_abs, row.kl)),
            _percent(row.argmax_agreement, 3),
            _percent(row.decided_agreement.value, 3),
            f"{row.loss_difference.value:.1e} ({row.loss_difference.tolerance:.0e})",
            f"{row.gradient_cosine.value:.6f} ({row.gradient_cosine.tolerance:.3f})",
        )
    table.add_row(
        "overall",
        f"{max(r.max_abs.value for r in rows):.2e}",
        f"{sum(r.mean_abs.value for r in rows) / len(rows):.2e}",
        f"{sum(r.kl.value for r in rows) / len(rows):.2e}",
        _percent(sum(r.argmax_agreement for r in rows) / len(rows), 3),
        _percent(min(r.decided_agreement.value for r in rows), 3),
        f"{max(r.loss_difference.value for r in rows):.1e}",
        f"{min(r.gradient_cosine.value for r in rows):.6f}",
    )
    return table


def _percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f} %"
