"""The section `classes` from the values in the masks: the number of classes, the value for no label, and oddities."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from kdpipe.configs.errors import ConfigError, count_text, summarise
from kdpipe.configs.fill_in import FILL_IN
from kdpipe.data.declared.tile import RECIPE
from kdpipe.data.survey import Root
from kdpipe.pipeline.starter.yaml import Item, Key
from kdpipe.pipeline.text import part_text

NO_LABEL_VALUES = (255, 65535)  # the largest of 8 and of 16 bits, which nearly everyone writes for unlabelled pixels
MAX_LISTED = 64  # classes
MOST_CLASSES = 200  # of 8 bits, more values are greys
ROUNDED = {0, 1, 254, 255}  # what compression that loses makes of black and white


@dataclass(frozen=True)
class Labels:
    """
    The keys of `classes`, their number, and the names if they are known. `problems` would stop a run; `notes` would not.

    `remap` is the key `data.remap`, of masks that hold codes instead of indices.
    """

    keys: list[Key]
    names: list[str] | None
    count: int
    remap: list[Key] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_labels(
    roots: Sequence[Root], roles: dict[str, str], names: list[str] | None, ignore_index: int | None
) -> Labels:
    """
    The section `classes` for surveyed roots; `names` and `ignore_index` are the user's, None if not given.

    Raises `ConfigError` if masks hold values beyond the names.
    """
    used = [root for root in roots if roles[root.path] in ("train", "val") and root.masks_read]
    values = sum((root.values for root in used), Counter[int]())
    trained = sum((root.values for root in used if roles[root.path] == "train"), Counter[int]())
    read = sum(root.masks_read for root in used if roles[root.path] == "train")
    no_label = ignore_index if ignore_index is not None else _no_label(used, values)
    classes = sorted(value for value in values if value != no_label)
    codes = classes if _are_codes(classes) and (names is None or len(names) == len(classes)) else []
    problems, notes = _oddities(used, classes, no_label, values, are_codes=bool(codes))
    if names is not None:
        _require_named(used, names, [] if codes else classes)
        count = len(names)
    else:
        count = len(codes) or max(classes, default=-1) + 1
    listed = names is not None or (2 <= count <= MAX_LISTED and not problems)
    total = sum(count for value, count in trained.items() if value != no_label)
    order = "values in the masks" if codes else "indices in the masks, counted from 0"
    why = ("Given" if names else "Asked") + f": the names, in the order of the {order}."
    if trained:
        why += f" Measured: shares of the labelled pixels in {count_text(read, 'training masks')}."
    entries: object = FILL_IN
    if listed:
        entries = [
            Item(names[i] if names else FILL_IN, f"{value}{_share(trained, value, total)}" if trained else str(value))
            for i, value in enumerate(codes or range(count))
        ]
    keys = [Key("names", entries, why)]
    if no_label is not None:
        share = part_text(trained[no_label], sum(trained.values()))
        source = "Given" if ignore_index is not None else "Measured"
        keys.append(
            Key(
                "ignore_index",
                no_label,
                f"{source}: mask value of pixels without a label, {share} of the training pixels.",
            )
        )
    return Labels(keys, names, count, _remap(codes), problems, notes)


def _are_codes(values: Sequence[int]) -> bool:
    """Whether values in masks are codes of classes rather than indices, by the many between them that are missing."""
    if len(values) < 2 or values[0] < 0 or len(values) > MAX_LISTED or set(values) >= ROUNDED:
        return False
    missing = values[-1] + 1 - len(values)
    return missing > len(values) or (len(values) == 2 and missing > 0)


def _remap(codes: Sequence[int]) -> list[Key]:
    """The key `data.remap` for masks that hold these codes."""
    why = "Measured: the masks hold these codes, which are no indices. Each is given the class at a place of classes.names, counted from 0."
    return [Key("remap", {code: place for place, code in enumerate(codes)}, why)] if codes else []


def _are_many_classes(values: Sequence[int]) -> bool:
    """Whether values beyond `MAX_LISTED` are the indices of a data set of many classes, such as ADE20K, and no greys."""
    return len(values) <= MOST_CLASSES and 2 * len(values) > values[-1]


def _no_label(roots: Sequence[Root], values: Counter[int]) -> int | None:
    """The value for no label: the largest, if a gap parts it from at least two others, and it is its type's largest or nodata."""
    ordered = sorted(values)
    if len(ordered) < 3 or ordered[-1] == ordered[-2] + 1:
        return None
    declared = {nodata for root in roots for nodata in root.mask_nodata}
    return ordered[-1] if ordered[-1] in NO_LABEL_VALUES or ordered[-1] in declared else None


def _require_named(roots: Sequence[Root], names: list[str], classes: list[int]) -> None:
    beyond = [value for value in classes if value >= len(names)]
    if beyond:
        where = ", ".join(root.path for root in roots if root.values.keys() & set(beyond))
        raise ConfigError(
            f"--classes names {len(names)} classes, 0 to {len(names) - 1}, but masks in {where} hold {', '.join(map(str, beyond[:5]))}: "
            "name every class, leave that folder out, or pass --ignore-index for a value that means no label"
        )


def _oddities(
    roots: Sequence[Root], classes: list[int], no_label: int | None, values: Counter[int], *, are_codes: bool
) -> tuple[list[str], list[str]]:
    problems, notes = [], []
    if are_codes:
        shown = ", ".join(map(str, classes[:6])) + (", …" if len(classes) > 6 else "")
        notes.append(
            f"masks hold {shown}, codes rather than indices: the config has data.remap, which gives each a class. If one of them means no "
            "label, write `ignore` there, and take its name out of classes.names"
        )
    elif any(value < 0 for value in classes):
        problems.append(f"masks hold {classes[0]}: class indices are counted from 0 up, so recode negative values")
    elif classes and classes[-1] >= MAX_LISTED and not _are_many_classes(classes):
        shown = ", ".join(map(str, classes[:6])) + (", …" if len(classes) > 6 else "")
        problems.append(
            f"masks hold {shown}, which are not class indices counted from 0: recode them ({RECIPE}), or pass --ignore-index"
        )
    elif len(classes) == 1:
        problems.append(f"all masks hold only {classes[0]}: a student needs two classes")
    missing = [value for value in range(max(classes, default=0)) if value not in values]
    if missing and not problems and not are_codes:
        notes.append(
            f"no mask that was read holds {summarise(map(str, missing), 12)}: a class without labels is never scored"
        )
    declared = {nodata for root in roots for nodata in root.mask_nodata if nodata is not None} - {no_label}
    if declared & set(classes):
        value = min(declared & set(classes))
        notes.append(
            f"masks declare {value:g} as nodata, which is a class index here: if it means no label, recode it to 255"
        )
    for root in roots:
        others = {value for other in roots if other is not root for value in other.values} | {no_label}
        own = sorted(root.values.keys() - others)
        if own and len(roots) > 1:
            notes.append(
                f"only masks in {root.path} hold {', '.join(map(str, own[:6]))}: are their classes the same as in the other folders?"
            )
    return problems, notes


def _share(counts: Counter[int], value: int, total: int) -> str:
    return f": {part_text(counts[value], total)}" if counts[value] else ": in no mask that was read"
