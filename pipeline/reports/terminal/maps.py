"""Maps and exported files as tables and text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from kdpipe.configs.errors import count_text
from kdpipe.pipeline.text import duration_text, limit_text, percent_cell, percent_text, size_text

if TYPE_CHECKING:
    from kdpipe.pipeline.prediction.export import Exported
    from kdpipe.pipeline.prediction.maps import MapSummary
    from kdpipe.pipeline.prediction.variants import Deployed

SHOWN_MAPS = 20  # the rest is in --json


def map_tables(summary: MapSummary) -> Iterator[Table | str]:
    """The maps that were written, and the area of each class on all of them; fits 80 columns."""
    windows = f"windows of {summary.window} px, overlap {summary.overlap} px"
    windows += "" if summary.blended else " (cut in the middle, as classes cannot be blended)"
    yield f"{summary.model} on {summary.device}: {windows}, TTA {summary.tta}"
    if not summary.maps:
        return
    for map_ in summary.maps[:SHOWN_MAPS]:
        yield f"{map_.files['classes']}: {map_.height} x {map_.width} px in {duration_text(map_.seconds)}"
    if summary.limit is not None:
        yield f"a trial: {count_text(len(summary.maps), 'scenes')}{limit_text(summary.limit, summary.scenes)}"
    if len(summary.maps) > SHOWN_MAPS:
        yield f"and {count_text(len(summary.maps) - SHOWN_MAPS, 'more maps')}"
    pixels = {name: sum(map_.pixels[name] for map_ in summary.maps) for name in summary.classes}
    mapped, empty = sum(pixels.values()), sum(map_.no_data for map_ in summary.maps)
    table = Table("class", title="Area by class", title_justify="left")
    table.add_column("MP", justify="right")
    table.add_column("percent", justify="right")
    for name, count in pixels.items():
        table.add_row(name, f"{count / 1e6:.3f}", percent_cell(count / mapped if mapped else None))
    if empty:
        table.add_section()
        table.add_row("no data", f"{empty / 1e6:.3f}", "")
    yield table


def export_table(result: Exported) -> str:
    """The exported file, and how far its predictions are from those of the checkpoint."""
    size = size_text(Path(result.file).stat().st_size)
    return (
        f"{result.file}: {result.network}, {len(result.classes)} classes, {size}, images of {result.sizes}\n"
        f"verified on {count_text(result.images, 'images')} of {count_text(result.tiles, 'tiles')}: largest difference in probability "
        f"{result.largest_difference:.1e}, "
        f"same class for {percent_text(result.same_class, 4)} of {result.pixels / 1e6:.2f} MP"
    )


def deployed_tables(result: Deployed) -> Iterator[Table | str]:
    """Size, latency and agreement of the exported files, and where they are; fits 80 columns."""
    of_tiles = f"{count_text(result.tiles, 'tiles')}"
    yield f"{result.network}, {len(result.classes)} classes; compared on {result.pixels / 1e6:.2f} MP of {of_tiles}"
    table = Table(
        "file", title=f"Latency: one image of {result.size_px} px, onnxruntime on the CPU", title_justify="left"
    )
    for column in ("size", "latency", "mIoU", "fall", "same class"):
        table.add_column(column, justify="right")
    table.add_column("")
    for each in result.files:
        table.add_row(
            each.name,
            size_text(each.size_bytes),
            f"{each.latency_ms:.1f} ms",
            "–" if each.miou is None else f"{each.miou:.2f}",
            "–" if each.fall is None or each.tolerance is None else f"{each.fall:.2f}",
            percent_text(each.same_class, 2) if each.tolerance is not None else "–",
            "to compare" if each.tolerance is None else "kept" if each.passes else "refused",
        )
    yield table
    for each in result.files:
        if each.file is not None:
            yield f"{each.name}: {each.file}"
