"""The labelled losses and class weights of `train`, by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated

from pydantic import Field

LEAST, MOST = 1e-6, 1e6  # products and ratios of two weights are finite numbers above zero
Weight = Annotated[float, Field(ge=LEAST, le=MOST)]

LABELLED_LOSSES = ("ce", "dice", "focal", "jaccard", "lovasz", "tversky")
USUAL_LABELLED_LOSS = {"ce": 1.0, "dice": 1.0}  # the guide's


def refuse_unknown_losses(losses: Mapping[str, float]) -> None:
    """Raise `ValueError`, whose text completes a sentence about a key, where there is no loss or a name is not one."""
    unknown = [name for name in losses if name not in LABELLED_LOSSES]
    if unknown or not losses:
        raise ValueError(f"needs one or more of {', '.join(LABELLED_LOSSES)}, found {', '.join(unknown) or 'none'}")


def refuse_other_weights(value: object) -> None:
    """Raise `ValueError` where a `train.class_weights` as written is neither null, nor `auto`, nor a mapping to weights."""
    expected = "expected auto, or weights of classes such as {Forest: 2.0}"
    if value not in (None, "auto") and not isinstance(value, Mapping):
        raise ValueError(f"{expected}, found {value!r}")
    for name, weight in value.items() if isinstance(value, Mapping) else ():
        if not isinstance(weight, int | float) or not LEAST <= weight <= MOST:
            raise ValueError(f"{expected}, from {LEAST:f} to {MOST:.0f}, found {name}: {weight!r}")


def refuse_unknown_classes(weights: Mapping[str, float], names: Iterable[str]) -> None:
    """Raise `ValueError` where `train.class_weights` names a class that is not one of the student's."""
    unknown = [name for name in weights if name not in names]
    if unknown:
        raise ValueError(f"train.class_weights names {unknown}, not among classes.names {list(names)}")
