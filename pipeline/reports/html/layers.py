"""
A tile as layers that can be laid over each other: its image, label, soft target, the target's entropy, answers and their errors.

Every layer is encoded for a page (a `data:` URL), small: at most `SHOWN_PX` a side. Maps of classes are scaled by their nearest pixel
and kept exactly; what is blended from colours, and photographs, is averaged and compressed with loss.

Shapes: H W a tile's pixels, C classes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kdpipe.pipeline.pictures import paint_classes, paint_soft_target
from kdpipe.pipeline.reports.html.page import data_url

SHOWN_PX = 512  # longest side of a layer: four tiles of six layers take about 1 MB
QUALITY = 80  # of WebP with loss, 0..100
HEAT = "magma"  # matplotlib's colours of numbers; grows lighter evenly
RIGHT, WRONG, NO_LABEL = (
    (38, 50, 56),
    (255, 99, 110),
    (150, 150, 150),
)  # dark, light and between: told apart without colours

IMAGE, LABEL, TARGET, ENTROPY = "image", "label", "soft target", "entropy"
STUDENT, ERRORS = "student", "errors"
DIFFERENCE = "|Δp|"
LAYERS = (IMAGE, LABEL, TARGET, ENTROPY, DIFFERENCE, STUDENT, ERRORS)  # in which order they are offered


@dataclass
class TilePictures:
    """
    A tile as it is shown: its size in px, layers by name (`data:` URLs of one size), and numbers to tell and to sort by.

    `exact` names the layers whose pixels are classes, not mixtures. A number's name reads on after it: `45.2 % right`.
    """

    tile: str
    group: str
    height: int
    width: int
    layers: dict[str, str] = field(default_factory=dict)
    exact: set[str] = field(default_factory=set)
    figures: dict[str, float] = field(default_factory=dict)


def draw_tile(
    tile: str,
    group: str,
    image_HWC: NDArray[np.uint8],
    num_classes: int,
    ignore_index: int,
    *,
    labels_HW: NDArray[Any] | None = None,
    target_CHW: NDArray[np.float32] | None = None,
    answers: Mapping[str, NDArray[np.intp]] | None = None,
    live_CHW: NDArray[np.float32] | None = None,
    largest_difference: float = 1.0,
) -> TilePictures:
    """
    The layers that can be drawn of a tile called `tile`, one of the `group`.

    `labels_HW` are class indices, `target_CHW` is the teacher's soft target; None where there is none. `answers` are class
    indices `(H, W)` by who gives them: "" is the only student. `live_CHW` is what the teacher says now: its difference to
    the target is drawn, the largest over classes, in colours that end at `largest_difference`.
    """
    height, width = image_HWC.shape[:2]
    shown = TilePictures(tile, group, height, width)

    def exactly(name: str, painted_HWC: NDArray[np.uint8]) -> None:
        shown.layers[name] = _encoded(_scaled(painted_HWC, Image.Resampling.NEAREST), lossless=True)
        shown.exact.add(name)

    labelled_HW = None if labels_HW is None else labels_HW != ignore_index
    entropy_HW = None if target_CHW is None else entropy(target_CHW)
    shown.layers[IMAGE] = _encoded(_scaled(image_HWC, Image.Resampling.BOX), lossless=False)
    if labels_HW is not None:
        exactly(LABEL, paint_classes(labels_HW, num_classes))
    if target_CHW is not None and entropy_HW is not None:
        shown.layers[TARGET] = _encoded(_scaled(paint_soft_target(target_CHW), Image.Resampling.BOX), lossless=False)
        shown.layers[ENTROPY] = _heat(entropy_HW, math.log(num_classes))
    for name, answers_HW in (answers or {}).items():
        suffix = f" {name}" if name else ""
        exactly(STUDENT + suffix, paint_classes(answers_HW, num_classes))
        if labels_HW is not None and labelled_HW is not None:
            exactly(ERRORS + suffix, paint_errors(labels_HW, answers_HW, labelled_HW))
            if labelled_HW.any():
                shown.figures["% right" + suffix] = 100 * float((labels_HW == answers_HW)[labelled_HW].mean())
        if target_CHW is not None:
            agreement = float((target_CHW.argmax(axis=0) == answers_HW).mean())
            shown.figures["% as the teacher" + suffix] = 100 * agreement
    if live_CHW is not None and target_CHW is not None:
        difference_HW = np.abs(target_CHW - live_CHW).max(axis=0)
        shown.layers[DIFFERENCE] = _heat(difference_HW, largest_difference)
        shown.figures["largest |Δp|"] = float(difference_HW.max())
    if entropy_HW is not None:
        shown.figures["nats of entropy"] = float(entropy_HW.mean())
    return shown


def entropy(probs_CHW: NDArray[np.float32]) -> NDArray[np.float32]:
    """The entropy of every pixel in nats, float32 `(H, W)` in 0..ln C."""
    terms_CHW = probs_CHW * np.log(np.maximum(probs_CHW, np.float32(1e-30)))
    found: NDArray[np.float32] = np.maximum(-terms_CHW.sum(axis=0), 0)
    return found


def paint_errors(
    labels_HW: NDArray[Any], answers_HW: NDArray[Any], labelled_HW: NDArray[np.bool_]
) -> NDArray[np.uint8]:
    """Where answers are right, wrong, or not to be judged, as uint8 `(H, W, 3)`."""
    table = np.array([RIGHT, WRONG, NO_LABEL], dtype=np.uint8)
    painted: NDArray[np.uint8] = table[np.where(labelled_HW, labels_HW != answers_HW, 2).astype(np.intp)]
    return painted


def heat_colours(steps: int) -> list[tuple[int, int, int]]:
    """RGB colours of `steps` numbers from the smallest to the largest."""
    rgba = matplotlib.colormaps[HEAT](np.linspace(0, 1, steps), bytes=True)
    return [(int(r), int(g), int(b)) for r, g, b, _ in rgba]


def _heat(values_HW: NDArray[np.float32], largest: float) -> str:
    """Numbers as colours, the mean of the pixels that are shown as one."""
    size = _shown_size(values_HW.shape)
    small_HW = np.asarray(Image.fromarray(values_HW.astype(np.float32)).resize(size, Image.Resampling.BOX))
    painted_HWA = matplotlib.colormaps[HEAT](small_HW / largest, bytes=True)
    return _encoded(Image.fromarray(np.ascontiguousarray(painted_HWA[..., :3])), lossless=False)


def _shown_size(shape: tuple[int, ...]) -> tuple[int, int]:
    """`(width, height)` as Pillow has it."""
    scale = min(1.0, SHOWN_PX / max(shape[:2]))
    return max(1, round(shape[1] * scale)), max(1, round(shape[0] * scale))


def _scaled(painted_HWC: NDArray[np.uint8], how: Image.Resampling) -> Image.Image:
    return Image.fromarray(painted_HWC).resize(_shown_size(painted_HWC.shape), how)


def _encoded(picture: Image.Image, *, lossless: bool) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", lossless=lossless, quality=100 if lossless else QUALITY)
    return data_url(buffer.getvalue(), "image/webp")
