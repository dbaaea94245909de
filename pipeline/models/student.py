"""Students by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from kdpipe.configs.errors import CheckpointError, ConfigError
from kdpipe.pipeline.models.smp_models import create_smp_model
from kdpipe.pipeline.models.weights import load_strictly, read_checkpoint

STUDENT_PREFIX = "student."  # of the student's tensors in kdpipe's own checkpoints


def build_student(architecture: str, num_classes: int, **options: Any) -> nn.Module:
    """
    A network from uint8-range-normalised images `(N, 3, H, W)` to logits `(N, num_classes, H, W)`.

    `architecture` is any of smp's; options: `encoder` (required), `encoder_weights` (None, a local file of the encoder's
    state dict, or a name that smp knows) and `checkpoint` (a local file with weights of the whole student, kdpipe's own
    checkpoints included). Raises `ConfigError` for unknown names, `CheckpointError` for weights that do not fit.
    """
    encoder = options.pop("encoder", None)
    weights = options.pop("encoder_weights", None)
    checkpoint = options.pop("checkpoint", None)
    if options:
        raise ConfigError(f"student has no options {sorted(options)}")
    if encoder is None:
        raise ConfigError(f"student.encoder is missing: {architecture} needs one, such as resnet18")
    local = weights is not None and Path(weights).suffix != "" and ("/" in weights or Path(weights).exists())
    try:
        model = create_smp_model(
            architecture, encoder, num_classes, key="student", encoder_weights=None if local else weights
        )
    except OSError as err:
        raise CheckpointError(
            f"student.encoder_weights: cannot download {weights!r} for {encoder}: {err}; give a local file instead"
        ) from err
    if local:
        part = model.encoder
        assert isinstance(part, nn.Module)
        load_strictly(part, read_checkpoint(weights), origin=f"student.encoder_weights {weights}")
    if checkpoint is not None:
        load_student_weights(model, checkpoint)
    return model


def load_student_weights(model: nn.Module, path: str | Path) -> None:
    """Load a student's weights from a bare state dict or from a checkpoint of `kdpipe train-student`, strictly."""
    content = read_checkpoint(path)
    state = content.get("state_dict", content)
    load_strictly(model, {name.removeprefix(STUDENT_PREFIX): value for name, value in state.items()}, origin=str(path))


def encoder_parameters(model: nn.Module) -> set[int]:
    """The `id`s of the encoder's parameters, which learn at a rate of their own."""
    return {id(parameter) for parameter in model.encoder.parameters()}  # type: ignore[union-attr]
