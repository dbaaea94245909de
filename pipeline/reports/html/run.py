"""The page of one or several runs: figures, curves, scores by class, confusion, class map, and tiles to browse."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from kdpipe.configs import Config, dump_config
from kdpipe.pipeline.evaluation.evaluate import RootScores
from kdpipe.pipeline.reports.html.charts import class_colours, class_map_figure, confusion_table, line_chart
from kdpipe.pipeline.reports.html.page import (
    bar_cell,
    contents,
    figures,
    folded,
    framed_table,
    heading,
    page,
    paragraph,
    percent_text,
    table,
)
from kdpipe.pipeline.reports.html.run_content import RunReport
from kdpipe.pipeline.reports.html.tiles import VIEWER, browser
from kdpipe.pipeline.runs.checkpoint import BEST

LOSSES = {"train_loss": "total", "train_hard_loss": "of labels", "train_kd_loss": "of soft targets"}
RATES = {"lr": "head", "lr_encoder": "encoder"}


def write_report(reports: Sequence[RunReport], path: Path) -> None:
    """Write one page of all runs, one section each; several also have their curves in one chart, and a table of all."""
    anchors = [f"run-{number}" for number in range(1, len(reports) + 1)]
    names = ", ".join(report.run.name for report in reports)
    parts = [heading(1, names if len(reports) == 1 else f"{len(reports)} runs")]
    if len(reports) > 1:
        parts.append(contents(dict(zip(anchors, (report.run.name for report in reports), strict=True))))
        parts.append(table("Validation scores of the best checkpoints, %", list(_run_rows(reports))))
        curves = {f"{number} {report.run.name}": _miou(report) for number, report in enumerate(reports, 1)}
        parts.append(line_chart("Validation mIoU", {n: p for n, p in curves.items() if p}, "steps", "%"))
    for anchor, report in zip(anchors, reports, strict=True):
        parts += [heading(2, report.run.name, anchor) if len(reports) > 1 else "", _section(report)]
    parts.append(VIEWER if any(report.tiles for report in reports) else "")
    content = page(f"kdpipe: {names}", f"<main>{''.join(parts)}</main>", script=any(report.tiles for report in reports))
    path.write_text(content, encoding="utf-8")


def class_rows(scores: RootScores, names: Sequence[str], caption: str) -> str:
    """A table of scores by class with a bar behind each."""
    found, boundary = scores.scores, scores.boundary
    columns = {
        "IoU": found.iou, "F1": found.f1, "precision": found.precision, "recall": found.recall,
        f"boundary F1, {boundary.width_px} px": boundary.f1,
    }  # fmt: skip
    counts_LP = scores.confusion_LP
    total = counts_LP.sum()
    columns["share of labels"] = dict(zip(names, (counts_LP.sum(axis=1) / total).tolist(), strict=True))
    columns["share of answers"] = dict(zip(names, (counts_LP.sum(axis=0) / total).tolist(), strict=True))
    head = '<th scope="col">class, %</th>' + "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    lines = []
    for name, colour in zip(names, class_colours(len(names)), strict=True):
        cells = "".join(bar_cell(values[name], percent_text(values[name])) for values in columns.values())
        remark = f' <small class="quiet">({escape(found.left_out[name])})</small>' if name in found.left_out else ""
        swatch = f'<span class="swatch" style="background:{colour}"></span>'
        lines.append(f'<tr><th scope="row">{swatch} {escape(name)}{remark}</th>{cells}</tr>')
    means = [found.miou, found.mean_f1, found.mean_precision, found.mean_recall, boundary.mean_f1]
    cells = "".join(bar_cell(value, percent_text(value)) for value in means)
    lines.append(f'<tr><th scope="row">mean of what is scored</th>{cells}<td></td><td></td></tr>')
    return framed_table(caption, head, "".join(lines))


def _section(report: RunReport) -> str:
    run, config, together = report.run, report.config, report.evaluation.together
    names, best = config.classes.names, report.evaluation.model.rpartition(" ")[2]
    parts = [
        paragraph(f"{_learnt_from(report)} Scores are those of {BEST}, after step {best} of {run.total_steps}, on "
                  f"{together.tiles} validation tiles ({together.confusion_LP.sum() / 1e6:.1f} MP labelled)."),
        figures({
            "mIoU": (f"{percent_text(together.scores.miou)} %", _left_out(together)),
            "overall accuracy": (f"{percent_text(together.scores.overall_accuracy)} %", "of all labelled pixels"),
            "calibration error": (f"{percent_text(together.calibration.error)} %", "0 is as sure as right"),
            "boundary F1": (f"{percent_text(together.boundary.mean_f1)} %", f"within {together.boundary.width_px} px"),
            "steps": (str(run.history[-1].steps), f"{run.history[-1].seconds:.0f} s of training"),
            "seed": (str(run.seed), f"on {run.device}"),
        }),
        *(paragraph(note, "quiet") for note in report.notes),
    ]  # fmt: skip
    parts += [heading(3, "Curves"), f'<div class="charts">{"".join(_charts(report))}</div>']
    parts += [heading(3, "Classes"), class_rows(together, names, "Scores by class, %")]
    if len(report.evaluation.roots) > 1:
        parts += [class_rows(root, names, f"{root.root}, %") for root in report.evaluation.roots]
    parts += [heading(3, "Confusion"), confusion_table(
        "What the labels' pixels were taken for; percent of a row, and pixels", together.confusion_LP, names)]  # fmt: skip
    parts += [heading(3, "Class map"), class_map(config)]
    if report.tiles:
        how = paragraph("Click a tile, or press Enter on it, to compare two of its layers.")
        parts += [heading(3, "Tiles"), how, browser(report.tiles, names)]
    parts += [folded("Configuration and libraries", f"<pre>{escape(dump_config(config))}</pre>"
                     + table("Libraries", [["library", "version"], *map(list, run.libraries.items())]))]  # fmt: skip
    return "".join(parts)


def class_map(config: Config) -> str:
    """The class map as a picture, and as a table below it."""
    names, teacher_classes, shares_TS = config.classes.names, config.teacher_classes, config.class_map_matrix()
    rows = [["teacher says", *names]]
    for name, row in zip(teacher_classes, shares_TS.tolist(), strict=True):
        rows.append([name, *(f"{share:g}" if share else "" for share in row)])
    return f"<figure>{class_map_figure(shares_TS, teacher_classes, names)}</figure>{folded('As a table', table('Class map', rows))}"


def _charts(report: RunReport) -> list[str]:
    history, logged, names = report.run.history, report.logged, report.config.classes.names
    accuracy: list[tuple[float, float]] = [
        (p.steps, 100 * p.overall_accuracy) for p in history if p.overall_accuracy is not None
    ]
    by_class: dict[str, list[tuple[float, float]]] = {
        name: [(p.steps, 100 * v) for p in history if (v := p.iou[name]) is not None] for name in names
    }
    charts: list[tuple[str, dict[str, list[tuple[float, float]]], str]] = [
        ("Validation scores", {"mIoU": _miou(report), "overall accuracy": accuracy}, "%"),
        ("Validation IoU by class", by_class, "%"),
        ("Training loss", {label: [*logged.get(name, [])] for name, label in LOSSES.items()}, "loss"),
        ("Learning rate", {label: [*logged.get(name, [])] for name, label in RATES.items()}, "rate"),
    ]
    shown = [(title, {name: points for name, points in lines.items() if points}, unit) for title, lines, unit in charts]
    return [line_chart(title, lines, "steps", unit, names) for title, lines, unit in shown if lines]


def _miou(report: RunReport) -> list[tuple[float, float]]:
    return [(point.steps, 100 * point.miou) for point in report.run.history if point.miou is not None]


def _run_rows(reports: Sequence[RunReport]) -> list[list[str]]:
    rows = [["run", "mode", "seed", "steps", "mIoU", "overall accuracy", "boundary F1", "calibration error"]]
    for number, report in enumerate(reports, 1):
        run, together = report.run, report.evaluation.together
        rows.append([
            f"{number} {run.name}", run.mode, str(run.seed), str(run.history[-1].steps), percent_text(together.scores.miou),
            percent_text(together.scores.overall_accuracy), percent_text(together.boundary.mean_f1),
            percent_text(together.calibration.error),
        ])  # fmt: skip
    return rows


def _learnt_from(report: RunReport) -> str:
    run = report.run
    if run.cache is not None:
        return f"Learnt from {run.cache.path} ({run.cache.tiles} tiles, fingerprint {run.cache.fingerprint[:16]})."
    return "Learnt without a teacher." if run.mode == "none" else "Learnt from the live teacher."


def _left_out(together: RootScores) -> str:
    left_out = together.scores.left_out
    return f"without {', '.join(left_out)}" if left_out else "of all classes"
