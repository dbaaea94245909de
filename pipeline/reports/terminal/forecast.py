"""A forecast as tables: the teacher's lead by scene and class, and the advice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.table import Table

from kdpipe.pipeline.text import percent_cell, percent_text

if TYPE_CHECKING:
    from kdpipe.pipeline.verify.forecast import Forecast, Lead, Scene

CAVEAT = (
    "The teacher may have seen these scenes, which kdpipe cannot know: if it was trained on them, its lead is too large, and this "
    "says nothing."
)


def forecast_tables(result: Forecast) -> Iterator[Table | str]:
    """The lead on each scene and on all together, teacher classes that the labels contradict, and the advice; fits 80 columns."""
    for scene in result.scenes:
        yield _table(scene)
        yield f"{scene.root}: {_scene_text(scene)}"
    if len(result.scenes) > 1:
        yield _table(result.together)
    for row in result.contradicted:
        yield (
            f"where the teacher predicts {row.name}, {percent_text(row.fitting_share, 0)} of the labels say {row.fitting} and "
            f"{percent_text(row.configured_share, 0)} {row.configured}"
        )
    yield f"Advice: {advice_text(result)}"
    yield CAVEAT


def advice_text(result: Forecast) -> str:
    """What to do, and why, in a sentence or two."""
    together, advice = result.together, result.advice
    lead = f"the teacher's lead is {_interval(together.miou)} points of mIoU"
    if advice == "correct the class map":
        rows = ", ".join(row.name for row in result.contradicted)
        return (
            f"{advice}, or the order of teacher.classes, before anything else: the labels contradict {rows}. kdpipe suggest-map prints "
            "the map that fits the labels."
        )
    if advice == "distil":
        return (
            f"{advice}: {lead}. A student learns at most what its teacher knows: how much of it, kdpipe compare shows."
        )
    if advice == "distil with care":
        trust = ", ".join(f"{name}: 0.3" for name in together.behind)
        return (
            f"{advice}: {lead}, but it is behind in {', '.join(together.behind)}. Believe it less there, such as by distill.class_trust: "
            f"{{{trust}}}, and look at these classes in kdpipe compare."
        )
    if advice == "not worth it":
        return f"{advice} on scenes like these: {lead}. Look for a better teacher, or train without one."
    return f"{advice}: {lead}. More labelled tiles, or more baselines of other seeds, would narrow it."


def _scene_text(scene: Scene) -> str:
    behind = f"; behind in {', '.join(scene.behind)}" if scene.behind else ""
    return f"{scene.advice}{behind}"


def _table(scene: Scene) -> Table:
    noun = "tile" if scene.tiles == 1 else "tiles"
    table = Table(title=f"{scene.root}: {scene.tiles} {noun}; IoU in percent", title_justify="left")
    for column in ("class", "teacher", "without it", "lead [95 %]"):
        table.add_column(column, justify="left" if column == "class" else "right")
    for name, lead in scene.classes.items():
        table.add_row(name, *_cells(lead))
    table.add_section()
    table.add_row("mean", *_cells(scene.miou))
    return table


def _cells(lead: Lead) -> tuple[str, str, str]:
    return percent_cell(lead.teacher), percent_cell(lead.baseline), _interval(lead)


def _interval(lead: Lead) -> str:
    if lead.lead is None:
        return "–"
    if lead.low is None or lead.high is None:
        return f"{100 * lead.lead:+.1f}"
    return f"{100 * lead.lead:+.1f} [{100 * lead.low:+.1f}, {100 * lead.high:+.1f}]"
