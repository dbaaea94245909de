"""What the values and colours of mask files stand for, where they are not the indices of the classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

Byte = Annotated[int, Field(ge=0, le=255)]
Colour = tuple[Byte, Byte, Byte]
"""Red, green and blue, 0..255."""
IGNORE = "ignore"  # stands for classes.ignore_index


@dataclass(frozen=True)
class MaskCodes:
    """
    The class index (or `ignore_index`) of each colour, and of each value, of mask files.

    With `colours` masks hold colours, as three bands or as a palette. With `values` they hold other codes than indices. Without both
    they hold indices.
    """

    colours: dict[Colour, int] = field(default_factory=dict)
    values: dict[int, int] = field(default_factory=dict)


def codes_of(
    colours: dict[str, Colour | list[Colour]], remap: dict[int, int | str], names: Sequence[str], ignore_index: int
) -> MaskCodes:
    """
    The codes that `data.colours` and `data.remap` give.

    Raises `ValueError`, whose text completes `data.`, for a class that is not among `names`, an index beyond them, and a colour that
    stands for two classes.
    """

    def index_of(target: int | str, key: str) -> int:
        if target in names:
            return names.index(str(target))
        if target in (IGNORE, ignore_index):
            return ignore_index
        if isinstance(target, int) and 0 <= target < len(names):
            return target
        raise ValueError(f"{key} names {target!r}, which is neither one of classes.names {list(names)} nor {IGNORE}")

    by_colour: dict[Colour, int] = {}
    for name, given in colours.items():
        for colour in given if isinstance(given, list) else [given]:
            if by_colour.setdefault(colour, index_of(name, "colours")) != index_of(name, "colours"):
                raise ValueError(f"colours gives {list(colour)} to two classes")
    return MaskCodes(by_colour, {value: index_of(target, "remap") for value, target in remap.items()})
