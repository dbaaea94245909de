"""
Students by name, with their weights.

To add an architecture to kdpipe itself (`student.model` and smp's need no change), extend:

- `options.FORMERS` and `_build_former`, which build it, and `options.UNTRACED`;
- `load_student_weights`, if its checkpoints are not plain state dicts;
- `external.encoder.encoder_of`, if its encoder is not its attribute `encoder` or `backbone`;
- `pipeline/models/recognise.py`, so that `kdpipe inspect` and errors about weights name it;
- the descriptions of `student` in `configs/schema/student.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from kdpipe.configs.errors import CheckpointError, ConfigError
from kdpipe.configs.schema import Config
from kdpipe.configs.schema.options import options_text
from kdpipe.pipeline.models.external.encoder import encoder_of, innermost
from kdpipe.pipeline.models.external.outputs import AtImageSize
from kdpipe.pipeline.models.external.own_module import build_own, load_own_weights
from kdpipe.pipeline.models.normalize import COLOURS, adapted_text, adapted_to_bands
from kdpipe.pipeline.models.options import FORMERS, check_options
from kdpipe.pipeline.models.smp import create_smp_model, named_as_today
from kdpipe.pipeline.models.unetformer import FTUNetFormer, UNetFormer
from kdpipe.pipeline.models.unwrap import bare_state, unwrapped
from kdpipe.pipeline.models.weights import CLASSES_HINT, load_encoder, load_strictly, read_checkpoint

WEIGHT_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors")
STUDENT_PREFIX = "student."  # of the student's tensors in kdpipe's own checkpoints


def build_student(
    architecture: str,
    num_classes: int,
    *,
    in_channels: int = 3,
    encoder: str | None = None,
    encoder_weights: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    replace_head: bool = False,
    options: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> nn.Module:
    """
    A network from normalised images `(N, in_channels, H, W)` to logits `(N, num_classes, H, W)`.

    Args:
        architecture: `ftunetformer`, `unetformer` or any of smp's.
        num_classes: number of student classes.
        in_channels: number of bands that it sees.
        encoder: smp's or timm's; required except for `ftunetformer`, which has its own.
        encoder_weights: a local file, or a name that smp or timm knows.
        checkpoint: a local file of the whole student's weights, kdpipe's own checkpoints included.
        replace_head: take all but the head from a checkpoint for another number of classes.
        options: further arguments of the architecture's constructor.
        say: called with a sentence on each part of `encoder_weights` that was not taken as it is.

    Raises `ConfigError` for unknown names and options, and `CheckpointError` for weights that do not fit.
    """
    if architecture in FORMERS:
        former = _build_former(architecture, num_classes, in_channels, encoder, options or {})
        if encoder_weights is not None:
            _load_encoder_weights(former, encoder_weights, say)
        if checkpoint is not None:
            load_student_weights(former, checkpoint, replace_head=replace_head, say=say)
        return former
    if replace_head:
        raise ConfigError(f"student.replace_head is for {' and '.join(FORMERS)}, not for {architecture}")
    if encoder is None:
        raise ConfigError(f"student.encoder is missing: {architecture} needs one, such as resnet18")
    local = encoder_weights is not None and _is_file(encoder_weights)
    try:
        model = create_smp_model(
            architecture,
            encoder,
            num_classes,
            key="student",
            in_channels=in_channels,
            encoder_weights=None if local else encoder_weights,
            options=options,
        )
    except OSError as err:
        raise CheckpointError(
            f"student.encoder_weights: cannot download {encoder_weights!r} for {encoder}: {err}; give a local file instead"
        ) from err
    if encoder_weights is not None and not local and in_channels != COLOURS:
        say(adapted_text(f"student.encoder_weights {encoder_weights}", in_channels))
    if encoder_weights is not None and local:
        part = model.encoder
        assert isinstance(part, nn.Module)
        state = bare_state(read_checkpoint(encoder_weights))
        origin = f"student.encoder_weights {encoder_weights}"
        _say_all(load_strictly(part, adapted_to_bands(part, state, origin, say), origin=origin), say)
    if checkpoint is not None:
        load_student_weights(model, checkpoint, say=say)
    return model


def initial_student(config: Config, say: Callable[[str], None] = lambda line: None) -> nn.Module:
    """
    The student that a configuration describes with the weights that it starts from, from normalised images to logits at their size.

    A module that `student.model` names is imported. `say` is called with a sentence on what is not taken as it is, and where no part of
    the network is recognised as its encoder. Raises `ConfigError` and `CheckpointError`, which name the key.
    """
    student, classes, in_channels = config.student, config.classes.names, bands_of(config)
    if student.pretrained is not None:
        from kdpipe.pipeline.models.external.transformers_student import pretrained_student

        network: nn.Module = pretrained_student(student.pretrained, classes, in_channels, say)
    elif student.model is not None:
        network = build_own(student.model, student.options, "student.model")
        if student.checkpoint is not None:
            load_own_weights(network, student.checkpoint, say=say)
    else:
        return build_student(
            str(student.architecture),
            len(classes),
            in_channels=in_channels,
            encoder=student.encoder,
            encoder_weights=student.encoder_weights,
            checkpoint=student.checkpoint,
            replace_head=student.replace_head,
            options=student.options,
            say=say,
        )
    if encoder_of(network) is None:
        say(
            f"student: {student.network} has no attribute encoder or backbone, so that all of it learns at train.lr "
            f"({config.train.lr:g}), and train.backbone_lr is not used"
        )
    return _at_image_size(network, config, say)


def untrained_student(
    config: Config, description: str | None = None, say: Callable[[str], None] = lambda line: None
) -> nn.Module:
    """
    The student that a configuration describes, with random weights.

    `description` is that of `TransformersStudent` in a checkpoint, and takes the place of the folder `student.pretrained`. A module that
    `student.model` names is imported; `say` is called as `AtImageSize` does.
    """
    student, classes = config.student, config.classes.names
    if student.pretrained is not None:
        from kdpipe.pipeline.models.external import transformers_student as transformers

        network: nn.Module = (
            transformers.untrained_pretrained(student.pretrained, classes, bands_of(config)) if description is None
            else transformers.described_student(description, f"the checkpoint of {config.name}")
        )  # fmt: skip
        return _at_image_size(network, config, say)
    if student.model is not None:
        return _at_image_size(build_own(student.model, student.options, "student.model"), config, say)
    return build_student(
        str(student.architecture),
        len(classes),
        in_channels=bands_of(config),
        encoder=student.encoder,
        options=student.options,
    )


def with_own_normalization(config: Config) -> Config:
    """The configuration with numbers in place of `student.normalize: pretrained`, from the folder that `student.pretrained` names."""
    student = config.student
    if student.normalize != "pretrained":
        return config
    from kdpipe.pipeline.models.external.transformers_student import own_normalization

    assert student.pretrained is not None
    found = own_normalization(student.pretrained, bands_of(config))
    return config.model_copy(update={"student": student.model_copy(update={"normalize": found})})


def bands_of(config: Config) -> int:
    """The number of bands that the student sees."""
    return len(config.data.places(config.student.bands))


def _at_image_size(network: nn.Module, config: Config, say: Callable[[str], None]) -> nn.Module:
    key = "student.model" if config.student.model else "student.pretrained"
    return AtImageSize(network, len(config.classes.names), key, say)


def load_student_weights(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    replace_head: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """
    Load a student's weights from a trainer's file or from a checkpoint of `kdpipe train-student`, strictly.

    `say` is called with a sentence on each thing in the file that was not taken.
    """
    path = os.fspath(path)
    if isinstance(model, AtImageSize):
        load_own_weights(innermost(model), path, say=say)
        return
    content = read_checkpoint(path)
    weights = unwrapped(content, str(path))
    _say_all(weights.notes(str(path)), say)
    if isinstance(model, FTUNetFormer | UNetFormer):
        model.load_published_state_dict(content, replace_head=replace_head, origin=str(path))
        return
    state = named_as_today(weights.state, model)
    head = "segmentation_head.0.weight"  # of every smp architecture
    found, own = state.get(head), model.state_dict().get(head)
    if isinstance(found, Tensor) and own is not None and found.ndim and len(found) != len(own):
        raise CheckpointError(
            f"{path} predicts {len(found)} classes and the model {len(own)}; give student.checkpoint the weights of a "
            f"student of these classes, or leave it out. {CLASSES_HINT}"
        )
    _say_all(load_strictly(model, state, origin=str(path)), say)


def encoder_parameters(model: nn.Module) -> set[int]:
    """The `id`s of the encoder's parameters, which have their own learning rate; none where `encoder_of` finds no encoder."""
    encoder = encoder_of(model)
    return {id(parameter) for parameter in encoder.parameters()} if encoder is not None else set()


def _build_former(
    architecture: str, num_classes: int, in_channels: int, encoder: str | None, options: Mapping[str, Any]
) -> FTUNetFormer | UNetFormer:
    """FTUNetFormer or UNetFormer with random weights."""
    if architecture == "ftunetformer" and encoder is not None:
        raise ConfigError(f"student.encoder: ftunetformer has an encoder of its own (Swin-B), found {encoder!r}")
    if architecture == "unetformer" and encoder is None:
        raise ConfigError("student.encoder is missing: unetformer needs one of timm's, such as resnet18")
    check_options(architecture, options, key="student")
    try:
        if encoder is None:
            return FTUNetFormer(num_classes, in_channels=in_channels, **options)
        return UNetFormer(num_classes, in_channels=in_channels, encoder=encoder, **options)
    except ConfigError:
        raise
    except Exception as err:
        if options:  # whose values nothing has checked
            raise ConfigError(
                f"student: cannot build {architecture} with {encoder or 'Swin-B'}{options_text(options)}: {err}"
            ) from err
        if isinstance(err, RuntimeError):  # timm's for an unknown name
            raise ConfigError(f"student.encoder: timm cannot build {encoder!r} for unetformer: {err}") from err
        raise


def _load_encoder_weights(model: FTUNetFormer | UNetFormer, weights: str, say: Callable[[str], None]) -> None:
    """Load the encoder's weights from a file, or from timm by name, which downloads them."""
    origin = f"student.encoder_weights {weights}"
    if _is_file(weights):
        content = read_checkpoint(weights)
    else:
        try:
            content = timm.create_model(weights, pretrained=True).state_dict()
        except (OSError, RuntimeError) as err:
            raise CheckpointError(f"{origin}: not a file, and timm cannot fetch it: {err}") from err
    _say_all(load_encoder(model.backbone, content, origin=origin), say)


def _say_all(notes: list[str], say: Callable[[str], None]) -> None:
    for note in notes:
        say(note)


def _is_file(weights: str) -> bool:
    return Path(weights).suffix in WEIGHT_SUFFIXES or "/" in weights or Path(weights).exists()
