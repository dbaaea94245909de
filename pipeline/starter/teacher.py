"""The section `teacher` from an inspected checkpoint, and the rows of `class_map`."""

from __future__ import annotations

from collections.abc import Sequence

from kdpipe.configs.errors import CheckpointError, ConfigError, count_text
from kdpipe.configs.fill_in import FILL_IN
from kdpipe.configs.schema import Data
from kdpipe.data.survey import Root
from kdpipe.pipeline.inspection.checkpoint import Inspection
from kdpipe.pipeline.inspection.external import External
from kdpipe.pipeline.models.options import FORMERS
from kdpipe.pipeline.starter.data import OWN_RUN, Wanted
from kdpipe.pipeline.starter.given import Given
from kdpipe.pipeline.starter.yaml import Item, Key
from kdpipe.pipeline.teacher.loading import KNOWN_ORDERS

WINDOW_FROM_PX = 2048**2  # a U-Net's feature maps of a whole tile of this size take several GB in float32
WINDOW_PX = 1024
OWN_TEACHER = "For a network of your own, model: my_package.teachers:build replaces it and encoder."


def teacher_classes(teacher: Inspection | External | None, given: Given) -> list[str] | None:
    """
    The names of the teacher's channels in order, or None if unknown.

    Raises `ConfigError` if their number differs from the file's.
    """
    names = given.teacher_classes or _own_classes(teacher)
    channels = _channels_of(teacher)
    if names is not None and channels is not None and len(names) != channels:
        raise ConfigError(
            f"--teacher-classes names {len(names)} classes, but {teacher.path if teacher else ''} has {count_text(channels, 'channels')}: "
            "name "
            "every channel, in order (docs/teachers.md says how to drop one)"
        )
    return names


def _own_classes(teacher: Inspection | External | None) -> list[str] | None:
    """The classes that the teacher's own files name."""
    if isinstance(teacher, External):
        return teacher.classes or None
    return teacher.student.classes if teacher and teacher.student else None


def _channels_of(teacher: Inspection | External | None) -> int | None:
    if teacher is None:
        return None
    channels = teacher.channels if isinstance(teacher, External) else teacher.network.channels
    return 2 if channels == 1 else channels  # a sigmoid's, which stands for two classes


def teacher_keys(
    teacher: Inspection | External | None, names: list[str] | None, train: Sequence[Root], given: Given
) -> list[Key]:
    """The keys of `teacher`; raises `CheckpointError` if the file holds a network that can only be a student."""
    if isinstance(teacher, External):
        keys = _external_keys(teacher, names, given)
        has_side = keys[-1].name == "window" or teacher.key == "predictions"
        return keys if has_side else keys + _window_keys(train)
    network = teacher.network if teacher else None
    if teacher and teacher.network.architecture in FORMERS:
        raise CheckpointError(
            f"{teacher.path} is {network}, which kdpipe trains as a student; a teacher is a network of segmentation-models-pytorch"
        )
    asked = "Asked: it was not recognised in the file;" if teacher else "Asked:"
    own = teacher.student.options if teacher and teacher.student else {}
    unseen = ""
    if teacher and not teacher.student and teacher.untraced_options:
        unseen = (
            f" They do not show {', '.join(teacher.untraced_options)}: give `options` unless smp's defaults were used."
        )
    keys = [
        Key("architecture", network.architecture, f"Measured: recognised from the names and shapes of its tensors.{unseen}")
        if network and network.architecture else
        Key("architecture", FILL_IN, f"{asked} one of segmentation-models-pytorch's, such as unet. {OWN_TEACHER}"),
        Key("encoder", network.encoder, "Measured: likewise.") if network and network.encoder else
        Key("encoder", FILL_IN, f"{asked} such as efficientnet-b4, or tu-NAME for one of timm's."),
        Key("checkpoint", teacher.path, "Given: the file of its weights.") if teacher else
        Key("checkpoint", FILL_IN, "Asked: the file of its weights (.pth, .ckpt, .safetensors)."),
        _channels(teacher, names, given),
        _normalize(teacher, given),
        *([Key("options", own, OWN_RUN)] if own else []),
    ]  # fmt: skip
    return keys + _window_keys(train)


def _external_keys(teacher: External, names: list[str] | None, given: Given) -> list[Key]:
    """The keys of a whole network of another library."""
    keys = [
        Key(teacher.key, teacher.path, f"Given: {teacher.network}."),
        _channels(teacher, names, given),
    ]
    if teacher.key == "predictions":
        why = (
            "Measured: the first file holds what these are."
            if teacher.are
            else "Asked: logits, probabilities or classes."
        )
        keys.insert(1, Key("are", teacher.are or FILL_IN, why))
    if teacher.key == "file":
        keys.append(_normalize(teacher, given))
    sides = set(teacher.input_shape[2:]) if teacher.input_shape else set()
    side = sides.pop() if len(sides) == 1 else None
    if isinstance(side, int):
        keys.append(Key("window", side, f"Measured: the network takes images of {side} x {side} px."))
    return keys


def _window_keys(train: Sequence[Root]) -> list[Key]:
    """The key `window`, if the largest tile needs one."""
    sizes = (size for root in train for size in root.sizes_HW)
    height, width = max(sizes, key=lambda size: size[0] * size[1], default=(0, 0))
    if height * width > WINDOW_FROM_PX:
        why = f"Guess: the largest tile has {height} x {width} px. Windows of this side fit a GPU; larger ones predict better."
        return [Key("window", WINDOW_PX, why)]
    return []


def wanted_bands(teacher: Inspection | External | None) -> Wanted | None:
    """What the file says of the bands that the teacher sees; None without a teacher, or where it says nothing."""
    if isinstance(teacher, External):
        bands = teacher.input_shape[1] if teacher.input_shape else None
        return Wanted(bands) if isinstance(bands, int) else None
    if teacher is None:
        return None
    own = teacher.student.bands if teacher.student else None
    return Wanted(teacher.network.in_channels, own if own != Data.model_fields["bands"].default else None)


def class_map_key(teacher_classes: list[str] | None, names: list[str] | None) -> Key:
    """The key `class_map`; rows of classes that both name alike are filled in."""
    why = ("For each teacher class, its shares in your classes. Every row sums to 1, as in Rangeland: {Grassland: 0.7, SemiNatural: "
           "0.3}. With labelled tiles, `kdpipe suggest-map` counts the labels and prints all rows, even before they are filled in."
           )  # fmt: skip
    if teacher_classes is None:
        return Key("class_map", FILL_IN, f"Asked. {why}")
    alike = {name.casefold(): name for name in names or []}
    rows = []
    for name in teacher_classes:
        own = alike.get(name.casefold())
        rows.append(Key(name, Item({own: 1}, "same name") if own else Item(FILL_IN, "asked: {YourClass: share, ...}")))
    return Key("class_map", rows, why)


def _channels(teacher: Inspection | External | None, names: list[str] | None, given: Given) -> Key:
    if given.teacher_classes:
        return Key("classes", names, "Given: its classes, in the order of its channels. No file confirms the order; `kdpipe verify-cache "
                   "--level parity` compares it with your labels.")  # fmt: skip
    if names is not None:
        why = (
            OWN_RUN
            if isinstance(teacher, Inspection)
            else "Measured: the classes that its config.json names, in the order of its channels."
        )
        return Key("classes", names, why)
    channels = _channels_of(teacher)
    why = "Asked: its classes in the order of its channels, from its training code or its author."
    if channels is None:
        return Key("classes", FILL_IN, f"{why} Such as [Tree, Road, Water].")
    if isinstance(teacher, Inspection) and teacher.network.channels == 1:
        why += " Its one channel is a sigmoid's, σ, and stands for two."
        return Key("classes", [Item(FILL_IN, "1 - σ, the rest"), Item(FILL_IN, "σ, what it finds")], why)
    if channels in KNOWN_ORDERS:
        lines, shipped = KNOWN_ORDERS[channels]
        why += f" Teachers with {channels} channels often have {lines['classes']}, as in {shipped}; another order is as likely."
    return Key("classes", [Item(FILL_IN, f"channel {channel}") for channel in range(channels)], why)


def _normalize(teacher: Inspection | External | None, given: Given) -> Key:
    if given.teacher_normalize:
        return Key("normalize", given.teacher_normalize, "Given: the normalisation of its input in training.")
    if isinstance(teacher, Inspection) and teacher.student:
        return Key("normalize", teacher.student.normalize, OWN_RUN)
    return Key("normalize", FILL_IN, "Asked: the normalisation of its input in training: unit (x / 255), imagenet, or {mean: [...], "
               "std: [...]} of x / 255. A wrong one raises no error; the predictions get worse.")  # fmt: skip
