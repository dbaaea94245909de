"""The commands: parse, call one function, print, exit. Heavy imports wait until a command runs, so that --help is instant."""

from __future__ import annotations

import gc
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kdpipe.pipeline.commands import completion as complete
from kdpipe.pipeline.commands.maps import export, predict
from kdpipe.pipeline.commands.options import (
    EXIT_FINDINGS,
    EXIT_REFUSED,
    EXIT_USAGE,
    complain,
    device_option,
    file_option,
    json_option,
    load,
    open_console,
    with_config,
    write_json,
)
from kdpipe.pipeline.commands.results import compare, report, verify_cache
from kdpipe.pipeline.commands.setup import init
from kdpipe.pipeline.commands.shells import completion
from kdpipe.pipeline.devices import ask_for_huge_pages, keep_freed_memory

if TYPE_CHECKING:
    from kdpipe.pipeline.cluster.client import Cluster
    from kdpipe.pipeline.commands.console import ConsoleProgress
    from kdpipe.pipeline.inspection.statistics import CacheStatistics


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="kdpipe")
def cli() -> None:
    """Distil a large land-cover teacher into a student one can deploy, and pay for the teacher once."""


@cli.command("precompute-teacher")
@with_config
@click.option("--dry-run", is_flag=True, help="Say what it will cost in bytes and time, and whether the disk holds it.")
@click.option("--repair", is_flag=True, help="Read every byte first, and compute damaged tiles again.")
@click.option(
    "--workers", type=click.IntRange(1), metavar="N", help="Compute in N processes of this machine, one a GPU."
)
@click.option("--scheduler", metavar="ADDRESS", help="Compute on the workers of a dask cluster: tcp://host:8786.")
def precompute_teacher(
    source: str, overrides: tuple[str, ...], json_path: str | None, device: str | None, debug: bool,
    dry_run: bool, repair: bool, workers: int | None, scheduler: str | None,
) -> None:  # fmt: skip
    """
    Stage one: store the teacher's soft targets of every training tile.

    Goes on where an earlier run stopped. Exit codes: 0 done, 1 some tiles failed (named), 2 usage or config, 3 refused
    (stale cache, locked, no disk).
    """
    from kdpipe.pipeline.precompute.plan import already_text, finished_already
    from kdpipe.pipeline.progress import stop_on_signal
    from kdpipe.pipeline.reports.terminal import results as reports

    if sum(map(bool, (dry_run, workers, scheduler))) > 1:
        raise click.UsageError("--dry-run, --workers and --scheduler exclude each other")
    config = load(source, overrides)
    # A device that is named is checked, for which torch is needed.
    if not (dry_run or repair or device) and (done := finished_already(config)):
        console, progress = open_console()
        progress.say(already_text(done))
        write_json(json_path, done.as_dict())
        console.print(reports.precompute_text(done), highlight=False, soft_wrap=True)
        return

    import torch

    from kdpipe.pipeline.devices import resolve_device
    from kdpipe.pipeline.precompute.run import failure_report, precompute

    console, progress = open_console()
    if dry_run:
        from kdpipe.pipeline.dry_run import estimate  # which brings all that trains

        forecast = estimate(config, resolve_device(device), progress)
        console.print(reports.estimate_text(forecast), highlight=False, soft_wrap=True)
        write_json(json_path, forecast.as_dict())
        sys.exit(0 if forecast.fits else EXIT_REFUSED)
    with stop_on_signal() as stop:
        if workers or scheduler:
            with _cluster(progress, device, scheduler, workers) as cluster:
                summary = precompute(config, torch.device("cpu"), progress, stop, repair=repair, workers=cluster)
        else:
            summary = precompute(config, resolve_device(device), progress, stop, repair=repair)
    write_json(json_path, summary.as_dict())
    console.print(reports.precompute_text(summary), highlight=False, soft_wrap=True)
    if summary.failed:
        complain(failure_report(summary))
        sys.exit(EXIT_FINDINGS)


@cli.command("train-student")
@with_config
@click.option(
    "--kd", type=click.Choice(["cached", "online", "none"]), help="Another source of soft targets than the config's."
)
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint, if there is one.")
@click.option("--overwrite", is_flag=True, help="Start anew where a run of this name exists.")
@click.option(
    "--devices",
    type=click.IntRange(1),
    metavar="N",
    help="Train on N GPUs, or in N processes on the CPU (train.devices).",
)
def train_student(
    source: str, overrides: tuple[str, ...], json_path: str | None, device: str | None, debug: bool,
    kd: Any, resume: bool, overwrite: bool, devices: int | None,
) -> None:  # fmt: skip
    """
    Stage two: train the student from the cache.

    Exit codes: 0 done, 1 the loss diverged, 2 usage or config, 3 refused (incomplete, stale or damaged cache).
    """
    from kdpipe.configs.errors import Interrupted, TrainingDiverged
    from kdpipe.pipeline.devices import resolve_device
    from kdpipe.pipeline.distributed import is_further_process
    from kdpipe.pipeline.progress import stop_on_signal
    from kdpipe.pipeline.reports.terminal import results as reports
    from kdpipe.pipeline.reports.terminal.curves import curves_text, read_curves
    from kdpipe.pipeline.training.run import train, with_mode

    console, progress = open_console()
    if devices is not None:
        overrides = (*overrides, f"train.devices={devices}")
    config = with_mode(load(source, overrides), kd)
    try:
        with stop_on_signal() as stop:
            summary = train(
                config, resolve_device(device), resume=resume, overwrite=overwrite, progress=progress, stop=stop
            )
    except (Interrupted, TrainingDiverged):
        if is_further_process(config):
            sys.exit(0)  # all end alike, and the first one says so; another code would have Lightning kill that one
        raise
    if is_further_process(config):
        return
    write_json(json_path, summary.as_dict())
    curves = curves_text(read_curves(summary.logs), console.width, only_ascii=console.options.ascii_only)
    for table in (curves, *reports.training_tables(summary)):
        console.print(table, highlight=False, soft_wrap=True)


@cli.command("suggest-map")
@with_config
@click.option("--sample", type=click.IntRange(1), metavar="N", help="Ask about N labelled tiles; about all by default.")
def suggest_map(
    source: str, overrides: tuple[str, ...], json_path: str | None, device: str | None, debug: bool, sample: int | None
) -> None:
    """
    The class map that the labels suggest, beside the configured one, ready to paste.

    Its rows, or all of it, may still be FILL_IN in CONFIG. Exit codes: 0 done, 2 usage, configuration, data or checkpoint.
    """
    from kdpipe.configs import load_open_config
    from kdpipe.pipeline.devices import resolve_device
    from kdpipe.pipeline.reports.terminal import results as reports
    from kdpipe.pipeline.verify import suggestion

    console, progress = open_console()
    config, unfilled = load_open_config(source, overrides)
    result = suggestion.suggest_map(config, resolve_device(device), sample=sample, unfilled=unfilled, progress=progress)
    write_json(json_path, result.as_dict())
    for part in reports.suggestion_tables(result):
        # The table fits the terminal; what is pasted must not be broken.
        console.print(part, highlight=False, markup=False, soft_wrap=isinstance(part, str))


@cli.command("inspect")
@click.argument("path", metavar="CHECKPOINT|CACHE", shell_complete=complete.weights_or_cache)
@click.option("--diff", "source", metavar="CONFIG", shell_complete=complete.configs,
              help="Of a cache: say what this configuration would have otherwise.")  # fmt: skip
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", shell_complete=complete.overrides,
              help="Override a key of CONFIG.")  # fmt: skip
@click.option("--stats", is_flag=True, help="Of a cache: read all of it; class shares, entropy, confidence, outliers.")
@file_option("--table", "table_path", "With --stats: one row a tile, as .csv or .parquet.")
@file_option("--plot", "plot_path", "With --stats: draw it as a PNG.")
@json_option
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def inspect(
    path: str, source: str | None, overrides: tuple[str, ...], stats: bool, table_path: str | None, plot_path: str | None,
    json_path: str | None, debug: bool,
) -> None:  # fmt: skip
    """
    Say what a file of weights or a cache is.

    Of a CHECKPOINT: its network as recognised, its channels, and how its weights lie in it; never executes anything from a
    file. Of a CACHE (a folder or URL): its manifest, and with --stats its numbers, out of core. Exit codes: 0 done, 1 --diff
    found differences, 2 not a readable checkpoint, 3 not a whole cache.
    """
    from kdpipe.pipeline.inspection.cache import inspect_cache, is_cache
    from kdpipe.pipeline.inspection.checkpoint import inspect_checkpoint
    from kdpipe.pipeline.reports.terminal import results as reports

    console, progress = open_console()
    if (table_path or plot_path) and not stats:
        raise click.UsageError("--table and --plot go with --stats")
    if not is_cache(path):
        if stats:
            raise click.UsageError(f"--stats is for a cache, and {path} is not a folder or URL")
        if source is not None:
            raise click.UsageError(f"--diff compares a cache with CONFIG, and {path} is not a folder or URL")
        found = inspect_checkpoint(path)
        write_json(json_path, found.as_dict())
        console.print(reports.inspection_table(found), highlight=False, soft_wrap=True)
        return
    cache = inspect_cache(path, load(source, overrides) if source is not None else None)
    content = cache.as_dict()
    for table in reports.cache_tables(cache):
        console.print(table, highlight=False, soft_wrap=True)
    if stats:
        statistics = _statistics(path, table_path, plot_path, progress)
        content["statistics"] = statistics.as_dict()
        for table in reports.statistics_tables(statistics):
            console.print(table, highlight=False, soft_wrap=True)
    write_json(json_path, content)
    sys.exit(EXIT_FINDINGS if cache.differences else 0)


@cli.command("evaluate")
@click.argument("paths", nargs=-1, metavar="[CHECKPOINT] [ROOT]...", shell_complete=complete.checkpoint_then_roots)
@click.option("--teacher", is_flag=True, help="Score the mapped teacher of a CONFIG instead of a CHECKPOINT.")
@click.option("-c", "--config", "source", metavar="CONFIG", shell_complete=complete.configs,
              help="The teacher's; a CHECKPOINT carries its own.")  # fmt: skip
@click.option(
    "--window",
    type=click.IntRange(64),
    metavar="PX",
    help="Side of overlapping windows for tiles too large for memory.",
)
@click.option("--tta", type=click.Choice(["none", "flips", "d4"]), help="Views whose logits are averaged.")
@click.option("--boundary-width", type=click.IntRange(1), default=3, show_default=True, metavar="PX",
              help="How far apart boundaries may lie.")  # fmt: skip
@json_option
@file_option("--png", "png_path", "Draw the confusion matrices.")
@device_option
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def evaluate_model(
    paths: tuple[str, ...], teacher: bool, source: str | None, window: int | None, tta: str | None, boundary_width: int,
    json_path: str | None, png_path: str | None, device: str | None, debug: bool,
) -> None:  # fmt: skip
    """
    Scores of a student's CHECKPOINT, or of a teacher, on labelled tiles.

    Every ROOT is a folder of images and masks, the config's data.val by default, with scores of its own and then all
    together. A student is asked for whole tiles and without TTA by default, a teacher as its config says.
    Exit codes: 0 done, 2 usage, config, data or checkpoint.
    """
    if teacher != (source is not None):
        raise click.UsageError("--teacher and -c CONFIG go together: a student's CHECKPOINT carries its own config")
    if not teacher and not paths:
        raise click.UsageError("Missing argument 'CHECKPOINT', such as model_weights/<group>/<name>/best.ckpt")
    from kdpipe.pipeline.devices import resolve_device
    from kdpipe.pipeline.evaluation import evaluate as evaluation
    from kdpipe.pipeline.reports.terminal import scores as evaluation_report

    console, progress = open_console()
    where = resolve_device(device)
    if source is not None:
        roots, model = paths, evaluation.teacher_model(load(source, ()), where, tta=tta, window=window)
    else:
        roots, model = paths[1:], evaluation.student_model(paths[0], where, tta=tta, window=window)
    result = evaluation.evaluate(model, roots, boundary_width_px=boundary_width, progress=progress)
    write_json(json_path, result.as_dict())
    if png_path is not None:
        from kdpipe.pipeline.reports.confusion_plot import draw_confusion

        draw_confusion(result, Path(png_path))
    for table in evaluation_report.evaluation_tables(result):
        console.print(table, highlight=False, soft_wrap=True)


@cli.command("sample-data")
@click.argument("folder", type=click.Path(file_okay=False))
@click.option("--seed", default=0, show_default=True, help="Another seed is another landscape.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def sample_data(folder: str, seed: int, debug: bool) -> None:
    """Write a small generated landscape into FOLDER: tiles, masks, and what its teacher is trained on."""
    from kdpipe.data.landscape.labels import write_sample_data
    from kdpipe.pipeline.reports.terminal import results as reports

    console, _ = open_console()
    summary = write_sample_data(Path(folder), seed=seed)
    console.print(reports.sample_data_text(summary), highlight=False, soft_wrap=True)


@cli.command("demo")
@click.option(
    "--out", default="demo_output", show_default=True, type=click.Path(file_okay=False), help="Where everything goes."
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def demo(out: str, debug: bool) -> None:
    """The whole pipeline on a generated landscape: a teacher, its cache, the proof, and two students."""
    from kdpipe.pipeline.demo import run_demo

    console, progress = open_console()
    for table in run_demo(Path(out), progress):
        console.print(table, highlight=False, soft_wrap=True)


cli.add_command(verify_cache)
cli.add_command(compare)
cli.add_command(report)
cli.add_command(completion)
cli.add_command(init)
cli.add_command(predict)
cli.add_command(export)


def main() -> None:
    """Run `kdpipe`; errors of the user's making end in one paragraph and their exit code, others in a traceback."""
    ask_for_huge_pages()
    keep_freed_memory()
    gc.disable()  # until `open_console`: imports make half a million objects, none of them garbage
    try:
        cli(standalone_mode=False)
    except click.exceptions.Abort:
        complain("aborted")
        sys.exit(130)
    except click.ClickException as err:
        err.show()
        sys.exit(EXIT_USAGE)
    except KeyboardInterrupt:
        complain("stopped at once; finished tiles and saved checkpoints are kept")
        sys.exit(130)
    except Exception as err:
        # Imported here, not above: it brings pydantic along, and --help must be instant.
        from kdpipe.configs.errors import KdpipeError

        if not isinstance(err, KdpipeError):
            raise
        if "--debug" in sys.argv:
            traceback.print_exc()
        complain(str(err))
        sys.exit(err.exit_code)
    finally:
        gc.enable()


def _cluster(progress: ConsoleProgress, device: str | None, address: str | None, local: int | None) -> Cluster:
    try:
        from kdpipe.pipeline.cluster.client import Cluster
    except ModuleNotFoundError as err:
        if err.name != "distributed":
            raise
        from kdpipe.configs.errors import ConfigError

        raise ConfigError("--workers and --scheduler need dask.distributed: pip install 'kdpipe[cluster]'") from err
    return Cluster(progress, device, address=address, local=local or 0)


def _statistics(path: str, table: str | None, plot: str | None, progress: ConsoleProgress) -> CacheStatistics:
    from kdpipe.pipeline.inspection.statistics import (
        compute_statistics,
        open_as_answered,
        require_table_format,
        write_table,
    )

    if table is not None:
        require_table_format(Path(table))
    cache = open_as_answered(path)
    with progress.bar("statistics", len(cache.tile_ids), "tiles") as advance:
        statistics = compute_statistics(cache, advance)
    if table is not None:
        write_table(statistics, Path(table))
    if plot is not None:
        from kdpipe.pipeline.reports.statistics_plot import draw_statistics

        draw_statistics(statistics, cache, Path(plot))
    return statistics
