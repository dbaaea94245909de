"""The page of a verification: findings, tiles to browse, measured parity, agreement with the labels, and the class map."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from kdpipe.cache.integrity import Finding
from kdpipe.cache.reader import SoftTargetCache
from kdpipe.configs.errors import count_text
from kdpipe.configs.files import write_file
from kdpipe.configs.schema import Config
from kdpipe.data.stretch import resolve_stretch
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.precompute.expected_recipe import configured_softening
from kdpipe.pipeline.reports.html.charts import confusion_table
from kdpipe.pipeline.reports.html.page import figures, heading, page, paragraph, table
from kdpipe.pipeline.reports.html.run import class_map
from kdpipe.pipeline.reports.html.tiles import (
    VIEWER,
    TilePictures,
    browser,
    cached_targets,
    draw_subject,
    spread,
    training_noun,
    training_subjects,
)
from kdpipe.pipeline.text import limit_text, percent_cell
from kdpipe.pipeline.verify.gate import Compared, Report
from kdpipe.pipeline.verify.parity import TileParity
from kdpipe.pipeline.verify.reference import ReferenceReport

SHOWN_FINDINGS = 200  # the rest is in --json
LEVELS = {"quick": "names, sizes and times", "full": "every byte", "parity": "every byte, and the teacher"}
MEASURES = {
    "max_abs": "largest |Δp|", "mean_abs": "mean |Δp|", "kl": "KL, nats", "decided_agreement": "decided classes agree",
    "loss_difference": "Δ loss", "gradient_cosine": "gradient cosine",
}  # fmt: skip


class ParityTiles:
    """Draws the tiles that parity compares, with the difference of cached and live target in colours up to the tolerance."""

    def __init__(self, config: Config) -> None:
        self.drawn: list[TilePictures] = []
        self._config = config

    def __call__(self, compared: Compared) -> None:
        """Draw one tile."""
        self.drawn.append(
            draw_subject(
                compared.subject, training_noun(self._config), self._config, {}, lambda *_: compared.cached_CHW,
                live_CHW=compared.live_CHW, largest_difference=compared.parity.max_abs.tolerance,
            )
        )  # fmt: skip


def cached_tiles(config: Config, report: Report, count: int) -> list[TilePictures]:
    """
    At most `count` tiles of a verified cache, drawn without the teacher; none that a finding names.

    There are none at all if a finding concerns the whole cache. Raises `CorruptCache` for a damaged tile, which level quick
    does not notice.
    """
    if any(finding.tile is None for finding in report.findings):
        return []
    named = {finding.tile for finding in report.findings}
    stretch = resolve_stretch(config.data, list_tiles(config.data, "train"))
    cache = SoftTargetCache.open(config.cache.path, configured_softening(config), partial=True)
    whole = [subject for subject in training_subjects(config, stretch, cache) if subject.id not in named]
    noun = training_noun(config)
    return [draw_subject(subject, noun, config, {}, cached_targets(cache)) for subject in spread(whole, count)]


def write_verification(report: Report, config: Config, tiles: Sequence[TilePictures], path: Path) -> None:
    """Write the page of a report, with `tiles` to browse."""
    count = len(report.findings)
    passes = "passes" if report.cache_checked else "no cache, and the teacher agrees with its reference"
    verdict = passes if report.passes else count_text(count, "findings")
    parts = [
        heading(1, f"{report.cache}: {verdict}"),
        figures({
            "level": (report.level, LEVELS[report.level]),
            report.noun: (str(report.tiles), "as configured" if report.limit is None else
                          f"looked at{limit_text(report.limit, report.configured)}"),
            "findings": (str(count), f"none: {'the cache passes' if report.cache_checked else passes}" if report.passes else ""),
            "|Δp| at most": ("–" if report.error_bound is None else f"{report.error_bound:.5f}", "by the encoding"),
            "fingerprint": ((report.fingerprint or "–")[:16], ""),
        }),
    ]  # fmt: skip
    if report.findings:
        parts += [heading(2, "Findings"), _findings(report.findings)]
    if report.reference is not None:
        parts += [heading(2, "The teacher against its owner's script"), _reference_table(report.reference)]
    if tiles:
        parts += [heading(2, report.noun.capitalize()), browser(tiles, config.classes.names)]
    if report.parity:
        parts += [heading(2, "Cached against live targets"), _parity_table(report.parity)]
    if report.labels is not None:
        parts += [heading(2, "Cached targets against the labels"), *_label_tables(report, config)]
    if report.teacher_classes:
        parts.append(_teacher_classes_table(report))
    parts += [heading(2, "Class map"), class_map(config), VIEWER if tiles else ""]
    content = page(f"kdpipe: {report.cache}", f"<main>{''.join(parts)}</main>", script=bool(tiles))
    write_file(path, content)


def _findings(findings: Sequence[Finding]) -> str:
    items = "".join(
        f"<li><strong>{escape(' '.join(filter(None, (finding.code, finding.tile))))}</strong>: {escape(finding.message)}</li>"
        for finding in findings[:SHOWN_FINDINGS]
    )
    more = len(findings) - SHOWN_FINDINGS
    rest = paragraph(f"and {more} more; --json lists all of them") if more > 0 else ""
    return f'<ul class="findings">{items}</ul>{rest}'


def _parity_table(tiles: Sequence[TileParity]) -> str:
    """Each figure with its bound; a figure beyond its bound is marked by words, not by colour alone."""
    rows = [["tile", *MEASURES.values(), "classes agree, %"]]
    for tile in tiles:
        measures = tile.measures()
        cells = []
        for name in MEASURES:
            measure = measures[name]
            bound = f"{'≥' if measure.at_least else '≤'}\N{NO-BREAK SPACE}{measure.tolerance:.3g}"
            cells.append(f"{measure.value:.3g} ({bound}{'' if measure.passes else ', NOT WITHIN'})")
        rows.append([tile.tile, *cells, f"{100 * tile.argmax_agreement:.2f}"])
    return table("Measured, and in brackets allowed", rows)


def _reference_table(found: ReferenceReport) -> str:
    rows = [["teacher", "tile", "scores", "largest |Δp|", "mean |Δp|", "classes agree, %"]]
    for row in found.tiles:
        measure = row.max_abs
        bound = f"≤\N{NO-BREAK SPACE}{measure.tolerance:.3g}{'' if measure.passes else ', NOT WITHIN'}"
        agree = f"{100 * row.argmax_agreement:.2f}"
        rows.append([row.teacher, row.tile, row.kind, f"{measure.value:.3g} ({bound})", f"{row.mean_abs:.3g}", agree])
    return table(f"Against the scores in {found.folder}, and in brackets allowed", rows)


def _label_tables(report: Report, config: Config) -> list[str]:
    assert report.labels is not None
    labels = report.labels
    rows = [["class", "IoU, %", "F1, %", ""]]
    rows += [
        [name, percent_cell(iou), percent_cell(labels.f1[name]), labels.left_out.get(name, "")]
        for name, iou in labels.iou.items()
    ]
    rows.append(["mean", percent_cell(labels.miou), percent_cell(labels.mean_f1), ""])
    counts_LP = np.asarray(report.confusion, dtype=np.int64)
    caption = "What the teacher predicted for each label: percent of the row, and pixels"
    return [
        table(f"Over {count_text(report.label_tiles, f'labelled {report.noun}')}", rows),
        confusion_table(caption, counts_LP, config.classes.names),
    ]


def _teacher_classes_table(report: Report) -> str:
    rows = [["teacher class", "configured", "labels agree, %", "best fit", "labels agree, %", "gain of mIoU, points"]]
    rows += [
        [
            row.name, row.configured, percent_cell(row.configured_share), row.fitting, percent_cell(row.fitting_share),
            f"{100 * row.gain:+.1f}",
        ]
        for row in report.teacher_classes
    ]  # fmt: skip
    return table("Teacher classes against the labels", rows)
