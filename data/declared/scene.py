"""What a scene declares against what a student was trained on: which of its bands are the student's, by their colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kdpipe.configs.errors import DataError, count_text
from kdpipe.configs.schema import Alpha
from kdpipe.data.declared.header import NAMELESS, called, read_declared

_RGB = ("red", "green", "blue")


@dataclass(frozen=True)
class Bands:
    """The `numbers` of a scene's bands, counted from 1, in the order of the student's; `note` is a line for the user, if there is one."""

    numbers: tuple[int, ...]
    note: str | None = None


def colours_of(path: Path, alpha: Alpha = "opacity") -> list[str]:
    """What an image calls its bands, all of them, in GDAL's words (see `Declared.colours` and `header.called`)."""
    return list(called(read_declared(path).colours, alpha))


def bands_of_scene(
    path: str,
    colours: Sequence[str],
    bands: Sequence[int],
    trained_colours: Sequence[str] | None,
    trained_count: int | None = None,
) -> Bands:
    """
    The bands of a scene that a student needs who was trained on the numbers `bands`.

    `colours` are what the scene calls its bands, `trained_colours` what the training images called `bands`, and `trained_count` how many
    bands these had that are not alpha (None: not recorded). Where both name the same colours, each once, they decide, else the numbers
    do. Raises `DataError` if a band is missing, or if the scene calls it alpha.
    """
    by_colour = _by_colour(colours, trained_colours)
    if by_colour is not None:
        called = ", ".join(trained_colours or ())
        note = (
            f"its bands are called {', '.join(colours)}: bands {_text(by_colour)} are taken as {called}, as in training"
        )
        return Bands(by_colour, note if by_colour != tuple(bands) else None)
    if max(bands) > len(colours):
        of = f" of images with {trained_count}" if trained_count is not None else ""
        raise DataError(
            f"{path} has {count_text(len(colours), 'bands')}, and the student was trained on bands {list(bands)}{of}: map "
            "scenes that have these bands in the same places (`gdal_translate -b …`, `gdalbuildvrt -separate`)"
        )
    found = [colours[band - 1] for band in bands]
    if "alpha" in found:
        band = bands[found.index("alpha")]
        raise DataError(
            f"{path} calls band {band} alpha, which is opacity and no colour, and the student was trained on bands {list(bands)}: write "
            f"the scene with its bands in that order (`gdal_translate -b …`), or, if band {band} is something else, such as infrared, call "
            f"it so (`gdal_edit.py -colorinterp_{band} undefined`), or train with data.alpha: band"
        )
    expected = _RGB if trained_colours is None else trained_colours
    if all(is_ == of or is_ in NAMELESS or of in NAMELESS for is_, of in zip(found, expected, strict=True)):
        return Bands(tuple(bands), _count_note(bands, count_of(colours), trained_count))
    said = (
        "does not say what its training called them"
        if trained_colours is None
        else f"called them {', '.join(expected)}"
    )
    return Bands(
        tuple(bands),
        f"its bands {_text(bands)} are called {', '.join(found)}, and the student {said}: they are taken by their numbers, which is "
        "wrong if they are in another order than in training",
    )


def count_of(colours: Sequence[str]) -> int:
    """The number of bands that are not alpha, by what they are called."""
    return sum(colour != "alpha" for colour in colours)


def _count_note(bands: Sequence[int], count: int, trained_count: int | None) -> str | None:
    if trained_count is None or count == trained_count:
        return None
    return (
        f"it has {count_text(count, 'bands')} and the training images had {trained_count}: bands {_text(bands)} are taken by "
        "their numbers, which is wrong if they are in another order than in training"
    )


def _by_colour(colours: Sequence[str], wanted: Sequence[str] | None) -> tuple[int, ...] | None:
    """The numbers of the bands that are called `wanted`; None unless each is a colour and names exactly one band."""
    if wanted is None or len(set(wanted)) < len(wanted) or not NAMELESS.isdisjoint(wanted):
        return None
    if any(list(colours).count(colour) != 1 for colour in wanted):
        return None
    return tuple(list(colours).index(colour) + 1 for colour in wanted)


def _text(bands: Sequence[int]) -> str:
    return ", ".join(map(str, bands))
