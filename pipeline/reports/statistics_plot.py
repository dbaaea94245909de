"""The statistics of a cache as one picture: class shares, histograms, and the tiles of which the teacher was least certain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from kdpipe.cache.reader import SoftTargetCache
from kdpipe.pipeline.inspection.statistics import CacheStatistics, TileStatistics

SHOWN_TILES = 6
SHOWN_PX = 1024  # side of what is shown of a larger tile: its middle
WIDTH_INCHES, HEIGHT_INCHES, DPI = 13, 8.5, 110


def draw_statistics(statistics: CacheStatistics, cache: SoftTargetCache, path: Path) -> None:
    """Write a PNG: shares and histograms above, the most uncertain tiles below, each as likeliest class and as entropy."""
    figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)  # never a window, whatever the user's backend is
    figure.suptitle(
        f"{len(statistics.tiles)} tiles, {statistics.pixels / 1e6:.1f} MP: mean entropy {statistics.entropy:.3f} nats, mean "
        f"confidence {statistics.confidence:.3f}",
        fontsize=10,
    )
    parts: Any = figure.subfigures(2, 1, height_ratios=[1, 1.5])
    above, below = parts
    axes = above.subplots(1, 3)
    _draw_shares(axes[0], statistics)
    largest = np.log(len(statistics.classes))
    _draw_histogram(axes[1], statistics.entropy_histogram, float(largest), "entropy of a pixel (nats)")
    _draw_histogram(axes[2], statistics.confidence_histogram, 1.0, "confidence of a pixel (largest probability)")
    shown = sorted(statistics.tiles, key=lambda tile: -tile.entropy)[:SHOWN_TILES]
    below.suptitle("the most uncertain tiles: likeliest class, and entropy", fontsize=9)
    grid = below.subplots(2, SHOWN_TILES, squeeze=False)
    for column in range(SHOWN_TILES):
        if column < len(shown):
            _draw_tile(grid[:, column], shown[column], cache, float(largest))
        else:
            grid[0, column].remove()
            grid[1, column].remove()
    handles = [
        Patch(color=colour, label=name)
        for name, colour in zip(statistics.classes, _colours(len(statistics.classes)), strict=True)
    ]
    below.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 8), fontsize=8, frameon=False)
    figure.savefig(path, format="png")


def _colours(num_classes: int) -> list[Any]:
    """Ten that are told apart easily; from the eleventh class on twenty, in pairs of dark and light, and then again."""
    palette = matplotlib.colormaps["tab10" if num_classes <= 10 else "tab20"]
    return [palette(i % palette.N) for i in range(num_classes)]


def _draw_shares(ax: Axes, statistics: CacheStatistics) -> None:
    places = np.arange(len(statistics.classes))
    colours = _colours(len(statistics.classes))
    ax.barh(places - 0.2, np.multiply(statistics.shares, 100), height=0.38, color=colours)
    ax.barh(places + 0.2, np.multiply(statistics.argmax_shares, 100), height=0.38, color=colours, alpha=0.45)
    ax.set_yticks(places, statistics.classes, fontsize=8)
    ax.invert_yaxis()
    ax.set_xlabel("percent: mean probability (dark), pixels where it is likeliest (light)", fontsize=8)
    ax.tick_params(axis="x", labelsize=8)


def _draw_histogram(ax: Axes, counts: list[int], largest: float, label: str) -> None:
    edges = np.linspace(0, largest, len(counts) + 1)
    ax.stairs(100 * np.array(counts) / max(1, sum(counts)), edges, fill=True, color="tab:blue")
    ax.set_yscale("symlog", linthresh=1)  # most pixels are certain, and the others are what one looks for
    ax.set_yticks([0, 0.5, 1, 10, 100], ["0", "0.5", "1", "10", "100"], fontsize=8)
    ax.set_ylim(0, 100)
    ax.set_xlabel(label, fontsize=8)
    ax.set_ylabel("percent of pixels", fontsize=8)
    ax.tick_params(axis="x", labelsize=8)


def _draw_tile(axes: NDArray[Any], tile: TileStatistics, cache: SoftTargetCache, largest: float) -> None:
    height, width = min(tile.height, SHOWN_PX), min(tile.width, SHOWN_PX)
    probs_CHW = cache.read(tile.tile, ((tile.height - height) // 2, (tile.width - width) // 2, height, width))
    entropy_HW = -(probs_CHW * np.log(np.maximum(probs_CHW, 1e-30))).sum(axis=0)
    colours_CR = np.array(_colours(len(probs_CHW)))[:, :3]
    axes[0].imshow(colours_CR[probs_CHW.argmax(axis=0)], interpolation="nearest")
    axes[1].imshow(entropy_HW, cmap="magma", vmin=0, vmax=largest)
    middle = "" if (height, width) == (tile.height, tile.width) else f"\nmiddle {height} x {width} px"
    axes[0].set_title(f"{tile.tile}\n{tile.entropy:.3f} nats{middle}", fontsize=8)
    for ax in axes:
        ax.set_axis_off()
