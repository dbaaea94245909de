"""The commands that score and compare students: evaluate, forecast, compare, report."""

from __future__ import annotations

from typing import Any

import click

from kdpipe.pipeline.commands import completion
from kdpipe.pipeline.commands.options import (
    common_options,
    config_option,
    file_option,
    limit_option,
    load,
    run,
    set_option,
    trust_option,
    window_option,
    with_config,
)


@click.command("evaluate")
@click.argument("paths", nargs=-1, metavar="[CHECKPOINT] [ROOT]...", shell_complete=completion.checkpoint_then_roots)
@click.option("--teacher", is_flag=True, help="Score the mapped teacher of CONFIG instead of a CHECKPOINT.")
@config_option("The config of a teacher, or of a student that kdpipe did not train. A CHECKPOINT of kdpipe carries its own.",
               "-c", "--config")  # fmt: skip
@set_option
@trust_option
@limit_option()
@window_option
@click.option("--tta", type=click.Choice(["none", "flips", "d4"]), help="Views over which logits are averaged.")
@click.option("--boundary-width", type=click.IntRange(1), default=3, show_default=True, metavar="PX",
              help="How far apart matching boundaries may lie.")  # fmt: skip
@file_option("--png", "png_path", "Draw the confusion matrices.")
@common_options(device=True)
def evaluate(
    paths: tuple[str, ...], teacher: bool, source: str | None, overrides: tuple[str, ...], **options: Any
) -> None:
    """
    Score a student or a teacher on labelled tiles.

    CHECKPOINT is of train-student, or with -c CONFIG an ONNX file, a .pt2 file or a student's weights of any origin. ROOT is a
    folder of images and masks (default: data.val of the config). Each is scored by itself, then all together. By default a
    student predicts whole tiles without TTA, and a teacher as its config says.

    Exit codes: 0 done, 2 usage, config, data or checkpoint.
    """
    if teacher and source is None:
        raise click.UsageError("--teacher needs -c CONFIG, which describes the teacher")
    if overrides and source is None:
        raise click.UsageError("--set overrides a key of -c CONFIG, and a student's CHECKPOINT carries its own config")
    if not teacher and not paths:
        raise click.UsageError("Missing argument 'CHECKPOINT', such as model_weights/<group>/<name>/best.ckpt")
    config = load(source, overrides) if source is not None else None
    run("results.evaluate_model", paths, config, teacher=teacher, **options)


@click.command("forecast")
@with_config
@click.argument("checkpoints", nargs=-1, required=True, metavar="CHECKPOINT...", shell_complete=completion.students)
@click.option(
    "--root",
    "roots",
    multiple=True,
    metavar="ROOT",
    help="Folder of labelled tiles of one scene, that no network has seen. Repeatable. Default: data.val.",
)
@window_option
@trust_option
def forecast(source: str, overrides: tuple[str, ...], checkpoints: tuple[str, ...], **options: Any) -> None:
    """
    Say whether distillation can pay.

    Compares what the teacher knows with a student that was trained without it. CHECKPOINT is of a run of train-student
    --kd none, such as model_weights/dubai/NAME-none/last.ckpt: best one for each of several seeds. By scene and class it
    prints teacher, student and difference, and advises.

    Exit codes: 0 done, whatever the advice, 2 usage, config, data or checkpoint.
    """
    run("results.forecast_gain", load(source, overrides), checkpoints, **options)


@click.command("compare")
@click.argument("runs", nargs=-1, required=True, metavar="RUN RUN...", shell_complete=completion.runs)
@click.option("--baseline", metavar="NAME", help="Run or arm to compare with. Default: the one without a teacher.")
@click.option("--by", type=click.Choice(["root"]),
              help="Also score the last checkpoint of every run on each root of data.val by itself.")  # fmt: skip
@click.option("--root", "roots", multiple=True, metavar="ROOT", shell_complete=completion.folders,
              help="Folder of labelled tiles to score in place of data.val, by root. Repeatable.")  # fmt: skip
@click.option("--out", default="comparison", show_default=True, type=click.Path(file_okay=False), metavar="DIR",
              help="Folder of the HTML report.")  # fmt: skip
@click.option("--tiles", type=click.IntRange(0), default=12, show_default=True, metavar="N",
              help="Validation tiles shown with the predictions of every arm.")  # fmt: skip
@window_option
@click.option("--png", is_flag=True, help="Draw curves and differences as PNG files too.")
@trust_option
@common_options(device=True)
def compare(**options: Any) -> None:
    """
    Compare runs over seeds, in an HTML report.

    RUN is a folder of train-student, such as model_weights/dubai/NAME. The runs must be equally long. Those that differ only
    in seed and name are one arm. For each arm and class, and for each root where asked, it says whether the arm gained,
    lost, or cannot be told apart from the baseline, and how many seeds would settle that.

    Exit codes: 0 done, 2 the runs cannot be compared, or data or checkpoint.
    """
    run("results.compare_runs", **options)


@click.command("report")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", shell_complete=completion.runs)
@file_option("--out", "out", "The HTML report.", default="report.html")
@click.option("--tiles", type=click.IntRange(0), default=24, show_default=True, metavar="N",
              help="Tiles shown for each run.")  # fmt: skip
@click.option("--teacher", is_flag=True, help="Run the teacher on the validation tiles shown.")
@window_option
@trust_option
@limit_option()
@common_options(device=True)
def report(**options: Any) -> None:
    """
    Show runs in one HTML report.

    RUN is a folder of train-student, such as model_weights/dubai/NAME. Its best checkpoint is evaluated on its validation
    tiles. The report holds scores, curves, confusion, class map and tiles, and needs no other file.

    Exit codes: 0 done, 2 usage, data or checkpoint, 3 the cache is damaged.
    """
    run("results.report_runs", **options)
