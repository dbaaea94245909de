"""
Charts as SVG within a page: lines, confusion matrices, and the class map. They take their colours from the page, dark or light.

Axes are plain, as a page of one's own has them; ticks are matplotlib's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from kdpipe.pipeline.pictures import colours
from kdpipe.pipeline.reports.html.page import framed_table, percent_text

WIDTH, HEIGHT = 520, 280
RIGHT, TOP, BOTTOM = 12, 10, 40  # px around the plot, for its labels
DIGIT = 7.5  # px of a character of them
STYLES = 8  # colours of lines that the page has
MAX_MARKS = 30  # points of a line up to which each has a mark
MAX_POINTS = 300  # of a line: more cannot be told apart in so many px
DASHES = (
    "none",
    "7 3",
    "2 3",
)  # lines are told apart without their colours too; no pair of colour and dash comes twice in 24

Points = Sequence[tuple[float, float]]


def line_chart(
    title: str, lines: Mapping[str, Points], x_label: str, y_label: str, of_classes: Sequence[str] = ()
) -> str:
    """
    A figure with one line for each of `lines`, of which each has a point at least, and a legend.

    A line of more than `MAX_POINTS` is shown as the means of as many stretches. Lines called as one of `of_classes` have that
    class's colour, as maps have it.
    """
    drawn = {name: _thinned(points) for name, points in lines.items()}
    xs, ys = (np.array([point[i] for points in drawn.values() for point in points]) for i in (0, 1))
    x_low, x_high = float(xs.min()), float(xs.max())
    x_ticks, y_ticks = [x for x in _ticks(xs) if x_low <= x <= x_high], _ticks(ys)
    left = 10 + DIGIT * max(len(f"{y:g}") for y in y_ticks)

    def x_at(x: float) -> float:
        return left + (x - x_low) / ((x_high - x_low) or 1) * (WIDTH - left - RIGHT)

    def y_at(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<line class="grid" x1="{left}" x2="{WIDTH - RIGHT}" y1="{y_at(y):.1f}" y2="{y_at(y):.1f}"/>'
        f'<text x="{left - 6}" y="{y_at(y) + 4:.1f}" text-anchor="end">{y:g}</text>'
        for y in y_ticks
    ]
    parts += [f'<text x="{x_at(x):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{x:g}</text>' for x in x_ticks]
    middle = (left + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>')
    legend = []
    painted = dict(zip(of_classes, class_colours(len(of_classes)), strict=True))
    for number, (name, points) in enumerate(drawn.items()):
        colour = painted.get(name, f"var(--s{number % STYLES})")
        style = f'style="stroke:{colour}" stroke-dasharray="{DASHES[number % len(DASHES)] if name not in painted else "none"}"'
        places = [(x_at(x), y_at(y)) for x, y in points]
        line = f'points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"'
        # A class is black or yellow wherever it is shown: a casing tells its line from a dark or a light page.
        casing = '<polyline class="casing" {}/>' if name in painted else ""
        parts.append(f'{casing.format(line)}<polyline class="line" {style} {line}/>')
        parts += [
            f'<circle class="point" cx="{x:.1f}" cy="{y:.1f}" r="3.5" style="fill:{colour}"/>'
            for x, y in (places if len(places) <= MAX_MARKS else ())
        ]
        mark = '<line class="{}" x1="0" x2="28" y1="6" y2="6" {}/>'
        both = (mark.format("casing", "") if name in painted else "") + mark.format("line", style)
        legend.append(f'<li><svg viewBox="0 0 28 12" aria-hidden="true">{both}</svg>{escape(name)}</li>')
    ends = "; ".join(
        f"{name}: {points[0][1]:.3g} at {points[0][0]:g}, {points[-1][1]:.3g} at {points[-1][0]:g}"
        for name, points in drawn.items()
    )
    label = escape(f"{title}, {y_label} against {x_label}. {ends}")
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f'{"".join(parts)}</svg><ul class="legend">{"".join(legend)}</ul></figure>'
    )


def confusion_table(caption: str, counts_LP: NDArray[np.int64], names: Sequence[str]) -> str:
    """A confusion matrix of pixels, rows labels and columns answers: percent of a row, and the pixels below."""
    head = '<th scope="col">label</th>' + "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    lines = []
    for name, row in zip(names, counts_LP.tolist(), strict=True):
        cells = "".join(_confusion_cell(count, sum(row)) for count in row)
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    return framed_table(caption, head, "".join(lines), "confusion")


def pixels_text(count: int) -> str:
    """A count in three digits: `812`, `4.1 k`, `1.32 M`."""
    if count < 1000:
        return str(count)
    return f"{count / 1e3:.3g} k" if count < 999_500 else f"{count / 1e6:.3g} M"


def class_colours(num_classes: int) -> list[str]:
    """The classes' colours as CSS has them."""
    return [f"rgb({r:.0f} {g:.0f} {b:.0f})" for r, g, b in colours(num_classes)]


def class_map_figure(shares_TS: NDArray[np.float32], teacher_classes: Sequence[str], names: Sequence[str]) -> str:
    """The class map as ribbons: every teacher class as high as every other, split by its shares of the student's classes."""
    row, gap, top = 26.0, 10.0, 6
    left = 16 + round(DIGIT * max(map(len, teacher_classes)))
    right = left + 140
    width = right + 28 + round(DIGIT * max(map(len, names)))
    num_teacher, num_student = shares_TS.shape
    heights_S = row * shares_TS.sum(axis=0)
    space = num_teacher * (row + gap)

    # A student class to which nothing is mapped keeps a place for its name.
    shown_S = np.maximum(heights_S, row / 2)
    height = max(space, float(shown_S.sum()) + gap * num_student) + 2 * top
    spread = (height - 2 * top - shown_S.sum()) / num_student
    tops_S = top + np.concatenate([[0], np.cumsum(shown_S + spread)[:-1]]) + spread / 2
    filled_S = tops_S.copy()
    colour = class_colours(num_student)
    parts, texts = [], []
    for t, teacher_class in enumerate(teacher_classes):
        y = top + (height - 2 * top - space) / 2 + t * (row + gap) + gap / 2
        parts.append(
            f'<text class="name" x="{left - 8}" y="{y + row / 2 + 4:.1f}" text-anchor="end">{escape(teacher_class)}</text>'
        )
        split = {names[s]: float(shares_TS[t, s]) for s in np.flatnonzero(shares_TS[t]).tolist()}
        texts.append(f"{teacher_class}: " + ", ".join(f"{name} {share:g}" for name, share in split.items()))
        for s in np.flatnonzero(shares_TS[t]).tolist():
            high = row * float(shares_TS[t, s])
            a, b, middle = y, float(filled_S[s]), (left + right) / 2
            above = f"M{left} {a:.1f}C{middle} {a:.1f} {middle} {b:.1f} {right} {b:.1f}"
            below = f"V{b + high:.1f}C{middle} {b + high:.1f} {middle} {a + high:.1f} {left} {a + high:.1f}Z"
            parts.append(f'<path class="ribbon" fill="{colour[s]}" d="{above}{below}"/>')
            y, filled_S[s] = y + high, filled_S[s] + high
    for s, name in enumerate(names):
        y = float(tops_S[s])
        parts.append(
            f'<rect class="ribbon" style="fill-opacity:1" x="{right}" y="{y:.1f}" width="12" height="{shown_S[s]:.1f}" fill="{colour[s]}"/>'
            f'<text class="name" x="{right + 20}" y="{y + float(shown_S[s]) / 2 + 4:.1f}">{escape(name)}</text>'
        )
    label = f"Class map, teacher's classes left and student's right. {'; '.join(texts)}"
    size = f'viewBox="0 0 {width} {height:.0f}" style="max-width:{width * 1.2:.0f}px"'
    return f'<svg {size} role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _confusion_cell(count: int, total: int) -> str:
    if not total:
        return "<td>–</td>"
    share = count / total
    return f'<td style="--share:{share:.4f}">{percent_text(share)}<small>{pixels_text(count)}</small></td>'


def _thinned(points: Points) -> list[tuple[float, float]]:
    if len(points) <= MAX_POINTS:
        return list(points)
    return [tuple(stretch.mean(axis=0).tolist()) for stretch in np.array_split(np.asarray(points, float), MAX_POINTS)]


def _ticks(values: NDArray[np.float64]) -> list[float]:
    low, high = float(values.min()), float(values.max())
    return [float(tick) for tick in MaxNLocator(5).tick_values(low, high if high > low else low + 1)]
