"""The commands that end in a page to look at: what a cache is, what runs came to, and how arms compare."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from kdpipe.pipeline.commands import completion as complete
from kdpipe.pipeline.commands.options import (
    EXIT_FINDINGS,
    debug_option,
    device_option,
    file_option,
    json_option,
    load,
    open_console,
    with_config,
    write_json,
)


@click.command("verify-cache")
@with_config
@click.option("--level", type=click.Choice(["quick", "full", "parity"]), default="full", show_default=True,
              help="quick: complete and fresh? full: every byte. parity: the teacher again, and the labels.")  # fmt: skip
@click.option(
    "--sample", type=click.IntRange(1), default=12, show_default=True, help="Tiles on which parity runs the teacher."
)
@click.option("--student", metavar="CHECKPOINT", shell_complete=complete.weights,
              help="Whose gradients parity compares; a fresh student by default.")  # fmt: skip
@file_option("--report", "page", "Write a page with the findings, and tiles of the cache to look at.")
def verify_cache(
    source: str, overrides: tuple[str, ...], json_path: str | None, device: str | None, debug: bool,
    level: Any, sample: int, student: str | None, page: str | None,
) -> None:  # fmt: skip
    """
    The gate: prove that the cache is whole, fresh, and what the teacher would have said.

    Exit codes: 0 passes, 1 findings, 2 usage or config, 3 refused.
    """
    from kdpipe.pipeline.devices import resolve_device
    from kdpipe.pipeline.reports.terminal import results as reports
    from kdpipe.pipeline.verify.gate import verify

    console, progress = open_console()
    config, parity_tiles = load(source, overrides), None
    if page is not None:
        from kdpipe.pipeline.reports.html.verify_tiles import ParityTiles, cached_tiles

        parity_tiles = ParityTiles(config)
    found = verify(
        config, level, resolve_device(device), sample=sample, student=student, progress=progress, on_parity=parity_tiles
    )
    write_json(json_path, found.as_dict())
    for table in reports.verify_tables(found):
        console.print(table, highlight=False, soft_wrap=True)
    if page is not None and parity_tiles is not None:
        from kdpipe.pipeline.reports.html.verify import write_verification

        write_verification(found, config, parity_tiles.drawn or cached_tiles(config, found, sample), Path(page))
        console.print(_page_text(page), highlight=False, soft_wrap=True, markup=False)
    sys.exit(0 if found.passes else EXIT_FINDINGS)


@click.command("compare")
@click.argument("runs", nargs=-1, required=True, metavar="RUN RUN …", shell_complete=complete.runs)
@click.option("--baseline", metavar="NAME", help="The run or arm to compare with; the one without teacher by default.")
@click.option(
    "--out", default="comparison", show_default=True, type=click.Path(file_okay=False), help="Where page and plots go."
)
@click.option("--tiles", type=click.IntRange(0), default=12, show_default=True, metavar="N",
              help="Validation tiles with the answers of every arm.")  # fmt: skip
@json_option
@device_option
@debug_option
def compare(
    runs: tuple[str, ...], baseline: str | None, out: str, tiles: int, json_path: str | None, device: str | None,
    debug: bool,
) -> None:  # fmt: skip
    """
    Runs of equal length side by side, over seeds.

    RUN is a folder of `train-student`, such as model_weights/dubai/NAME. Runs that differ in nothing but seed and name are
    one arm. Writes a page and its plots. Exit codes: 0 done, 2 runs that cannot be compared.
    """
    from kdpipe.configs.outputs import output_path
    from kdpipe.pipeline.devices import resolve_device
    from kdpipe.pipeline.evaluation.compare import compare as compare_runs
    from kdpipe.pipeline.reports.html.comparison import write_comparison
    from kdpipe.pipeline.reports.html.comparison_tiles import comparison_tiles
    from kdpipe.pipeline.reports.terminal.comparison import comparison_tables
    from kdpipe.pipeline.runs.record import read_run, run_folder

    console, progress = open_console()
    found = [read_run(run) for run in runs]
    comparison = compare_runs(found, baseline)
    folders = {id(run): run_folder(path) for run, path in zip(found, runs, strict=True)}
    drawn, notes = comparison_tiles(comparison, folders, resolve_device(device), tiles, progress) if tiles else ([], [])
    page = write_comparison(comparison, output_path(out, key="--out"), drawn, notes)
    write_json(json_path, comparison.as_dict())
    for table in comparison_tables(comparison):
        console.print(table, highlight=False, soft_wrap=True)
    for note in notes:
        console.print(note, highlight=False, soft_wrap=True, markup=False)
    console.print(f"page: {page}", highlight=False, soft_wrap=True)


@click.command("report")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", shell_complete=complete.runs)
@file_option("--out", "out", "Where the page goes.", default="report.html")
@click.option("--tiles", type=click.IntRange(0), default=24, show_default=True, metavar="N",
              help="Tiles to look at, of each run.")  # fmt: skip
@click.option("--teacher", is_flag=True, help="Ask the teacher about the validation tiles shown.")
@click.option("--window", type=click.IntRange(64), metavar="PX",
              help="Side of overlapping windows for tiles too large for memory.")  # fmt: skip
@json_option
@device_option
@debug_option
def report(
    runs: tuple[str, ...], out: str, tiles: int, teacher: bool, window: int | None, json_path: str | None, device: str | None,
    debug: bool,
) -> None:  # fmt: skip
    """
    Runs on one page that opens from a file: scores, curves, confusion, class map, and tiles to look at.

    RUN is a folder of `train-student`, such as model_weights/dubai/NAME. Its best checkpoint is evaluated on its validation tiles.
    Exit codes: 0 done, 2 usage, data or checkpoint, 3 the cache is damaged.
    """
    from kdpipe.pipeline.devices import resolve_device
    from kdpipe.pipeline.reports.html.run import write_report
    from kdpipe.pipeline.reports.html.run_content import report_run

    console, progress = open_console()
    where = resolve_device(device)
    reports = [report_run(run, where, tiles=tiles, teacher=teacher, window=window, progress=progress) for run in runs]
    write_report(reports, Path(out))
    write_json(json_path, {"page": out, "runs": [each.as_dict() for each in reports]})
    for each in reports:
        miou = each.evaluation.together.scores.miou
        console.print(f"{each.run.name}: mIoU {100 * miou:.1f} %", highlight=False, soft_wrap=True, markup=False)
        for note in each.notes:
            console.print(f"  {note}", highlight=False, soft_wrap=True, markup=False)
    console.print(_page_text(out), highlight=False, soft_wrap=True, markup=False)


def _page_text(page: str) -> str:
    from kdpipe.pipeline.text import size_text

    return f"page: {page} ({size_text(Path(page).stat().st_size)})"
