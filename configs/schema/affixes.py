"""What surrounds a tile's name in the names of its files: `img_` in `img_001.png`, `_sat` in `001_sat.png`."""

from __future__ import annotations

from typing import NamedTuple


class Affixes(NamedTuple):
    """The beginning and the end of stems that are no part of a tile's name; both empty by default."""

    prefix: str = ""
    suffix: str = ""

    def within(self, stem: str) -> str | None:
        """What lies between the two in the stem of a file; None if the stem lacks one of them."""
        if len(stem) < len(self.prefix) + len(self.suffix):
            return None
        if not (stem.startswith(self.prefix) and stem.endswith(self.suffix)):
            return None
        return stem[len(self.prefix) : len(stem) - len(self.suffix)]

    def around(self, name: str) -> str:
        """The stem of the file of a tile of this name."""
        return f"{self.prefix}{name}{self.suffix}"

    def text(self, begin: str = "begins", end: str = "ends") -> str:
        """`begins with img_ and ends in _sat`, with verbs for one name or several; empty without affixes."""
        parts = [(f"{begin} with ", self.prefix), (f"{end} in ", self.suffix)]
        return " and ".join(words + part for words, part in parts if part)


NO_AFFIXES = Affixes()
