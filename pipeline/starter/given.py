"""The options of `kdpipe init`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kdpipe.configs.schema.labels import IGNORE, MaskCodes, codes_of
from kdpipe.data.survey import NO_LABEL
from kdpipe.pipeline.starter.layouts import Layout


@dataclass(frozen=True)
class Given:
    """What the user gave besides the folders; None where not given."""

    name: str
    val: Sequence[str] = ()
    images: str = "images"
    masks: str = "masks"
    layout: Layout | None = None
    colours: dict[str, list[int]] | None = None
    classes: list[str] | None = None
    ignore_index: int | None = None
    bands: tuple[int, ...] | None = None
    teacher_classes: list[str] | None = None
    teacher_normalize: str | None = None
    limit: int | None = None

    @property
    def codes(self) -> MaskCodes | None:
        """What the colours of masks stand for; None for masks of indices."""
        if self.colours is None:
            return None
        names = [name for name in self.colours if name != IGNORE]
        return codes_of({name: tuple(rgb) for name, rgb in self.colours.items()}, {}, names, NO_LABEL)  # type: ignore[misc]
