"""The contents of a checkpoint file: the recognised network, its channels, and where its weights lie. No code in the file is run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from kdpipe.configs.files import file_sha256
from kdpipe.pipeline.models.options import untraced_options
from kdpipe.pipeline.models.recognise import Network, recognise
from kdpipe.pipeline.models.weights import check_tensors, read_checkpoint, unwrapped
from kdpipe.pipeline.runs.checkpoint import FORMAT


@dataclass(frozen=True)
class StudentRun:
    """
    The run of `kdpipe train-student` that saved a checkpoint; best mIoU in 0..1.

    `classes` name its channels in order, `normalize` is its `student.normalize` and `options` its `student.options`.
    """

    name: str
    mode: str
    steps: int
    best_miou: float | None
    fingerprint: str | None
    classes: list[str]
    normalize: Any
    options: dict[str, Any]


@dataclass(frozen=True)
class Inspection:
    """
    A checkpoint file: size in bytes, sha256, network, and how its weights lie in it.

    The weights lie under the key `nest`, and all their names begin with `prefix`; `dtypes` counts tensors. `parameters` counts
    floating-point numbers, buffers such as a batch norm's statistics included. `student` is None if the file is not a checkpoint of
    `kdpipe train-student`. `untraced_options` are those that change what the network computes and leave no trace in its tensors.
    """

    path: str
    size_bytes: int
    sha256: str
    network: Network
    nest: str | None
    prefix: str
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
    weights = unwrapped(content)
    check_tensors(weights.state, origin=path)
    state: dict[str, Tensor] = weights.state
    student, encoder, options = None, None, {}
    if content.get("format") == FORMAT and "kdpipe" in content:
        recorded, position = content["kdpipe"], content["position"]
        config = yaml.safe_load(recorded["config"])
        encoder, options = config["student"]["encoder"], config["student"].get("options", {})
        student = StudentRun(
            f"{config['group']}/{config['name']}",
            recorded["mode"],
            position["steps"],
            position["best_miou"],
            recorded["fingerprint"],
            config["classes"]["names"],
            config["student"]["normalize"],
            options,
        )
    network = recognise(state, likely_encoder=encoder, likely_options=options)
    return Inspection(
        path=path,
        size_bytes=Path(path).stat().st_size,
        sha256=file_sha256(path),
        network=network,
        nest=weights.nest,
        prefix=weights.prefix,
        tensors=len(state),
        parameters=sum(tensor.numel() for tensor in state.values() if tensor.is_floating_point()),
        dtypes=dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in state.values())),
        other_keys=[] if weights.nest is None else [str(key) for key in content if key != weights.nest],
        student=student,
        untraced_options=untraced_options(network.architecture),
    )
