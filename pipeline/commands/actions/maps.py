"""`predict` and `export`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict

from kdpipe.pipeline.commands.console import Terminal, write_json
from kdpipe.pipeline.commands.options import EXIT_FINDINGS, complain
from kdpipe.pipeline.prediction.export import Format, export_student
from kdpipe.pipeline.prediction.maps import predict
from kdpipe.pipeline.prediction.model import open_predictor
from kdpipe.pipeline.progress import stop_on_signal
from kdpipe.pipeline.reports.terminal.maps import export_table, map_tables


def predict_maps(
    inputs: Sequence[str], *, checkpoint: str, out: str, window: int, overlap: int, batch_size: int | None, tta: str,
    confidence: bool, probabilities: bool, overwrite: bool, limit: int | None, json_path: str | None, device: str | None,
) -> None:  # fmt: skip
    """Write maps and report them; ends the process with 1 where a scene failed."""
    terminal = Terminal()
    predictor = open_predictor(checkpoint, device, tta=tta)
    with stop_on_signal() as stop:
        summary = predict(
            predictor, inputs, out, window=window, overlap=overlap, batch_size=batch_size, confidence=confidence,
            probabilities=probabilities, overwrite=overwrite, limit=limit, progress=terminal, stop=stop,
        )  # fmt: skip
    write_json(json_path, asdict(summary))
    terminal.show(*map_tables(summary))
    if summary.failed:
        for reason in summary.failed.values():
            complain(reason)
        sys.exit(EXIT_FINDINGS)


def export_model(
    *, checkpoint: str, format_: Format, out: str | None, tiles: Sequence[str], overwrite: bool, json_path: str | None
) -> None:
    """Write a student's file, verified, and report it."""
    terminal = Terminal()
    result = export_student(checkpoint, format_, out, tiles=tiles, overwrite=overwrite, progress=terminal)
    write_json(json_path, asdict(result))
    terminal.show(export_table(result))
