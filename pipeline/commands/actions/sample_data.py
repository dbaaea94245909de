"""`sample-data`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from kdpipe.data.landscape.labels import write_sample_data
from kdpipe.pipeline.commands.console import Terminal, write_json
from kdpipe.pipeline.text import size_text


def generate(folder: str, *, seed: int, json_path: str | None) -> None:
    """Write the generated landscape and report it."""
    summary = write_sample_data(Path(folder), seed=seed)
    write_json(json_path, asdict(summary))
    tiles = ", ".join(f"{count} {split}" for split, count in summary.tiles.items())
    size = f"{sum(summary.pixels.values()) / 1e6:.1f} MP, {size_text(summary.size_bytes)}"
    Terminal().show(f"{tiles} tiles, {size} in {summary.out_dir}")
