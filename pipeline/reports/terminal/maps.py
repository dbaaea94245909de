"""What `kdpipe predict` and `kdpipe export` print."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from kdpipe.pipeline.text import duration_text, size_text

if TYPE_CHECKING:
    from kdpipe.pipeline.prediction.export import Exported
    from kdpipe.pipeline.prediction.maps import MapSummary

SHOWN_MAPS = 20  # the rest is in --json


def map_tables(summary: MapSummary) -> Iterator[Table | str]:
    """Which maps there are, and what of them is of which class; narrow enough for 80 columns."""
    yield (
        f"{summary.model} on {summary.device}: windows of {summary.window} px, {summary.overlap} px shared, TTA {summary.tta}"
    )
    if not summary.maps:
        return
    yield "\n".join(
        [
            *(
                f"{map_.files['classes']}: {map_.height} x {map_.width} px in {duration_text(map_.seconds)}"
                for map_ in summary.maps[:SHOWN_MAPS]
            ),
            *([f"and {len(summary.maps) - SHOWN_MAPS} more maps"] if len(summary.maps) > SHOWN_MAPS else []),
        ]
    )
    pixels = {name: sum(map_.pixels[name] for map_ in summary.maps) for name in summary.classes}
    mapped, empty = sum(pixels.values()), sum(map_.no_data for map_ in summary.maps)
    table = Table("class", title="What the maps show", title_justify="left")
    table.add_column("MP", justify="right")
    table.add_column("percent", justify="right")
    for name, count in pixels.items():
        table.add_row(name, f"{count / 1e6:.3f}", f"{100 * count / mapped:.1f}" if mapped else "–")
    if empty:
        table.add_section()
        table.add_row("no data", f"{empty / 1e6:.3f}", "")
    yield table


def export_table(result: Exported) -> str:
    """The file, and how far its answers are from the checkpoint's."""
    return (
        f"{result.file}: {result.network}, {len(result.classes)} classes, {size_text(Path(result.file).stat().st_size)}, images of "
        f"{result.sizes}\n"
        f"verified on {result.images} images of {result.tiles} tiles: largest difference of a probability {result.largest_difference:.1e}, "
        f"same class at {100 * result.same_class:.4f} % of {result.pixels / 1e6:.2f} MP"
    )
