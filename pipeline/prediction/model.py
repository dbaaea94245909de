"""
What makes maps: a checkpoint of `train-student`, or an ONNX file of `kdpipe export`, with all that its images must go through.

Both say it in a `Card`, which an exported file carries as JSON, so that a program without kdpipe can use the file too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from kdpipe.configs.errors import CheckpointError, ConfigError
from kdpipe.configs.files import file_sha256
from kdpipe.configs.schema import MeanStd
from kdpipe.pipeline.devices import resolve_device
from kdpipe.pipeline.models.normalize import mean_std, normalized
from kdpipe.pipeline.models.views import averaged_logits
from kdpipe.pipeline.pictures import colours
from kdpipe.pipeline.runs.checkpoint import Trained, load_trained

CARD_KEY = "kdpipe"  # in an ONNX file's metadata
INPUT, OUTPUT = "images", "logits"
ONNX_SUFFIX, OTHER_SUFFIXES = ".onnx", (".torchscript", ".pt2")
INSTALL = "pip install 'kdpipe[export]'"
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class Card(BaseModel):
    """
    What a network is, what its input must be, and what its output means.

    Input: float32 `(N, 3, H, W)`, `(x / 255 - mean) / std` of the file's `bands`, each taken linearly from its (low, high) of `stretch` to
    0..255 and rounded, or as it is if there is none. Output: float32 logits `(N, len(classes), H, W)`. `sizes` says which H and W do.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    run: str
    step: int
    network: str
    checkpoint_sha256: str
    classes: list[str]
    palette: list[tuple[int, int, int]]
    ignore_index: int
    bands: tuple[int, int, int]
    stretch: list[tuple[float, float]] | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    sizes: str
    kdpipe: str


@dataclass(frozen=True)
class Predictor:
    """`ask` takes uint8 images `(N, 3, H, W)` in main memory to float32 logits `(N, C, H, W)`; `device` is where it computes."""

    origin: str
    card: Card
    device: str
    tta: str
    ask: Callable[[Tensor], Tensor]


def card_of(trained: Trained, checkpoint: str | Path, sizes: str) -> Card:
    """The card of a student as `load_trained` returns it."""
    config = trained.config
    mean, std = mean_std(config.student.normalize)
    encoder = f" with {config.student.encoder}" if config.student.encoder else ""
    palette = colours(len(config.classes.names)).astype(int).tolist()
    return Card.model_validate(
        {
            "run": config.name,
            "step": trained.position.steps,
            "network": config.student.architecture + encoder,
            "checkpoint_sha256": file_sha256(checkpoint),
            "classes": config.classes.names,
            "palette": palette,
            "ignore_index": config.classes.ignore_index,
            "bands": config.data.bands,
            "stretch": trained.stretch,
            "mean": mean,
            "std": std,
            "sizes": sizes,
            "kdpipe": version("kdpipe"),
        }
    )


def open_predictor(path: str | Path, device: str | None, *, tta: str = "none") -> Predictor:
    """
    What maps with a checkpoint or an ONNX file on the named device, in float32; `device` None is the best one there is.

    Logits are averaged over the views of `tta`. Raises `CheckpointError` where the file is neither, `ConfigError` where the device is
    not there, or onnxruntime is not installed.
    """
    suffix = Path(path).suffix
    if suffix in OTHER_SUFFIXES:
        raise CheckpointError(
            f"{path} is an exported file that predict does not run: name the checkpoint, or an ONNX file (`kdpipe export --format onnx`)"
        )
    return _onnx_predictor(Path(path), device, tta) if suffix == ONNX_SUFFIX else _student(path, device, tta)


def open_session(path: Path, providers: list[str]) -> Any:
    """An onnxruntime session of a file; raises `CheckpointError` where it cannot be read, `ConfigError` where onnxruntime is missing."""
    runtime = require_onnxruntime()
    if not path.is_file():
        raise CheckpointError(f"no file at {path.absolute()}; relative paths start at the current folder")
    try:
        return runtime.InferenceSession(str(path), providers=providers)
    except Exception as err:  # onnxruntime's errors have no class in common
        raise CheckpointError(f"{path} is not a readable ONNX file: {str(err).splitlines()[0]}") from err


def require_onnxruntime() -> Any:
    """The module; raises `ConfigError` where it is not installed."""
    try:
        import onnxruntime
    except ImportError as err:
        raise ConfigError(f"an ONNX file needs onnxruntime, which is not installed here: {INSTALL}") from err
    return onnxruntime


def _student(path: str | Path, name: str | None, tta: str) -> Predictor:
    trained = load_trained(path)
    device = resolve_device(name)
    student = trained.student.to(device).to(memory_format=torch.channels_last)
    normalize = trained.config.student.normalize

    @torch.inference_mode()
    def ask(images_NCHW: Tensor) -> Tensor:
        inputs_NCHW = normalized(images_NCHW.to(device), normalize)
        # fp32 means fp32, as `evaluate` has it: TF32 would draw other maps on a GPU than on a CPU.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            return averaged_logits(student, inputs_NCHW, tta=tta, scales=[1.0]).cpu()

    return Predictor(str(path), card_of(trained, path, sizes="any"), str(device), tta, ask)


def _onnx_predictor(path: Path, name: str | None, tta: str) -> Predictor:
    device, provider = _provider(name)
    session = open_session(path, [provider])
    described = session.get_modelmeta().custom_metadata_map.get(CARD_KEY)
    if described is None:
        raise CheckpointError(
            f"{path} does not say which classes and which normalisation it is for (metadata key {CARD_KEY!r}): predict takes ONNX files "
            "that `kdpipe export` wrote"
        )
    try:
        card = Card.model_validate_json(described)
    except ValidationError as err:
        raise CheckpointError(f"{path} describes itself in a way that this version does not read: {err}") from err
    normalize = MeanStd(mean=card.mean, std=card.std)

    def run(inputs_NCHW: Tensor) -> Tensor:
        (logits,) = session.run([OUTPUT], {INPUT: inputs_NCHW.contiguous().numpy()})
        return torch.from_numpy(logits)

    @torch.inference_mode()
    def ask(images_NCHW: Tensor) -> Tensor:
        return averaged_logits(run, normalized(images_NCHW, normalize), tta=tta, scales=[1.0])

    return Predictor(str(path), card, device, tta, ask)


def _provider(name: str | None) -> tuple[str, str]:
    """The device, and what onnxruntime calls it; the best one that onnxruntime has where none is named."""
    available = require_onnxruntime().get_available_providers()
    device = name or ("cuda" if PROVIDERS["cuda"] in available else "cpu")
    provider = PROVIDERS.get(device)
    if provider not in available:
        usable = ", ".join(device for device, provider in PROVIDERS.items() if provider in available)
        raise ConfigError(
            f"--device {device}: onnxruntime, as installed here, computes on {usable}; for cuda, install onnxruntime-gpu in its place"
        )
    assert provider is not None
    return device, provider
