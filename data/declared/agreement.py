"""
What tiles declare against each other: the order of colours, scales, the colour tables of masks, orientations.

The tiles of a run are read in one way, so files that say different things cannot all be read right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdpipe.data.declared.header import NAMELESS, Declared

RGB = {"red", "green", "blue"}
SHOWN = 3  # ways of saying something, with an example of each
_Triple = tuple[int, int, int]


@dataclass
class Agreement:
    """
    What the tiles that were added declare, and how it contradicts itself or `data.bands`.

    Args:
        bands: `data.bands`; None where they are still to be chosen.
        chosen: whether the user wrote them, rather than left the default.
        classes: number of classes; entries of colour tables beyond them mean nothing.
    """

    bands: Sequence[int] | None
    chosen: bool
    classes: int
    _orders: Counter[tuple[str, ...]] = field(default_factory=Counter)
    _named: Counter[_Triple] = field(default_factory=Counter)
    _scales: Counter[tuple[tuple[float, float], ...]] = field(default_factory=Counter)
    _types: Counter[str] = field(default_factory=Counter)
    _turned: Counter[int] = field(default_factory=Counter)
    _examples: dict[object, Path] = field(default_factory=dict)
    _tables: set[tuple[tuple[int, int, int, int], ...]] = field(default_factory=set)
    _class_of: dict[_Triple, tuple[int, Path]] = field(default_factory=dict)
    _contradiction: str | None = None

    def add_image(self, path: Path, image: Declared) -> None:
        """Note what an image declares."""
        last = image.bands if self.bands or image.rgb is None else max(image.rgb)
        bands = [band for band in (self.bands or range(1, last + 1)) if band <= image.bands]
        order = tuple(image.colours[band - 1] for band in bands)
        if NAMELESS.isdisjoint(order) and (self.bands or image.rgb):
            self._count(self._orders, order, path)
        if image.rgb is not None:
            self._count(self._named, image.rgb, path)
        self._count(self._types, image.dtype, path)
        scales = tuple((image.scales[band - 1], image.offsets[band - 1]) for band in bands)
        self._count(self._scales, scales[:1] if len(set(scales)) == 1 else scales, path)
        if image.orientation != 1:
            self._count(self._turned, image.orientation, path)

    def add_mask(self, path: Path, mask: Declared) -> None:
        """Note what a mask declares."""
        table = mask.colour_table
        if table is None or table in self._tables or self._contradiction is not None:
            return
        self._tables.add(table)
        own = [colour[:3] for colour in table[: self.classes]]
        for value, colour in enumerate(own):
            if own.count(colour) > 1:  # padding
                continue
            first, where = self._class_of.setdefault(colour, (value, path))
            if first != value:
                self._contradiction = (
                    f"the colour tables of masks contradict each other: {_rgb_text(colour)} is {first} in {where} and {value} in {path}, "
                    "so the same index means different classes. Give all masks one table, and recode their indices to it"
                )
                return

    @property
    def faults(self) -> list[str]:
        """What is certainly wrong."""
        found = [self._contradiction] if self._contradiction else []
        if "uint8" in self._types and len(self._types) > 1:
            found.append(
                f"images hold values of different ranges: {self._list(self._types, str)}; data.stretch is one for all images, so convert "
                "them to one type and unit, or leave those of one type out"
            )
        if len(self._orders) > 1:
            orders = self._list(self._orders, ", ".join)
            found.append(
                f"images name the bands that are read differently: {orders}; all images are read alike, so give them one order "
                "(`gdal_translate -b 3 -b 2 -b 1`), or correct what they declare (`gdal_edit.py -colorinterp_1 red`)"
            )
        elif self.bands is not None and not self.chosen and (misread := self._misread()):
            found.append(
                f"{misread}. Set data.bands to those three, or to {list(self.bands)} if the networks should see this order"
            )
        return found

    @property
    def notes(self) -> list[str]:
        """What is probably wrong."""
        found = []
        is_swapped = len(self._orders) == 1 and set(next(iter(self._orders))) == RGB
        if self.chosen and is_swapped and (misread := self._misread()):
            found.append(f"{misread}, so the networks see another order; right only if the teacher was trained on it")
        if len(self._scales) > 1:
            scales = self._list(self._scales, _scales_text)
            found.append(
                f"images declare different scales and offsets: {scales}; kdpipe reads values as they are stored, so store them alike"
            )
        elif any(pair != (1.0, 0.0) for pairs in self._scales for pair in pairs):
            scales = _scales_text(next(iter(self._scales)))
            found.append(
                f"images declare {scales}; kdpipe reads values as they are stored, and data.stretch is in stored values"
            )
        if self._turned:
            count = self._turned.total()
            found.append(
                f"{count} image{'s have' if count > 1 else ' has'} an EXIF orientation: {self._list(self._turned, str)}; viewers and "
                "annotation tools turn such an image, kdpipe reads pixels as they are stored. If its mask is turned, store the image "
                "upright (`mogrify -auto-orient FILE`)"
            )
        return found

    def _misread(self) -> str | None:
        """
        How three bands differ from those that all images call red, green and blue; None if they do not.

        Of another number of bands nobody knows which order is right.
        """
        if len(self._named) != 1 or self.bands is None or len(self.bands) != len(RGB):
            return None
        if next(iter(self._named)) == tuple(self.bands):
            return None
        named, example = next(iter(self._named)), self._examples[next(iter(self._named))]
        return f"images call bands {list(named)} red, green and blue (such as {example}), and data.bands is {list(self.bands)}"

    def _count(self, counts: Counter[Any], key: Any, path: Path) -> None:
        counts[key] += 1
        self._examples.setdefault(key, path)

    def _list(self, counts: Counter[Any], text: Callable[[Any], str]) -> str:
        """`red, green, blue in 12 (such as a.tif), blue, green, red in 3 (such as b.tif)`."""
        shown = [f"{text(key)} in {n} (such as {self._examples[key]})" for key, n in counts.most_common(SHOWN)]
        return "; ".join([*shown, *(["…"] if len(counts) > SHOWN else [])])


def _scales_text(pairs: tuple[tuple[float, float], ...]) -> str:
    return " and ".join(f"scale {scale:g} and offset {offset:g}" for scale, offset in pairs[:1]) + (
        f" (other bands: {', '.join(f'{scale:g} and {offset:g}' for scale, offset in pairs[1:])})"
        if len(pairs) > 1
        else ""
    )


def _rgb_text(colour: _Triple) -> str:
    return f"colour {colour[0]}, {colour[1]}, {colour[2]}"
