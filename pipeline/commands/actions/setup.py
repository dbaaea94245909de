"""`init`, `inspect CHECKPOINT`, `suggest-map` and `demo`."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path

from kdpipe.configs import Config
from kdpipe.pipeline.commands.console import Terminal, write_json
from kdpipe.pipeline.commands.options import EXIT_FINDINGS
from kdpipe.pipeline.demo import STUDENTS, run_demo
from kdpipe.pipeline.devices import resolve_device
from kdpipe.pipeline.inspection.checkpoint import inspect_checkpoint
from kdpipe.pipeline.inspection.external import inspect_external, is_external
from kdpipe.pipeline.reports.terminal.inspection import checkpoint_table, external_parts
from kdpipe.pipeline.reports.terminal.starter import first_config_parts
from kdpipe.pipeline.reports.terminal.verify import suggestion_tables
from kdpipe.pipeline.starter.colours import read_colours
from kdpipe.pipeline.starter.given import Given
from kdpipe.pipeline.starter.write import run_name, write_first_config
from kdpipe.pipeline.verify import class_map


def init(
    folders: Sequence[str], *, teacher: str | None, out: str, classes: list[str] | None, colours: str | None,
    ignore_index: int | None,
    teacher_classes: list[str] | None, teacher_normalize: str | None, bands: tuple[int, ...] | None,
    val: tuple[str, ...], images: str, masks: str, overwrite: bool, limit: int | None, json_path: str | None,
) -> None:  # fmt: skip
    """Write a first config and report what was found; ends the process with 1 where some files have problems."""
    terminal = Terminal()
    given = Given(
        run_name(out), val, images, masks, classes=classes,
        colours=None if colours is None else read_colours(colours), ignore_index=ignore_index, bands=bands,
        teacher_classes=teacher_classes, teacher_normalize=teacher_normalize, limit=limit,
    )  # fmt: skip
    found = write_first_config(folders, teacher, out, given, overwrite=overwrite, progress=terminal)
    write_json(json_path, found.as_dict() | {"limit": limit})
    terminal.show(*first_config_parts(found))
    if found.draft.problems:
        sys.exit(EXIT_FINDINGS)


def show_checkpoint(path: str, json_path: str | None) -> None:
    """Describe a file of weights, or a whole network of another library."""
    if is_external(path):
        network = inspect_external(path)
        write_json(json_path, asdict(network))
        Terminal().show(*external_parts(network))
        return
    found = inspect_checkpoint(path)
    write_json(json_path, asdict(found))
    Terminal().show(checkpoint_table(found))


def suggest_map(
    config: Config, unfilled: Collection[str], *, sample: int | None, json_path: str | None, device: str | None
) -> None:
    """Show the class map that the labels suggest; `unfilled` are teacher classes without a configured row."""
    terminal = Terminal()
    where = resolve_device(device)
    result = class_map.suggest_map(config, where, sample=sample, unfilled=unfilled, progress=terminal)
    write_json(json_path, result.as_dict() | {"limit": config.data.limit})
    terminal.show(*suggestion_tables(result), wrap_tables=True)


def demo(*, out: str, json_path: str | None) -> None:
    """Run the demo; its JSON holds the results of both students."""
    terminal = Terminal()
    for part in run_demo(Path(out), terminal):
        terminal.show(part)
    write_json(json_path, {label: json.loads((Path(out) / f"{label}.json").read_text()) for label in STUDENTS})
