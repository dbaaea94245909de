"""`predict` and `export`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from kdpipe.configs import Config
from kdpipe.configs.errors import ConfigError
from kdpipe.pipeline.commands.console import Terminal, write_json
from kdpipe.pipeline.commands.options import EXIT_FINDINGS, complain
from kdpipe.pipeline.prediction.export import Format, export_student
from kdpipe.pipeline.prediction.maps import predict
from kdpipe.pipeline.prediction.model import Precision, open_predictor
from kdpipe.pipeline.prediction.variants import Variant, export_variants
from kdpipe.pipeline.progress import stop_on_signal
from kdpipe.pipeline.reports.terminal.maps import deployed_tables, export_table, map_tables
from kdpipe.pipeline.runs.layout import BEST


def predict_maps(
    inputs: Sequence[str], *, checkpoint: str, config: Config | None, out: str, window: int | None, overlap: int | None,
    batch_size: int | None,
    tta: str, confidence: bool, probabilities: bool, overwrite: bool, limit: int | None, json_path: str | None,
    device: str | None,
) -> None:  # fmt: skip
    """Write maps and report them; ends the process with 1 where a scene failed."""
    terminal = Terminal()
    predictor = open_predictor(checkpoint, device, tta=tta, config=config, say=terminal.say)
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
    *, given: str | None, checkpoint: str | None, format_: Format, fp16: bool, int8: bool, argmax: bool,
    calibrate: str | None, tolerance: float | None, side: int | None, timed_px: int | None, out: str | None,
    tiles: Sequence[str], overwrite: bool, limit: int | None, json_path: str | None,
) -> None:  # fmt: skip
    """Write a student's file or files, verified, and report them; ends the process with 1 where one was not kept."""
    terminal = Terminal()
    path = _checkpoint(given, checkpoint)
    flags: dict[Precision, bool] = {"fp16": fp16, "int8": int8}
    precisions = [precision for precision, wanted in flags.items() if wanted]
    if not precisions and not argmax:
        _refuse_alone(calibrate=calibrate, tolerance=tolerance, timed_size=timed_px)
        result = export_student(
            path, format_, out, side=side, tiles=tiles, limit=limit, overwrite=overwrite, progress=terminal,
        )  # fmt: skip
        write_json(json_path, asdict(result))
        terminal.show(export_table(result))
        return
    if format_ != "onnx":
        raise ConfigError(f"--fp16, --int8 and --argmax write ONNX files, and --format is {format_}: leave it out")
    if not int8:
        _refuse_alone(calibrate=calibrate)
    if side is not None and timed_px is not None:
        raise ConfigError(f"files of --size {side} are timed at that size: leave --timed-size out")
    deployed = export_variants(
        path, [Variant(each, argmax) for each in precisions] or [Variant("fp32", argmax)], out, tiles=tiles,
        calibrate=calibrate, tolerance=tolerance, side=side, timed_px=timed_px, limit=limit, overwrite=overwrite, progress=terminal,
    )  # fmt: skip
    write_json(json_path, asdict(deployed))
    terminal.show(*deployed_tables(deployed))
    for reason in deployed.refused:
        complain(reason)
    if deployed.refused:
        sys.exit(EXIT_FINDINGS)


def _checkpoint(given: str | None, checkpoint: str | None) -> Path:
    """The checkpoint that RUN or --checkpoint names."""
    if (given is None) == (checkpoint is None):
        raise ConfigError(
            "export takes one student: name RUN, the folder of a run or a checkpoint, or --checkpoint; found "
            f"{'neither' if given is None else 'both'}"
        )
    path = Path(given or checkpoint or "")
    return path / BEST if given and path.is_dir() else path


def _refuse_alone(**options: object) -> None:
    """Raise `ConfigError` for an option that says how to make a file that was not asked for."""
    needs = {
        "calibrate": "--int8",
        "tolerance": "--fp16, --int8 or --argmax",
        "timed_size": "--fp16, --int8 or --argmax",
    }
    for name, value in options.items():
        if value is not None:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} is for {needs[name]}: add it, or leave {option} out")
