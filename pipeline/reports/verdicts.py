"""What a comparison says in words, the same in a terminal and on a page: gained, lost or cannot tell, at which budget and where."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from kdpipe.configs.errors import count_text, summarise
from kdpipe.pipeline.evaluation.differences import MEAN, MOST_SEEDS, ArmScores, Difference
from kdpipe.pipeline.text import duration_text

if TYPE_CHECKING:
    from kdpipe.pipeline.evaluation.compare import Comparison
    from kdpipe.pipeline.evaluation.roots import RootComparison


def points_text(difference: Difference | None) -> str:
    """A difference in points of IoU with its interval: `+1.2 [-0.3, +2.7]`, without it for a single seed."""
    if difference is None:
        return "–"
    if difference.low is None or difference.high is None:
        return f"{100 * difference.mean:+.1f}"
    return f"{100 * difference.mean:+.1f} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"


def verdict_lines(arms: Sequence[ArmScores]) -> Iterator[str]:
    """A sentence for each arm but the first, the baseline: in which classes it gained, lost, or cannot be told apart."""
    baseline, *others = arms
    for arm in others:
        yield f"{arm.label} against {baseline.label}: {_verdicts_text(arm.differences or {})}."


def seconds_lines(comparison: Comparison) -> Iterator[str]:
    """The verdicts after equal seconds of training, or why there are none."""
    found = comparison.equal_seconds
    budget = duration_text(found.seconds)
    yield f"After {budget} of training, the time of the shortest run (without validation and stage one):"
    if found.arms:
        yield from verdict_lines(found.arms)
    for label, reason in found.untold.items():
        yield f"{label} against {comparison.arms[0].label}: cannot tell after {budget}, because {reason}."


def root_title(root: RootComparison) -> str:
    """A root and its tiles: `regions/North: 12 tiles`."""
    return f"{root.root}: {count_text(root.tiles, 'tiles')}"


def root_lines(root: RootComparison) -> Iterator[str]:
    """The verdicts on one root, and which runs were trained on it."""
    for line in verdict_lines(root.arms):
        yield f"{root.root}: {line}"
    if root.trained_on:
        runs = summarise(root.trained_on, 3)
        yield f"{root.root}: trained on some of these tiles, so that the scores say nothing about other tiles: {runs}."


def _verdicts_text(differences: dict[str, Difference]) -> str:
    """`gained in mIoU (+3.1 [+1.0, +5.2]); cannot tell in Road (about 14 seeds would settle it), Water (about 40)`."""
    shown = {("mIoU" if name == MEAN else name): differences[name] for name in _mean_first(differences)}
    if all(difference.low is None for difference in shown.values()):
        return "cannot tell from one seed"
    parts = []
    for verdict in ("gained", "lost"):
        told = [f"{name} ({points_text(d)})" for name, d in shown.items() if d.verdict == verdict]
        if told:
            parts.append(f"{verdict} in {', '.join(told)}")
    untold = {name: d for name, d in shown.items() if d.verdict == "cannot tell"}
    if untold:
        parts.append(f"cannot tell in {', '.join(_untold_texts(untold))}")
    return "; ".join(parts)


def _mean_first(differences: dict[str, Difference]) -> list[str]:
    return sorted(differences, key=lambda name: name != MEAN)


def _untold_texts(untold: dict[str, Difference]) -> Iterator[str]:
    """Each class with the seeds that would settle it; what the number means is said with the first."""
    meaning = " seeds would settle it"
    for name, difference in untold.items():
        if difference.low is None:
            yield f"{name} (one seed)"
            continue
        seeds = difference.seeds_to_settle
        yield f"{name} ({f'more than {MOST_SEEDS}' if seeds is None else f'about {seeds}'}{meaning})"
        meaning = ""
