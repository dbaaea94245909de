"""The labelled losses and class weights of `train`, by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated

from pydantic import Field

Weight = Annotated[float, Field(ge=1e-6, le=1e6)]  # products and ratios of two of them are finite numbers above zero

LABELLED_LOSSES = ("ce", "dice", "focal", "jaccard", "lovasz", "tversky")
USUAL_LABELLED_LOSS = {"ce": 1.0, "dice": 1.0}  # the guide's


def refuse_unknown_losses(losses: Mapping[str, float]) -> None:
    """Raise `ValueError`, whose text completes a sentence about a key, where there is no loss or a name is not one."""
    unknown = [name for name in losses if name not in LABELLED_LOSSES]
    if unknown or not losses:
        raise ValueError(f"needs one or more of {', '.join(LABELLED_LOSSES)}, found {', '.join(unknown) or 'none'}")


def refuse_unknown_classes(weights: Mapping[str, float], names: Iterable[str]) -> None:
    """Raise `ValueError` where `train.class_weights` names a class that is not one of the student's."""
    unknown = [name for name in weights if name not in names]
    if unknown:
        raise ValueError(f"train.class_weights names {unknown}, not among classes.names {list(names)}")
