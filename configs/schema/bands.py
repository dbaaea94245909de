"""Bands of image files: those that a run reads, by number, and those among them that a network sees, by number or by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import Field

Bands = Annotated[tuple[int, ...], Field(min_length=1)]
"""Numbers of a file's bands, counted from 1."""
Names = dict[str, int]
"""Numbers of a file's bands by name."""
Choice = Annotated[list[int | str], Field(min_length=1)]
"""A choice among the bands that are read, each by its number in the file or by its name."""

COLOURS = ("red", "green", "blue")


def numbers_of(choice: Sequence[int | str] | None, bands: Sequence[int], names: Mapping[str, int]) -> tuple[int, ...]:
    """
    The file's numbers of the chosen bands, in the order of the choice; all of `bands` where it is None.

    Raises `ValueError`, whose text completes the name of a key, for an unknown name and for a band that is not among `bands`.
    """
    if choice is None:
        return tuple(bands)
    found = []
    for band in choice:
        if isinstance(band, str) and band not in names:
            known = ", ".join(names) or "none"
            raise ValueError(
                f"names the band {band!r}, and data.band_names has {known}: name it there, as {band}: NUMBER"
            )
        number = names[band] if isinstance(band, str) else band
        if number not in bands:
            called = f"{number} ({band})" if isinstance(band, str) else str(number)
            raise ValueError(f"takes band {called}, and data.bands reads {list(bands)}: add it there")
        found.append(number)
    return tuple(found)


def text_of(numbers: Sequence[int], names: Mapping[str, int]) -> str:
    """`1 (red), 2 (green), 5`: bands by number, with their names where they have one."""
    called = {number: name for name, number in names.items()}
    return ", ".join(f"{number} ({called[number]})" if number in called else str(number) for number in numbers)
