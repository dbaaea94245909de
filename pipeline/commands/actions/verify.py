"""`verify-cache`."""

from __future__ import annotations

import sys
from pathlib import Path

from kdpipe.configs import Config
from kdpipe.pipeline.commands.console import Terminal, write_json
from kdpipe.pipeline.commands.options import EXIT_FINDINGS
from kdpipe.pipeline.devices import resolve_device
from kdpipe.pipeline.reports.terminal.verify import verify_tables
from kdpipe.pipeline.text import file_text
from kdpipe.pipeline.verify.gate import Level, verify


def verify_cache(
    config: Config, *, level: Level, sample: int, student: str | None, reference: str | None, page: str | None,
    json_path: str | None, device: str | None,
) -> None:  # fmt: skip
    """Verify the cache and report it; ends the process with 1 where there are findings."""
    terminal = Terminal()
    parity_tiles = None
    if page is not None:
        # It imports the evaluation of students, which only a page needs.
        from kdpipe.pipeline.reports.html import verify as html

        parity_tiles = html.ParityTiles(config)
    found = verify(
        config, level, resolve_device(device), sample=sample, student=student, on_parity=parity_tiles,
        reference=None if reference is None else Path(reference), progress=terminal,
    )  # fmt: skip
    write_json(json_path, found.as_dict())
    terminal.show(*verify_tables(found))
    if page is not None and parity_tiles is not None:
        tiles = parity_tiles.drawn or (html.cached_tiles(config, found, sample) if found.cache_checked else [])
        html.write_verification(found, config, tiles, Path(page))
        terminal.show(file_text("HTML report", page))
    if not found.passes:
        sys.exit(EXIT_FINDINGS)
