"""
Exports that are deployed: smaller ONNX files, and such that answer with classes, each verified on real tiles and measured.

Every one is made from the float32 file, which was compared with the checkpoint. It is kept only if its mIoU falls by no more than its
tolerance or, on tiles without labels, if no larger share of the pixels gets another class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from kdpipe.configs.errors import ConfigError, count_text
from kdpipe.configs.files import partial_path, publish
from kdpipe.pipeline.models.external.onnx_file import CLASSES, INPUT, OUTPUT
from kdpipe.pipeline.models.limits.sizes import fixed_side
from kdpipe.pipeline.models.normalize import student_inputs
from kdpipe.pipeline.models.views import mirrored_to, padded_logits
from kdpipe.pipeline.models.windows import blended_logits
from kdpipe.pipeline.prediction.agreement import (
    MOST_TILES,
    Agreement,
    Classify,
    agreements,
    latencies,
    miou,
    pixels_of,
    tiles_to_calibrate,
    tiles_to_verify,
)
from kdpipe.pipeline.prediction.export import (
    exporting,
    images_of,
    place_of,
    require_onnx,
    running,
    sizes_text,
    write_verified,
)
from kdpipe.pipeline.prediction.graphs import MOST_CLASSES, half, quantised, with_classes, write_graph
from kdpipe.pipeline.prediction.model import ONNX_SUFFIX, PROVIDERS, Card, Precision, card_of
from kdpipe.pipeline.prediction.onnx_student import OnnxStudent
from kdpipe.pipeline.prediction.traced import require_side
from kdpipe.pipeline.progress import Progress, Silent
from kdpipe.pipeline.runs.checkpoint import Trained, load_trained

# Points of mIoU that a file may lose. The argmax of the same logits loses none.
TOLERANCES: dict[Precision, float] = {"fp32": 0.0, "fp16": 0.2, "int8": 1.0}
ROUNDING = 1e-9  # points


@dataclass(frozen=True)
class Variant:
    """A form of a student's file: the numbers it computes with, and whether it answers with classes."""

    precision: Precision
    argmax: bool = False

    @property
    def parts(self) -> list[str]:
        """What tells its file from the others': `fp16`, `argmax`."""
        return [*([self.precision] if self.precision != "fp32" else []), *(["argmax"] if self.argmax else [])]

    @property
    def name(self) -> str:
        return " ".join(self.parts) or "fp32"


REFERENCE = Variant("fp32")


@dataclass
class Measured:
    """
    A file: its size, the median milliseconds for an image, and how it compares with the float32 logits.

    `miou` is in percent and `fall` in points, None without labels; `same_class` is the share of pixels with the same class, 0..1. `file` is
    None where it was not kept, and for the float32 file, which the others are compared with; `finite` says whether all logits were.
    """

    name: str
    file: str | None
    size_bytes: int
    latency_ms: float
    miou: float | None
    fall: float | None
    same_class: float
    tolerance: float | None
    finite: bool = True

    @property
    def lost(self) -> float:
        """The points that count against the tolerance: of mIoU, or without labels of pixels."""
        return self.fall if self.fall is not None else 100 * (1 - self.same_class)

    @property
    def passes(self) -> bool:
        return self.tolerance is None or (self.finite and self.lost <= self.tolerance + ROUNDING)


@dataclass
class Deployed:
    """The measured files, the float32 one first; `tiles` with or without labels, and `size_px` is the side of the timed image."""

    network: str
    classes: list[str]
    tiles: int
    pixels: int
    labelled: bool
    size_px: int
    files: list[Measured] = field(default_factory=list)

    @property
    def refused(self) -> list[str]:
        """A paragraph on each file that was not kept."""
        return [self._refusal(each) for each in self.files if not each.passes]

    def _refusal(self, each: Measured) -> str:
        if not each.finite:
            return (
                f"the file {each.name} was not kept: its logits are not finite, as float16 holds numbers up to 65504 and the network has "
                "larger ones. Take --int8, or the float32 file"
            )
        of_tiles = f"{count_text(self.tiles, 'tiles')}"
        if each.fall is not None and each.miou is not None:
            what = (
                f"its mIoU on {of_tiles} is {each.miou:.2f}, that of fp32 is {each.miou + each.fall:.2f}, so it fell by "
                f"{each.fall:.2f} points"
            )
        else:
            what = f"it gives {each.lost:.2f} % of the pixels of {of_tiles} another class than fp32"
        advice = (
            ["calibrate it on images like those that it is for (--calibrate FOLDER)"] if "int8" in each.name else []
        )
        if not self.labelled:
            advice.append("name tiles with masks (--tiles ROOT) to compare the mIoU instead")
        advice.append(f"accept it with --tolerance {np.ceil(100 * each.lost) / 100:g}")
        return (
            f"the file {each.name} was not kept: {what}, and {each.tolerance:g} are allowed. You can "
            f"{', '.join(advice[:-1])}{' or ' if advice[:-1] else ''}{advice[-1]}"
        )


def export_variants(
    checkpoint: str | Path,
    variants: Sequence[Variant],
    out: str | Path | None = None,
    *,
    tiles: Sequence[str] = (),
    calibrate: str | None = None,
    tolerance: float | None = None,
    side: int | None = None,
    timed_px: int | None = None,
    limit: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Deployed:
    """
    Export a student to one ONNX file for each of `variants`, and keep those that pass.

    One file is written to `out`, and several beside it, named by their `parts`; by default the checkpoint's name is theirs. With `side`,
    they are for images of that side alone: they are timed, calibrated and compared in windows of it. `tiles` are roots of tiles, images or
    folders of images to compare on, by default `data.val`; `calibrate` is a root or a folder of images for int8, by default `data.train`.
    At most `limit` of each are taken, by default `MOST_TILES`. `tolerance` replaces `TOLERANCES`; `timed_px` is the side of the image whose
    latency is measured, by default that of the training's crops. Raises what `export_student` raises.
    """
    progress = progress or Silent()
    require_onnx()
    trained = load_trained(checkpoint, progress.say).alone()
    config = trained.config
    require_side(side, trained.student)
    _refuse_too_many_classes(variants, len(config.classes.names))
    base = Path(out or Path(checkpoint).with_suffix(ONNX_SUFFIX))
    is_given = out is not None and len(variants) == 1
    named = {each: base if is_given else base.with_name(_file_name(base, each)) for each in variants}
    files = {variant: place_of(path, overwrite=overwrite) for variant, path in named.items()}
    most = limit or MOST_TILES
    verified_on = tiles_to_verify(config.data, tiles, most)
    calibrated_on = (
        tiles_to_calibrate(config.data, calibrate, most) if any(each.precision == "int8" for each in variants) else []
    )
    card = card_of(trained, checkpoint, sizes_text("onnx", side))
    folder = next(iter(files.values())).parent
    partials = {REFERENCE: partial_path(folder / f"{base.stem}.fp32{base.suffix}")}
    partials |= {variant: partial_path(file) for variant, file in files.items()}
    with ExitStack() as stack:
        for partial in partials.values():
            stack.callback(partial.unlink, missing_ok=True)
        write_verified(
            trained, checkpoint, card, "onnx", partials[REFERENCE], images_of(trained, tiles, limit), progress, side
        )
        _write_all(trained, files, partials, card, calibrated_on, side, progress)
        with running("ONNX", card.network, "Leave out --fp16, --int8 or --argmax"):
            result, found = _measured(
                trained, partials, verified_on, side or timed_px or config.train.crop, card, tolerance, progress
            )
        for variant, measured in found.items():
            if variant in files and measured.passes:
                publish(partials[variant], files[variant])
                measured.file = str(files[variant])
    return result


def _refuse_too_many_classes(variants: Sequence[Variant], count: int) -> None:
    if any(variant.argmax for variant in variants) and count > MOST_CLASSES:
        raise ConfigError(
            f"--argmax answers in 8 bits, which tell {MOST_CLASSES} classes apart, and the student has {count}: leave it out"
        )


def _write_all(
    trained: Trained, variants: Iterable[Variant], partials: Mapping[Variant, Path], card: Card, calibrated_on: Sequence[Any],
    side: int | None, progress: Progress,
) -> None:  # fmt: skip
    for variant in variants:
        progress.say(f"making {variant.name}")
        inputs = _inputs_of(trained, calibrated_on, side) if variant.precision == "int8" else []
        with exporting(f"{variant.name} ONNX", card.network, f"Leave out --{' and --'.join(variant.parts)}"):
            _write(variant, partials, card, inputs)


def _file_name(base: Path, variant: Variant) -> str:
    return ".".join([base.stem, *variant.parts]) + base.suffix


def _write(
    variant: Variant, partials: Mapping[Variant, Path], card: Card, inputs_1BHW: Sequence[NDArray[np.float32]]
) -> None:
    import onnx

    source = partials[REFERENCE]
    if variant.precision == "fp16":
        model = half(source)
    elif variant.precision == "int8":
        model = quantised(source, inputs_1BHW)
    else:
        model = onnx.load(str(source))
    if variant.argmax:
        model = with_classes(model)
    output: Literal["logits", "classes"] = "classes" if variant.argmax else "logits"
    changed = card.model_copy(update={"precision": variant.precision, "output": output})
    write_graph(model, changed, partials[variant])


def _measured(
    trained: Trained, files: Mapping[Variant, Path], tiles: Sequence[Any], size_px: int, card: Card,
    tolerance: float | None, progress: Progress,
) -> tuple[Deployed, dict[Variant, Measured]]:  # fmt: skip
    networks = {
        each: OnnxStudent(file, CLASSES if each.argmax else OUTPUT, len(card.classes), PROVIDERS["cpu"])
        for each, file in files.items()
    }
    not_finite: set[Variant] = set()
    classify = {each: _classifier(trained, each, network, not_finite) for each, network in networks.items()}
    others = {variant.name: run for variant, run in classify.items() if variant != REFERENCE}
    found = agreements(trained, tiles, classify[REFERENCE], others, progress)
    progress.say(f"timing images of {size_px} x {size_px} px")
    image_1BHW = np.random.default_rng(0).standard_normal((1, len(card.bands), size_px, size_px), np.float32)
    taken = latencies({each.name: _timed(network.session, each, image_1BHW) for each, network in networks.items()})
    first = next(iter(found.values()))
    rows = {}
    reference_miou = miou(trained, first.reference_CC)
    for variant, file in files.items():
        agreement = found.get(variant.name, Agreement(len(card.classes), 1, 1))
        own = reference_miou if variant == REFERENCE else miou(trained, agreement.confusion_CC)
        allowed = TOLERANCES[variant.precision] if tolerance is None else tolerance
        rows[variant] = Measured(
            name=variant.name,
            file=None,
            size_bytes=file.stat().st_size,
            latency_ms=round(taken[variant.name], 3),
            miou=own,
            fall=None if own is None or reference_miou is None else reference_miou - own,
            same_class=agreement.same / agreement.pixels,
            tolerance=None if variant == REFERENCE else allowed,
            finite=variant not in not_finite,
        )
    labelled = reference_miou is not None
    result = Deployed(card.network, card.classes, len(tiles), first.pixels, labelled, size_px, list(rows.values()))
    return result, rows


def _timed(session: Any, variant: Variant, image_1BHW: NDArray[np.float32]) -> Callable[[], object]:
    return lambda: session.run([CLASSES if variant.argmax else OUTPUT], {INPUT: image_1BHW})


def _classifier(trained: Trained, variant: Variant, network: OnnxStudent, not_finite: set[Variant]) -> Classify:
    """From an image to the classes that a file gives it; adds the variant to `not_finite` where its logits are not."""
    side, fitted = fixed_side(network), partial(padded_logits, network)

    def classify(image_BHW: NDArray[np.uint8]) -> NDArray[Any]:
        inputs_1BHW = torch.from_numpy(_input_of(trained, image_BHW))
        # Windows are not blended, as one file answers with classes and another with logits.
        logits_1CHW = network(inputs_1BHW) if side is None else blended_logits(fitted, inputs_1BHW, side, weights=None)
        if not torch.isfinite(logits_1CHW).all():
            not_finite.add(variant)
        classes_HW: NDArray[Any] = logits_1CHW[0].numpy().argmax(axis=0)
        return classes_HW

    return classify


def _inputs_of(trained: Trained, tiles: Sequence[Any], side: int | None) -> list[NDArray[np.float32]]:
    """The middles of tiles as inputs, of the size of the training's crops; with `side` of that size, smaller tiles mirrored to it."""
    inputs = [
        _input_of(trained, image_BHW) for image_BHW, _ in pixels_of(trained, tiles, side or trained.config.train.crop)
    ]
    return inputs if side is None else [mirrored_to(torch.from_numpy(each), side).numpy() for each in inputs]


def _input_of(trained: Trained, image_BHW: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The network's input of an image, float32 `(1, B, H, W)`."""
    inputs: NDArray[np.float32] = student_inputs(
        torch.from_numpy(np.ascontiguousarray(image_BHW))[None], trained.config
    ).numpy()
    return inputs
