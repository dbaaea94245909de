"""`precompute-teacher` on a complete cache, without importing torch."""

from __future__ import annotations

from kdpipe.configs import Config
from kdpipe.pipeline.commands.console import Terminal, write_json
from kdpipe.pipeline.precompute.plan import complete_text, find_complete
from kdpipe.pipeline.reports.terminal.stage_one import precompute_text


def report_complete(config: Config, json_path: str | None) -> bool:
    """Report the cache if it is complete; returns whether it is."""
    summary = find_complete(config)
    if summary is None:
        return False
    terminal = Terminal()
    terminal.say(complete_text(summary))
    write_json(json_path, summary.as_dict())
    terminal.show(precompute_text(summary))
    return True
