"""The contents of a checkpoint file: the recognised network, its channels, and where its weights lie. No code in the file is run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from torch import Tensor

from kdpipe.configs.errors import CheckpointError
from kdpipe.configs.files import file_sha256
from kdpipe.configs.schema.bands import numbers_of
from kdpipe.pipeline.models.options import untraced_options
from kdpipe.pipeline.models.recognise import Network, recognise
from kdpipe.pipeline.models.unwrap import unwrapped
from kdpipe.pipeline.models.weights import check_tensors, read_checkpoint
from kdpipe.pipeline.runs.checkpoint import Header, config_in, header_of, is_of_a_student


@dataclass(frozen=True)
class StudentRun:
    """
    The run of `kdpipe train-student` that saved a checkpoint; best mIoU in 0..1.

    `classes` name its channels in order, `normalize` is its `student.normalize` and `options` its `student.options`; `bands` are the
    numbers of the bands that it sees. `model` and `pretrained` are keys of `student` too; None for a network of smp or kdpipe.
    `averaged_steps` is the number of steps whose weights are averaged, None where the weights are those of the last step.
    """

    name: str
    mode: str
    steps: int
    best_miou: float | None
    fingerprint: str | None
    classes: list[str]
    normalize: Any
    options: dict[str, Any]
    bands: tuple[int, ...] = (1, 2, 3)
    model: str | None = None
    pretrained: str | None = None
    averaged_steps: int | None = None


@dataclass(frozen=True)
class Inspection:
    """
    A checkpoint file: size in bytes, sha256, network, and how its weights lie in it.

    The weights lie under the key `nest`, and all their names begin with `prefix`; `notes` say what lies beside them. `dtypes` counts
    tensors. `parameters` counts floating-point numbers, buffers such as a batch norm's statistics included. `student` is None if the
    file is not a checkpoint of `kdpipe train-student`. `untraced_options` are those that change what the network computes and leave no
    trace in its tensors.
    """

    path: str
    size_bytes: int
    sha256: str
    network: Network
    nest: str | None
    prefix: str
    notes: list[str]
    tensors: int
    parameters: int
    dtypes: dict[str, int]
    other_keys: list[str]
    student: StudentRun | None
    untraced_options: list[str]


def inspect_checkpoint(path: str) -> Inspection:
    """
    A description of the checkpoint at `path`.

    Raises `CheckpointError` where it cannot be read without executing code, or holds no tensors.
    """
    content = read_checkpoint(path)
    weights = unwrapped(content, path)
    check_tensors(weights.state, origin=path)
    state: dict[str, Tensor] = weights.state
    student, encoder = None, None
    if is_of_a_student(content):
        student, encoder = _run_of(header_of(content, path), path)
    options = student.options if student else {}
    network = recognise(state, likely_encoder=encoder, likely_options=options)
    return Inspection(
        path=path,
        size_bytes=Path(path).stat().st_size,
        sha256=file_sha256(path),
        network=network,
        nest=weights.nest,
        prefix=weights.prefix,
        notes=weights.notes(path, "teacher"),
        tensors=len(state),
        parameters=sum(tensor.numel() for tensor in state.values() if tensor.is_floating_point()),
        dtypes=dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in state.values())),
        other_keys=[] if weights.nest is None else [str(key) for key in content if key != weights.nest],
        student=student,
        untraced_options=untraced_options(network.architecture),
    )


class _Classes(BaseModel):
    names: list[str]


class _Student(BaseModel):
    encoder: str | None = None
    model: str | None = None
    pretrained: str | None = None
    normalize: Any = None
    options: dict[str, Any] = {}
    bands: list[int | str] | None = None


class _Data(BaseModel):
    bands: tuple[int, ...] = (1, 2, 3)
    band_names: dict[str, int] = {}


class _Config(BaseModel):
    """The keys of a recorded configuration that are shown, also where others are not valid today."""

    name: str
    group: str
    classes: _Classes
    data: _Data = _Data()
    student: _Student


def _run_of(header: Header, path: str) -> tuple[StudentRun, str | None]:
    """The run in a student's checkpoint, and its encoder if that is one of an installed package."""
    try:
        config = _Config.model_validate(config_in(header, path))
    except ValidationError as err:
        first = err.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"the configuration in {path} is not one of kdpipe: {key}: {first['msg']}") from err
    student, encoder = config.student, config.student.encoder
    try:
        bands = numbers_of(student.bands, config.data.bands, config.data.band_names)
    except ValueError as err:
        raise CheckpointError(f"the configuration in {path} is not one of kdpipe: student.bands {err}") from err
    run = StudentRun(
        f"{config.group}/{config.name}",
        header.kdpipe.mode,
        header.position.steps,
        header.position.best_miou,
        header.kdpipe.fingerprint,
        config.classes.names,
        student.normalize,
        student.options,
        bands,
        student.model,
        student.pretrained,
        header.averaged.steps if header.averaged else None,
    )
    # timm would fetch `tu-hf-hub:…` from a hub.
    return run, None if encoder is None or ":" in encoder else encoder
