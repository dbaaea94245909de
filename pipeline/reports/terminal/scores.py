"""What `kdpipe evaluate` prints: scores by class and root, and where the pixels of each class went."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.table import Table

from kdpipe.pipeline.evaluation.calibration import BINS
from kdpipe.pipeline.evaluation.evaluate import Evaluation, Network, RootScores

SHOWN_TILES = 5  # the rest is in --json


def evaluation_tables(result: Evaluation) -> Iterator[Table | str]:
    """The model, the scores of each root and of all together, and the confusion matrix of all; fits 80 columns."""
    yield "\n".join([result.model, *(f"  {_asked(network)}" for network in result.networks)])
    for root in result.roots:
        yield from _scores_of(root, result.classes)
    if len(result.roots) > 1:
        yield from _scores_of(result.together, result.classes)
    yield _confusion_table(result.together, result.classes)


def shares(confusion: RootScores) -> tuple[list[float], list[float]]:
    """Of all labelled pixels the shares by class, 0..1: as labelled, and as answered."""
    counts_LP = confusion.confusion_LP
    total = counts_LP.sum()
    return (counts_LP.sum(axis=1) / total).tolist(), (counts_LP.sum(axis=0) / total).tolist()


def _asked(network: Network) -> str:
    window = f"windows of {network.window} px" if network.window else "whole tiles"
    scales = f", scales {network.scales}" if network.scales != [1.0] else ""
    return f"{network.checkpoint}: {window}, TTA {network.tta}{scales}"


def _scores_of(root: RootScores, names: list[str]) -> Iterator[Table | str]:
    scores, boundary = root.scores, root.boundary
    pixels = int(root.confusion_LP.sum())
    table = Table(
        title=f"{root.root}: {_tiles(root.tiles)}, {pixels / 1e6:.2f} MP labelled; percent", title_justify="left"
    )
    columns = ("class", "IoU", "F1", "prec.", "recall", f"F1 {boundary.width_px} px", "labels", "answers")
    for column in columns:
        table.add_column(column, justify="left" if column == "class" else "right")
    for name, labelled, answered in zip(names, *shares(root), strict=True):
        by_class = (scores.iou, scores.f1, scores.precision, scores.recall, boundary.f1)
        table.add_row(name, *(_percent(values[name]) for values in by_class), _percent(labelled), _percent(answered))
    table.add_section()
    means = (scores.miou, scores.mean_f1, scores.mean_precision, scores.mean_recall, boundary.mean_f1)
    table.add_row("mean", *map(_percent, means), "", "")
    yield table
    yield (
        f"overall accuracy {_percent(scores.overall_accuracy)}, "
        f"calibration error {_percent(root.calibration.error)} ({BINS} bins)"
    )
    if scores.left_out:
        yield f"left out of the means: {_reasons(scores.left_out)}"
    no_boundary = {name: why for name, why in boundary.left_out.items() if name not in scores.left_out}
    if no_boundary:
        yield f"left out of the boundaries' mean: {_reasons(no_boundary)}"
    if root.without_mask:
        yield f"left out, without a mask: {_some(root.without_mask)}"
    if root.without_label:
        yield f"without one labelled pixel: {_some(root.without_label)}"
    if root.trained_on:
        yield "the student was trained on these tiles, or some of them: this says nothing of others"


def _confusion_table(root: RootScores, names: list[str]) -> Table:
    """Rows are labels and sum to 100; columns are numbered, as names are too long for them."""
    title = "What the labels' pixels were taken for; percent of a row"
    table = Table(title=title, title_justify="left", padding=(0, 0, 0, 1))
    table.add_column("label")
    for i in range(len(names)):
        table.add_column(str(i), justify="right")
    for i, (name, row) in enumerate(zip(names, root.confusion_LP.tolist(), strict=True)):
        table.add_row(f"{i} {name}", *(_percent(count / sum(row) if sum(row) else None) for count in row))
    return table


def _reasons(left_out: Mapping[str, str]) -> str:
    """`A and B (not scored), C (absent from the labels)`."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        by_reason.setdefault(reason, []).append(name)
    return ", ".join(f"{', '.join(names)} ({reason})" for reason, names in by_reason.items())


def _some(tiles: list[str]) -> str:
    more = len(tiles) - SHOWN_TILES
    return f"{_tiles(len(tiles))} ({', '.join(tiles[:SHOWN_TILES])}{f' and {more} more' if more > 0 else ''})"


def _tiles(count: int) -> str:
    return f"{count} tile{'s' if count != 1 else ''}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
