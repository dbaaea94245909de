"""
Charts as SVG within a page, in the page's own colours, dark or light: curves, intervals, confusion and class map.

Shapes: T teacher classes, S student classes, L labels, P predictions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from kdpipe.pipeline.pictures import colours
from kdpipe.pipeline.reports.html.page import framed_table
from kdpipe.pipeline.text import percent_cell

WIDTH, HEIGHT = 520, 280
RIGHT, TOP, BOTTOM = 12, 10, 40  # px around the plot, for its labels
CHARACTER_PX = 7.5  # width of a character of the labels
STYLES = 8  # colours of lines that page.css defines
MAX_MARKS = 30  # a line of more points has no marks
MAX_POINTS = 300  # of a line: more cannot be told apart in so many px
DASHES = ("none", "7 3", "2 3")  # tell lines apart without colour; 24 pairs of colour and dash before one repeats

Points = Sequence[tuple[float, float]]


class Interval(NamedTuple):
    """A mean and the interval around it, if there is one."""

    mean: float
    low: float | None = None
    high: float | None = None


def line_chart(
    title: str,
    lines: Mapping[str, Points],
    x_label: str,
    y_label: str,
    class_names: Sequence[str] = (),
    faint: Mapping[str, Sequence[Points]] | None = None,
) -> str:
    """
    A figure with one line for each of `lines`, none of them empty, and a legend.

    A line of more than `MAX_POINTS` points is averaged down to as many. A line named after one of `class_names` has
    that class's colour in maps. `faint` holds thin lines by the name of a line, and in its colour: the single runs of a mean.
    """
    drawn = {name: _thinned(points) for name, points in lines.items()}
    thin = {name: [_thinned(points) for points in several] for name, several in (faint or {}).items()}
    everything = [point for points in [*drawn.values(), *(p for ps in thin.values() for p in ps)] for point in points]
    axes = _Axes.around(everything)
    parts, legend = axes.drawn(x_label), []
    painted = dict(zip(class_names, class_colours(len(class_names)), strict=True))
    for number, (name, points) in enumerate(drawn.items()):
        colour = painted.get(name, f"var(--s{number % STYLES})")
        style = f'style="stroke:{colour}" stroke-dasharray="{DASHES[number % len(DASHES)] if name not in painted else "none"}"'
        for each in thin.get(name, ()):
            parts.append(f'<polyline class="faint" style="stroke:{colour}" {axes.polyline(each)}/>')
        # Classes keep their colours, black and yellow included; a casing sets the line off from a dark or a light page.
        cased = name in painted
        parts.append(f'<polyline class="casing" {axes.polyline(points)}/>' if cased else "")
        parts.append(f'<polyline class="line" {style} {axes.polyline(points)}/>')
        parts += [
            f'<circle class="point" cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="3.5" style="fill:{colour}"/>'
            for x, y in (points if len(points) <= MAX_MARKS else ())
        ]
        legend.append(_legend_item(name, style, cased=cased))
    ends = "; ".join(
        f"{name}: {points[0][1]:.3g} at {points[0][0]:g}, {points[-1][1]:.3g} at {points[-1][0]:g}"
        for name, points in drawn.items()
    )
    label = f"{title}, {y_label} against {x_label}. {ends}"
    return _figure(f"{title}, {y_label}" if y_label == "%" else title, label, HEIGHT, parts, legend)


def interval_chart(title: str, rows: Mapping[str, Mapping[str, Interval]], x_label: str) -> str:
    """A figure with the means and intervals of `{row: {series: interval}}`, one below the other, beside a line at zero."""
    series = list(dict.fromkeys(name for row in rows.values() for name in row))
    step = 14  # px between the series of a row
    row_height = step * len(series) + 14
    height = TOP + BOTTOM + row_height * len(rows)
    bounds = [value for row in rows.values() for found in row.values() for value in found if value is not None]
    ticks = _ticks(np.array([0.0, *bounds]))
    left = 16 + CHARACTER_PX * max(map(len, rows))

    def x_at(x: float) -> float:
        return left + (x - ticks[0]) / (ticks[-1] - ticks[0]) * (WIDTH - left - RIGHT)

    parts = [
        f'<line class="{"grid" if tick else "zero"}" x1="{x_at(tick):.1f}" x2="{x_at(tick):.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>'
        f'<text x="{x_at(tick):.1f}" y="{height - BOTTOM + 17}" text-anchor="middle">{tick:g}</text>'
        for tick in ticks
    ]
    parts.append(
        f'<text x="{(left + WIDTH - RIGHT) / 2}" y="{height - 5}" text-anchor="middle">{escape(x_label)}</text>'
    )
    texts = []
    for number, (name, row) in enumerate(rows.items()):
        top = TOP + number * row_height
        parts.append(
            f'<text class="name" x="{left - 8}" y="{top + row_height / 2 + 4}" text-anchor="end">{escape(name)}</text>'
        )
        for place, label in enumerate(series):
            if label not in row:
                continue
            found, y = row[label], top + row_height / 2 + (place - (len(series) - 1) / 2) * step
            colour = f"var(--s{(place + 1) % STYLES})"  # the first colour is the baseline's, as in the curves
            texts.append(f"{name}, {label}: {found.mean:+.1f}")
            if found.low is not None and found.high is not None:
                texts[-1] += f" ({found.low:+.1f} to {found.high:+.1f})"
                parts.append(
                    f'<line class="line" style="stroke:{colour}" x1="{x_at(found.low):.1f}" x2="{x_at(found.high):.1f}" y1="{y}" y2="{y}"/>'
                )
            parts.append(f'<circle class="point" cx="{x_at(found.mean):.1f}" cy="{y}" r="4.5" style="fill:{colour}"/>')
    legend = [
        _legend_item(name, f'style="stroke:var(--s{(place + 1) % STYLES})"', cased=False)
        for place, name in enumerate(series)
    ]
    return _figure(title, f"{title}, {x_label}. {'; '.join(texts)}", height, parts, legend)


def confusion_table(caption: str, counts_LP: NDArray[np.int64], names: Sequence[str]) -> str:
    """A confusion matrix of pixels, rows labels and columns predictions: percent of a row, and the pixels below."""
    head = '<th scope="col">label</th>' + "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    lines = []
    for name, row in zip(names, counts_LP.tolist(), strict=True):
        cells = "".join(_confusion_cell(count, sum(row)) for count in row)
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    return framed_table(caption, head, "".join(lines), "confusion")


def pixels_text(count: int) -> str:
    """A count with three digits: `812`, `4.1 k`, `1.32 M`."""
    if count < 1000:
        return str(count)
    return f"{count / 1e3:.3g} k" if count < 999_500 else f"{count / 1e6:.3g} M"


def class_colours(num_classes: int) -> list[str]:
    """The classes' colours as CSS."""
    return [f"rgb({r:.0f} {g:.0f} {b:.0f})" for r, g, b in colours(num_classes)]


def class_map_figure(shares_TS: NDArray[np.float32], teacher_classes: Sequence[str], names: Sequence[str]) -> str:
    """The class map as ribbons: teacher classes of equal height, each split by its shares of the student's classes."""
    row, gap, top = 26.0, 10.0, 6
    left = 16 + round(CHARACTER_PX * max(map(len, teacher_classes)))
    right = left + 140
    width = right + 28 + round(CHARACTER_PX * max(map(len, names)))
    num_teacher, num_student = shares_TS.shape
    heights_S = row * shares_TS.sum(axis=0)
    space = num_teacher * (row + gap)

    # A student class that nothing maps to keeps a place for its name.
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
    label = f"Class map, the teacher's classes on the left, the student's on the right. {'; '.join(texts)}"
    size = f'viewBox="0 0 {width} {height:.0f}" style="max-width:{width * 1.2:.0f}px"'
    return f'<svg {size} role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


class _Axes(NamedTuple):
    """A mapping from numbers to px within `WIDTH` x `HEIGHT`."""

    x_low: float
    x_high: float
    x_ticks: list[float]
    y_ticks: list[float]
    left: float

    @classmethod
    def around(cls, points: Points) -> _Axes:
        """Axes in which all points lie."""
        xs, ys = np.array(points, dtype=float).T
        low, high = float(xs.min()), float(xs.max())
        y_ticks = _ticks(ys)
        left = 10 + CHARACTER_PX * max(len(f"{y:g}") for y in y_ticks)
        return cls(low, high, [x for x in _ticks(xs) if low <= x <= high], y_ticks, left)

    def x(self, x: float) -> float:
        return self.left + (x - self.x_low) / ((self.x_high - self.x_low) or 1) * (WIDTH - self.left - RIGHT)

    def y(self, y: float) -> float:
        share = (y - self.y_ticks[0]) / (self.y_ticks[-1] - self.y_ticks[0])
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def polyline(self, points: Points) -> str:
        return f'points="{" ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)}"'

    def drawn(self, x_label: str) -> list[str]:
        """The grid with its ticks, and the label below."""
        left, right = self.left, WIDTH - RIGHT
        parts = [
            f'<line class="grid" x1="{left}" x2="{right}" y1="{self.y(y):.1f}" y2="{self.y(y):.1f}"/>'
            f'<text x="{left - 6}" y="{self.y(y) + 4:.1f}" text-anchor="end">{y:g}</text>'
            for y in self.y_ticks
        ]
        below = f'y="{HEIGHT - BOTTOM + 17}" text-anchor="middle"'
        parts += [f'<text x="{self.x(x):.1f}" {below}>{x:g}</text>' for x in self.x_ticks]
        parts.append(f'<text x="{(left + right) / 2}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>')
        return parts


def _figure(title: str, label: str, height: float, parts: Sequence[str], legend: Sequence[str]) -> str:
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
        f'<ul class="legend">{"".join(legend)}</ul></figure>'
    )


def _legend_item(name: str, style: str, *, cased: bool) -> str:
    mark = '<line class="{}" x1="0" x2="28" y1="6" y2="6" {}/>'
    both = (mark.format("casing", "") if cased else "") + mark.format("line", style)
    return f'<li><svg viewBox="0 0 28 12" aria-hidden="true">{both}</svg>{escape(name)}</li>'


def _confusion_cell(count: int, total: int) -> str:
    if not total:
        return "<td>–</td>"
    share = count / total
    return f'<td style="--share:{share:.4f}">{percent_cell(share)}<small>{pixels_text(count)}</small></td>'


def _thinned(points: Points) -> list[tuple[float, float]]:
    if len(points) <= MAX_POINTS:
        return list(points)
    return [tuple(stretch.mean(axis=0).tolist()) for stretch in np.array_split(np.asarray(points, float), MAX_POINTS)]


def _ticks(values: NDArray[np.float64]) -> list[float]:
    low, high = float(values.min()), float(values.max())
    return [float(tick) for tick in MaxNLocator(5).tick_values(low, high if high > low else low + 1)]
