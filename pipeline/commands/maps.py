"""The commands that put a trained student to use: predict, export."""

from __future__ import annotations

from typing import Any

import click

from kdpipe.pipeline.commands import completion
from kdpipe.pipeline.commands.options import common_options, limit_option, run


@click.command("predict")
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...", shell_complete=completion.files)
@click.option("--checkpoint", required=True, metavar="FILE", shell_complete=completion.students,
              help="A student's checkpoint, or an ONNX file of kdpipe export.")  # fmt: skip
@click.option("--out", required=True, metavar="DIR", type=click.Path(file_okay=False), help="Folder of the maps.")
@click.option("--confidence", is_flag=True, help="Write the largest class probability too, as NAME.confidence.tif.")
@click.option("--probabilities", is_flag=True, help="Write a band per class too, as NAME.probabilities.tif.")
@click.option("--window", type=int, default=1024, show_default=True, metavar="PX", help="Side of a window.")
@click.option(
    "--overlap", type=int, default=128, show_default=True, metavar="PX", help="Overlap of neighbouring windows."
)
@click.option(
    "--batch-size", type=click.IntRange(1), metavar="N", help="Windows per batch. Default: 1 on a CPU, else 4."
)
@click.option("--tta", type=click.Choice(["none", "flips", "d4"]), default="none", show_default=True,
              help="Views over which logits are averaged.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace maps that exist.")
@limit_option("scenes")
@common_options(device=True)
def predict(**options: Any) -> None:
    """
    Map scenes of any size, as GeoTIFF.

    INPUT is a raster that rasterio opens, a folder of rasters, a pattern ('scenes/*/rgb.tif') or a URL.

    Exit codes: 0 done, 1 some scenes could not be read (named) or a map could not be written, 2 usage, data or checkpoint.
    """
    run("maps.predict_maps", **options)


@click.command("export")
@click.option("--checkpoint", required=True, metavar="FILE", shell_complete=completion.weights,
              help="A student's, such as model_weights/<group>/<name>/best.ckpt.")  # fmt: skip
@click.option("--format", "format_", required=True, type=click.Choice(["onnx", "torchscript", "pt2"]),
              help="pt2 is the format of torch.export.")  # fmt: skip
@click.option("--out", metavar="FILE", type=click.Path(dir_okay=False),
              help="File to write. Default: the checkpoint's name, beside it.")  # fmt: skip
@click.option("--tiles", multiple=True, metavar="PATH", shell_complete=completion.files,
              help="Images, or folders of images, to verify with. Default: data.val of its config. Repeatable.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace a file that exists.")
@common_options(device=False)
def export(**options: Any) -> None:
    """
    Export a student for other programs, and verify it.

    The file takes images of any size (pt2: multiples of 32 px) and holds its class names, colours and normalisation. It is
    kept only if it predicts real tiles as the checkpoint does.

    Exit codes: 0 done, 1 its predictions differ, 2 usage, data or checkpoint.
    """
    run("maps.export_model", **options)
