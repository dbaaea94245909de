"""The options of `kdpipe init`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Given:
    """What the user gave besides the folders; None where not given."""

    name: str
    val: Sequence[str] = ()
    images: str = "images"
    masks: str = "masks"
    classes: list[str] | None = None
    ignore_index: int | None = None
    bands: tuple[int, ...] | None = None
    teacher_classes: list[str] | None = None
    teacher_normalize: str | None = None
