"""A grid of tiles to browse, and the viewer with a divider between two layers of one; `page.js` moves them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape

from kdpipe.pipeline.pictures import UNLABELLED, colours
from kdpipe.pipeline.reports.html.layers import (
    DIFFERENCE,
    ENTROPY,
    ERRORS,
    IMAGE,
    LAYERS,
    NO_LABEL,
    RIGHT,
    WRONG,
    TilePictures,
    heat_colours,
)

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
<kbd>1</kbd>…<kbd>9</kbd> the layer left, with <kbd>Shift</kbd> right, <kbd>Esc</kbd> closes.</p>
</dialog>"""


def browser(tiles: Sequence[TilePictures], names: Sequence[str]) -> str:
    """
    The HTML of a grid of tiles, with a choice of layer and of order, and a legend of classes called `names`.

    A page with one has `VIEWER` once, and is made with `page(…, script=True)`.
    """
    found = dict.fromkeys(name for tile in tiles for name in tile.layers)
    layers = [name for kind in LAYERS for name in found if name == kind or name.startswith(f"{kind} ")]
    exact = set().union(*(tile.exact for tile in tiles))
    figures = list(dict.fromkeys(name for tile in tiles for name in tile.figures))
    options = "".join(
        f'<option value="{escape(name)}"{" data-exact" if name in exact else ""}>{escape(name)}</option>'
        for name in layers  # the first of them is shown
    )
    orders = '<option value="" selected>as listed</option>' + "".join(
        f'<option value="{escape(name)}" data-sign="{sign}">{escape(name)}: {word} first</option>'
        for name in figures
        for sign, word in ((1, "smallest"), (-1, "largest"))
    )
    items = "".join(_item(tile) for tile in tiles)
    # Within a script "<" could end it; as an escape of JSON it is the same text.
    rest = json.dumps([{n: url for n, url in tile.layers.items() if n != IMAGE} for tile in tiles]).replace(
        "<", "\\u003c"
    )
    return (
        f'<section class="browser" aria-label="Tiles"><div class="controls needs-script">'
        f'<label>Show <select data-choose="layer">{options}</select></label>'
        f'<label>Order <select data-choose="order">{orders}</select></label></div>'
        f'<div class="legends">{_legend(layers, names)}</div>'
        f'<ul class="tiles">{items}</ul><script type="application/json">{rest}</script></section>'
    )


def _item(tile: TilePictures) -> str:
    facts = [tile.group, *(f"{_number(value)} {name}" for name, value in tile.figures.items())]
    told = ", ".join(facts)
    return (
        f'<li data-tile="{escape(tile.tile)}" data-width="{tile.width}" data-height="{tile.height}" '
        f'data-figures="{escape(json.dumps(tile.figures))}" data-facts="{escape(f"{told}, {tile.width} × {tile.height} px")}">'
        f'<button type="button" aria-label="{escape(f"Open {tile.tile}, {told}")}"><span class="picture">'
        f'<img data-layer="{IMAGE}" alt="{escape(f"{tile.tile}: {IMAGE}")}" width="{tile.width}" height="{tile.height}" '
        f'src="{tile.layers[IMAGE]}"><span class="absent" hidden></span></span>'
        f'<span class="name">{escape(tile.tile)}</span><span class="facts">{escape(", ".join(facts[:2]))}</span></button></li>'
    )


def _legend(layers: Sequence[str], names: Sequence[str]) -> str:
    painted = [(name, tuple(map(int, rgb))) for name, rgb in zip(names, colours(len(names)), strict=True)]
    lists = [_swatches("Classes", [*painted, ("no label", UNLABELLED)])]
    if any(name.startswith(ERRORS) for name in layers):
        lists.append(_swatches("Errors", [("right", RIGHT), ("wrong", WRONG), ("no label", NO_LABEL)]))
    stops = ", ".join(_css(colour) for colour in heat_colours(9))
    scales = [f"entropy, 0 to {math.log(len(names)):.2f} nats"] if ENTROPY in layers else []
    scales += ["largest |Δp| over classes, 0 to what is allowed"] if DIFFERENCE in layers else []
    items = "".join(
        f'<li><span class="scale" style="background:linear-gradient(to right,{stops})"></span>{escape(scale)}</li>'
        for scale in scales
    )
    return "".join(lists) + (f'<ul class="legend" aria-label="Scales">{items}</ul>' if items else "")


def _swatches(title: str, colours_of: Sequence[tuple[str, tuple[int, ...]]]) -> str:
    items = "".join(
        f'<li><span class="swatch" style="background:{_css(colour)}"></span>{escape(name)}</li>'
        for name, colour in colours_of
    )
    return f'<ul class="legend" aria-label="{title}">{items}</ul>'


def _css(colour: tuple[int, ...]) -> str:
    return f"rgb({' '.join(map(str, colour))})"


def _number(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2g}"
