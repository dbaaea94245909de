"""How a scene is cut into windows: their size, their overlap, and the memory that a row of them takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psutil

from kdpipe.configs.errors import ConfigError, DataError
from kdpipe.data.scenes import Scene
from kdpipe.pipeline.models.views import STRIDE
from kdpipe.pipeline.models.windows import Span, cut_spans, spans, tapered_overlap, window_of
from kdpipe.pipeline.text import size_text

if TYPE_CHECKING:
    from kdpipe.pipeline.prediction.model import Card, Predictor

WINDOW_PX = 1024
OVERLAP_PX = 128  # `windows.MARGIN` has the measured error


def is_blended(card: Card) -> bool:
    """Whether logits of overlapping windows are blended."""
    return card.output == "logits"


def windows_over(scene: Scene, window: int, overlap: int, card: Card) -> tuple[list[Span], list[Span]]:
    """The windows over the rows and over the columns of a scene."""
    sides = (scene.height, scene.width)
    if is_blended(card):
        rows, columns = (spans(size, window, overlap, tapered_overlap) for size in sides)
    else:
        rows, columns = (cut_spans(size, window, overlap) for size in sides)
    return rows, columns


def sizes_of_windows(predictor: Predictor, window: int | None, overlap: int | None) -> tuple[int, int]:
    """
    The side and the overlap of windows in px: those given, else that of the network's only size, or `WINDOW_PX` and `OVERLAP_PX`.

    Raises `ConfigError` for sizes off the network's grid, and for a window of another size than the network takes.
    """
    chosen = window_of(predictor.side, window, predictor.origin)
    side = WINDOW_PX if chosen is None else chosen
    shared = min(OVERLAP_PX, side // 2 // STRIDE * STRIDE) if overlap is None else overlap
    least = 2 * STRIDE if predictor.side is None else STRIDE
    for name, value, smallest in (("--window", side, least), ("--overlap", shared, 0)):
        if value < smallest or value % STRIDE:
            raise ConfigError(
                f"{name} must be a multiple of {STRIDE} px, from {smallest} up, so that windows lie in the network's grid; found {value}"
            )
    if shared > side // 2:
        raise ConfigError(f"--overlap must be at most half of --window, {side // 2} px, found {shared}")
    return side, shared


def require_memory(scene: Scene, window: int, bands: int, classes: int) -> None:
    """Raise `DataError` for a scene whose strip of one row of windows does not fit into the free memory."""
    strip_bytes = min(window, scene.height) * scene.width * (bands + 4 * classes)
    free_bytes = psutil.virtual_memory().available
    if strip_bytes > free_bytes:
        raise DataError(
            f"{scene.path} is {scene.width} px wide: one row of windows takes {size_text(strip_bytes)} at least, and "
            f"{size_text(free_bytes)} of memory are free. Choose a smaller --window, or cut the scene into columns "
            "(`gdal_translate -srcwin`)"
        )


def advice_on_memory(window: int, side: int | None) -> list[str]:
    """What takes less memory, options of `predict`; windows of a network of one size stay."""
    can_shrink = side is None and window >= 4 * STRIDE
    smaller = [f"--window {window // 2 // STRIDE * STRIDE} (now {window})"] if can_shrink else []
    return ["--batch-size 1", *smaller, "--device cpu"]
