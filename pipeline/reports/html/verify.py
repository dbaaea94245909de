"""The page of a verification: findings, what parity measured, the labels' view, the class map, and tiles to browse."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from kdpipe.cache.integrity import Finding
from kdpipe.configs.schema import Config
from kdpipe.pipeline.reports.html.charts import confusion_table
from kdpipe.pipeline.reports.html.layers import TilePictures
from kdpipe.pipeline.reports.html.page import figures, heading, page, paragraph, percent_text, table
from kdpipe.pipeline.reports.html.run import class_map
from kdpipe.pipeline.reports.html.tiles import VIEWER, browser
from kdpipe.pipeline.verify.gate import Report
from kdpipe.pipeline.verify.parity import TileParity

SHOWN_FINDINGS = 200  # the rest is in --json


def write_verification(report: Report, config: Config, tiles: Sequence[TilePictures], path: Path) -> None:
    """Write the page of a report; `tiles` are what `shown_tiles` drew of it."""
    verdict = "passes" if report.passes else f"{len(report.findings)} findings"
    parts = [
        heading(1, f"{report.cache}: {verdict}"),
        figures({
            "level": (report.level, {"quick": "complete and fresh?", "full": "every byte", "parity": "the teacher again"}[report.level]),
            report.noun: (str(report.tiles), "as configured"),
            "findings": (str(len(report.findings)), "none is a pass"),
            "|Δp| at most": ("–" if report.error_bound is None else f"{report.error_bound:.5f}", "by encoding"),
            "fingerprint": ((report.fingerprint or "–")[:16], ""),
        }),
    ]  # fmt: skip
    if report.findings:
        parts += [heading(2, "Findings"), _findings(report.findings)]
    if report.parity:
        parts += [heading(2, "Cached against live targets"), _parity_table(report.parity)]
    if report.labels is not None and report.confusion is not None:
        rows = [["class", "IoU, %", "F1, %", ""]]
        rows += [
            [name, percent_text(iou), percent_text(report.labels.f1[name]), report.labels.left_out.get(name, "")]
            for name, iou in report.labels.iou.items()
        ]
        rows.append(["mean", percent_text(report.labels.miou), percent_text(report.labels.mean_f1), ""])
        counts_LP = np.asarray(report.confusion, dtype=np.int64)
        parts += [
            heading(2, "Cached targets against the labels"),
            table(f"Over {report.label_tiles} labelled {report.noun}", rows),
            confusion_table(
                "What the teacher took the labels' pixels for; percent of a row, and pixels",
                counts_LP,
                config.classes.names,
            ),
        ]
    if report.teacher_classes:
        rows = [["teacher says", "configured", "agree, %", "labels fit best", "share, %", "gain of mIoU, points"]]
        rows += [
            [
                row.name,
                row.configured,
                percent_text(row.configured_share),
                row.fitting,
                percent_text(row.fitting_share),
                f"{100 * row.gain:+.1f}",
            ]
            for row in report.teacher_classes
        ]
        parts.append(table("Teacher classes against the labels", rows))
    parts += [heading(2, "Class map"), class_map(config)]
    if tiles:
        how = paragraph("Click one, or press Enter on it, to compare two of its layers.")
        parts += [heading(2, report.noun.capitalize()), how, browser(tiles, config.classes.names), VIEWER]
    path.write_text(
        page(f"kdpipe: {report.cache}", f"<main>{''.join(parts)}</main>", script=bool(tiles)), encoding="utf-8"
    )


def _findings(findings: Sequence[Finding]) -> str:
    items = "".join(
        f"<li><strong>{escape(finding.code)}</strong> {escape(finding.tile or '')}: {escape(finding.message)}</li>"
        for finding in findings[:SHOWN_FINDINGS]
    )
    more = len(findings) - SHOWN_FINDINGS
    return f'<ul class="findings">{items}</ul>' + (
        paragraph(f"and {more} more; all of them with --json") if more > 0 else ""
    )


def _parity_table(tiles: Sequence[TileParity]) -> str:
    """Every figure with what is allowed of it; what is not within is marked by a word, not by a colour alone."""
    names = {
        "max_abs": "largest |Δp|", "mean_abs": "mean |Δp|", "kl": "KL, nats", "decided_agreement": "decided classes agree",
        "loss_difference": "Δ loss", "gradient_cosine": "gradient cosine",
    }  # fmt: skip
    rows = [["tile", *names.values(), "classes agree, %"]]
    for tile in tiles:
        measures = tile.measures()
        cells = []
        for name in names:
            measure = measures[name]
            bound = f"{'≥' if measure.at_least else '≤'} {measure.tolerance:.3g}"
            cells.append(f"{measure.value:.3g} ({bound}{'' if measure.passes else ', NOT WITHIN'})")
        rows.append([tile.tile, *cells, f"{100 * tile.argmax_agreement:.2f}"])
    return table("What was measured, and in brackets what is allowed", rows)
