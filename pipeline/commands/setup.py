"""The commands before the pipeline: init, inspect, suggest-map, sample-data, demo."""

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
    load_open,
    run,
    set_option,
    with_config,
)


def _names(context: click.Context, option: click.Parameter, text: str | None) -> list[str] | None:
    """`A, B` as a list of names."""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    if len(names) < 2 or not all(names):
        raise click.BadParameter(f"expected two names or more, separated by commas, found {text!r}")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise click.BadParameter(f"names {', '.join(repeated)} more than once")
    return names


def _bands(context: click.Context, option: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    """`3,2,1` as numbers."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise click.BadParameter(f"expected band numbers, counted from 1, such as 3,2,1, found {text!r}")
    return tuple(map(int, parts))


@click.command("init")
@click.argument("folders", nargs=-1, required=True, metavar="FOLDER...", shell_complete=completion.folders)
@click.option("--teacher", metavar="PATH", shell_complete=completion.weights,
              help="The teacher: a file of weights, an exported network, or a folder of transformers.")  # fmt: skip
@click.option("--out", default="mine.yaml", show_default=True, metavar="FILE", shell_complete=completion.configs,
              help="The config to write.")  # fmt: skip
@click.option("--classes", callback=_names, metavar="A,B,...", help="Names of mask values 0, 1, ...")
@click.option("--colours", metavar="FILE", help="For masks of colours: a table of name,red,green,blue.")
@click.option("--ignore-index", type=click.IntRange(0, 65535), metavar="N", help="Mask value that means no label.")
@click.option(
    "--teacher-classes", callback=_names, metavar="A,B,...", help="Names of the teacher's channels, in order."
)
@click.option("--teacher-normalize", type=click.Choice(["unit", "imagenet"]),
              help="Normalisation of the teacher's input: unit is x / 255.")  # fmt: skip
@click.option(
    "--bands", callback=_bands, metavar="N,N,...", help="Bands in the teacher's order, counted from 1, such as 3,2,1."
)
@click.option("--val", multiple=True, metavar="FOLDER", shell_complete=completion.folders,
              help="Tiles to validate on. Repeatable.")  # fmt: skip
@click.option("--images", default="images", show_default=True, metavar="NAME", help="Folder of images in a root.")
@click.option("--masks", default="masks", show_default=True, metavar="NAME", help="Folder of masks in a root.")
@click.option("--overwrite", is_flag=True, help="Replace a config that exists.")
@limit_option()
@common_options(device=False)
def init(**options: Any) -> None:
    """
    Write a first config for your tiles and teacher.

    FOLDER holds images/ and masks/, or several folders that do, such as Train and Val, or has another
    layout, in which folders or files of masks are named as such. Surveys the tiles, recognises the teacher's network, and writes
    FILL_IN where no file holds the value.

    Exit codes: 0 written, 1 written, but some files have problems (named), 2 usage, data or checkpoint.
    """
    run("setup.init", **options)


@click.command("inspect")
@click.argument("path", metavar="NETWORK|CACHE", shell_complete=completion.weights_or_cache)
@config_option("For a cache: show how it differs from one of this config.", "--diff")
@set_option
@click.option(
    "--stats", is_flag=True, help="For a cache: read it all, and show class shares, entropy, confidence, outliers."
)
@file_option("--table", "table_path", "With --stats: write one row per tile, as .csv or .parquet.")
@file_option("--plot", "plot_path", "With --stats: draw the statistics as a PNG.")
@limit_option()
@common_options(device=False)
def inspect(
    path: str, source: str | None, overrides: tuple[str, ...], stats: bool, table_path: str | None,
    plot_path: str | None, limit: int | None, json_path: str | None,
) -> None:  # fmt: skip
    """
    Describe a network or a cache.

    For a file of weights: the network as recognised, its channels, and the layout of its weights. For an exported network
    (.onnx, .pt2) or a folder of transformers: its classes, input and preprocessing. Nothing in a file is executed. For a
    CACHE (a folder or URL): its manifest and, with --stats, its statistics.

    Exit codes: 0 done, 1 --diff found differences, 2 not a readable network, 3 not a complete cache.
    """
    if (table_path or plot_path or limit) and not stats:
        raise click.UsageError("--table, --plot and --limit go with --stats")
    if overrides and source is None:
        raise click.UsageError("--set overrides a key of --diff CONFIG")
    if run("inspect_cache.is_cache", path):
        config = load(source, overrides) if source is not None else None
        run(
            "inspect_cache.show_cache", path, config, json_path, stats=stats, table_path=table_path, plot_path=plot_path,
            limit=limit,
        )  # fmt: skip
    elif stats or source is not None:
        option = "--stats is for a cache" if stats else "--diff compares a cache with CONFIG"
        raise click.UsageError(f"{option}, and {path} is not a folder or URL")
    else:
        run("setup.show_checkpoint", path, json_path)


@click.command("suggest-map")
@with_config
@click.option("--sample", type=click.IntRange(1), metavar="N", help="Labelled tiles to use. Default: all.")
def suggest_map(source: str, overrides: tuple[str, ...], **options: Any) -> None:
    """
    Suggest a class map from the labels, ready to paste.

    Runs the teacher on labelled tiles. Rows of the class map, or all of it, may still be FILL_IN in CONFIG.

    Exit codes: 0 done, 2 usage, config, data or checkpoint.
    """
    config, unfilled = load_open(source, overrides)
    run("setup.suggest_map", config, unfilled, **options)


@click.command("sample-data")
@click.argument("folder", type=click.Path(file_okay=False))
@click.option("--seed", default=0, show_default=True, help="Another seed generates another landscape.")
@common_options(device=False)
def sample_data(**options: Any) -> None:
    """
    Generate a small landscape with labels.

    Writes tiles and masks, and the masks that the demo's teacher is trained on, into FOLDER.
    """
    run("sample_data.generate", **options)


@click.command("demo")
@click.option("--out", default="demo_output", show_default=True, type=click.Path(file_okay=False), metavar="DIR",
              help="Folder of all results.")  # fmt: skip
@common_options(device=False)
def demo(**options: Any) -> None:
    """
    Run the whole pipeline on a generated landscape.

    Trains a teacher, caches its soft targets, verifies the cache, and trains a student with and without the teacher.
    """
    run("setup.demo", **options)
