"""The section `classes` from the values in the masks: the number of classes, the value for no label, and oddities."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from kdpipe.configs.errors import ConfigError
from kdpipe.configs.fill_in import FILL_IN
from kdpipe.data.declared.tile import RECIPE
from kdpipe.data.survey import Root
from kdpipe.pipeline.starter.yaml import Item, Key
from kdpipe.pipeline.text import part_text

NO_LABEL_VALUES = (255, 65535)  # the largest of 8 and of 16 bits, which nearly everyone writes for unlabelled pixels
MAX_LISTED = 64  # classes; larger values are codes or colours rather than indices


@dataclass(frozen=True)
class Labels:
    """The keys of `classes`, their number, and the names if they are known. `problems` would stop a run; `notes` would not."""

    keys: list[Key]
    names: list[str] | None
    count: int
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
    problems, notes = _oddities(used, classes, no_label, values)
    if names is not None:
        _require_named(used, names, classes)
        count = len(names)
    else:
        count = max(classes, default=-1) + 1
    listed = names is not None or (2 <= count <= MAX_LISTED and not problems)
    total = sum(count for value, count in trained.items() if value != no_label)
    why = ("Given" if names else "Asked") + ": the names, in the order of the indices in the masks, counted from 0."
    if trained:
        why += f" Measured: shares of the labelled pixels in {read} training masks."
    entries: object = FILL_IN
    if listed:
        entries = [
            Item(names[i] if names else FILL_IN, f"{i}{_share(trained, i, total)}" if trained else str(i))
            for i in range(count)
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
    return Labels(keys, names, count, problems, notes)


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
    roots: Sequence[Root], classes: list[int], no_label: int | None, values: Counter[int]
) -> tuple[list[str], list[str]]:
    problems, notes = [], []
    if any(value < 0 for value in classes):
        problems.append(f"masks hold {classes[0]}: class indices are counted from 0 up, so recode negative values")
    elif classes and (classes[-1] >= MAX_LISTED or (len(classes) == 2 and classes[-1] > 1)):
        shown = ", ".join(map(str, classes[:6])) + (", ..." if len(classes) > 6 else "")
        hint = "with two classes, recode 255 to 1" if classes == [0, 255] else f"recode them ({RECIPE})"
        problems.append(
            f"masks hold {shown}, which are not class indices counted from 0: {hint}, or pass --ignore-index"
        )
    elif len(classes) == 1:
        problems.append(f"all masks hold only {classes[0]}: a student needs two classes")
    missing = [value for value in range(max(classes, default=0)) if value not in values]
    if missing and not problems:
        notes.append(
            f"no mask that was read holds {', '.join(map(str, missing))}: a class without labels is never scored"
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
