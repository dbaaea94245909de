"""A comparison as plots (PNG) and as one HTML page that needs nothing from elsewhere."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdpipe.pipeline.evaluation.compare import MEAN, Arm, Comparison, Difference
from kdpipe.pipeline.reports.html.layers import TilePictures
from kdpipe.pipeline.reports.html.page import data_url, heading, page, paragraph, percent_text, table
from kdpipe.pipeline.reports.html.tiles import VIEWER, browser

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAGE, STEPS_PLOT, SECONDS_PLOT, CLASSES_PLOT = (
    "comparison.html",
    "miou-by-steps.png",
    "miou-by-seconds.png",
    "classes.png",
)

# Okabe and Ito's, told apart with the usual colour blindness too; the baseline is the first.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#F0E442")


def write_comparison(
    comparison: Comparison, folder: Path, tiles: Sequence[TilePictures] = (), notes: Sequence[str] = ()
) -> Path:
    """Write the three plots and the page into `folder`, with `tiles` to browse and what is not shown; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    plots = {
        STEPS_PLOT: _curves(comparison, "steps"),
        SECONDS_PLOT: _curves(comparison, "seconds"),
        CLASSES_PLOT: _class_bars(comparison),
    }
    for name, png in plots.items():
        (folder / name).write_bytes(png)
    file = folder / PAGE
    file.write_text(_page(comparison, plots, tiles, notes), encoding="utf-8")
    return file


def points_text(difference: Difference | None) -> str:
    """A difference in points of IoU with its interval: `+1.2 [-0.3, +2.7]`."""
    if difference is None:
        return "–"
    if difference.low is None or difference.high is None:
        return f"{100 * difference.mean:+.1f}"
    return f"{100 * difference.mean:+.1f} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"


def cache_text(arm: Arm) -> str:
    """Which cache an arm learnt from."""
    run = next(iter(arm.runs.values()))
    if run.cache is None:
        return {"none": "no teacher", "online": "the live teacher"}.get(run.mode, run.mode)
    return f"{run.cache.path} ({run.cache.tiles} tiles, fingerprint {run.cache.fingerprint[:12]})"


def reached_text(arm: Arm) -> str:
    """After how many steps and seconds an arm has what the baseline ends with."""
    return f"{arm.reaches.steps} steps, {arm.reaches.seconds:.0f} s" if arm.reaches else "not reached"


def _curves(comparison: Comparison, against: str) -> bytes:
    def draw(axes: Axes) -> None:
        for arm, colour in zip(comparison.arms, _colours(comparison), strict=True):
            for run in arm.runs.values():
                points = [p for p in run.history if p.miou is not None]
                axes.plot(
                    [getattr(p, against) for p in points],
                    [100 * (p.miou or 0) for p in points],
                    color=colour, linewidth=0.6, alpha=0.35,
                )  # fmt: skip
            curve = [p for p in arm.curve() if p.miou is not None]
            axes.plot(
                [getattr(p, against) for p in curve],
                [100 * (p.miou or 0) for p in curve],
                color=colour, linewidth=2, marker="o", markersize=3,
                label=f"{arm.label} ({len(arm.runs)} seed{'s' if len(arm.runs) > 1 else ''})",
            )  # fmt: skip
        axes.set_xlabel(
            "steps" if against == "steps" else "seconds of training (validation and precompute not counted)"
        )
        axes.set_ylabel("validation mIoU, %")
        axes.grid(alpha=0.3)
        axes.legend()

    return _png(draw, (7.5, 4.5))


def _class_bars(comparison: Comparison) -> bytes:
    """The paired differences by class with their intervals."""
    compared = comparison.arms[1:]

    def draw(axes: Axes) -> None:
        names = [*comparison.classes, MEAN]
        for i, (arm, colour) in enumerate(zip(compared, _colours(comparison)[1:], strict=True)):
            rows = [(k, arm.differences[n]) for k, n in enumerate(names) if arm.differences and n in arm.differences]
            axes.errorbar(
                [k + (i - (len(compared) - 1) / 2) * 0.15 for k, _ in rows],
                [100 * d.mean for _, d in rows],
                yerr=[100 * (d.high - d.mean) if d.high is not None else 0 for _, d in rows],
                fmt="o", color=colour, capsize=3, label=arm.label,
            )  # fmt: skip
        axes.axhline(0, color=COLOURS[0], linewidth=0.8)
        axes.set_xticks(range(len(names)), names)
        axes.set_ylabel(f"IoU, points against {comparison.arms[0].label}")
        axes.grid(axis="y", alpha=0.3)
        axes.legend()

    return _png(draw, (7.5, 4.0))


def _png(draw: Any, size: tuple[float, float]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure.add_subplot())
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _colours(comparison: Comparison) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(comparison.arms))]


def _page(comparison: Comparison, plots: dict[str, bytes], tiles: Sequence[TilePictures], notes: Sequence[str]) -> str:
    baseline = comparison.arms[0]
    body = [
        heading(1, f"{len(comparison.arms)} arms after {comparison.steps} steps"),
        paragraph(
            f"Baseline: {baseline.label}. Differences are between runs of one seed, in points of IoU; the interval is the "
            "95 % interval of their mean (Student's t). Scores are those of the last step, not of the best one."
        ),
        table("Arms", list(_arm_rows(comparison))),
        table("IoU by class, %", list(_class_rows(comparison))),
    ]
    for name, title in (
        (STEPS_PLOT, "Validation mIoU against steps"),
        (SECONDS_PLOT, "Validation mIoU against seconds of training"),
        (CLASSES_PLOT, f"Difference to {baseline.label} by class, with 95 % intervals"),
    ):
        body += [
            heading(2, title),
            f'<img class="plot" alt="{escape(title)}" src="{data_url(plots[name], "image/png")}">',
        ]
    body += [
        table("What differs from the baseline", list(_setting_rows(comparison))),
        table("Runs", list(_run_rows(comparison))),
    ]
    if tiles:
        how = paragraph(
            "Click a tile, or press Enter on it, to compare two of its layers: those of two arms, for instance."
        )
        of_arms = paragraph("Answers are those of the first seed's run of every arm, after its last step.")
        body += [heading(2, "Validation tiles"), how, of_arms, browser(tiles, comparison.classes), VIEWER]
    body += [paragraph(note, "quiet") for note in notes]
    title = f"kdpipe: comparison of {len(comparison.arms)} arms"
    return page(title, f"<main>{''.join(body)}</main>", script=bool(tiles))


def _arm_rows(comparison: Comparison) -> Iterator[list[str]]:
    yield ["arm", "seeds", "mIoU, %", "difference", "has the baseline's last mIoU after", "s/step", "learnt from"]
    for arm in comparison.arms:
        difference = points_text(arm.differences[MEAN]) if arm.differences else "baseline"
        reached = reached_text(arm) if arm.differences else "–"
        yield [
            arm.label, ", ".join(map(str, arm.runs)), percent_text(arm.mean_iou(MEAN)), difference, reached,
            f"{arm.seconds_per_step():.3f}", cache_text(arm),
        ]  # fmt: skip


def _class_rows(comparison: Comparison) -> Iterator[list[str]]:
    yield ["class", *(arm.label for arm in comparison.arms)]
    for name in [*comparison.classes, MEAN]:
        cells = []
        for arm in comparison.arms:
            cell = percent_text(arm.mean_iou(name))
            if arm.differences and name in arm.differences:
                cell += f" ({points_text(arm.differences[name])})"
            cells.append(cell)
        yield [name, *cells]


def _setting_rows(comparison: Comparison) -> Iterator[list[str]]:
    yield ["arm", "settings"]
    for arm in comparison.arms[1:]:
        yield [arm.label, ", ".join(f"{key}: {value}" for key, value in arm.settings.items()) or "the cache alone"]


def _run_rows(comparison: Comparison) -> Iterator[list[str]]:
    yield ["run", "arm", "seed", "mIoU, %", "seconds", "device", "torch"]
    for arm in comparison.arms:
        for seed, run in arm.runs.items():
            yield [
                run.name, arm.label, str(seed), percent_text(arm.iou(seed)[MEAN]), f"{run.history[-1].seconds:.0f}",
                run.device, run.libraries.get("torch", "–"),
            ]  # fmt: skip
