"""The page of a comparison: arms over seeds, tiles with the predictions of each arm, curves, and differences by class."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from kdpipe.configs.errors import DataError, count_text
from kdpipe.configs.files import make_folder, write_file
from kdpipe.pipeline.evaluation.compare import Arm, Comparison, one_seed_text
from kdpipe.pipeline.evaluation.differences import MEAN, ArmScores
from kdpipe.pipeline.evaluation.evaluate import ALL_ROOTS, student_model
from kdpipe.pipeline.pictures import visible
from kdpipe.pipeline.progress import Progress, Silent
from kdpipe.pipeline.reports.html.charts import Interval, Points, interval_chart, line_chart
from kdpipe.pipeline.reports.html.page import heading, page, paragraph, table
from kdpipe.pipeline.reports.html.tiles import VIEWER, TilePictures, browser, draw_tile, spread, validation_subjects
from kdpipe.pipeline.reports.verdicts import points_text, root_lines, root_title, seconds_lines, verdict_lines
from kdpipe.pipeline.runs.layout import LAST
from kdpipe.pipeline.runs.record import Validation
from kdpipe.pipeline.text import duration_text, pace_text, percent_cell

PAGE = "comparison.html"


def write_comparison(
    comparison: Comparison, folder: Path, tiles: Sequence[TilePictures] = (), notes: Sequence[str] = ()
) -> Path:
    """Write the page into `folder`, with `tiles` to browse and `notes` on what is missing; returns its path."""
    file = make_folder(folder) / PAGE
    write_file(file, _page(comparison, tiles, notes))
    return file


def comparison_tiles(
    comparison: Comparison,
    folders: Mapping[int, Path],
    device: torch.device,
    count: int,
    progress: Progress | None = None,
    *,
    window: int | None = None,
) -> tuple[list[TilePictures], list[str]]:
    """
    At most `count` validation tiles with the predictions of every arm, and notes on what is missing.

    Each arm is shown by the last checkpoint of its first seed's run, which predicts in windows of `window` px, or whole tiles (None);
    `folders` are the runs' folders by `id(run)`. An arm without a `last.ckpt` is left out, and so is every arm where the
    validation tiles are missing.
    """
    models, notes = {}, []
    for arm in comparison.arms:
        file = folders[id(arm.first)] / LAST
        if file.is_file():
            models[arm.label] = student_model(file, device, tta=None, window=window, say=(progress or Silent()).say)
        else:
            notes.append(f"No predictions of {arm.label}: there is no {file}.")
    if not models:
        return [], notes
    try:
        # Each arm sees the images as in its training: with its own bands and stretch.
        subjects = {label: validation_subjects(model.config, model.stretch) for label, model in models.items()}
    except DataError as err:
        return [], [*notes, f"No tiles: {err}"]
    shown = spread(range(min(map(len, subjects.values()))), count)
    first, config = next(iter(subjects.values())), next(iter(models.values())).config
    drawn = []
    with (progress or Silent()).bar("tiles of the page", len(shown), "tiles") as advance:
        for i in shown:
            predictions = {
                label: model.predict(subjects[label][i].image()).argmax(axis=0) for label, model in models.items()
            }
            drawn.append(
                draw_tile(
                    first[i].id, "validation tile", visible(first[i].image(), config.data.visible_places), len(config.classes.names),
                    labels_HW=first[i].labels(), predictions=predictions,
                )
            )  # fmt: skip
            advance(1)
    return drawn, notes


def cache_text(arm: Arm) -> str:
    """The cache that an arm was trained from."""
    run = arm.first
    if run.cache is None:
        return {"none": "no teacher", "online": "the live teacher"}.get(run.mode, run.mode)
    return f"{run.cache.path} ({count_text(run.cache.tiles, 'tiles')}, fingerprint {run.cache.fingerprint[:12]})"


def reached_text(arm: Arm) -> str:
    """The steps and the training time after which an arm has the baseline's last mIoU."""
    return (
        f"{count_text(arm.reaches.steps, 'steps')}, {duration_text(arm.reaches.seconds)}"
        if arm.reaches
        else "not reached"
    )


def _page(comparison: Comparison, tiles: Sequence[TilePictures], notes: Sequence[str]) -> str:
    baseline = comparison.arms[0]
    intervals = comparison.has_intervals
    body = [
        heading(1, f"{len(comparison.arms)} arms after {count_text(comparison.steps, 'steps')}"),
        table("Arms", list(_arm_rows(comparison))),
        paragraph(
            f"Baseline: {baseline.label}. Scores are those of the last step, not of the best one. Differences are taken "
            "between runs of one seed, in points of IoU."
            + (" In brackets: the 95 % interval of their mean (Student's t)." if intervals else "")
        ),
    ]
    if not intervals:
        body.append(paragraph(one_seed_text(baseline.first.seed), "warning"))
    body += [heading(2, "Gained, lost, or cannot tell"), *map(paragraph, verdict_lines(comparison.arms))]
    if tiles:
        of_arms = paragraph("Each arm predicts by its first seed's run, after the last step.", "quiet")
        body += [heading(2, "Validation tiles"), of_arms, browser(tiles, comparison.classes)]
    body += [paragraph(note, "quiet") for note in notes]
    body += [heading(2, "Curves"), f'<div class="charts">{"".join(_charts(comparison))}</div>']
    body += map(paragraph, seconds_lines(comparison))
    body += [heading(2, "Classes"), table("IoU by class, %", list(_class_rows(comparison.arms)))]
    by_class = {name: (name, comparison.arms) for name in [MEAN, *comparison.classes]}
    body.append(_difference_chart(by_class, intervals=intervals))
    body += _by_root(comparison)
    body += [
        heading(2, "Runs"),
        table("Settings that differ from the baseline", list(_setting_rows(comparison))),
        table("Runs", list(_run_rows(comparison))),
        VIEWER if tiles else "",
    ]
    title = f"kdpipe: comparison of {len(comparison.arms)} arms"
    return page(title, f"<main>{''.join(body)}</main>", script=bool(tiles))


def _charts(comparison: Comparison) -> Iterator[str]:
    labels = {}
    for arm in comparison.arms:
        labels[arm.label] = f"{arm.label} ({count_text(len(arm.runs), 'seeds')})"
    for against, x_label in (
        ("steps", "steps"),
        ("seconds", "seconds of training, without validation and stage one"),
    ):
        means = {labels[arm.label]: _points(arm.curve(), against) for arm in comparison.arms}
        singles = {
            labels[arm.label]: [_points(run.history, against) for run in arm.runs.values()]
            for arm in comparison.arms
            if len(arm.runs) > 1
        }
        shown = {name: points for name, points in means.items() if points}
        if shown:
            yield line_chart(f"Validation mIoU by {against}", shown, x_label, "%", faint=singles)


def _points(history: Sequence[Validation], against: str) -> Points:
    return [(getattr(point, against), 100 * point.miou) for point in history if point.miou is not None]


def _by_root(comparison: Comparison) -> Iterator[str]:
    """What `--by root` found: the mIoU of all roots in one chart, then the classes of each."""
    if not comparison.roots:
        return
    yield heading(2, "By root")
    names = _short_names([root.root for root in comparison.roots])
    rows = {name: (MEAN, root.arms) for name, root in zip(names, comparison.roots, strict=True)}
    yield _difference_chart(rows, intervals=comparison.has_intervals, what="mIoU by root: difference")
    for root in comparison.roots:
        yield table(f"{root_title(root)}; IoU by class, %", list(_class_rows(root.arms)))
        yield from map(paragraph, root_lines(root))


def _short_names(roots: Sequence[str]) -> list[str]:
    """The paths of roots below the folder that holds them all, which fit beside a chart; `all roots` stays."""
    folders = {root: Path(root).absolute() for root in roots if root != ALL_ROOTS}
    common = os.path.commonpath([folder.parent for folder in folders.values()])
    return [str(folders[root].relative_to(common)) if root in folders else root for root in roots]


def _difference_chart(
    shown: Mapping[str, tuple[str, Sequence[ArmScores]]], *, intervals: bool, what: str = "Difference"
) -> str:
    """The differences of arms from the baseline; a row is a class, or `MEAN`, of arms that begin with the baseline."""
    rows: dict[str, dict[str, Interval]] = {}
    for row, (name, (_, *arms)) in shown.items():
        for arm in arms:
            if difference := (arm.differences or {}).get(name):
                bounds = (None if b is None else 100 * b for b in (difference.low, difference.high))
                rows.setdefault(row, {})[arm.label] = Interval(100 * difference.mean, *bounds)
    baseline = next(arms[0].label for _, arms in shown.values())
    suffix = " with 95 % intervals" if intervals else ""
    return interval_chart(f"{what} from {baseline}{suffix}", rows, f"points of IoU above {baseline}")


def _arm_rows(comparison: Comparison) -> Iterator[list[str]]:
    yield [
        "arm",
        "seeds",
        "mIoU, %",
        "difference",
        "reaches the baseline's last mIoU after",
        "step (median)",
        "trained from",
    ]
    for arm in comparison.arms:
        difference = points_text(arm.differences[MEAN]) if arm.differences else "baseline"
        reached = reached_text(arm) if arm.differences else "–"
        yield [
            arm.label, ", ".join(map(str, arm.runs)), percent_cell(arm.mean_iou(MEAN)), difference, reached,
            pace_text(arm.seconds_per_step()), cache_text(arm),
        ]  # fmt: skip


def _class_rows(arms: Sequence[ArmScores]) -> Iterator[list[str]]:
    yield ["class", *(arm.label for arm in arms)]
    for name in arms[0].iou:
        cells = []
        for arm in arms:
            cell = percent_cell(arm.mean_iou(name))
            if arm.differences and name in arm.differences:
                cell += f" ({points_text(arm.differences[name])})"
            cells.append(cell)
        yield [name, *cells]


def _setting_rows(comparison: Comparison) -> Iterator[list[str]]:
    yield ["arm", "settings"]
    for arm in comparison.arms[1:]:
        yield [arm.label, ", ".join(f"{key}: {value}" for key, value in arm.settings.items()) or "the cache alone"]


def _run_rows(comparison: Comparison) -> Iterator[list[str]]:
    yield ["run", "arm", "seed", "mIoU, %", "run (wall time)", "device", "torch"]
    for arm in comparison.arms:
        for seed, run in arm.runs.items():
            yield [
                run.name, arm.label, str(seed), percent_cell(arm.iou[MEAN][seed]),
                "–" if run.wall_seconds is None else duration_text(run.wall_seconds), run.device, run.libraries.get("torch", "–"),
            ]  # fmt: skip
