"""Loading teachers: every tensor of the file fits the configured network, or the error shows the configuration that fits the file."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor, nn

from kdpipe.configs.errors import CheckpointError
from kdpipe.configs.schema import Teacher
from kdpipe.configs.schema.options import options_text
from kdpipe.pipeline.models.external.outputs import of_two_classes
from kdpipe.pipeline.models.unwrap import unwrapped
from kdpipe.pipeline.models.weights import Misfit, check_tensors, load_strictly, read_checkpoint
from kdpipe.pipeline.teacher.sources import load_foreign

if TYPE_CHECKING:
    from kdpipe.pipeline.models.recognise import Network

# By number of channels: the usual order of a teacher's classes, as lines of the configuration, and the shipped configuration
# whose class map fits it. The first order is the guide's, the second OpenEarthMap's own.
KNOWN_ORDERS = {
    8: (
        {"classes": "[Tree, Rangeland, Cropland, Developed, Road, Bareland, Water, Background]"},
        "biodiversity/ftunetformer_kd",
    ),
    9: (
        {
            "classes": "[Unknown, Bareland, Rangeland, Developed, Road, Tree, Water, Cropland, Building]",
            "drop_channels": "[0]",
        },
        "biodiversity/ftunetformer_kd_openearthmap",
    ),
}
SIGMOID = "its one channel z is a sigmoid's: classes needs two names, first that of 1 - σ(z), then that of σ(z)"
# Options without a trace in the weights that training scripts set, unlike those of norms and interpolation.
OFTEN_SET = ("encoder_output_stride", "decoder_atrous_rates", "encoder_output_indices", "decoder_readout")
WITH_ATTENTION = ("unet", "unetplusplus")  # smp's architectures whose decoder may have scSE attention


class TwoClasses(nn.Module):
    """A network of one channel z, trained with a sigmoid, as one of two classes: see `of_two_classes`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images_NCHW: Tensor) -> Tensor:
        return of_two_classes(self.network(images_NCHW))


def load_teacher(
    teacher: Teacher, key: str = "teacher", say: Callable[[str], None] = lambda line: None, *, in_channels: int = 3
) -> nn.Module:
    """
    The teacher's network with its weights for images of `in_channels` bands, frozen, in eval mode, float32, on the CPU.

    A network of smp with its weights, or one that `sources.load_foreign` reads.

    The weights may lie under any key and a trainer's prefix, in any floating-point type; `say` is called with a sentence on each thing
    in the file that was not taken. scSE attention in the decoder is recognised from the tensors; other options are `teacher.options`. A
    network of one channel becomes `TwoClasses`. Errors name `key`, the section of the configuration. Raises `ConfigError` for options
    that the architecture lacks, and `CheckpointError` where any tensor does not fit, with what the file holds and the lines of the
    configuration that fit it.
    """
    if teacher.kind != "smp":
        return load_foreign(teacher, key, say).eval().requires_grad_(False)
    assert teacher.architecture is not None
    assert teacher.encoder is not None
    assert teacher.checkpoint is not None
    # These import timm, which takes longer than a run with nothing to do.
    from kdpipe.pipeline.models.options import check_options
    from kdpipe.pipeline.models.recognise import attention_of, channels_of, recognise
    from kdpipe.pipeline.models.smp import create_smp_model, named_as_today

    check_options(teacher.architecture, teacher.options, key=key)
    weights = unwrapped(read_checkpoint(teacher.checkpoint), teacher.checkpoint, teacher.weights, key)
    state = weights.state
    check_tensors(state, origin=teacher.checkpoint)
    is_sigmoid = len(teacher.classes) == 2 and channels_of(state) == 1
    attention = attention_of(state) if teacher.architecture.lower() in WITH_ATTENTION else None
    model = create_smp_model(
        teacher.architecture,
        teacher.encoder,
        1 if is_sigmoid else len(teacher.classes),
        key=key,
        in_channels=in_channels,
        attention=attention,
        options=teacher.options,
    )
    try:
        notes = load_strictly(model, named_as_today(state, model), origin=teacher.checkpoint)
    except Misfit as err:
        found = recognise(state, likely_encoder=teacher.encoder, likely_options=teacher.options)
        raise CheckpointError(_misfit_text(teacher, key, found, str(err))) from err
    for note in [*weights.notes(teacher.checkpoint, key), *notes, *_unseen_options(teacher, key)]:
        say(note)
    return (TwoClasses(model) if is_sigmoid else model).eval().requires_grad_(False)


def _unseen_options(teacher: Teacher, key: str) -> list[str]:
    """A sentence on the options that teachers often differ in, that no tensor shows and that the configuration leaves open."""
    from kdpipe.pipeline.models.options import untraced_options

    unseen = [
        name for name in untraced_options(teacher.architecture) if name in OFTEN_SET and name not in teacher.options
    ]
    if not unseen:
        return []
    return [
        f"{key}: weights do not show {' and '.join(unseen)}, and smp's defaults are used: set {key}.options if the teacher was trained "
        "with others. `kdpipe verify-cache --reference` tells"
    ]


def _misfit_text(teacher: Teacher, key: str, found: Network, reason: str) -> str:
    """The message for a misfit: what the file holds, what the configuration says, and the lines that fit the file."""
    lines, hint = {}, ""
    if found.architecture is not None and found.architecture != str(teacher.architecture).lower():
        lines["architecture"] = found.architecture
    if found.encoder is not None and found.encoder != teacher.encoder:
        lines["encoder"] = found.encoder
    fits_defaults = found.architecture is not None and not found.options and found.channels == len(teacher.classes)
    if teacher.options and fits_defaults and not lines:
        lines["options"] = "{}"
    known = found.architecture is not None or found.encoder is not None
    if known and found.channels is not None and found.channels != len(teacher.classes):
        order, shipped = KNOWN_ORDERS.get(
            found.channels, ({"classes": "[..., ...]" if found.channels == 1 else "[...]"}, None)
        )
        lines |= order
        hint = (
            f"\n\n{SIGMOID}"
            if found.channels == 1
            else (
                f"\n\nclasses needs one name for each of the file's {found.channels} channels, in the file's own order"
                + (f"; this one is that of the shipped {shipped}, whose class_map fits it" if shipped else "")
            )
        )
    text = (
        f"{teacher.checkpoint} holds {found}, but {key} says {teacher.architecture} with {teacher.encoder}"
        f"{options_text(teacher.options)}, "
        f"{len(teacher.classes)} channels ({', '.join(teacher.classes)})"
    )
    if found.architecture is None or not lines:
        text += f": {reason.removeprefix(f'{teacher.checkpoint} ')}. `kdpipe inspect {teacher.checkpoint}` says more"
    if not lines:
        return text
    yaml = "\n".join([f"    {key}:", *(f"      {name}: {value}" for name, value in lines.items())])
    return f"{text}. Lines that fit it:\n\n{yaml}{hint}"
