"""`precompute-teacher`: stage one in this process, or on a cluster."""

from __future__ import annotations

import sys

import torch

from kdpipe.configs import Config
from kdpipe.configs.errors import ConfigError, extra_text
from kdpipe.pipeline.commands.console import Terminal, write_json
from kdpipe.pipeline.commands.options import EXIT_FINDINGS, complain
from kdpipe.pipeline.devices import resolve_device
from kdpipe.pipeline.precompute.plan import Summary, failure_report
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.progress import stop_on_signal
from kdpipe.pipeline.reports.terminal.stage_one import precompute_text


def precompute_teacher(
    config: Config,
    device: str | None,
    json_path: str | None,
    *,
    repair: bool,
    workers: int | None,
    scheduler: str | None,
) -> None:
    """Run stage one and report it; ends the process with 1 where tiles failed."""
    terminal = Terminal()
    if workers or scheduler:
        summary = precompute_on_cluster(config, device, terminal, repair=repair, workers=workers, scheduler=scheduler)
    else:
        with stop_on_signal() as stop:
            summary = precompute(config, resolve_device(device), terminal, stop, repair=repair)
    write_json(json_path, summary.as_dict())
    terminal.show(precompute_text(summary))
    if summary.failed:
        complain(failure_report(summary))
        sys.exit(EXIT_FINDINGS)


def precompute_on_cluster(
    config: Config, device: str | None, terminal: Terminal, *, repair: bool, workers: int | None, scheduler: str | None
) -> Summary:
    """Stage one on `workers` processes of this machine, or on those of the cluster at `scheduler`."""
    try:
        from kdpipe.pipeline.cluster.client import Cluster
    except ModuleNotFoundError as err:  # of the extra `cluster`
        if err.name != "distributed":
            raise
        raise ConfigError(f"--workers and --scheduler need dask.distributed; {extra_text('cluster')}") from err
    with stop_on_signal() as stop, Cluster(terminal, device, address=scheduler, local=workers or 0) as cluster:
        return precompute(config, torch.device("cpu"), terminal, stop, repair=repair, workers=cluster)
