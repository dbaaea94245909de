"""
Students for maps: a checkpoint of `train-student` or an ONNX file of `kdpipe export`, with the `Card` that describes it.

An exported file carries its card as JSON, so that programs without kdpipe can use it too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, PositiveFloat, ValidationError, model_validator
from torch import Tensor

from kdpipe.configs.errors import CheckpointError, ConfigError, summarise
from kdpipe.configs.files import file_sha256
from kdpipe.configs.schema import Alpha, Config, MeanStd
from kdpipe.pipeline.devices import resolve_device
from kdpipe.pipeline.models.external.onnx_file import (
    CLASSES,
    described,
    require_onnxruntime,
)
from kdpipe.pipeline.models.limits.sizes import fixed_side
from kdpipe.pipeline.models.normalize import mean_std, normalized
from kdpipe.pipeline.models.views import averaged_logits
from kdpipe.pipeline.pictures import colours
from kdpipe.pipeline.prediction.onnx_student import OnnxStudent
from kdpipe.pipeline.runs.checkpoint import Ends, Trained, load_trained
from kdpipe.pipeline.runs.elsewhere import refuse_undescribed, trained_elsewhere

CARD_KEY = "kdpipe"  # in the metadata of an ONNX file
Precision = Literal["fp32", "fp16", "int8"]
Byte = Annotated[int, Field(ge=0, le=255)]
ONNX_SUFFIX, OTHER_SUFFIXES = ".onnx", (".torchscript", ".pt2")
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class Card(BaseModel):
    """
    Description of a network, its input and its output.

    Input: float32 `(N, len(bands), H, W)`, `(x / 255 - mean) / std` of the image's `bands`, numbers from 1 of which `band_names` names
    some; `stretch` maps each band linearly from its (low, high) to 0..255, rounded, unless it is None. `output` is `logits`, float32 `(N,
    len(classes), H, W)`, or `classes`, uint8 `(N, H, W)`; `precision` is what the network computes with. `sizes` describes the allowed H
    and W, `colours` what the training images called `bands`, `image_bands` how many bands they had; None if that is not recorded. `alpha`
    is `data.alpha`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    run: str
    step: int
    network: str
    checkpoint_sha256: str
    classes: list[str] = Field(min_length=1)
    palette: list[tuple[Byte, Byte, Byte]]
    ignore_index: int = Field(ge=0, le=65535)
    bands: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1)
    band_names: dict[str, int] = Field({}, exclude_if=lambda names: not names)
    colours: list[str] | None = None
    image_bands: int | None = Field(None, exclude_if=lambda count: count is None)
    alpha: Alpha = "opacity"
    stretch: list[Ends] | None
    mean: tuple[FiniteFloat, ...]
    std: tuple[Annotated[PositiveFloat, Field(allow_inf_nan=False)], ...]
    sizes: str
    input_dtype: Literal["float32"] = "float32"
    output: Literal["logits", "classes"] = "logits"
    precision: Precision = "fp32"
    kdpipe: str

    @model_validator(mode="after")
    def _check(self) -> Self:
        of_bands = {"stretch": self.stretch, "mean": self.mean, "std": self.std, "colours": self.colours}
        for name, values in of_bands.items():
            if values is not None and len(values) != len(self.bands):
                raise ValueError(f"{name} has {len(values)} entries for {len(self.bands)} bands")
        if len(self.palette) != len(self.classes):
            raise ValueError(f"palette has {len(self.palette)} colours for {len(self.classes)} classes")
        if self.ignore_index < len(self.classes):
            raise ValueError(f"ignore_index {self.ignore_index} is also the index of a class")
        return self


@dataclass(frozen=True)
class Predictor:
    """
    `logits` maps uint8 images `(N, B, H, W)` of the card's bands to float32 logits `(N, C, H, W)`, both in main memory.

    It computes on `device`. A network that takes images of one size alone, squares of `side` px, is given smaller ones mirrored to it. For
    one whose `card.output` is classes, the logits are 1 for its class and 0 for the others: they have the same argmax, and must not be
    averaged.
    """

    origin: str
    card: Card
    device: str
    tta: str
    logits: Callable[[Tensor], Tensor]
    side: int | None = None


def card_of(trained: Trained, checkpoint: str | Path, sizes: str) -> Card:
    """The card of a student from `load_trained`, whose images are read for it alone."""
    trained = trained.alone()
    config, bands = trained.config, trained.config.data.bands
    mean, std = mean_std(config.student.normalize, len(bands))
    palette = colours(len(config.classes.names)).astype(int).tolist()
    return Card.model_validate(
        {
            "run": config.name,
            "step": trained.position.steps,
            "network": trained.file or config.student.network,
            "checkpoint_sha256": file_sha256(checkpoint),
            "classes": config.classes.names,
            "palette": palette,
            "ignore_index": config.classes.ignore_index,
            "bands": bands,
            "band_names": {name: number for name, number in config.data.band_names.items() if number in bands},
            "colours": trained.colours,
            "image_bands": trained.image_bands,
            "alpha": config.data.alpha,
            "stretch": trained.stretch,
            "mean": mean,
            "std": std,
            "sizes": sizes,
            "kdpipe": version("kdpipe"),
        }
    )


def open_predictor(
    path: str | Path,
    device: str | None,
    *,
    tta: str = "none",
    config: Config | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Predictor:
    """
    A predictor from a checkpoint or an ONNX file, in float32; `device` None is the best one available.

    `config` describes a file of another origin: weights, or an exported network (see `trained_elsewhere`). A file that describes itself
    needs none, and must have its classes. Logits are averaged over the views of `tta`; `say` is that of `load_trained`. Raises
    `CheckpointError` if the file is neither, `ConfigError` if the device is missing or onnxruntime is not installed.
    """
    if Path(path).suffix == ONNX_SUFFIX and (text := described(Path(path), CARD_KEY)) is not None:
        found = _onnx_predictor(Path(path), text, device, tta)
        _refuse_other_classes(found, config)
        return found
    if config is None:
        refuse_undescribed(path)
        return _student(path, load_trained(path, say), device, tta)
    return _student(path, trained_elsewhere(path, config, say), device, tta)


def _refuse_other_classes(predictor: Predictor, config: Config | None) -> None:
    if config is not None and config.classes.names != predictor.card.classes:
        raise ConfigError(
            f"{predictor.origin} says that its classes are {', '.join(predictor.card.classes)}, and classes.names has "
            f"{', '.join(config.classes.names)}: take the configuration that it was trained with"
        )


def _student(path: str | Path, trained: Trained, name: str | None, tta: str) -> Predictor:
    trained, device = trained.alone(), resolve_device(name)
    student = trained.student.to(device).to(memory_format=torch.channels_last)
    normalize = trained.config.student.normalize

    @torch.inference_mode()
    def logits(images_NCHW: Tensor) -> Tensor:
        inputs_NCHW = normalized(images_NCHW.to(device), normalize)
        # fp32 means fp32, as in `evaluate`: with TF32, maps would depend on the device.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            return averaged_logits(student, inputs_NCHW, tta=tta, scales=[1.0]).cpu()

    return Predictor(str(path), card_of(trained, path, sizes="any"), str(device), tta, logits, fixed_side(student))


def _onnx_predictor(path: Path, text: str, name: str | None, tta: str) -> Predictor:
    device, provider = _provider(name)
    try:
        card = Card.model_validate_json(text)
    except ValidationError as err:
        faults = [
            f"{'.'.join(map(str, each['loc'])) or 'as a whole'}: {each['msg'].removeprefix('Value error, ')}"
            for each in err.errors(include_url=False)
        ]
        raise CheckpointError(
            f"{path} has a description that this version cannot read: {summarise(faults, 3)}"
        ) from err
    if card.output == CLASSES and tta != "none":
        raise ConfigError(
            f"--tta {tta} averages logits, and {path} answers with classes: leave --tta out, or take a file that was exported without "
            "--argmax"
        )
    network, normalize = (
        OnnxStudent(path, card.output, len(card.classes), provider),
        MeanStd(mean=card.mean, std=card.std),
    )

    @torch.inference_mode()
    def logits(images_NCHW: Tensor) -> Tensor:
        return averaged_logits(network, normalized(images_NCHW, normalize), tta=tta, scales=[1.0])

    return Predictor(str(path), card, device, tta, logits, fixed_side(network))


def _provider(name: str | None) -> tuple[str, str]:
    """The device and its onnxruntime provider; the best one available if `name` is None."""
    available = require_onnxruntime().get_available_providers()
    device = name or ("cuda" if PROVIDERS["cuda"] in available else "cpu")
    provider = PROVIDERS.get(device)
    if provider not in available:
        usable = ", ".join(device for device, provider in PROVIDERS.items() if provider in available)
        raise ConfigError(
            f"--device {device}: the installed onnxruntime computes on {usable} only; for cuda, install onnxruntime-gpu instead"
        )
    assert provider is not None
    return device, provider
