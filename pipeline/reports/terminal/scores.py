"""Scores as tables: by class and root, and the confusion matrix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from rich.table import Table

from kdpipe.configs.errors import count_text
from kdpipe.pipeline.evaluation.calibration import BINS
from kdpipe.pipeline.text import limit_text, percent_cell, percent_text

if TYPE_CHECKING:
    from kdpipe.pipeline.evaluation.evaluate import Evaluation, Network, RootScores

SHOWN_TILES = 5  # the rest is in --json


def evaluation_tables(result: Evaluation) -> Iterator[Table | str]:
    """The model, scores of each root and of all together, and the confusion matrix of all; fits 80 columns."""
    yield "\n".join([result.model, *(f"  {_network_text(network)}" for network in result.networks)])
    for root in result.roots:
        yield from _scores_of(root, result.classes, result.limit)
    if len(result.roots) > 1:
        yield from _scores_of(result.together, result.classes, result.limit)
    yield _confusion_table(result.together, result.classes)


def score_table(
    title: str, iou: Mapping[str, float | None], f1: Mapping[str, float | None], left_out: Mapping[str, str],
    means: tuple[float | None, float | None], note: str = "",
) -> Table:  # fmt: skip
    """IoU and F1 by class, why a class has none, and last their means."""
    table = Table(title=title, title_justify="left")
    for column in ("class", "IoU", "F1", ""):
        table.add_column(column, justify="right" if column in ("IoU", "F1") else "left")
    for name in iou:
        table.add_row(name, percent_text(iou[name]), percent_text(f1[name]), left_out.get(name, ""))
    table.add_section()
    table.add_row("mean", *map(percent_text, means), note)
    return table


def score_text(name: str, evaluation: Evaluation) -> str:
    """The mIoU of a model on all roots together, in a line."""
    return f"{name}: mIoU {percent_text(evaluation.together.scores.miou)}"


def _network_text(network: Network) -> str:
    window = f"windows of {network.window} px" if network.window else "whole tiles"
    scales = f", scales {network.scales}" if network.scales != [1.0] else ""
    return f"{network.checkpoint}: {window}, TTA {network.tta}{scales}"


def _scores_of(root: RootScores, names: list[str], limit: int | None) -> Iterator[Table | str]:
    scores, boundary = root.scores, root.boundary
    pixels = int(root.confusion_LP.sum())
    tiles = f"{count_text(root.tiles, 'tiles')}{limit_text(limit, root.labelled)}"
    table = Table(title=f"{root.root}: {tiles}, {pixels / 1e6:.2f} MP labelled; percent", title_justify="left")
    columns = ("class", "IoU", "F1", "prec.", "recall", f"F1 {boundary.width_px} px", "labels", "predicted")
    for column in columns:
        table.add_column(column, justify="left" if column == "class" else "right")
    labelled_L, predicted_P = root.confusion_LP.sum(axis=1) / pixels, root.confusion_LP.sum(axis=0) / pixels
    for name, labelled, predicted in zip(names, labelled_L, predicted_P, strict=True):
        by_class = (scores.iou, scores.f1, scores.precision, scores.recall, boundary.f1)
        table.add_row(
            name, *(percent_cell(values[name]) for values in by_class), percent_cell(labelled), percent_cell(predicted)
        )
    table.add_section()
    means = (scores.miou, scores.mean_f1, scores.mean_precision, scores.mean_recall, boundary.mean_f1)
    table.add_row("mean", *map(percent_cell, means), "", "")
    yield table
    yield (
        f"overall accuracy {percent_cell(scores.overall_accuracy)}, "
        f"calibration error {percent_cell(root.calibration.error)} ({BINS} bins)"
    )
    if scores.left_out:
        yield f"left out of the means: {_reasons(scores.left_out)}"
    no_boundary = {name: why for name, why in boundary.left_out.items() if name not in scores.left_out}
    if no_boundary:
        yield f"left out of the mean boundary F1: {_reasons(no_boundary)}"
    if root.without_mask:
        yield f"left out, as they have no mask: {_some(root.without_mask)}"
    if root.without_label:
        yield f"without a labelled pixel: {_some(root.without_label)}"
    if root.trained_on:
        yield "the student was trained on some of these tiles: their scores say nothing about other tiles"


def _confusion_table(root: RootScores, names: list[str]) -> Table:
    """One row per label, which sums to 100; columns are numbered, as names would be too wide."""
    title = "Predictions by label; percent of a row"
    table = Table(title=title, title_justify="left", padding=(0, 0, 0, 1))
    table.add_column("label")
    for i in range(len(names)):
        table.add_column(str(i), justify="right")
    for i, (name, row) in enumerate(zip(names, root.confusion_LP.tolist(), strict=True)):
        table.add_row(f"{i} {name}", *(percent_cell(count / sum(row) if sum(row) else None) for count in row))
    return table


def _reasons(left_out: Mapping[str, str]) -> str:
    """`A and B (not scored), C (absent from the labels)`."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        by_reason.setdefault(reason, []).append(name)
    return ", ".join(f"{', '.join(names)} ({reason})" for reason, names in by_reason.items())


def _some(tiles: list[str]) -> str:
    more = len(tiles) - SHOWN_TILES
    return (
        f"{count_text(len(tiles), 'tiles')} ({', '.join(tiles[:SHOWN_TILES])}{f' and {more} more' if more > 0 else ''})"
    )
