"""Loading teachers: every tensor of the file fits the configured network, or the error shows the configuration that fits the file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from kdpipe.configs.errors import CheckpointError
from kdpipe.configs.schema import Teacher
from kdpipe.configs.schema.options import options_text
from kdpipe.pipeline.models.weights import bare_state, check_tensors, load_strictly, read_checkpoint

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
WITH_ATTENTION = ("unet", "unetplusplus")  # smp's architectures whose decoder may have scSE attention


def load_teacher(teacher: Teacher, key: str = "teacher", *, in_channels: int = 3) -> nn.Module:
    """
    The teacher's network with its weights for images of `in_channels` bands, frozen, in eval mode, float32, on the CPU.

    The weights may lie under `state_dict` or `model`, under a trainer's prefix, in any floating-point type. scSE attention in the
    decoder is recognised from the tensors; other options are `teacher.options`. Errors name `key`, the section of the configuration.
    Raises `ConfigError` for options that the architecture lacks, and `CheckpointError` where any tensor does not fit, with what the file
    holds and the lines of the configuration that fit it.
    """
    # These import timm, which takes longer than a run with nothing to do.
    from kdpipe.pipeline.models.options import check_options
    from kdpipe.pipeline.models.recognise import attention_of, recognise
    from kdpipe.pipeline.models.smp import create_smp_model

    check_options(teacher.architecture, teacher.options, key=key)
    state = bare_state(read_checkpoint(teacher.checkpoint))
    check_tensors(state, origin=teacher.checkpoint)
    attention = attention_of(state) if teacher.architecture.lower() in WITH_ATTENTION else None
    model = create_smp_model(
        teacher.architecture,
        teacher.encoder,
        len(teacher.classes),
        key=key,
        in_channels=in_channels,
        attention=attention,
        options=teacher.options,
    )
    try:
        load_strictly(model, state, origin=teacher.checkpoint)
    except CheckpointError as err:
        found = recognise(state, likely_encoder=teacher.encoder, likely_options=teacher.options)
        raise CheckpointError(_misfit_text(teacher, key, found, str(err))) from err
    return model.eval().requires_grad_(False)


def _misfit_text(teacher: Teacher, key: str, found: Network, reason: str) -> str:
    """The message for a misfit: what the file holds, what the configuration says, and the lines that fit the file."""
    lines, hint = {}, ""
    if found.architecture is not None and found.architecture != teacher.architecture.lower():
        lines["architecture"] = found.architecture
    if found.encoder is not None and found.encoder != teacher.encoder:
        lines["encoder"] = found.encoder
    fits_defaults = found.architecture is not None and not found.options and found.channels == len(teacher.classes)
    if teacher.options and fits_defaults and not lines:
        lines["options"] = "{}"
    known = found.architecture is not None or found.encoder is not None
    if known and found.channels is not None and found.channels != len(teacher.classes):
        order, shipped = KNOWN_ORDERS.get(found.channels, ({"classes": "[...]"}, None))
        lines |= order
        hint = (
            f"\n\nclasses needs one name for each of the file's {found.channels} channels, in the file's own order"
            + (f"; this one is that of the shipped {shipped}, whose class_map fits it" if shipped else "")
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
