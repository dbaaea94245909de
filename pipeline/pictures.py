"""
Class maps, soft targets, entropy and errors as RGB pixels, and sheets of them: the one palette, used everywhere.

Shapes: H W pixels, B bands, C classes, 3 colour channels (uint8).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

# Okabe and Ito's palette, which colour-blind readers can tell apart: https://jfly.uni-koeln.de/color/
PALETTE = np.array(
    [(0, 0, 0), (0, 158, 115), (240, 228, 66), (230, 159, 0), (213, 94, 0), (204, 121, 167), (86, 180, 233), (0, 114, 178)],
    dtype=np.float32,
)  # fmt: skip
UNLABELLED = (255, 255, 255)
RIGHT, WRONG, UNJUDGED = (38, 50, 56), (255, 99, 110), (150, 150, 150)  # dark, light, between: no hue needed
MARGIN, LINE, FONT_PX = 8, 20, 14  # px between panels, of a line of text, and of its letters


def visible(image_HWB: NDArray[np.uint8], places: Sequence[int]) -> NDArray[np.uint8]:
    """An image as it is shown, uint8 `(H, W, 3)`: its bands at three `places` as red, green and blue, or one as grey."""
    return image_HWB[..., list(places) if len(places) == 3 else [places[0]] * 3]


def colours(num_classes: int) -> NDArray[np.float32]:
    """RGB colours of class indices, float32 `(C, 3)` in 0..255; from the ninth class on, lighter, and then again."""
    pale = (PALETTE + 255) / 2
    return np.concatenate([PALETTE, pale])[np.arange(num_classes) % (2 * len(PALETTE))]


def paint_classes(mask_HW: NDArray[Any], num_classes: int) -> NDArray[np.uint8]:
    """A mask of class indices as uint8 `(H, W, 3)`; any other value is white."""
    table = np.full((65536, 3), UNLABELLED, dtype=np.uint8)
    table[:num_classes] = colours(num_classes)
    painted: NDArray[np.uint8] = table[mask_HW.astype(np.uint16)]
    return painted


def paint_soft_target(probs_CHW: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The mean of the classes' colours, weighted by probability, uint8 `(H, W, 3)`."""
    blended = np.einsum("chw,cr->hwr", probs_CHW, colours(len(probs_CHW)))
    painted: NDArray[np.uint8] = np.rint(blended).clip(0, 255).astype(np.uint8)
    return painted


def entropy(probs_CHW: NDArray[np.float32]) -> NDArray[np.float32]:
    """The entropy of each pixel in nats, float32 `(H, W)` in 0..ln C."""
    terms_CHW = probs_CHW * np.log(np.maximum(probs_CHW, np.float32(1e-30)))
    found: NDArray[np.float32] = np.maximum(-terms_CHW.sum(axis=0), 0)
    return found


def paint_entropy(probs_CHW: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The entropy of each pixel as grey, uint8 `(H, W, 3)`: black is 0, white is `ln C`, where all classes are alike."""
    grey_HW = np.rint(255 * entropy(probs_CHW) / np.log(len(probs_CHW))).clip(0, 255).astype(np.uint8)
    return np.repeat(grey_HW[..., None], 3, axis=2)


def paint_errors(predicted_HW: NDArray[Any], labels_HW: NDArray[Any], num_classes: int) -> NDArray[np.uint8]:
    """Predictions as `RIGHT` or `WRONG` by the labels, uint8 `(H, W, 3)`; pixels without a label are `UNJUDGED`."""
    table = np.array([RIGHT, WRONG, UNJUDGED], dtype=np.uint8)
    unlabelled_HW = (labels_HW < 0) | (labels_HW >= num_classes)
    painted: NDArray[np.uint8] = table[np.where(unlabelled_HW, 2, predicted_HW != labels_HW).astype(np.intp)]
    return painted


class Panel(NamedTuple):
    """A picture of a contact sheet, uint8 `(H, W, 3)`, and the line below it."""

    pixels: NDArray[np.uint8]
    caption: str = ""


def legend(names: Sequence[str]) -> Image.Image:
    """The classes' names beside their colours, in one row."""
    font = _font()
    ends = np.cumsum([MARGIN] + [FONT_PX + 20 + int(font.getlength(name)) for name in names]).tolist()
    strip = Image.new("RGB", (ends[-1], LINE), UNLABELLED)
    draw = ImageDraw.Draw(strip)
    for name, colour, left in zip(names, colours(len(names)), ends, strict=False):
        fill = tuple(int(value) for value in colour)
        draw.rectangle((left, 2, left + FONT_PX - 2, FONT_PX), fill=fill, outline=(0, 0, 0))
        draw.text((left + FONT_PX + 3, 0), name, fill=(0, 0, 0), font=font)
    return strip


def contact_sheet(rows: Sequence[Sequence[Panel]], titles: Sequence[str], names: Sequence[str]) -> Image.Image:
    """Rows of panels under column titles, which may have several lines, with a legend of the classes called `names`."""
    font = _font()
    title_lines = max(title.count("\n") + 1 for title in titles)
    needed = [max(font.getlength(line) for line in title.split("\n")) for title in titles]
    widths = [max(int(need), *(row[i].pixels.shape[1] for row in rows)) for i, need in enumerate(needed)]
    heights = [max(panel.pixels.shape[0] for panel in row) + LINE + MARGIN for row in rows]
    strip = legend(names)
    width = max(sum(widths) + MARGIN * (len(titles) + 1), strip.width)
    top = MARGIN + title_lines * LINE
    sheet = Image.new("RGB", (width, top + sum(heights) + MARGIN + LINE), UNLABELLED)
    draw = ImageDraw.Draw(sheet)
    left = MARGIN
    for column, (title, column_width) in enumerate(zip(titles, widths, strict=True)):
        draw.multiline_text((left, MARGIN // 2), title, fill=(0, 0, 0), font=font, spacing=LINE - FONT_PX - 2)
        y = top
        for row, height in zip(rows, heights, strict=True):
            panel = row[column]
            sheet.paste(Image.fromarray(panel.pixels), (left, y))
            draw.text((left, y + panel.pixels.shape[0] + 2), panel.caption, fill=(0, 0, 0), font=font)
            y += height
        left += column_width + MARGIN
    sheet.paste(strip, (0, sheet.height - LINE - MARGIN // 2))
    return sheet


def _font() -> ImageFont.FreeTypeFont:
    """Matplotlib's own font: present wherever kdpipe is, with letters beyond ASCII."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), FONT_PX)
