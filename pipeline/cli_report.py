"""The command that shows runs on a page."""

from __future__ import annotations

from pathlib import Path

import click

from kdpipe.pipeline.cli_options import debug_option, device_option, file_option, json_option, open_console, write_json


@click.command("report")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@file_option("--out", "out", "Where the page goes.", default="report.html")
@click.option(
    "--tiles", type=click.IntRange(0), default=24, show_default=True, metavar="N", help="Tiles to look at, of each run."
)
@click.option("--teacher", is_flag=True, help="Ask the teacher about the validation tiles shown.")
@click.option(
    "--window",
    type=click.IntRange(64),
    metavar="PX",
    help="Side of overlapping windows for tiles too large for memory.",
)
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
    from kdpipe.pipeline.console import size_text
    from kdpipe.pipeline.models.teacher import resolve_device
    from kdpipe.pipeline.run_report import report_run
    from kdpipe.pipeline.run_report_page import write_report

    console, progress = open_console()
    where = resolve_device(device)
    reports = [report_run(run, where, tiles=tiles, teacher=teacher, window=window, progress=progress) for run in runs]
    write_report(reports, Path(out))
    write_json(json_path, {"page": out, "runs": [each.as_dict() for each in reports]})
    for each in reports:
        scores = each.evaluation.together.scores
        console.print(f"{each.run.name}: mIoU {100 * scores.miou:.1f} %", highlight=False, soft_wrap=True)
        for note in each.notes:
            console.print(f"  {note}", highlight=False, soft_wrap=True, markup=False)
    console.print(f"page: {out} ({size_text(Path(out).stat().st_size)})", highlight=False, soft_wrap=True)
