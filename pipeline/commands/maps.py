"""The commands that put a trained student to use: predict, export."""

from __future__ import annotations

from typing import Any

import click

from kdpipe.pipeline.commands import completion
from kdpipe.pipeline.commands.options import (
    common_options,
    config_option,
    limit_option,
    load,
    run,
    set_option,
    trust_option,
)


@click.command("predict")
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...", shell_complete=completion.files)
@click.option("--checkpoint", required=True, metavar="FILE", shell_complete=completion.students,
              help="A student's checkpoint, an ONNX file of kdpipe export, or with -c CONFIG a file of another origin.")  # fmt: skip
@config_option("Config of a student that kdpipe did not train: its classes, bands and normalisation.", "-c", "--config")
@set_option
@click.option("--out", required=True, metavar="DIR", type=click.Path(file_okay=False), help="Folder of the maps.")
@click.option("--confidence", is_flag=True, help="Write the largest class probability too, as NAME.confidence.tif.")
@click.option("--probabilities", is_flag=True, help="Write a band per class too, as NAME.probabilities.tif.")
@click.option("--window", type=int, metavar="PX",
              help="Side of a window. Default: 1024, or the only size that the network takes.")  # fmt: skip
@click.option("--overlap", type=int, metavar="PX",
              help="Overlap of neighbouring windows. Default: 128, at most half of a window.")  # fmt: skip
@click.option(
    "--batch-size", type=click.IntRange(1), metavar="N", help="Windows per batch. Default: 1 on a CPU, else 4."
)
@click.option("--tta", type=click.Choice(["none", "flips", "d4"]), default="none", show_default=True,
              help="Views over which logits are averaged.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace maps that exist.")
@trust_option
@limit_option("scenes")
@common_options(device=True)
def predict(source: str | None, overrides: tuple[str, ...], **options: Any) -> None:
    """
    Map scenes of any size, as GeoTIFF.

    INPUT is a raster that rasterio opens, a folder of rasters, a pattern ('scenes/*/rgb.tif') or a URL.

    Exit codes: 0 done, 1 some scenes could not be read (named) or a map could not be written, 2 usage, data or checkpoint.
    """
    if overrides and source is None:
        raise click.UsageError("--set overrides a key of -c CONFIG, and a student's checkpoint carries its own config")
    run("maps.predict_maps", config=load(source, overrides) if source is not None else None, **options)


@click.command("export")
@click.argument("given", required=False, metavar="[RUN]", shell_complete=completion.runs)
@click.option("--checkpoint", metavar="FILE", shell_complete=completion.weights,
              help="A student's, in place of RUN, such as model_weights/<group>/<name>/last.ckpt.")  # fmt: skip
@click.option("--format", "format_", type=click.Choice(["onnx", "torchscript", "pt2"]), default="onnx",
              show_default=True, help="pt2 is the format of torch.export.")  # fmt: skip
@click.option("--fp16", is_flag=True, help="ONNX in half precision, half of the size.")
@click.option("--int8", is_flag=True, help="ONNX in 8-bit integers, a quarter of the size, calibrated on real tiles.")
@click.option("--argmax", is_flag=True, help="ONNX that answers with classes, uint8, in place of logits.")
@click.option("--calibrate", metavar="FOLDER", shell_complete=completion.folders,
              help="Images, or a root of tiles, to calibrate --int8 on. Default: data.train of its config.")  # fmt: skip
@click.option("--tolerance", type=click.FloatRange(0, 100), metavar="POINTS",
              help="Points of mIoU that a file may lose. Default: fp16 0.2, int8 1, argmax 0.")  # fmt: skip
@click.option("--size", "side", type=int, metavar="PX",
              help="Write a graph for images of PX x PX px alone, which some networks and runtimes need.")  # fmt: skip
@click.option("--timed-size", "timed_px", type=click.IntRange(32), metavar="PX",
              help="Side of the image whose latency is measured. Default: train.crop of its config.")  # fmt: skip
@click.option("--out", metavar="FILE", type=click.Path(dir_okay=False),
              help="File to write. Default: the checkpoint's name, beside it.")  # fmt: skip
@click.option("--tiles", multiple=True, metavar="PATH", shell_complete=completion.files,
              help="Roots of tiles, or images and folders of them, to verify with. Default: data.val of its config. "
              "Repeatable.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace a file that exists.")
@trust_option
@limit_option()
@common_options(device=False)
def export(**options: Any) -> None:
    """
    Export a student for other programs, and verify it.

    RUN is the folder of a run, whose best.ckpt is taken, or a checkpoint.

    The file takes images of any size (pt2: multiples of 32 px), or with --size of one alone, and holds its class names, colours
    and normalisation. It is kept only if it predicts real tiles as the checkpoint does. With --fp16, --int8 and --argmax,
    which combine, it is compared with the float32 file by mIoU, or without labels by class, and size and latency of all are
    shown.

    Exit codes: 0 done, 1 its predictions differ too much, 2 usage, data or checkpoint.
    """
    run("maps.export_model", **options)
