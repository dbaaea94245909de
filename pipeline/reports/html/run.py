"""The page of one or several runs: scores, tiles to browse, curves, classes, confusion and class map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch

from kdpipe.cache.reader import SoftTargetCache
from kdpipe.configs import Config, dump_config
from kdpipe.configs.errors import CacheError, CheckpointError, count_text
from kdpipe.configs.files import write_file
from kdpipe.data.rasters import Stretch
from kdpipe.pipeline.evaluation.compare import one_seed_text
from kdpipe.pipeline.evaluation.evaluate import Evaluation, RootScores, evaluate, student_model
from kdpipe.pipeline.precompute.expected_recipe import complete_recipe, configured_softening
from kdpipe.pipeline.progress import Progress, Silent
from kdpipe.pipeline.reports.html.charts import Points, class_colours, class_map_figure, confusion_table, line_chart
from kdpipe.pipeline.reports.html.page import (
    bar_cell,
    contents,
    figures,
    folded,
    framed_table,
    heading,
    page,
    paragraph,
    table,
)
from kdpipe.pipeline.reports.html.tiles import (
    VIEWER,
    Targets,
    TilePictures,
    browser,
    cached_targets,
    draw_subject,
    spread,
    training_noun,
    training_subjects,
    validation_subjects,
)
from kdpipe.pipeline.runs.curves import Curve, read_curves
from kdpipe.pipeline.runs.layout import BEST, RUN, logs_folder, run_folder
from kdpipe.pipeline.runs.record import Run, read_run
from kdpipe.pipeline.runs.trust import require_trust
from kdpipe.pipeline.teacher.frozen import open_teacher
from kdpipe.pipeline.text import duration_text, limit_text, pace_text, percent_cell, percent_text

SHOWN_TILES = 24
LOSSES = {"train_loss": "total", "train_hard_loss": "part from labels", "train_kd_loss": "part from soft targets"}
RATES = {"lr": "head", "lr_encoder": "encoder"}


@dataclass
class RunReport:
    """A run, the scores of its best checkpoint, its logged curves, and tiles; `notes` say what is missing, and why."""

    folder: str
    run: Run
    config: Config
    evaluation: Evaluation
    logged: dict[str, Curve]
    tiles: list[TilePictures]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the pictures."""
        return {
            "folder": self.folder,
            "name": self.run.name,
            "mode": self.run.mode,
            "evaluation": self.evaluation.as_dict(),
            "tiles": [{"tile": tile.tile, "group": tile.group, **tile.figures} for tile in self.tiles],
            "notes": self.notes,
        }


def report_run(
    folder: str | Path,
    device: torch.device,
    *,
    tiles: int = SHOWN_TILES,
    limit: int | None = None,
    teacher: bool = False,
    window: int | None = None,
    progress: Progress | None = None,
) -> RunReport:
    """
    The report of the run in `folder`, whose `best.ckpt` is evaluated on its `data.val`; with `limit`, on so many of its tiles.

    Half of the `tiles` are validation tiles, half training tiles with the soft targets of the cache; without a cache to
    read, all are validation tiles. A cache holds no soft target of a validation tile: with `teacher`, the teacher predicts
    it at the run's temperature. `window` is the side in px of the student's windows on tiles too large for memory.

    Raises `DataError` where there is no run or its tiles are missing, `CheckpointError` where the weights of the student
    or, with `teacher`, of the teacher are missing, `CorruptCache` where a shown tile of the cache is damaged.
    """
    progress = progress or Silent()
    run, place = read_run(folder), run_folder(folder)
    if not (place / BEST).is_file():
        raise CheckpointError(
            f"no {BEST} in {place.absolute()}, only {RUN}: expected the folder as `kdpipe train-student` left it, with the "
            "student's best weights"
        )
    model = student_model(place / BEST, device, tta=None, window=window, say=progress.say)
    model = model if limit is None else model.limited(limit)
    config = model.config
    if teacher:
        for module in filter(None, (member.model for member in config.members.values())):
            require_trust(module, place / BEST)
    live = _live_targets(config, model.stretch, device) if teacher else None
    evaluation = evaluate(model, progress=progress)
    cache, why_not = _run_cache(run, config)
    notes = [why_not] if why_not else []
    if live is None and tiles:
        notes.append("Validation tiles have no soft target here: the cache holds training tiles (--teacher adds them).")

    training = [] if cache is None else spread(training_subjects(config, model.stretch, cache), tiles // 2)
    validation = spread(validation_subjects(config, model.stretch), tiles - len(training))
    shown = [(subject, "validation tile", live) for subject in validation]
    if cache is not None:
        shown += [(subject, training_noun(config), cached_targets(cache)) for subject in training]
    drawn = []
    with progress.bar("tiles of the page", len(shown), "tiles") as advance:
        for subject, group, targets in shown:
            drawn.append(draw_subject(subject, group, config, {"": model}, targets))
            advance(1)
    logs = logs_folder(place, config)
    logged = read_curves(logs)
    if not logged:
        notes.append(f"No losses by step: there is no log in {logs}.")
    return RunReport(str(folder), run, config, evaluation, logged, drawn, notes)


def write_report(reports: Sequence[RunReport], path: Path) -> None:
    """Write one page with a section for each run; several runs also share a table and a chart."""
    anchors = [f"run-{number}" for number in range(1, len(reports) + 1)]
    names = ", ".join(report.run.name for report in reports)
    parts = [heading(1, names if len(reports) == 1 else f"{len(reports)} runs")]
    if len(reports) > 1:
        parts.append(contents(dict(zip(anchors, (report.run.name for report in reports), strict=True))))
        parts.append(table("Validation scores of the best checkpoints, %", list(_run_rows(reports))))
        if len({report.run.seed for report in reports}) == 1:
            parts.append(paragraph(one_seed_text(reports[0].run.seed)))
        curves = {f"{number} {report.run.name}": _miou(report) for number, report in enumerate(reports, 1)}
        parts.append(line_chart("Validation mIoU", {n: p for n, p in curves.items() if p}, "steps", "%"))
    for anchor, report in zip(anchors, reports, strict=True):
        parts += [heading(2, report.run.name, anchor) if len(reports) > 1 else "", _section(report)]
    parts.append(VIEWER if any(report.tiles for report in reports) else "")
    content = page(f"kdpipe: {names}", f"<main>{''.join(parts)}</main>", script=any(report.tiles for report in reports))
    write_file(path, content)


def class_map(config: Config) -> str:
    """The class map as a picture, and as a folded table below it."""
    names, teacher_classes, shares_TS = config.classes.names, config.teacher_classes, config.class_map_matrix()
    rows = [["teacher class", *names]]
    for name, row in zip(teacher_classes, shares_TS.tolist(), strict=True):
        rows.append([name, *(f"{share:g}" if share else "" for share in row)])
    figure = f"<figure>{class_map_figure(shares_TS, teacher_classes, names)}</figure>"
    return figure + folded("As a table", table("Class map", rows))


def _live_targets(config: Config, stretch: Stretch, device: torch.device) -> Targets:
    teacher = open_teacher(config, complete_recipe(config, stretch, None), device)
    return lambda subject, image_HWC: teacher.soft_targets(image_HWC[None])[0]


def _run_cache(run: Run, config: Config) -> tuple[SoftTargetCache | None, str]:
    """The cache that a run was trained from; or None, and why its soft targets cannot be shown."""
    if run.cache is None:
        without = {
            "none": "the run was trained without a teacher",
            "online": "the teacher ran during training, and nothing was stored",
        }
        return None, f"No soft targets: {without.get(run.mode, run.mode)}."
    try:
        cache = SoftTargetCache.open(run.cache.path, configured_softening(config), partial=True)
    except CacheError as err:
        return None, f"No soft targets: {err}"
    if cache.manifest.fingerprint != run.cache.fingerprint:
        return None, (
            f"No soft targets: {run.cache.path} now has the fingerprint {cache.manifest.fingerprint}, and the run was "
            f"trained from {run.cache.fingerprint}."
        )
    return cache, ""


def _section(report: RunReport) -> str:
    run, config, together = report.run, report.config, report.evaluation.together
    names, best = config.classes.names, report.evaluation.model.rpartition(" ")[2]
    scored = count_text(together.tiles, "validation tiles") + limit_text(report.evaluation.limit, together.labelled)
    parts = [
        figures({
            "mIoU": (percent_text(together.scores.miou), _left_out(together)),
            "overall accuracy": (percent_text(together.scores.overall_accuracy), "of all labelled pixels"),
            "boundary F1": (percent_text(together.boundary.mean_f1), f"within {together.boundary.width_px} px"),
            "calibration error": (percent_text(together.calibration.error), "0: as confident as accurate"),
            "seed": (str(run.seed), f"{count_text(run.history[-1].steps, 'steps')} on {run.device}"),
            **_times(run),
        }),
        paragraph(f"{_trained_from(report)} Scores are those of {BEST}, from step {best} of {run.total_steps}, on {scored} "
                  f"({together.confusion_LP.sum() / 1e6:.1f} MP labelled)."),
        *(paragraph(note, "quiet") for note in report.notes),
    ]  # fmt: skip
    if report.tiles:
        parts += [heading(3, "Tiles"), browser(report.tiles, names)]
    parts += [heading(3, "Curves"), f'<div class="charts">{"".join(_charts(report))}</div>']
    parts += [heading(3, "Classes"), _class_table(together, names, "Scores by class, %")]
    if len(report.evaluation.roots) > 1:
        parts += [_class_table(root, names, f"{root.root}, %") for root in report.evaluation.roots]
    caption = "What each label was predicted as: percent of the row, and pixels"
    parts += [heading(3, "Confusion"), confusion_table(caption, together.confusion_LP, names)]
    parts += [heading(3, "Class map"), class_map(config)]
    libraries = table("Libraries", [["library", "version"], *map(list, run.libraries.items())])
    parts += [folded("Configuration and libraries", f"<pre>{escape(dump_config(config))}</pre>{libraries}")]
    return "".join(parts)


def _times(run: Run) -> dict[str, tuple[str, str]]:
    """The times of a run, as far as it recorded them."""
    found = {}
    if run.wall_seconds is not None:
        found["run"] = (duration_text(run.wall_seconds), "wall time")
    if run.seconds_per_step is not None:
        found["step"] = (pace_text(run.seconds_per_step), "median")
    if run.stage_one_seconds is not None:
        found["stage one"] = (duration_text(run.stage_one_seconds), "for the whole cache")
    return found


def _class_table(found: RootScores, names: Sequence[str], caption: str) -> str:
    """A table of scores by class, each with a bar."""
    scores, boundary = found.scores, found.boundary
    counts_LP = found.confusion_LP
    total = counts_LP.sum()
    columns = {
        "IoU": scores.iou, "F1": scores.f1, "precision": scores.precision, "recall": scores.recall,
        f"boundary F1, {boundary.width_px} px": boundary.f1,
        "share of labels": dict(zip(names, (counts_LP.sum(axis=1) / total).tolist(), strict=True)),
        "share of predictions": dict(zip(names, (counts_LP.sum(axis=0) / total).tolist(), strict=True)),
    }  # fmt: skip
    head = '<th scope="col">class</th>' + "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    lines = []
    for name, colour in zip(names, class_colours(len(names)), strict=True):
        cells = "".join(bar_cell(values[name], percent_cell(values[name])) for values in columns.values())
        remark = f' <small class="quiet">({escape(scores.left_out[name])})</small>' if name in scores.left_out else ""
        swatch = f'<span class="swatch" style="background:{colour}"></span>'
        lines.append(f'<tr><th scope="row">{swatch} {escape(name)}{remark}</th>{cells}</tr>')
    means = [scores.miou, scores.mean_f1, scores.mean_precision, scores.mean_recall, boundary.mean_f1]
    cells = "".join(bar_cell(value, percent_cell(value)) for value in means)
    lines.append(f'<tr><th scope="row">mean of the scored classes</th>{cells}<td></td><td></td></tr>')
    return framed_table(caption, head, "".join(lines), "scores")


def _charts(report: RunReport) -> list[str]:
    history, names = report.run.history, report.config.classes.names
    accuracy = [(p.steps, 100 * p.overall_accuracy) for p in history if p.overall_accuracy is not None]
    charts: list[tuple[str, dict[str, Points], str]] = [
        ("Validation scores", {"mIoU": _miou(report), "overall accuracy": accuracy}, "%"),
        (
            "Validation IoU by class",
            {name: [(p.steps, 100 * v) for p in history if (v := p.iou[name]) is not None] for name in names},
            "%",
        ),
        ("Training loss", {label: _points(report, name) for name, label in LOSSES.items()}, "loss"),
        ("Learning rate", {label: _points(report, name) for name, label in RATES.items()}, "rate"),
    ]
    shown = [(title, {name: points for name, points in lines.items() if points}, unit) for title, lines, unit in charts]
    return [line_chart(title, lines, "steps", unit, names) for title, lines, unit in shown if lines]


def _points(report: RunReport, figure: str) -> list[tuple[float, float]]:
    return list(report.logged.get(figure, {}).items())


def _miou(report: RunReport) -> list[tuple[float, float]]:
    return [(point.steps, 100 * point.miou) for point in report.run.history if point.miou is not None]


def _run_rows(reports: Sequence[RunReport]) -> list[list[str]]:
    rows = [["run", "mode", "seed", "steps", "mIoU", "overall accuracy", "boundary F1", "calibration error"]]
    for number, report in enumerate(reports, 1):
        run, together = report.run, report.evaluation.together
        rows.append([
            f"{number} {run.name}", run.mode, str(run.seed), str(run.history[-1].steps), percent_cell(together.scores.miou),
            percent_cell(together.scores.overall_accuracy), percent_cell(together.boundary.mean_f1),
            percent_cell(together.calibration.error),
        ])  # fmt: skip
    return rows


def _trained_from(report: RunReport) -> str:
    run = report.run
    limit = run.config["data"].get("limit")
    trial = (
        ""
        if limit is None
        else f"This is a trial on at most {count_text(limit, 'tiles')} (data.limit), not a whole run. "
    )
    if run.cache is not None:
        tiles = count_text(run.cache.tiles, "tiles")
        return f"{trial}Trained from {run.cache.path} ({tiles}, fingerprint {run.cache.fingerprint[:16]})."
    return trial + ("Trained without a teacher." if run.mode == "none" else "Trained with the live teacher.")


def _left_out(together: RootScores) -> str:
    left_out = together.scores.left_out
    return f"without {', '.join(left_out)}" if left_out else "of all classes"
