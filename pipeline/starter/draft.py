"""
A first config for a user's own tiles and teacher: each key with the reason for its value.

A comment begins with the source of the value: `Measured` in the files, `Given` as an option, a `Guess` at a common starting
point, or `Asked` of the user, who finds `FILL_IN`. The names of the classes, the order of the teacher's channels and its
normalisation are in no file, and training with a wrong guess raises no error. Keys with the right default are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kdpipe.configs.errors import ConfigError, DataError, count_text
from kdpipe.configs.fill_in import FILL_IN
from kdpipe.configs.schema import Alpha, Data
from kdpipe.configs.schema.labels import IGNORE
from kdpipe.data.declared.check import Comparison, Findings
from kdpipe.data.declared.tile import image_faults
from kdpipe.data.survey import Root
from kdpipe.pipeline.inspection.checkpoint import Inspection
from kdpipe.pipeline.inspection.external import External
from kdpipe.pipeline.starter.classes import Labels, read_labels
from kdpipe.pipeline.starter.data import data_keys
from kdpipe.pipeline.starter.given import Given
from kdpipe.pipeline.starter.layouts import split_of
from kdpipe.pipeline.starter.teacher import class_map_key, teacher_classes, teacher_keys, wanted_bands
from kdpipe.pipeline.starter.training import train_keys
from kdpipe.pipeline.starter.yaml import Key, as_yaml, comment

HEADER = """\
Written by `kdpipe init` from {tiles} in {roots} and {teacher}.
A comment begins with the source of the value. Measured: counted in these files. Given: an option of the command. Guess: a common \
starting point. Asked: only you know it. Every command stops at a {fill_in} and names its line. Keys that are left out have \
their defaults.
Paths are relative to the folder that the commands are run in."""

NO_VAL = (
    "no folder to validate on. Move whole scenes or regions out of the training folder into a folder called Val, or name one with "
    "--val: neighbouring tiles are too alike for a random split to prove anything"
)


@dataclass(frozen=True)
class Draft:
    """The keys of a config. `problems` would stop a run; `notes` would not."""

    keys: list[Key]
    header: str
    roles: dict[str, str]
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The config as YAML."""
        return "\n".join(comment(self.header)) + "\n\n" + "\n".join(as_yaml([key]) for key in self.keys)


def draft_config(roots: Sequence[Root], teacher: Inspection | External | None, given: Given) -> Draft:
    """
    The first config for surveyed roots and an inspected teacher; without a teacher its section is left to be filled in.

    Raises `ConfigError` if an option contradicts the files, `DataError` if no image can be read, `CheckpointError` if the file
    cannot be a teacher.
    """
    roles = assign_roles(roots, given.val)
    train = [root for root in roots if roles[root.path] in ("train", "unlabelled")]
    if not train:
        raise ConfigError(
            f"all folders are for validation or tests by their names: {', '.join(root.path for root in roots)}; name one to "
            "train on"
        )
    if not any(root.headers for root in train):
        raise DataError(f"none of the images that were opened can be read; the first: {train[0].problems[0]}")
    labels = read_labels(roots, roles, _class_names(given), given.ignore_index)
    channels = teacher_classes(teacher, given)
    problems = [problem for root in roots for problem in root.problems] + labels.problems
    notes = list(labels.notes)
    if given.layout is not None:
        problems += given.layout.problems
        notes += given.layout.notes
    keys = [
        Key("name", given.name, f"Given: the name of this file. The run's weights go to model_weights/default/{given.name}."),
        Key("classes", labels.keys),
        Key("data", [*data_keys(roots, roles, given, notes, problems, wanted_bands(teacher)), *labels.remap]),
        Key("teacher", teacher_keys(teacher, channels, train, given)),
        class_map_key(channels, labels.names),
        Key("cache", [
            Key("path", f"caches/{given.name}.zarr", "Stage one stores the teacher's predictions here, and stage two reads them."),
        ]),
        Key("distill", [
            Key("temperature", 1.0, "Guess: the teacher's own probabilities. The default, 2, gained nothing on the Dubai tiles."),
            Key("loss", {"kl": 1, "dice": 1}, "Guess: of recipes/few_labels. dice kept rare classes on Ohio, and cost one on Dubai."),
        ]),
        Key("student", [
            Key("architecture", "linknet", "Guess: a small network to start with, 2.5 million parameters. Any of smp's, unetformer "
                "or ftunetformer."),
            Key("encoder", "tu-regnetx_002", "Guess: any of smp's or timm's (tu-NAME). It starts from random weights; "
                "encoder_weights: imagenet downloads published ones."),
        ]),
        Key("train", train_keys(train)),
    ]  # fmt: skip
    found = compared(roots, roles, given, keys, labels)
    problems += found.faults
    notes += found.notes
    header = HEADER.format(
        fill_in=FILL_IN,
        tiles=count_text(sum(len(root.tiles) for root in roots), "tiles"),
        roots=", ".join(root.path for root in roots),
        teacher="no teacher" if teacher is None else f"the teacher {teacher.path}",
    )
    has_val = "val" in roles.values() or (given.layout is not None and given.layout.val_list is not None)
    if "train" in roles.values() and not has_val:
        notes.append(NO_VAL)
    return Draft(keys, header, roles, problems, notes)


def _class_names(given: Given) -> list[str] | None:
    """The classes of --classes, or those of --colours in their order."""
    if given.classes is not None or given.colours is None:
        return given.classes
    return [name for name in given.colours if name != IGNORE]


def compared(
    roots: Sequence[Root], roles: dict[str, str], given: Given, keys: Sequence[Key], labels: Labels
) -> Findings:
    """What the surveyed headers declare, against the drafted `data.bands` and against each other."""
    bands, alpha = drafted_bands(keys), drafted_alpha(keys)
    comparison = Comparison(bands, given.bands is not None, labels.count)
    faults: list[str] = []
    for root in roots:
        for declared in root.seen if roles[root.path] != "not used" else ():
            headers = declared.called(alpha)
            comparison.add(headers, is_val=roles[root.path] == "val")
            image = headers.image
            if image is not None and bands is not None and max(bands) <= image.bands:
                faults += image_faults(headers.tile.image, image, bands, has_stretch=True)
    findings = comparison.findings()
    return Findings(faults + findings.faults, findings.notes)


def drafted_bands(keys: Sequence[Key]) -> list[int] | None:
    """The bands that a run of these keys reads; None if they are left to the user."""
    (data,) = (key.value for key in keys if key.name == "data")
    written = [key.value for key in data if key.name == "bands"]
    return None if written == [FILL_IN] else (written or [list(Data.model_fields["bands"].default)])[0]


def drafted_alpha(keys: Sequence[Key]) -> Alpha:
    """What a run of these keys takes a band called alpha for."""
    (data,) = (key.value for key in keys if key.name == "data")
    return "band" if any(key.name == "alpha" for key in data) else "opacity"


def assign_roles(roots: Sequence[Root], val: Sequence[str] = ()) -> dict[str, str]:
    """
    `train`, `val`, `unlabelled` or `not used` for each root's path.

    Roots in `val`, or with such a name, are for validation. Roots called test are not used. Roots without masks are unlabelled; if
    no root has masks, all are for training.
    """
    roles = {}
    for root in roots:
        split = split_of(root.path, [other.path for other in roots])
        if root.path in val or (split == "val" and root.masks):
            roles[root.path] = "val"
        elif split == "test":
            roles[root.path] = "not used"
        else:
            roles[root.path] = "train" if root.masks else "unlabelled"
    if "train" not in roles.values():
        roles = {path: "train" if role == "unlabelled" else role for path, role in roles.items()}
    return roles
