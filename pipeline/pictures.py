"""Class maps and soft targets as pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

MARGIN, LINE = 6, 16  # px between panels, and of a line of text

# One colour a class, told apart by people with the usual colour blindness too: Okabe and Ito's palette, repeated if need be.
PALETTE = np.array(
    [
        (0, 0, 0),
        (0, 158, 115),
        (240, 228, 66),
        (230, 159, 0),
        (213, 94, 0),
        (204, 121, 167),
        (86, 180, 233),
        (0, 114, 178),
    ],
    dtype=np.float32,
)
UNLABELLED = (255, 255, 255)


def colours(num_classes: int) -> NDArray[np.float32]:
    """RGB colours of class indices, float32 `(C, 3)` in 0..255."""
    return PALETTE[np.arange(num_classes) % len(PALETTE)]


def paint_classes(mask_HW: NDArray[Any], num_classes: int) -> NDArray[np.uint8]:
    """A mask of class indices as uint8 `(H, W, 3)`; any other value is white."""
    table = np.full((65536, 3), UNLABELLED, dtype=np.uint8)
    table[:num_classes] = colours(num_classes)
    painted: NDArray[np.uint8] = table[mask_HW.astype(np.uint16)]
    return painted


def paint_soft_target(probs_CHW: NDArray[np.float32]) -> NDArray[np.uint8]:
    """A soft target as the mean of its classes' colours, weighted by probability, uint8 `(H, W, 3)`."""
    blended = np.einsum("chw,cr->hwr", probs_CHW, colours(len(probs_CHW)))
    painted: NDArray[np.uint8] = np.rint(blended).clip(0, 255).astype(np.uint8)
    return painted


def contact_sheet(
    rows: Sequence[Sequence[NDArray[np.uint8]]], titles: Sequence[str], names: Sequence[str]
) -> Image.Image:
    """A picture of `rows` of panels, uint8 `(H, W, 3)`, under column titles, with a legend of the class colours."""
    widths = [max(row[column].shape[1] for row in rows) for column in range(len(titles))]
    heights = [max(panel.shape[0] for panel in row) for row in rows]
    width = sum(widths) + MARGIN * (len(titles) + 1)
    sheet = Image.new("RGB", (width, sum(heights) + MARGIN * (len(rows) + 2) + 2 * LINE), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    left = MARGIN
    for column, title in enumerate(titles):
        draw.text((left, MARGIN // 2), title, fill=(0, 0, 0))
        top = MARGIN + LINE
        for row, height in zip(rows, heights, strict=True):
            sheet.paste(Image.fromarray(row[column]), (left, top))
            top += height + MARGIN
        left += widths[column] + MARGIN
    left, top = MARGIN, sheet.height - LINE
    for name, colour in zip(names, colours(len(names)), strict=True):
        draw.rectangle((left, top, left + 10, top + 10), fill=tuple(int(v) for v in colour), outline=(0, 0, 0))
        draw.text((left + 14, top - 1), name, fill=(0, 0, 0))
        left += 26 + int(draw.textlength(name))
    return sheet
