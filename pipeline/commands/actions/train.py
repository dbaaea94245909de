"""`train-student`."""

from __future__ import annotations

import sys
from pathlib import Path

from kdpipe.configs import Config
from kdpipe.configs.errors import Interrupted, TrainingDiverged
from kdpipe.configs.schema import DistillMode
from kdpipe.pipeline.commands.console import Terminal, write_json
from kdpipe.pipeline.devices import resolve_device
from kdpipe.pipeline.distributed import is_further_process
from kdpipe.pipeline.progress import stop_on_signal
from kdpipe.pipeline.reports.terminal.training import curves_text, training_tables
from kdpipe.pipeline.runs.curves import read_curves
from kdpipe.pipeline.training.run import train, with_mode


def train_student(
    config: Config, *, kd: DistillMode | None, resume: bool, overwrite: bool, json_path: str | None, device: str | None
) -> None:
    """Run stage two and report it, once for all of its processes."""
    terminal = Terminal()
    config = with_mode(_named_as_trial(config), kd)
    try:
        with stop_on_signal() as stop:
            summary = train(
                config, resolve_device(device), resume=resume, overwrite=overwrite, progress=terminal, stop=stop
            )
    except (Interrupted, TrainingDiverged):
        if is_further_process(config):
            sys.exit(0)  # the first process says so; at another exit code Lightning would kill it
        raise
    if is_further_process(config):
        return
    write_json(json_path, summary.as_dict())
    console = terminal.console
    curves = curves_text(read_curves(Path(summary.logs).parent), console.width, only_ascii=console.options.ascii_only)
    terminal.show(curves, *training_tables(summary))


def _named_as_trial(config: Config) -> Config:
    """The configuration under a name of its own where `data.limit` makes the run a trial, which must not take the whole run's place."""
    limit = config.data.limit
    return config if limit is None else config.model_copy(update={"name": f"{config.name}-limit-{limit}"})
