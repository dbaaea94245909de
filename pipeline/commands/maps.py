"""The commands that take a trained student out to use: maps, and files for other programs."""

from __future__ import annotations

import sys
from typing import Any

import click

from kdpipe.pipeline.commands import completion
from kdpipe.pipeline.commands.options import (
    EXIT_FINDINGS,
    complain,
    debug_option,
    device_option,
    json_option,
    open_console,
    write_json,
)

checkpoint_option = click.option(
    "--checkpoint",
    required=True,
    metavar="FILE",
    shell_complete=completion.weights,
    help="A student's, such as model_weights/<group>/<name>/best.ckpt.",
)


@click.command("predict")
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...", shell_complete=completion.files)
@click.option("--checkpoint", required=True, metavar="FILE", shell_complete=completion.students,
              help="A student's, or an ONNX file of `kdpipe export`.")  # fmt: skip
@click.option("--out", required=True, metavar="DIR", type=click.Path(file_okay=False), help="Where the maps go.")
@click.option("--confidence", is_flag=True, help="Write the largest class probability too, as NAME.confidence.tif.")
@click.option("--probabilities", is_flag=True, help="Write a band for each class too, as NAME.probabilities.tif.")
@click.option("--window", type=int, default=1024, show_default=True, metavar="PX", help="Side of a window.")
@click.option("--overlap", type=int, default=128, show_default=True, metavar="PX", help="What neighbours share of it.")
@click.option(
    "--batch-size", type=click.IntRange(1), metavar="N", help="Windows at once: 1 on a CPU, else 4 by default."
)
@click.option("--tta", type=click.Choice(["none", "flips", "d4"]), default="none", show_default=True,
              help="Views whose logits are averaged.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace maps that are there already.")
@json_option
@device_option
@debug_option
def predict(
    inputs: tuple[str, ...], checkpoint: str, out: str, confidence: bool, probabilities: bool, window: int, overlap: int,
    batch_size: int | None, tta: str, overwrite: bool, json_path: str | None, device: str | None, debug: bool,
) -> None:  # fmt: skip
    """
    Maps of scenes of any size, as GeoTIFF.

    INPUT is a raster that rasterio opens, a folder of them, a pattern ('scenes/*/rgb.tif') or a URL. Exit codes: 0 done, 1 some
    scenes could not be read (named), or a map could not be written, 2 usage, data or checkpoint.
    """
    from kdpipe.pipeline.prediction.maps import predict as draw_maps
    from kdpipe.pipeline.prediction.model import open_predictor
    from kdpipe.pipeline.progress import stop_on_signal
    from kdpipe.pipeline.reports.terminal.maps import map_tables

    console, progress = open_console()
    predictor = open_predictor(checkpoint, device, tta=tta)
    with stop_on_signal() as stop:
        summary = draw_maps(
            predictor, inputs, out, window=window, overlap=overlap, batch_size=batch_size, confidence=confidence,
            probabilities=probabilities, overwrite=overwrite, progress=progress, stop=stop,
        )  # fmt: skip
    write_json(json_path, summary.as_dict())
    for table in map_tables(summary):
        console.print(table, highlight=False, soft_wrap=True)
    if summary.failed:
        for reason in summary.failed.values():
            complain(reason)
        sys.exit(EXIT_FINDINGS)


@click.command("export")
@checkpoint_option
@click.option("--format", "format_", required=True, type=click.Choice(["onnx", "torchscript", "pt2"]),
              help="pt2 is torch.export's.")  # fmt: skip
@click.option("--out", metavar="FILE", type=click.Path(dir_okay=False),
              help="Beside the checkpoint, under its name, by default.")  # fmt: skip
@click.option("--tiles", "tiles", multiple=True, metavar="PATH", shell_complete=completion.files,
              help="Images, or folders of them, to verify the file with; the config's data.val by default.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace a file that is there already.")
@json_option
@debug_option
def export(
    checkpoint: str, format_: Any, out: str | None, tiles: tuple[str, ...], overwrite: bool, json_path: str | None,
    debug: bool,
) -> None:  # fmt: skip
    """
    Write a student as a file for other programs, and verify it.

    The file takes images of any size (pt2: of multiples of 32 px) and says its classes, colours and normalisation itself. It is
    kept if its answers on real tiles are those of the checkpoint. Exit codes: 0 done, 1 its answers differ, 2 usage, data or checkpoint.
    """
    from kdpipe.pipeline.prediction.export import export_student
    from kdpipe.pipeline.reports.terminal.maps import export_table

    console, progress = open_console()
    result = export_student(checkpoint, format_, out, tiles=tiles, overwrite=overwrite, progress=progress)
    write_json(json_path, result.as_dict())
    console.print(export_table(result), highlight=False, soft_wrap=True)
