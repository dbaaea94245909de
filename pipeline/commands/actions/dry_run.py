"""`precompute-teacher --dry-run`."""

from __future__ import annotations

import sys

from kdpipe.configs import Config
from kdpipe.pipeline.commands.console import Terminal, write_json
from kdpipe.pipeline.commands.options import EXIT_REFUSED
from kdpipe.pipeline.devices import resolve_device
from kdpipe.pipeline.dry_run import estimate
from kdpipe.pipeline.reports.terminal.stage_one import estimate_text


def dry_run(config: Config, device: str | None, json_path: str | None) -> None:
    """Estimate stage one and report it; ends the process with 3 where the cache does not fit on the disk."""
    terminal = Terminal()
    forecast = estimate(config, resolve_device(device), terminal)
    terminal.show(estimate_text(forecast))
    write_json(json_path, forecast.as_dict())
    if not forecast.fits:
        sys.exit(EXIT_REFUSED)
