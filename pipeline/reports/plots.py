"""Plots as PNG files: confusion matrices, the statistics of a cache, and the curves of a comparison."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from kdpipe.cache.reader import SoftTargetCache
from kdpipe.configs.errors import count_text
from kdpipe.configs.files import write_file
from kdpipe.pipeline.inspection.statistics import CacheStatistics, TileStatistics
from kdpipe.pipeline.pictures import colours, entropy, paint_classes
from kdpipe.pipeline.reports.html.charts import pixels_text

if TYPE_CHECKING:  # a plot of a cache needs no torch
    from kdpipe.pipeline.evaluation.compare import Comparison
    from kdpipe.pipeline.evaluation.evaluate import Evaluation, RootScores

CELL_INCHES, LABELS_INCHES, DPI = 0.75, 2.6, 120
COLUMNS = 2  # of confusion panels: more would be too small to read
DARK = 0.55  # share of a row above which a cell is dark, and its text white
SHOWN_TILES = 6  # of a cache's statistics
SHOWN_PX = 1024  # side of the middle that is shown of a larger tile
STEPS_PLOT, SECONDS_PLOT, CLASSES_PLOT = "miou-by-steps.png", "miou-by-seconds.png", "classes.png"


def draw_confusion(result: Evaluation, path: Path) -> None:
    """
    Write a PNG with a confusion matrix `(C, C)` for each root, and one for all roots together.

    Rows are labels, columns predictions; colours and percents are shares of a row, with the number of pixels below. A class
    that no label names has no shares: its row is hatched.
    """
    panels = [*result.roots, result.together] if len(result.roots) > 1 else result.roots
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    side = LABELS_INCHES + CELL_INCHES * len(result.classes)
    figure = _figure(columns * side, rows * side + 0.4)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax, root in zip(axes, panels, strict=False):
        _draw_confusion_panel(ax, root, result.classes)
    for ax in axes[len(panels) :]:
        ax.remove()
    figure.suptitle(f"{result.model}\nlabels against predictions, percent of a row and pixels", fontsize=9)
    _save(figure, path, bbox_inches="tight")  # however long the names are


def draw_statistics(statistics: CacheStatistics, cache: SoftTargetCache, path: Path) -> None:
    """Write a PNG: class shares and histograms above; below, the most uncertain tiles as likeliest class and as entropy."""
    figure = _figure(13, 8.5)
    figure.suptitle(
        f"{count_text(len(statistics.tiles), 'tiles')}, {statistics.pixels / 1e6:.1f} MP: mean entropy {statistics.entropy:.3f} nats, mean "
        f"confidence {statistics.confidence:.3f}",
        fontsize=10,
    )
    parts: Any = figure.subfigures(2, 1, height_ratios=[1, 1.5])
    above, below = parts
    axes = above.subplots(1, 3)
    _draw_shares(axes[0], statistics)
    largest = float(np.log(len(statistics.classes)))
    _draw_histogram(axes[1], statistics.entropy_histogram, largest, "entropy of a pixel (nats)")
    _draw_histogram(axes[2], statistics.confidence_histogram, 1.0, "confidence of a pixel (largest probability)")
    below.suptitle("the most uncertain tiles: likeliest class, and entropy", fontsize=9)
    grid = below.subplots(2, SHOWN_TILES, squeeze=False)
    shown = sorted(statistics.tiles, key=lambda tile: -tile.entropy)[:SHOWN_TILES]
    for column, tile in enumerate(shown):
        _draw_cached_tile(grid[:, column], tile, cache, largest)
    for ax in grid[:, len(shown) :].ravel():
        ax.remove()
    handles = [
        Patch(color=colour, label=name)
        for name, colour in zip(statistics.classes, _colours(len(statistics.classes)), strict=True)
    ]
    below.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 8), fontsize=8, frameon=False)
    _save(figure, path)


def draw_comparison(comparison: Comparison, folder: Path) -> None:
    """Write three PNGs into `folder`: mIoU by steps and by seconds, and the differences by class with their intervals."""
    for name, against in ((STEPS_PLOT, "steps"), (SECONDS_PLOT, "seconds")):
        figure = _figure(7.5, 4.5)
        _draw_curves(figure.add_subplot(), comparison, against)
        _save(figure, folder / name)
    figure = _figure(7.5, 4)
    _draw_differences(figure.add_subplot(), comparison)
    _save(figure, folder / CLASSES_PLOT)


def _save(figure: Figure, path: Path, **options: Any) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", **options)
    write_file(path, picture.getvalue())


def _figure(width_inches: float, height_inches: float) -> Figure:
    figure = Figure(figsize=(width_inches, height_inches), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)  # never a window, whatever the user's backend is
    return figure


def _colours(count: int) -> list[tuple[float, float, float]]:
    """The palette as matplotlib takes it, 0..1."""
    return [(red, green, blue) for red, green, blue in (colours(count) / 255).tolist()]


def _draw_confusion_panel(ax: Axes, root: RootScores, names: list[str]) -> None:
    counts_LP = root.confusion_LP
    labelled_L = counts_LP.sum(axis=1, keepdims=True)
    shares_LP = counts_LP / np.maximum(labelled_L, 1)
    ax.imshow(shares_LP, cmap="Blues", vmin=0, vmax=1)
    for row in range(len(names)):
        if not labelled_L[row, 0]:
            ax.axhspan(row - 0.5, row + 0.5, facecolor="0.92", edgecolor="0.75", hatch="///", linewidth=0)
            continue
        for column in range(len(names)):
            share, count = shares_LP[row, column], int(counts_LP[row, column])
            colour = "white" if share > DARK else "0.15" if count else "0.6"
            text = f"{100 * share:.1f}\n{pixels_text(count)}" if count else "0"
            ax.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    notes = root.scores.left_out
    ax.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(names)), [f"{name}\n({notes[name]})" if name in notes else name for name in names])
    ax.tick_params(length=0, labelsize=8)
    ax.set_xlabel("predicted")
    ax.set_ylabel("labelled")
    ax.set_title(f"{root.root}: {count_text(root.tiles, 'tiles')}, mIoU {100 * root.scores.miou:.1f}", fontsize=10)


def _draw_shares(ax: Axes, statistics: CacheStatistics) -> None:
    places = np.arange(len(statistics.classes))
    painted = _colours(len(statistics.classes))
    ax.barh(places - 0.2, np.multiply(statistics.shares, 100), height=0.38, color=painted)
    ax.barh(places + 0.2, np.multiply(statistics.argmax_shares, 100), height=0.38, color=painted, alpha=0.45)
    ax.set_yticks(places, statistics.classes, fontsize=8)
    ax.invert_yaxis()
    ax.set_xlabel("percent: mean probability (dark), pixels where it is likeliest (light)", fontsize=8)
    ax.tick_params(axis="x", labelsize=8)


def _draw_histogram(ax: Axes, counts: list[int], largest: float, label: str) -> None:
    edges = np.linspace(0, largest, len(counts) + 1)
    ax.stairs(100 * np.array(counts) / max(1, sum(counts)), edges, fill=True, color="tab:blue")
    ax.set_yscale("symlog", linthresh=1)  # most pixels are certain, and the others are of interest
    ax.set_yticks([0, 0.5, 1, 10, 100], ["0", "0.5", "1", "10", "100"], fontsize=8)
    ax.set_ylim(0, 100)
    ax.set_xlabel(label, fontsize=8)
    ax.set_ylabel("percent of pixels", fontsize=8)
    ax.tick_params(axis="x", labelsize=8)


def _draw_cached_tile(axes: NDArray[Any], tile: TileStatistics, cache: SoftTargetCache, largest: float) -> None:
    height, width = min(tile.height, SHOWN_PX), min(tile.width, SHOWN_PX)
    probs_CHW = cache.read(tile.tile, ((tile.height - height) // 2, (tile.width - width) // 2, height, width))
    axes[0].imshow(paint_classes(probs_CHW.argmax(axis=0), len(probs_CHW)), interpolation="nearest")
    axes[1].imshow(entropy(probs_CHW), cmap="magma", vmin=0, vmax=largest)
    middle = "" if (height, width) == (tile.height, tile.width) else f"\nmiddle {height} x {width} px"
    axes[0].set_title(f"{tile.tile}\n{tile.entropy:.3f} nats{middle}", fontsize=8)
    for ax in axes:
        ax.set_axis_off()


def _draw_curves(ax: Axes, comparison: Comparison, against: str) -> None:
    for arm, colour in zip(comparison.arms, _colours(len(comparison.arms)), strict=True):
        label = f"{arm.label} ({count_text(len(arm.runs), 'seeds')})"
        singles = [(run.history, {"linewidth": 0.6, "alpha": 0.35}) for run in arm.runs.values()]
        mean: tuple[Any, dict[str, Any]] = (
            arm.curve(),
            {"linewidth": 2, "marker": "o", "markersize": 3, "label": label},
        )
        for history, style in [*singles, mean]:
            points = [(getattr(p, against), 100 * p.miou) for p in history if p.miou is not None]
            ax.plot(*zip(*points, strict=True), color=colour, **style)
    ax.set_xlabel("steps" if against == "steps" else "seconds of training, without validation and stage one")
    ax.set_ylabel("validation mIoU, %")
    ax.grid(alpha=0.3)
    ax.legend()


def _draw_differences(ax: Axes, comparison: Comparison) -> None:
    compared = comparison.arms[1:]
    names = list(dict.fromkeys(name for arm in compared for name in arm.differences or {}))
    for i, (arm, colour) in enumerate(zip(compared, _colours(len(comparison.arms))[1:], strict=True)):
        rows = [(k, arm.differences[n]) for k, n in enumerate(names) if arm.differences and n in arm.differences]
        ax.errorbar(
            [k + (i - (len(compared) - 1) / 2) * 0.15 for k, _ in rows],
            [100 * d.mean for _, d in rows],
            yerr=[100 * (d.high - d.mean) if d.high is not None else 0 for _, d in rows],
            fmt="o", color=colour, capsize=3, label=arm.label,
        )  # fmt: skip
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set_xticks(range(len(names)), names)
    ax.set_ylabel(f"IoU, points above {comparison.arms[0].label}")
    ax.grid(axis="y", alpha=0.3)
    ax.legend()
