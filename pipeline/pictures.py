"""Class maps, soft targets and errors as pictures."""

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
RIGHT, WRONG = (70, 70, 70), (255, 64, 64)  # of an answer, beside `UNLABELLED`


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


def paint_entropy(probs_CHW: NDArray[np.float32]) -> NDArray[np.uint8]:
    """A soft target's entropy as grey, uint8 `(H, W, 3)`: black is a certain answer, white `ln C`, all classes alike."""
    entropy_HW = -np.sum(probs_CHW * np.log(np.maximum(probs_CHW, np.finfo(np.float32).tiny)), axis=0)
    grey_HW = np.rint(255 * entropy_HW / np.log(len(probs_CHW))).clip(0, 255).astype(np.uint8)
    return np.repeat(grey_HW[..., None], 3, axis=2)


def paint_errors(answer_HW: NDArray[Any], mask_HW: NDArray[Any], num_classes: int) -> NDArray[np.uint8]:
    """Where class indices differ from a mask's, uint8 `(H, W, 3)`: grey is right, red wrong, white without a label."""
    painted = np.where(
        (answer_HW == mask_HW)[..., None], np.array(RIGHT, dtype=np.uint8), np.array(WRONG, dtype=np.uint8)
    )
    painted[(mask_HW < 0) | (mask_HW >= num_classes)] = UNLABELLED
    return painted


def legend(names: Sequence[str]) -> Image.Image:
    """The classes' names beside their colours, in a row."""
    font = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    places = np.cumsum([MARGIN] + [26 + int(font.textlength(name)) for name in names]).tolist()
    strip = Image.new("RGB", (places[-1], LINE), UNLABELLED)
    draw = ImageDraw.Draw(strip)
    for name, colour, left in zip(names, colours(len(names)), places, strict=False):
        draw.rectangle((left, 0, left + 10, 10), fill=tuple(int(v) for v in colour), outline=(0, 0, 0))
        draw.text((left + 14, -1), name, fill=(0, 0, 0))
    return strip


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
    sheet.paste(legend(names), (0, sheet.height - LINE))
    return sheet
