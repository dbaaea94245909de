"""`evaluate`, `forecast`, `compare` and `report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kdpipe.configs import Config
from kdpipe.configs.errors import ConfigError
from kdpipe.configs.outputs import output_path
from kdpipe.pipeline.commands.console import Terminal, write_json
from kdpipe.pipeline.devices import resolve_device
from kdpipe.pipeline.evaluation.compare import compare
from kdpipe.pipeline.evaluation.evaluate import Model, evaluate, student_model, teacher_model
from kdpipe.pipeline.evaluation.roots import compare_roots
from kdpipe.pipeline.prediction.model import ONNX_SUFFIX
from kdpipe.pipeline.prediction.scored import exported_model
from kdpipe.pipeline.reports.html.comparison import comparison_tiles, write_comparison
from kdpipe.pipeline.reports.html.run import report_run, write_report
from kdpipe.pipeline.reports.plots import draw_comparison, draw_confusion
from kdpipe.pipeline.reports.terminal.comparison import comparison_tables
from kdpipe.pipeline.reports.terminal.forecast import forecast_tables
from kdpipe.pipeline.reports.terminal.scores import evaluation_tables, score_text
from kdpipe.pipeline.runs.layout import run_folder
from kdpipe.pipeline.runs.record import read_run
from kdpipe.pipeline.text import file_text
from kdpipe.pipeline.verify.forecast import forecast


def evaluate_model(
    paths: Sequence[str], config: Config | None, *, teacher: bool, limit: int | None, window: int | None, tta: str | None,
    boundary_width: int, json_path: str | None, png_path: str | None, device: str | None,
) -> None:  # fmt: skip
    """Score the teacher of a config, through its class map, on the roots `paths`, or the student `paths[0]` on the rest."""
    terminal = Terminal()
    limit = config.data.limit if config is not None and limit is None else limit
    roots = paths if teacher else paths[1:]
    model = _model(paths, config, device, teacher=teacher, tta=tta, window=window, terminal=terminal)
    result = evaluate(model.limited(limit), roots, boundary_width_px=boundary_width, progress=terminal)
    write_json(json_path, result.as_dict())
    if png_path is not None:
        draw_confusion(result, Path(png_path))
    terminal.show(*evaluation_tables(result))


def _model(
    paths: Sequence[str], config: Config | None, device: str | None, *, teacher: bool, tta: str | None, window: int | None,
    terminal: Terminal,
) -> Model:  # fmt: skip
    if teacher and config is not None:
        return teacher_model(config, resolve_device(device), tta=tta, window=window)
    if Path(paths[0]).suffix != ONNX_SUFFIX:
        where = resolve_device(device)
        return student_model(paths[0], where, tta=tta, window=window, alone=True, config=config, say=terminal.say)
    if config is None:
        raise ConfigError(
            f"{paths[0]} does not say where masks lie and what is in them: add -c CONFIG, such as the config.yaml of its run, "
            "model_weights/<group>/<name>/config.yaml"
        )
    return exported_model(paths[0], config, device, tta=tta, window=window, say=terminal.say)


def forecast_gain(
    config: Config, checkpoints: Sequence[str], *, roots: Sequence[str], window: int | None, json_path: str | None,
    device: str | None,
) -> None:  # fmt: skip
    """Show the lead of a config's teacher over the students `checkpoints`, on the folders `roots`."""
    terminal = Terminal()
    result = forecast(config, checkpoints, roots, resolve_device(device), window=window, progress=terminal)
    write_json(json_path, result.as_dict() | {"limit": config.data.limit})
    terminal.show(*forecast_tables(result))


def compare_runs(
    runs: Sequence[str], *, baseline: str | None, by: str | None, roots: Sequence[str], out: str, tiles: int, window: int | None,
    png: bool, json_path: str | None, device: str | None,
) -> None:  # fmt: skip
    """Compare runs in tables and in an HTML report in the folder `out`; by root where `by` says so, or `roots` are named."""
    terminal = Terminal()
    found = [read_run(run) for run in runs]
    comparison = compare(found, baseline)
    folders = {id(run): run_folder(path) for run, path in zip(found, runs, strict=True)}
    where = resolve_device(device)
    if by == "root" or roots:
        comparison.roots = compare_roots(comparison.runs, folders, where, roots, window=window, progress=terminal)
    drawn, notes = comparison_tiles(comparison, folders, where, tiles, terminal, window=window) if tiles else ([], [])
    page = write_comparison(comparison, output_path(out, key="--out"), drawn, notes)
    if png:
        draw_comparison(comparison, page.parent)
    write_json(json_path, comparison.as_dict())
    terminal.show(*comparison_tables(comparison), *notes, file_text("HTML report", page))


def report_runs(
    runs: Sequence[str], *, out: str, tiles: int, limit: int | None, teacher: bool, window: int | None, json_path: str | None,
    device: str | None,
) -> None:  # fmt: skip
    """Evaluate runs and show them in one HTML report at `out`."""
    terminal = Terminal()
    where = resolve_device(device)
    reports = [
        report_run(run, where, tiles=tiles, limit=limit, teacher=teacher, window=window, progress=terminal)
        for run in runs
    ]
    write_report(reports, Path(out))
    write_json(json_path, {"page": out, "runs": [each.as_dict() for each in reports]})
    for each in reports:
        terminal.show(score_text(each.run.name, each.evaluation), *(f"  {note}" for note in each.notes))
    terminal.show(file_text("HTML report", out))
