"""
Students by name, with their weights.

To add an architecture of your own (smp's need no change), extend:

- `FORMERS` and `_build_former`, which build it;
- `load_student_weights`, if its checkpoints are not plain state dicts;
- `encoder_parameters`, if its encoder is not its attribute `encoder`;
- `pipeline/models/recognise.py`, so that `kdpipe inspect` and errors about weights name it;
- the descriptions of `student` in `configs/schema/student.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from kdpipe.configs.errors import CheckpointError, ConfigError
from kdpipe.pipeline.models.smp import create_smp_model
from kdpipe.pipeline.models.unetformer import FTUNetFormer, UNetFormer
from kdpipe.pipeline.models.weights import CLASSES_HINT, load_encoder, load_strictly, read_checkpoint

FORMERS = ("ftunetformer", "unetformer")
WEIGHT_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")
STUDENT_PREFIX = "student."  # of the student's tensors in kdpipe's own checkpoints


def build_student(
    architecture: str, num_classes: int, *, say: Callable[[str], None] = lambda line: None, **options: Any
) -> nn.Module:
    """
    A network from normalised images `(N, 3, H, W)` to logits `(N, num_classes, H, W)`.

    Args:
        architecture: `ftunetformer`, `unetformer` or any of smp's.
        num_classes: number of student classes.
        say: called with a sentence on each part of `encoder_weights` that was not taken as it is.
        options: `encoder` (smp's or timm's; required except for `ftunetformer`, which has its own), `encoder_weights` (None, a local
            file, or a name that smp or timm knows), `checkpoint` (a local file of the whole student's weights, kdpipe's own checkpoints
            included) and `replace_head` (take all but the head from a checkpoint for another number of classes).

    Raises `ConfigError` for unknown names, and `CheckpointError` for weights that do not fit.
    """
    if architecture in FORMERS:
        return _build_former(architecture, num_classes, say, **options)
    if options.pop("replace_head", False):
        raise ConfigError(f"student.replace_head is for {' and '.join(FORMERS)}, not for {architecture}")
    encoder = options.pop("encoder", None)
    weights = options.pop("encoder_weights", None)
    checkpoint = options.pop("checkpoint", None)
    if options:
        raise ConfigError(f"student has no options {sorted(options)}")
    if encoder is None:
        raise ConfigError(f"student.encoder is missing: {architecture} needs one, such as resnet18")
    local = weights is not None and _is_file(weights)
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


def load_student_weights(model: nn.Module, path: str | Path, *, replace_head: bool = False) -> None:
    """Load a student's weights from a bare state dict or from a checkpoint of `kdpipe train-student`, strictly."""
    content = read_checkpoint(path)
    if isinstance(model, FTUNetFormer | UNetFormer):
        model.load_published_state_dict(content, replace_head=replace_head, origin=str(path))
        return
    state = content.get("state_dict", content)
    state = {name.removeprefix(STUDENT_PREFIX): value for name, value in state.items()}
    head = "segmentation_head.0.weight"  # of every smp architecture
    found, own = state.get(head), model.state_dict().get(head)
    if isinstance(found, Tensor) and own is not None and found.ndim and len(found) != len(own):
        raise CheckpointError(
            f"{path} predicts {len(found)} classes and the model {len(own)}; give student.checkpoint the weights of a "
            f"student of these classes, or leave it out. {CLASSES_HINT}"
        )
    load_strictly(model, state, origin=str(path))


def encoder_parameters(model: nn.Module) -> set[int]:
    """The `id`s of the encoder's parameters, which have their own learning rate."""
    encoder = model.backbone if isinstance(model, FTUNetFormer | UNetFormer) else model.encoder
    assert isinstance(encoder, nn.Module)
    return {id(parameter) for parameter in encoder.parameters()}


def _build_former(
    architecture: str,
    num_classes: int,
    say: Callable[[str], None],
    *,
    encoder: str | None = None,
    encoder_weights: str | None = None,
    checkpoint: str | None = None,
    replace_head: bool = False,
) -> FTUNetFormer | UNetFormer:
    """FTUNetFormer or UNetFormer; a timm name in `encoder_weights` is downloaded, a file is read."""
    model: FTUNetFormer | UNetFormer
    if architecture == "ftunetformer":
        if encoder is not None:
            raise ConfigError(f"student.encoder: ftunetformer has an encoder of its own (Swin-B), found {encoder!r}")
        model = FTUNetFormer(num_classes)
    else:
        if encoder is None:
            raise ConfigError("student.encoder is missing: unetformer needs one of timm's, such as resnet18")
        try:
            model = UNetFormer(num_classes, encoder=encoder)
        except RuntimeError as err:  # timm's for an unknown name
            raise ConfigError(f"student.encoder: timm cannot build {encoder!r} for unetformer: {err}") from err
    if encoder_weights is not None:
        origin = f"student.encoder_weights {encoder_weights}"
        if _is_file(encoder_weights):
            content = read_checkpoint(encoder_weights)
        else:
            try:
                content = timm.create_model(encoder_weights, pretrained=True).state_dict()
            except (OSError, RuntimeError) as err:
                raise CheckpointError(f"{origin}: not a file, and timm cannot fetch it: {err}") from err
        for note in load_encoder(model.backbone, content, origin=origin):
            say(note)
    if checkpoint is not None:
        load_student_weights(model, checkpoint, replace_head=replace_head)
    return model


def _is_file(weights: str) -> bool:
    return Path(weights).suffix in WEIGHT_SUFFIXES or "/" in weights or Path(weights).exists()
