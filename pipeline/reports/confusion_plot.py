"""Confusion matrices as a picture, one panel a root of tiles, and one of all of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kdpipe.pipeline.evaluation.evaluate import Evaluation, RootScores
from kdpipe.pipeline.reports.html.charts import pixels_text

CELL_INCHES, LABELS_INCHES, DPI = 0.75, 2.6, 120
COLUMNS = 2  # of panels: more would be too small to read on a page
DARK = 0.55  # of a row: above it a cell is dark, and its text white


def draw_confusion(result: Evaluation, path: Path) -> None:
    """
    Write a PNG of `(C, C)` panels: rows are labels, columns answers, colours and percents are shares of a row.

    Under a percent stands the number of pixels. A class that no label names has no shares: its row is hatched.
    """
    panels = [*result.roots, result.together] if len(result.roots) > 1 else result.roots
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    side = LABELS_INCHES + CELL_INCHES * len(result.classes)
    figure = Figure(figsize=(columns * side, rows * side + 0.4), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)  # never a window, whatever the user's backend is
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax, root in zip(axes, panels, strict=False):
        _draw_panel(ax, root, result.classes)
    for ax in axes[len(panels) :]:
        ax.remove()
    figure.suptitle(f"{result.model}\nlabels against answers, percent of a row and pixels", fontsize=9)
    figure.savefig(path, format="png", bbox_inches="tight")  # however long the names are


def _draw_panel(ax: Axes, root: RootScores, names: list[str]) -> None:
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
    ax.set_xlabel("answered")
    ax.set_ylabel("labelled")
    ax.set_title(f"{root.root}: {root.tiles} tiles, mIoU {100 * root.scores.miou:.1f}", fontsize=10)
