"""The losses of labels and of soft targets, and the weights of classes, by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field

from kdpipe.configs.schema.teacher import OWN_MODEL

LEAST, MOST = 1e-6, 1e6  # products and ratios of two weights are finite numbers above zero
Weight = Annotated[float, Field(ge=LEAST, le=MOST)]

LABELLED_LOSSES = ("ce", "dice", "focal", "jaccard", "lovasz", "tversky")
USUAL_LABELLED_LOSS = {"ce": 1.0, "dice": 1.0}  # the guide's

SOFT_LOSSES = ("kl", "dice", "jaccard")
USUAL_SOFT_LOSS = {"kl": 1.0}

Trust = Literal["none", "confidence", "entropy", "threshold"]


def refuse_unknown_losses(losses: Mapping[str, float]) -> None:
    """Raise `ValueError`, whose text completes a sentence about a key, where there is no loss or a name is not one."""
    _refuse_others(losses, LABELLED_LOSSES)


def _refuse_others(given: Mapping[str, object], known: Sequence[str]) -> None:
    unknown = [str(name) for name in given if name not in known]
    if unknown or not given:
        colon = "; YAML needs a space after a colon: {name: 1}" if any(":" in name for name in unknown) else ""
        raise ValueError(f"needs one or more of {', '.join(known)}, found {', '.join(unknown) or 'none'}{colon}")


def refuse_other_soft_losses(value: object) -> None:
    """Raise `ValueError` where a `distill.loss` as written is neither a loss by name, nor weights of them, nor a function's name."""
    if isinstance(value, Mapping):
        _refuse_others(value, SOFT_LOSSES)
        for name, weight in value.items():
            if not isinstance(weight, int | float) or not LEAST <= weight <= MOST:
                raise ValueError(f"expected weights from {LEAST:f} to {MOST:.0f}, found {name}: {weight!r}")
    elif value not in SOFT_LOSSES and not (isinstance(value, str) and re.fullmatch(OWN_MODEL, value)):
        raise ValueError(
            f"expected {', '.join(SOFT_LOSSES)}, weights of them such as {{kl: 1.0, dice: 1.0}}, or a function of your own as "
            f"package.module:name, found {value!r}"
        )


def refuse_other_weights(value: object, least: float = LEAST, most: float = MOST) -> None:
    """Raise `ValueError` where weights of classes as written are neither null, nor `auto`, nor a mapping to numbers in a range."""
    expected = f"expected auto, or weights of classes such as {{Forest: {min(2.0, most / 2):g}}}"
    if value not in (None, "auto") and not isinstance(value, Mapping):
        raise ValueError(f"{expected}, found {value!r}")
    for name, weight in value.items() if isinstance(value, Mapping) else ():
        if not isinstance(weight, int | float) or not least <= weight <= most:
            raise ValueError(f"{expected}, from {least:f} to {most:.0f}, found {name}: {weight!r}")


def refuse_unknown_classes(key: str, weights: Mapping[str, float], names: Iterable[str]) -> None:
    """Raise `ValueError` where `key`, weights of classes, names one that is not the student's."""
    unknown = [name for name in weights if name not in names]
    if unknown:
        raise ValueError(f"{key} names {unknown}, not among classes.names {list(names)}")
