"""`inspect CACHE`."""

from __future__ import annotations

import sys
from pathlib import Path

from kdpipe.configs import Config
from kdpipe.pipeline.commands.console import Terminal, write_json
from kdpipe.pipeline.commands.options import EXIT_FINDINGS
from kdpipe.pipeline.inspection.cache import inspect_cache
from kdpipe.pipeline.inspection.cache import is_cache as is_cache
from kdpipe.pipeline.inspection.statistics import (
    CacheStatistics,
    compute_statistics,
    open_as_predicted,
    require_table_format,
    write_table,
)
from kdpipe.pipeline.reports.terminal.inspection import cache_tables, statistics_tables


def show_cache(
    path: str,
    config: Config | None,
    json_path: str | None,
    *,
    stats: bool,
    table_path: str | None,
    plot_path: str | None,
    limit: int | None = None,
) -> None:
    """Describe a cache, and its differences from a config; ends the process with 1 if there are any."""
    terminal = Terminal()
    found = inspect_cache(path, config)
    content = found.as_dict()
    terminal.show(*cache_tables(found))
    if stats:
        statistics = _statistics(path, table_path, plot_path, limit, terminal)
        content["statistics"] = statistics.as_dict()
        terminal.show(*statistics_tables(statistics))
    write_json(json_path, content)
    if found.differences:
        sys.exit(EXIT_FINDINGS)


def _statistics(
    path: str, table_path: str | None, plot_path: str | None, limit: int | None, terminal: Terminal
) -> CacheStatistics:
    if table_path is not None:
        require_table_format(Path(table_path))
    cache = open_as_predicted(path)
    with terminal.bar("statistics", min(len(cache.tile_ids), limit or len(cache.tile_ids)), "tiles") as advance:
        statistics = compute_statistics(cache, advance, limit)
    if table_path is not None:
        write_table(statistics, Path(table_path))
    if plot_path is not None:
        from kdpipe.pipeline.reports.plots import draw_statistics  # matplotlib, which only a plot needs

        draw_statistics(statistics, cache, Path(plot_path))
    return statistics
