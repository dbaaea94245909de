"""
A first config for a user's own tiles and teacher: what was found becomes keys, each with the reason for its value.

Comments begin with where a value comes from: `Measured` in the files, `Said` on the command line, a `Guess` where others began, or
`Asked` of the user, who finds `FILL_IN` in its place: the classes' names, the teacher's order of channels and its normalisation are in no
file, and a wrong guess of them trains without an error. Keys whose default is right are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from kdpipe.configs.errors import CheckpointError, ConfigError, DataError
from kdpipe.configs.fill_in import FILL_IN
from kdpipe.data.survey import PERCENTILES, Root
from kdpipe.pipeline.inspection.checkpoint import Inspection
from kdpipe.pipeline.models.student import FORMERS
from kdpipe.pipeline.starter.classes import read_labels
from kdpipe.pipeline.starter.training import train_keys
from kdpipe.pipeline.starter.yaml import Item, Key, as_yaml, comment
from kdpipe.pipeline.teacher.loading import KNOWN_ORDERS

VAL_NAMES = ("val", "valid", "validation")
TEST_NAMES = ("test", "testing")
WINDOW_FROM_PX = 2048**2  # whole, a U-Net's feature maps of such a tile take several GB in float32
WINDOW_PX = 1024

HEADER = """\
Written by `kdpipe init` from {tiles} tiles in {roots} and {teacher}.
Measured: counted in these files. Said: on the command line. Guess: where others began. Asked: only you know; each {fill_in} is \
one, and every command stops and names its line until it is filled in. Keys that are not here have their defaults.
Paths are relative to the folder that the commands are run in."""


@dataclass(frozen=True)
class Said:
    """What the command line says beside the folders; None where it is silent."""

    name: str
    val: Sequence[str] = ()
    images: str = "images"
    masks: str = "masks"
    classes: list[str] | None = None
    ignore_index: int | None = None
    bands: tuple[int, ...] | None = None
    teacher_classes: list[str] | None = None
    teacher_normalize: str | None = None


@dataclass(frozen=True)
class Draft:
    """The config's keys, and what the user is to know: `problems` would stop a run, `notes` would not."""

    keys: list[Key]
    header: str
    roles: dict[str, str]
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The config as YAML."""
        return "\n".join(comment(self.header)) + "\n\n" + "\n".join(as_yaml([key]) for key in self.keys)


def draft_config(roots: Sequence[Root], teacher: Inspection | None, said: Said) -> Draft:
    """
    The first config for surveyed roots and an inspected teacher (None: its section is to be filled in).

    Raises `ConfigError` where what was said contradicts what was found, `DataError` where no image can be read, `CheckpointError`
    where the file cannot be a teacher.
    """
    roles = assign_roles(roots, said.val)
    train = [root for root in roots if roles[root.path] in ("train", "unlabelled")]
    labelled = [root for root in roots if roles[root.path] == "train"]
    if not train:
        raise ConfigError(
            f"all folders are for validation or tests by their names: {', '.join(root.path for root in roots)}; name one to "
            "train on"
        )
    if not any(root.headers for root in train):
        raise DataError(f"none of the images that were opened can be read; the first: {train[0].problems[0]}")
    labels = read_labels(roots, roles, said.classes, said.ignore_index)
    teacher_classes = _teacher_classes(teacher, said)
    problems = [problem for root in roots for problem in root.problems] + labels.problems
    notes = list(labels.notes)
    data = _data(roots, roles, said, notes, problems)
    keys = [
        Key("name", said.name, f"Said: by the name of this file. The run's weights go to model_weights/default/{said.name}."),
        Key("classes", labels.keys),
        Key("data", data),
        Key("teacher", _teacher(teacher, teacher_classes, train, said)),
        _class_map(teacher_classes, labels.names),
        Key("cache", [Key("path", f"caches/{said.name}.zarr", "Where stage one puts the teacher's answers, and stage two reads them.")]),
        Key("distill", [Key("temperature", 1.0, "Guess. The default, 2, cost the student a class on the tiles of configs/dubai.")]),
        Key("student", [
            Key("architecture", "linknet", "Guess: a small one to begin with, 2.5 million parameters. "
                "Any of smp's, unetformer or ftunetformer."),
            Key("encoder", "tu-regnetx_002", "Guess: any of smp's or timm's (tu-NAME). Its weights are random; encoder_weights: imagenet "
                "downloads published ones."),
        ]),
        Key("train", train_keys(train)),
    ]  # fmt: skip
    tiles = sum(len(root.tiles) for root in roots)
    found = "no teacher" if teacher is None else f"the teacher {teacher.path}"
    header = HEADER.format(fill_in=FILL_IN, tiles=tiles, roots=", ".join(root.path for root in roots), teacher=found)
    if labelled and not any(role == "val" for role in roles.values()):
        notes.append(NO_VAL)
    return Draft(keys, header, roles, problems, notes)


NO_VAL = (
    "no folder to validate on. Move whole scenes or regions out of the training folder into one of their own, called Val or named with "
    "--val: neighbouring tiles are too alike for a random choice of them to tell anything"
)


def assign_roles(roots: Sequence[Root], val: Sequence[str] = ()) -> dict[str, str]:
    """
    `train`, `val`, `unlabelled` or `not used` for each root's path.

    Roots in `val` or called so validate, those called test are not used, those without a mask are unlabelled; where no root has
    masks, all train.
    """
    roles = {}
    for root in roots:
        name = PurePath(root.path).name.lower()
        if root.path in val or (name in VAL_NAMES and root.masks):
            roles[root.path] = "val"
        elif name in TEST_NAMES:
            roles[root.path] = "not used"
        else:
            roles[root.path] = "train" if root.masks else "unlabelled"
    if "train" not in roles.values():
        roles = {path: "train" if role == "unlabelled" else role for path, role in roles.items()}
    return roles


def _data(roots: Sequence[Root], roles: dict[str, str], said: Said, notes: list[str], problems: list[str]) -> list[Key]:
    paths = {role: [path for path, of in roles.items() if of == role] for role in roles.values()}
    train = [root for root in roots if roles[root.path] == "train"]
    keys = [Key("train", paths["train"], "Roots of tiles to train on, " + _masks_text(train, said) + ".")]
    if "val" in paths:
        keys.append(Key("val", paths["val"], "Roots to validate on: by name, or as said with --val."))
    else:
        keys.append(
            Key(
                "val",
                [],
                "None was found: without labelled tiles of other places no score is computed, and last.ckpt is all there is.",
            )
        )
    if "unlabelled" in paths:
        keys.append(
            Key(
                "unlabelled",
                paths["unlabelled"],
                "Measured: roots without a mask; they train from the teacher's answers alone.",
            )
        )
    if "not used" in paths:
        notes.append(
            f"not in the config, by name: {', '.join(paths['not used'])}; `kdpipe evaluate CHECKPOINT {paths['not used'][0]}` scores there"
        )
    if said.images != "images":
        keys.append(Key("images", said.images, "Said: the folder of images in each root."))
    if said.masks != "masks":
        keys.append(Key("masks", said.masks, "Said: the folder of masks in each root."))
    without = sum(len(root.tiles) - root.masks for root in train)
    if without:
        keys.append(
            Key(
                "allow_missing_masks",
                True,
                f"Measured: {without} of {sum(len(root.tiles) for root in train)} tiles have no "
                "mask, and train from the teacher's answers alone.",
            )
        )
    used = [root for root in roots if roles[root.path] != "not used"]
    return keys + _bands_and_stretch(used, said.bands, notes, problems)  # fmt: skip


def _masks_text(train: Sequence[Root], said: Said) -> str:
    if not any(root.masks for root in train):
        return "none with a mask"
    return f"each a folder with {said.images}/ and {said.masks}/ paired by stem; masks hold class indices"


def _bands_and_stretch(
    roots: Sequence[Root], bands: tuple[int, ...] | None, notes: list[str], problems: list[str]
) -> list[Key]:
    counts = sum((root.bands for root in roots), Counter())
    rgb: Counter[Any] = sum((root.rgb for root in roots), Counter())
    dtypes = sum((root.dtypes for root in roots), Counter())
    alpha = sum(root.alpha for root in roots)
    if len(counts) > 1:
        notes.append(f"images differ in their number of bands: {_counts_text(counts)}")
    if len(dtypes) > 1:
        notes.append(f"images differ in their type: {_counts_text(dtypes)}")
    least, most = min(counts), max(counts)
    keys = []
    sampled = next((root for root in roots if root.ranges), None)
    span = (f" In {sampled.images_read} images of {sampled.path}, {PERCENTILES[0]:g} to {PERCENTILES[1]:g} % of the values of each "
            f"band are {_ranges_text(sampled.ranges)}." if sampled else "")  # fmt: skip
    if bands is None and least < 3 <= most:
        problems.append(
            f"images have {_counts_text(counts)} bands: a run takes the same three of all of them, so give those with fewer a "
            "folder of their own and leave it out, or convert them"
        )
    if bands is not None:
        if max(bands) > least:
            raise ConfigError(f"--bands asks for {list(bands)}, and images have {_counts_text(counts)} bands")
        keys.append(Key("bands", list(bands), "Said: the bands to take as red, green and blue, counted from 1."))
    elif least == most == 1:
        keys.append(
            Key(
                "bands",
                [1, 1, 1],
                "Measured: images have one band, which is shown to the networks as red, green and blue.",
            )
        )
    elif least == 2 or (most - bool(alpha) > 3 and len(rgb) == 1 and None in rgb) or (len(rgb) > 1 and most > 3):
        why = ("Asked: which three bands are red, green and blue as the teacher knows them, counted from 1, such as [3, 2, 1]. Images do "
               f"not say what theirs are, {_counts_text(counts)} in number.")  # fmt: skip
        keys.append(Key("bands", FILL_IN, why + span))
    elif len(rgb) == 1 and next(iter(rgb)) not in (None, (1, 2, 3)):
        keys.append(Key("bands", list(next(iter(rgb))), "Measured: which bands the files call red, green and blue."))
    if dtypes.keys() - {"uint8"}:
        keys.append(
            Key(
                "stretch",
                {"percentiles": list(PERCENTILES)},
                f"Measured: images hold {_counts_text(dtypes)}, and networks see 0..255. These percentiles, a guess, over all training "
                f"images become 0 and 255; range: [low, high] fixes them.{span}",
            )
        )
    return keys


def _ranges_text(ranges: Sequence[tuple[float, float]]) -> str:
    return ", ".join(f"{number}: {low:g} to {high:g}" for number, (low, high) in enumerate(ranges, start=1))


def _counts_text(counts: Counter[Any]) -> str:
    """`uint16`, or `3 (20 images), 4 (1 image)`."""
    if len(counts) == 1:
        return str(next(iter(counts)))
    return ", ".join(f"{key} ({n} image{'s' if n > 1 else ''})" for key, n in sorted(counts.items()))


def _teacher_classes(teacher: Inspection | None, said: Said) -> list[str] | None:
    """The names of the teacher's channels in their order, as far as they are known; checks them against the file."""
    own = teacher.student.classes if teacher and teacher.student else None
    names = said.teacher_classes or own
    channels = teacher.network.channels if teacher else None
    if names is not None and channels is not None and len(names) != channels:
        raise ConfigError(
            f"--teacher-classes names {len(names)} classes, and {teacher.path if teacher else ''} answers in {channels} channels: "
            "name every channel, in the order of the channels (docs/teachers.md says how one is dropped)"
        )
    return names


def _teacher(teacher: Inspection | None, names: list[str] | None, train: Sequence[Root], said: Said) -> list[Key]:
    if teacher is None:
        network, path = None, FILL_IN
    else:
        network, path = teacher.network, teacher.path
        if network.architecture in FORMERS:
            raise CheckpointError(
                f"{path} is {network}, which kdpipe trains as a student; a teacher is a network of segmentation-models-pytorch"
            )
    asked = "Asked: it was not recognised in the file;" if teacher else "Asked:"
    keys = [
        Key("architecture", (network and network.architecture) or FILL_IN,
            "Measured: from the names and shapes of its tensors." if network and network.architecture else
            f"{asked} one of segmentation-models-pytorch's, such as unet."),
        Key("encoder", (network and network.encoder) or FILL_IN,
            "Measured: likewise." if network and network.encoder else f"{asked} such as efficientnet-b4, or tu-NAME for one of timm's."),
        Key("checkpoint", path, "Said: its file of weights." if teacher else
            "Asked: its file of weights (.pth, .ckpt, .safetensors)."),
        _channels(teacher, names, said),
        _normalize(teacher, said),
    ]  # fmt: skip
    largest = max(
        (size for root in train for size in root.sizes_HW), key=lambda size: size[0] * size[1], default=(0, 0)
    )
    if largest[0] * largest[1] > WINDOW_FROM_PX:
        keys.append(
            Key("window", WINDOW_PX, f"Guess: the largest tile has {largest[0]} x {largest[1]} px. It is asked in overlapping windows of "
                "this side, which a GPU holds; the larger, the better the answer.")
        )  # fmt: skip
    return keys


def _channels(teacher: Inspection | None, names: list[str] | None, said: Said) -> Key:
    if said.teacher_classes:
        return Key("classes", names, "Said: its classes in the order of its channels. No file tells whether that is their order; "
                   "`kdpipe verify-cache --level parity` compares it with your labels.")  # fmt: skip
    if names is not None:
        return Key("classes", names, "Measured: from the configuration that this student was trained with.")
    channels = teacher.network.channels if teacher else None
    why = "Asked: its classes in the order of its channels, as its training code or its author says."
    if channels is None:
        return Key("classes", FILL_IN, f"{why} Such as [Tree, Road, Water].")
    if channels in KNOWN_ORDERS:
        lines, shipped = KNOWN_ORDERS[channels]
        why += f" With {channels} channels often {lines['classes']}, as in {shipped}; another order is as likely."
    return Key("classes", [Item(FILL_IN, f"channel {channel}") for channel in range(channels)], why)


def _normalize(teacher: Inspection | None, said: Said) -> Key:
    if said.teacher_normalize:
        return Key("normalize", said.teacher_normalize, "Said: how its input was normalised in its training.")
    if teacher and teacher.student:
        return Key(
            "normalize",
            teacher.student.normalize,
            "Measured: from the configuration that this student was trained with.",
        )
    return Key("normalize", FILL_IN, "Asked: how its input was normalised in its training: unit (x / 255), imagenet, or {mean: [...], "
               "std: [...]} of x / 255. With the wrong one it answers, only worse.")  # fmt: skip


def _class_map(teacher_classes: list[str] | None, names: list[str] | None) -> Key:
    """Rows for the classes that both name alike; the others are asked."""
    why = ("For each class of the teacher, the share of each of your classes that it stands for; a row sums to 1, as in "
           "Rangeland: {Grassland: 0.7, SemiNatural: 0.3}.")  # fmt: skip
    suggest = "With labelled tiles, `kdpipe suggest-map` counts what the labels say and prints all rows, also before they are filled in."
    if teacher_classes is None:
        return Key("class_map", FILL_IN, f"Asked: {why} {suggest}")
    alike = {name.casefold(): name for name in names or []}
    rows = []
    for name in teacher_classes:
        own = alike.get(name.casefold())
        rows.append(Key(name, Item({own: 1}, "same name") if own else Item(FILL_IN, "asked: {YourClass: share, ...}")))
    return Key("class_map", rows, f"{why} {suggest}")
