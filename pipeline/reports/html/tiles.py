"""
Tiles on a page: which ones, their layers as pictures, and the browser that lays one layer over another.

A layer is a `data:` URL of at most `SHOWN_PX` a side. Classes are scaled by the nearest pixel and stored without loss;
photographs, blended colours and numbers are averaged and compressed with loss. `page.js` moves the browser.

Shapes: H W a tile's pixels, C classes.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any, TypeVar

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kdpipe.cache.reader import SoftTargetCache
from kdpipe.configs.schema import Config
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.pictures import (
    RIGHT,
    UNJUDGED,
    UNLABELLED,
    WRONG,
    colours,
    entropy,
    paint_classes,
    paint_errors,
    paint_soft_target,
    visible,
)
from kdpipe.pipeline.precompute.subjects import Subject, WholeTile, subject_noun, subjects
from kdpipe.pipeline.reports.html.page import data_url

if TYPE_CHECKING:
    from kdpipe.data.rasters import Stretch
    from kdpipe.pipeline.evaluation.evaluate import Model

T = TypeVar("T")
Targets = Callable[[Subject, NDArray[np.uint8]], NDArray[np.float32]]
"""From a subject and its image, uint8 `(H, W, B)`, to its soft target, float32 `(C, H, W)`."""

SHOWN_PX = 512  # longest side of a layer: four tiles of six layers take about 1 MB
QUALITY = 80  # of WebP with loss, 0..100
HEAT = "magma"  # matplotlib's colours of numbers: lightness rises evenly

IMAGE, LABEL, TARGET, ENTROPY = "image", "label", "soft target", "entropy"
STUDENT, ERRORS = "student", "errors"
DIFFERENCE = "|Δp|"
LAYERS = (IMAGE, LABEL, TARGET, ENTROPY, DIFFERENCE, STUDENT, ERRORS)  # in the order in which they are offered

VIEWER = """
<dialog id="viewer" aria-labelledby="viewer-title">
<header><h2 id="viewer-title" data-part="title"></h2><button type="button" data-part="close" aria-label="Close">✕</button></header>
<p class="quiet" data-part="facts"></p>
<div class="between">
<label>Left <select data-part="left"></select></label><label>Right <select data-part="right"></select></label>
</div>
<div class="stage" data-part="stage">
<div class="layer right" data-part="right-layer"></div><div class="layer left" data-part="left-layer"></div><div class="divider"></div>
<input type="range" min="0" max="100" value="50" data-part="split" aria-label="Divider between the left and the right layer">
</div>
<div class="between">
<button type="button" data-part="previous">‹ Previous</button><span data-part="place" role="status"></span>
<button type="button" data-part="next">Next ›</button>
</div>
<div data-part="legends"></div>
<p class="quiet">Keys: <kbd>←</kbd> <kbd>→</kbd> move the divider, <kbd>N</kbd> <kbd>P</kbd> next and previous tile,
<kbd>1</kbd>…<kbd>9</kbd> the left layer, with <kbd>Shift</kbd> the right one, <kbd>Esc</kbd> closes.</p>
</dialog>"""


@dataclass
class TilePictures:
    """
    A tile as a page shows it: its size in px, its layers (`data:` URLs of one size by name), and figures to sort by.

    `exact` names the layers whose pixels are classes, not mixtures. A figure reads `{value} {name}`: `45.2 % right`.
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
    *,
    labels_HW: NDArray[Any] | None = None,
    target_CHW: NDArray[np.float32] | None = None,
    predictions: Mapping[str, NDArray[np.intp]] | None = None,
    live_CHW: NDArray[np.float32] | None = None,
    largest_difference: float = 1.0,
) -> TilePictures:
    """
    The layers of a tile called `tile`, one of a `group` such as "validation tile"; layers without their data are left out. The image is
    as `pictures.visible` shows it.

    Labels are class indices, and any other value is no label. `target_CHW` is the teacher's soft target. `predictions` are
    class indices `(H, W)` by the student's name, "" for an only one. `live_CHW` is the soft target predicted anew: its
    largest difference over classes is drawn, in colours up to `largest_difference`.
    """
    shown = TilePictures(tile, group, *image_HWC.shape[:2])

    def exactly(name: str, painted_HWC: NDArray[np.uint8]) -> None:
        shown.layers[name] = _encoded(_scaled(painted_HWC, Image.Resampling.NEAREST), lossless=True)
        shown.exact.add(name)

    shown.layers[IMAGE] = _encoded(_scaled(image_HWC, Image.Resampling.BOX), lossless=False)
    if labels_HW is not None:
        exactly(LABEL, paint_classes(labels_HW, num_classes))
    if target_CHW is not None:
        entropy_HW = entropy(target_CHW)
        shown.layers[TARGET] = _encoded(_scaled(paint_soft_target(target_CHW), Image.Resampling.BOX), lossless=False)
        shown.layers[ENTROPY] = _heat(entropy_HW, math.log(num_classes))
    for name, predicted_HW in (predictions or {}).items():
        suffix, by = (f" {name}", f" by {name}") if name else ("", "")
        exactly(STUDENT + suffix, paint_classes(predicted_HW, num_classes))
        if labels_HW is not None:
            exactly(ERRORS + suffix, paint_errors(predicted_HW, labels_HW, num_classes))
            labelled_HW = (labels_HW >= 0) & (labels_HW < num_classes)
            if labelled_HW.any():
                shown.figures["% right" + by] = 100 * float((labels_HW == predicted_HW)[labelled_HW].mean())
        if target_CHW is not None:
            agreement = float((target_CHW.argmax(axis=0) == predicted_HW).mean())
            shown.figures["% as the teacher" + by] = 100 * agreement
    if live_CHW is not None and target_CHW is not None:
        difference_HW = np.abs(target_CHW - live_CHW).max(axis=0)
        shown.layers[DIFFERENCE] = _heat(difference_HW, largest_difference)
        shown.figures["max |Δp|"] = float(difference_HW.max())
    if target_CHW is not None:
        shown.figures["nats of entropy"] = float(entropy_HW.mean())
    return shown


def draw_subject(
    subject: Subject, group: str, config: Config, models: Mapping[str, Model], targets: Targets | None, **live: Any
) -> TilePictures:
    """The layers of a subject, predicted by `models` under their names ("" for an only one); `live` goes to `draw_tile`."""
    image_HWC = subject.image()
    return draw_tile(
        subject.id, group, visible(image_HWC, config.data.visible_places), len(config.classes.names),
        labels_HW=subject.labels() if subject.mask is not None else None,
        target_CHW=targets(subject, image_HWC) if targets is not None else None,
        predictions={name: model.predict(image_HWC).argmax(axis=0) for name, model in models.items()},
        **live,
    )  # fmt: skip


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of `items`, evenly spread; with two or more, the first and the last are among them."""
    if count >= len(items):
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int)]


def validation_subjects(config: Config, stretch: Stretch) -> list[Subject]:
    """The validation tiles that have labels. Raises `DataError` where they cannot be listed."""
    return [WholeTile(tile, config, stretch) for tile in list_tiles(config.data, "val") if tile.mask is not None]


def training_subjects(config: Config, stretch: Stretch, cache: SoftTargetCache) -> list[Subject]:
    """The training tiles, or recorded views of them, whose soft targets the cache holds."""
    cached = set(cache.tile_ids)
    return [subject for subject in subjects(config, list_tiles(config.data, "train"), stretch) if subject.id in cached]


def training_noun(config: Config) -> str:
    """The name of a training subject on a page."""
    return "training tile" if subject_noun(config) == "tiles" else "recorded view"


def cached_targets(cache: SoftTargetCache) -> Targets:
    """The soft targets of a cache."""
    return lambda subject, image_HWC: cache.read(subject.id)


def browser(tiles: Sequence[TilePictures], names: Sequence[str]) -> str:
    """
    The HTML of a grid of tiles, with a choice of layer and of order, and a legend of the classes called `names`.

    Its page holds `VIEWER` once, and is made by `page(…, script=True)`.
    """
    found = dict.fromkeys(name for tile in tiles for name in tile.layers)
    layers = [name for kind in LAYERS for name in found if name == kind or name.startswith(f"{kind} ")]
    exact = set().union(*(tile.exact for tile in tiles))
    figures = list(dict.fromkeys(name for tile in tiles for name in tile.figures))
    options = "".join(
        f'<option value="{escape(name)}"{" data-exact" if name in exact else ""}>{escape(name)}</option>'
        for name in layers  # the first one is shown
    )
    orders = '<option value="" selected>as listed</option>' + "".join(
        f'<option value="{escape(name)}" data-sign="{sign}">{escape(name)}: {word} first</option>'
        for name in figures
        for sign, word in ((1, "smallest"), (-1, "largest"))
    )
    items = "".join(_item(tile) for tile in tiles)
    # A "<" could end the script; as an escape of JSON it is the same text.
    rest = json.dumps([{n: url for n, url in tile.layers.items() if n != IMAGE} for tile in tiles]).replace(
        "<", "\\u003c"
    )
    return (
        '<p class="needs-script">Click a tile, or press Enter on it, to compare two of its layers.</p>'
        '<section class="browser" aria-label="Tiles"><div class="controls needs-script">'
        f'<label>Show <select data-choose="layer">{options}</select></label>'
        f'<label>Order <select data-choose="order">{orders}</select></label></div>'
        f'<div class="legends">{_legend(layers, names)}</div>'
        f'<ul class="tiles">{items}</ul><script type="application/json">{rest}</script></section>'
    )


def heat_colours(steps: int) -> list[tuple[int, int, int]]:
    """`steps` RGB colours, from the smallest number to the largest."""
    rgba = matplotlib.colormaps[HEAT](np.linspace(0, 1, steps), bytes=True)
    return [(int(r), int(g), int(b)) for r, g, b, _ in rgba]


def _item(tile: TilePictures) -> str:
    facts = [tile.group, *(f"{_number(value)} {name}" for name, value in tile.figures.items())]
    told = ", ".join(facts)
    return (
        f'<li data-tile="{escape(tile.tile)}" data-width="{tile.width}" data-height="{tile.height}" '
        f'data-figures="{escape(json.dumps(tile.figures))}" data-facts="{escape(f"{told}, {tile.width} × {tile.height} px")}">'
        f'<button type="button" aria-label="{escape(f"Open {tile.tile}, {told}")}"><span class="picture">'
        f'<img data-layer="{IMAGE}" alt="{escape(f"{tile.tile}: {IMAGE}")}" width="{tile.width}" height="{tile.height}" '
        f'src="{tile.layers[IMAGE]}"><span class="absent" hidden></span></span>'
        f'<span class="name">{escape(tile.tile)}</span><span class="facts">{escape(", ".join(facts[:3]))}</span></button></li>'
    )


def _legend(layers: Sequence[str], names: Sequence[str]) -> str:
    painted = [(name, tuple(map(int, rgb))) for name, rgb in zip(names, colours(len(names)), strict=True)]
    lists = [_swatches("Classes", [*painted, ("no label", UNLABELLED)])]
    if any(name.startswith(ERRORS) for name in layers):
        lists.append(_swatches("Errors", [("right", RIGHT), ("wrong", WRONG), ("no label", UNJUDGED)]))
    stops = ", ".join(_css(colour) for colour in heat_colours(9))
    scales = [f"entropy, 0 to {math.log(len(names)):.2f} nats"] if ENTROPY in layers else []
    scales += ["largest |Δp| over classes, 0 to what is allowed"] if DIFFERENCE in layers else []
    items = "".join(
        f'<li><span class="scale" style="background:linear-gradient(to right,{stops})"></span>{escape(scale)}</li>'
        for scale in scales
    )
    return "".join(lists) + (f'<ul class="legend" aria-label="Scales">{items}</ul>' if items else "")


def _swatches(title: str, named: Sequence[tuple[str, tuple[int, ...]]]) -> str:
    items = "".join(
        f'<li><span class="swatch" style="background:{_css(colour)}"></span>{escape(name)}</li>'
        for name, colour in named
    )
    return f'<ul class="legend" aria-label="{title}"><li class="quiet">{title}:</li>{items}</ul>'


def _css(colour: tuple[int, ...]) -> str:
    return f"rgb({' '.join(map(str, colour))})"


def _number(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2g}"


def _heat(values_HW: NDArray[np.float32], largest: float) -> str:
    """Numbers as colours, averaged over the pixels that are shown as one."""
    size = _shown_size(values_HW.shape)
    small_HW = np.asarray(Image.fromarray(values_HW.astype(np.float32)).resize(size, Image.Resampling.BOX))
    painted_HWA = matplotlib.colormaps[HEAT](small_HW / largest, bytes=True)
    return _encoded(Image.fromarray(np.ascontiguousarray(painted_HWA[..., :3])), lossless=False)


def _shown_size(shape: tuple[int, ...]) -> tuple[int, int]:
    """`(width, height)`, in Pillow's order."""
    scale = min(1.0, SHOWN_PX / max(shape[:2]))
    return max(1, round(shape[1] * scale)), max(1, round(shape[0] * scale))


def _scaled(painted_HWC: NDArray[np.uint8], how: Image.Resampling) -> Image.Image:
    return Image.fromarray(painted_HWC).resize(_shown_size(painted_HWC.shape), how)


def _encoded(picture: Image.Image, *, lossless: bool) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", lossless=lossless, quality=100 if lossless else QUALITY)
    return data_url(buffer.getvalue(), "image/webp")
