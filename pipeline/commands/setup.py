"""The command that writes a first config."""

from __future__ import annotations

import sys

import click

from kdpipe.pipeline.commands import completion
from kdpipe.pipeline.commands.options import EXIT_FINDINGS, debug_option, json_option, open_console, write_json


def _names(context: click.Context, option: click.Parameter, text: str | None) -> list[str] | None:
    """`A, B` as a list of names."""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    if len(names) < 2 or not all(names):
        raise click.BadParameter(f"expected two names or more with commas between them, found {text!r}")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise click.BadParameter(f"names {', '.join(repeated)} more than once")
    return names


def _bands(context: click.Context, option: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    """`3,2,1` as numbers."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 3 or not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise click.BadParameter(f"expected three band numbers, counted from 1, such as 3,2,1, found {text!r}")
    return tuple(map(int, parts))


@click.command("init")
@click.argument("folders", nargs=-1, required=True, metavar="FOLDER...", shell_complete=completion.folders)
@click.option(
    "--teacher", metavar="CHECKPOINT", shell_complete=completion.weights, help="The teacher's file of weights."
)
@click.option("--out", default="mine.yaml", show_default=True, metavar="FILE", shell_complete=completion.configs,
              help="The config to write.")  # fmt: skip
@click.option("--classes", callback=_names, metavar="A,B,…", help="Names of the classes in the masks: of 0, of 1, …")
@click.option(
    "--ignore-index", type=click.IntRange(0, 65535), metavar="N", help="The value in masks that means no label."
)
@click.option(
    "--teacher-classes", callback=_names, metavar="A,B,…", help="The teacher's classes, in the order of its channels."
)
@click.option("--teacher-normalize", type=click.Choice(["unit", "imagenet"]),
              help="How the teacher's input was normalised: unit is x / 255.")  # fmt: skip
@click.option("--bands", callback=_bands, metavar="R,G,B", help="Which bands are red, green and blue, counted from 1.")
@click.option(
    "--val",
    multiple=True,
    metavar="FOLDER",
    shell_complete=completion.folders,
    help="Tiles to validate on; repeatable.",
)
@click.option("--images", default="images", show_default=True, metavar="NAME", help="The folder of images in a root.")
@click.option("--masks", default="masks", show_default=True, metavar="NAME", help="The folder of masks in a root.")
@click.option("--overwrite", is_flag=True, help="Replace a config that is there already.")
@json_option
@debug_option
def init(
    folders: tuple[str, ...], teacher: str | None, out: str, classes: list[str] | None, ignore_index: int | None,
    teacher_classes: list[str] | None, teacher_normalize: str | None, bands: tuple[int, ...] | None, val: tuple[str, ...],
    images: str, masks: str, overwrite: bool, json_path: str | None, debug: bool,
) -> None:  # fmt: skip
    """
    Write a first, commented config for tiles and a teacher.

    FOLDER holds images/ and masks/, or several folders that do, such as Train and Val. Counts what is in them, recognises the
    teacher's network, and writes FILL_IN where only you know. Exit codes: 0 written, 1 written, and files to mend (named), 2 usage,
    data or checkpoint.
    """
    from kdpipe.pipeline.reports.terminal.starter import first_config_parts
    from kdpipe.pipeline.starter.draft import Said
    from kdpipe.pipeline.starter.write import run_name, write_first_config

    console, progress = open_console()
    said = Said(
        run_name(out), val, images, masks, classes=classes, ignore_index=ignore_index, bands=bands,
        teacher_classes=teacher_classes, teacher_normalize=teacher_normalize,
    )  # fmt: skip
    found = write_first_config(folders, teacher, out, said, overwrite=overwrite, progress=progress)
    write_json(json_path, found.as_dict())
    for part in first_config_parts(found):
        console.print(part, highlight=False, markup=False, soft_wrap=True)
    if found.draft.problems:
        sys.exit(EXIT_FINDINGS)
