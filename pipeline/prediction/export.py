"""
Exporting a student to ONNX, TorchScript or torch.export's pt2. A file is kept only if its predictions match the checkpoint's.

ONNX and TorchScript are traced, with the network's padding inside the graph, so that they take images of any size. torch.export
proves its graph for all sizes at once, which it manages for multiples of 32 px, but not with padding, nor for the smallest maps, where
one attention window holds everything. Its ONNX export has the same limits and takes minutes, so the tracing exporter is used
although torch calls it deprecated.

With `side` all three are for images of `side` x `side` px alone, which networks whose graph depends on the size need.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdpipe.configs.errors import ConfigError, KdpipeError, extra_text
from kdpipe.configs.files import partial_path, publish, try_to_write
from kdpipe.configs.os_errors import explained
from kdpipe.configs.outputs import output_path
from kdpipe.data.dataset import ValTiles
from kdpipe.pipeline.models.external.onnx_file import INPUT, OUTPUT, first_line, open_session, require_onnxruntime
from kdpipe.pipeline.models.normalize import normalized
from kdpipe.pipeline.models.views import STRIDE, padded_logits
from kdpipe.pipeline.prediction.agreement import tiles_to_verify
from kdpipe.pipeline.prediction.graphs import write_graph
from kdpipe.pipeline.prediction.model import ONNX_SUFFIX, OTHER_SUFFIXES, PROVIDERS, Card, card_of
from kdpipe.pipeline.prediction.traced import AnySize, one_size, require_side
from kdpipe.pipeline.progress import Progress, Silent
from kdpipe.pipeline.runs.checkpoint import Trained, load_trained

Format = Literal["onnx", "torchscript", "pt2"]
SUFFIXES: dict[Format, str] = {"onnx": ONNX_SUFFIX, "torchscript": OTHER_SUFFIXES[0], "pt2": OTHER_SUFFIXES[1]}
CARD_FILE = "kdpipe.json"  # in a TorchScript or pt2 archive
OPSET = 17  # the first with LayerNormalization; every onnxruntime since 1.12 reads it
PT2_LEAST_PX, PT2_MOST_PX = 288, 65536
SIZES: dict[Format, str] = {
    "onnx": "any size",
    "torchscript": "any size",
    "pt2": f"sides that are multiples of {STRIDE} px, from {PT2_LEAST_PX} px up",
}
# Exported kernels add in another order, which measures 3e-7 to 3e-5. Stored probabilities are rounded by up to 0.002.
MAX_DIFFERENCE = 1e-3
VERIFIED_TILES = 4  # evenly spread over all tiles
EXAMPLE_PX = (97, 130)  # height and width of a traced input: none a multiple of the stride


@dataclass(frozen=True)
class Exported:
    """The exported file and its verification: `images` cut from `tiles`, compared with the checkpoint pixel by pixel."""

    file: str
    format: Format
    network: str
    classes: list[str]
    sizes: str
    tiles: int
    images: int
    pixels: int
    largest_difference: float
    same_class: float


def export_student(
    checkpoint: str | Path,
    format_: Format,
    out: str | Path | None = None,
    *,
    side: int | None = None,
    tiles: Sequence[str] = (),
    limit: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """
    Export the student of a checkpoint to `out`, by default beside the checkpoint, and compare its predictions with the checkpoint's.

    With `side`, a multiple of `STRIDE`, the file takes images of `side` x `side` px alone, and the tiles are compared in crops of it.
    `tiles` are roots of tiles, images, or folders of images to compare on; by default `data.val` of the checkpoint's config. A few of them
    are taken, at most `limit`. The file appears at `out` once it has passed. Raises `CheckpointError` for the checkpoint; `ConfigError` if
    a package is missing, the file exists, or there are no tiles to compare on; `DataError` for unreadable images; `KdpipeError` if the
    export fails or its predictions differ.
    """
    progress = progress or Silent()
    if format_ == "onnx":
        require_onnx()
    trained = load_trained(checkpoint, progress.say).alone()
    require_side(side, trained.student)
    file = place_of(out or Path(checkpoint).with_suffix(SUFFIXES[format_]), overwrite=overwrite)
    images = images_of(trained, tiles, limit)
    card = card_of(trained, checkpoint, sizes_text(format_, side))
    partial = partial_path(file)
    try:
        found = write_verified(trained, checkpoint, card, format_, partial, images, progress, side)
        publish(partial, file)
    finally:
        partial.unlink(missing_ok=True)
    return Exported(str(file), format_, card.network, card.classes, card.sizes, len(images), *found)


def place_of(path: str | Path, *, overwrite: bool) -> Path:
    """The absolute path of a file to write; raises `ConfigError` if it exists or cannot be written."""
    file = output_path(path, "--out")
    if file.exists() and not overwrite:
        raise ConfigError(f"{file} exists already: choose another --out, or add --overwrite to replace it")
    try_to_write(file, path, "--out: writing")
    return file


def write_verified(
    trained: Trained, checkpoint: str | Path, card: Card, format_: Format, file: Path,
    images: Sequence[NDArray[np.uint8]], progress: Progress, side: int | None,
) -> tuple[int, int, float, float]:  # fmt: skip
    """
    Write a student's file, of one size with `side`, and compare its predictions with the student's; returns what `_compare` does.

    Raises `KdpipeError` if it cannot be written, or predicts something else.
    """
    progress.say(f"exporting {card.network} as {format_}")
    advice = _advice(side)
    with explained("writing", file), exporting(format_, card.network, advice):
        WRITERS[format_](trained.student, file, card, side)
    with running(format_, card.network, advice):
        found = _compare(trained, READERS[format_](file), images, format_, progress, side)
    largest_difference = found[2]
    if not largest_difference <= MAX_DIFFERENCE:
        raise KdpipeError(
            f"the {format_} file of {checkpoint} predicts something else than the checkpoint: a probability differs by "
            f"{largest_difference:.2g}, expected at most {MAX_DIFFERENCE:g}; it was not kept. {advice}"
        )
    return found


def _advice(side: int | None) -> str:
    """What to do where a file of this `--size`, or without one, cannot be had."""
    return (
        "Try another --format" if side else "Add --size PX, for a graph of one size of image, or try another --format"
    )


def _write_onnx(student: nn.Module, file: Path, card: Card, side: int | None = None) -> None:
    import onnx

    axes = {0: "n", 2: "height", 3: "width"} if side is None else {0: "n"}
    content = io.BytesIO()
    export: Any = torch.onnx.export  # its signature names paths alone
    export(
        AnySize(student) if side is None else one_size(student),
        (_example(card, *(EXAMPLE_PX if side is None else (side, side))),),
        content,
        dynamo=False,
        opset_version=OPSET,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_axes={INPUT: axes, OUTPUT: axes},
    )
    model = onnx.load_from_string(content.getvalue())
    if side is not None:  # the exporter leaves what it cannot derive without a number
        sizes = model.graph.output[0].type.tensor_type.shape.dim[1:]
        for size, known in zip(sizes, (len(card.classes), side, side), strict=True):
            size.dim_value = known
    write_graph(model, card, file)


def _write_torchscript(student: nn.Module, file: Path, card: Card, side: int | None = None) -> None:
    trace: Any = torch.jit.trace
    traced, sizes = (AnySize(student), EXAMPLE_PX) if side is None else (one_size(student), (side, side))
    graph = trace(traced, _example(card, *sizes), check_trace=False)
    content = io.BytesIO()  # torch would tell of a full disk by an error of its own
    torch.jit.save(graph, content, _extra_files={CARD_FILE: card.model_dump_json()})
    file.write_bytes(content.getvalue())


def _write_pt2(student: nn.Module, file: Path, card: Card, side: int | None = None) -> None:
    sides = {
        dim: STRIDE * torch.export.Dim(name, min=PT2_LEAST_PX // STRIDE, max=PT2_MOST_PX // STRIDE)
        for dim, name in ((2, "rows"), (3, "columns"))
    }
    shapes = ({0: torch.export.Dim("n"), **(sides if side is None else {})},)
    sizes = (PT2_LEAST_PX + STRIDE, PT2_LEAST_PX + 3 * STRIDE) if side is None else (side, side)
    network = student if side is None else one_size(student)
    program = torch.export.export(network, (_example(card, *sizes),), dynamic_shapes=shapes)
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={CARD_FILE: card.model_dump_json()})
    file.write_bytes(content.getvalue())


def _example(card: Card, height: int, width: int) -> Tensor:
    """An input to trace with, `(2, B, height, width)`."""
    return torch.randn(2, len(card.bands), height, width)


def _read_onnx(file: Path) -> Callable[[Tensor], Tensor]:
    session = open_session(file, [PROVIDERS["cpu"]])
    return lambda inputs_NCHW: torch.from_numpy(session.run([OUTPUT], {INPUT: inputs_NCHW.contiguous().numpy()})[0])


def _read_torchscript(file: Path) -> Callable[[Tensor], Tensor]:
    graph: Callable[[Tensor], Tensor] = _load_torchscript(file, {})
    return graph


def _load_torchscript(file: Path, extra_files: dict[str, Any]) -> Any:
    with warnings.catch_warnings():
        # torch's deprecation of TorchScript, whose class depends on the version.
        warnings.filterwarnings("ignore", message="`torch.jit.load` is")
        load: Any = torch.jit.load
        return load(file, map_location="cpu", _extra_files=extra_files)


def _read_pt2(file: Path) -> Callable[[Tensor], Tensor]:
    with file.open("rb") as stream:
        program = torch.export.load(stream)
    module: Callable[[Tensor], Tensor] = program.module()
    return module


WRITERS: dict[Format, Callable[[nn.Module, Path, Card, int | None], None]] = {
    "onnx": _write_onnx,
    "torchscript": _write_torchscript,
    "pt2": _write_pt2,
}
READERS: dict[Format, Callable[[Path], Callable[[Tensor], Tensor]]] = {
    "onnx": _read_onnx,
    "torchscript": _read_torchscript,
    "pt2": _read_pt2,
}


def require_onnx() -> None:
    """Raise `ConfigError` unless the packages of the extra `export` are installed."""
    require_onnxruntime()
    try:
        import onnx  # noqa: F401
    except ImportError as err:
        raise ConfigError(
            f"--format onnx needs the package onnx, which is not installed; {extra_text('export')}"
        ) from err


def sizes_text(format_: Format, side: int | None) -> str:
    """The sizes of images that a file takes, for its card."""
    return SIZES[format_] if side is None else f"{side} x {side} px only"


def images_of(trained: Trained, tiles: Sequence[str], limit: int | None = None) -> list[NDArray[np.uint8]]:
    """A few tiles, at most `limit`, uint8 `(H, W, B)`, spread evenly over all."""
    most = min(limit or VERIFIED_TILES, VERIFIED_TILES)
    dataset = ValTiles(tiles_to_verify(trained.config.data, tiles, most), trained.config, trained.stretch)
    return [dataset[number]["image"].transpose(1, 2, 0) for number in range(len(dataset))]


@torch.inference_mode()
def _compare(
    trained: Trained,
    run: Callable[[Tensor], Tensor],
    images: Sequence[NDArray[np.uint8]],
    format_: Format,
    progress: Progress,
    side: int | None,
) -> tuple[int, int, float, float]:
    """Numbers of images and pixels, the largest difference of a probability, and the share of pixels with the same class, 0..1."""
    count = pixels = same = 0
    largest = 0.0
    with progress.bar("verify", len(images), "tiles") as advance:
        for image_HWB in images:
            for part_NCHW in _parts(image_HWB, format_, side):
                inputs_NCHW = normalized(part_NCHW, trained.config.student.normalize)
                expected = padded_logits(trained.student, inputs_NCHW)
                found = run(inputs_NCHW)
                if found.shape != expected.shape:
                    raise KdpipeError(
                        f"the {format_} file maps images of {tuple(inputs_NCHW.shape)} to {tuple(found.shape)}, expected "
                        f"{tuple(expected.shape)}: its size is not dynamic. {_advice(side)}"
                    )
                difference = (found.softmax(dim=1) - expected.softmax(dim=1)).abs().max().item()
                largest = difference if difference > largest or np.isnan(difference) else largest
                same += int((found.argmax(dim=1) == expected.argmax(dim=1)).sum())
                count, pixels = count + len(inputs_NCHW), pixels + expected[:, 0].numel()
            advance(1)
    return count, pixels, largest, same / pixels


def _parts(image_HWB: NDArray[np.uint8], format_: Format, side: int | None) -> Iterator[Tensor]:
    """
    The whole image, and two of its corners as one batch, so that neither size is the traced one; for pt2, in sizes that it takes.

    With `side` its middle and the two corners, of that size.
    """
    image_NCHW = torch.from_numpy(image_HWB).permute(2, 0, 1)[None]
    height, width = image_NCHW.shape[-2:]
    if format_ != "pt2" and side is None:
        yield image_NCHW
        h, w = (height + 1) // 2, (width * 2 + 2) // 3
        yield torch.cat([image_NCHW[..., :h, :w], image_NCHW[..., height - h :, width - w :]])
        return
    # An image below the smallest size is repeated, so that its pixels stay real.
    least = side or PT2_LEAST_PX
    repeats = [1, 1, *(-(-least // size) for size in (height, width))]
    image_NCHW = image_NCHW.repeat(repeats)
    height, width = (size // STRIDE * STRIDE for size in image_NCHW.shape[-2:])
    if side is None:
        yield image_NCHW[..., :height, :width]
    else:
        top, left = ((size - side) // 2 for size in (height, width))
        yield image_NCHW[..., top : top + side, left : left + side]
    yield torch.cat([image_NCHW[..., :least, :least], image_NCHW[..., -least:, -least:]])


@contextmanager
def exporting(form: str, network: str, advice: str = "Try another --format") -> Iterator[None]:
    """Turn any error of an exporter into a `KdpipeError`, and silence its warnings, which do not concern the user."""
    # torch prints the whole graph where it cannot export an operator.
    silence = redirect_stdout(io.StringIO())
    with _one_paragraph(f"{network} cannot be written as {form}", advice), warnings.catch_warnings(), silence:
        warnings.simplefilter("ignore")
        yield


def running(form: str, network: str, advice: str) -> AbstractContextManager[None]:
    """Turn any error of the runtime of a written file into a `KdpipeError`."""
    return _one_paragraph(f"{network}, written as {form}, does not run", advice)


@contextmanager
def _one_paragraph(what_fails: str, advice: str) -> Iterator[None]:
    try:
        yield
    except (KdpipeError, OSError):
        raise
    except Exception as err:  # exporters and runtimes raise classes of many modules
        raise KdpipeError(f"{what_fails}: {first_line(err)}. {advice}, or --debug for the full error") from err
