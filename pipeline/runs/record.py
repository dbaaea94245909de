"""
What a run of stage two leaves behind to be compared with others: `run.json` in its folder, written anew at each validation.

It holds the resolved configuration, the cache that was learnt from, and the score of every validation with its step and time.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from kdpipe.configs.errors import DataError

RUN, CONFIG = "run.json", "config.yaml"
UNVALIDATED = "has no validation yet: let it train on, or give it data.val"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Validation(_Record):
    """Scores (0..1, None where no label is scored) after `steps` steps, which took `seconds` without validation."""

    steps: int
    seconds: float
    miou: float | None
    overall_accuracy: float | None
    iou: dict[str, float | None]


class CacheUsed(_Record):
    """The cache that a run learnt from."""

    path: str
    fingerprint: str
    tiles: int


class Run(_Record):
    """One run: who it is, what it was configured as, what it learnt from, and how it went."""

    name: str
    seed: int
    mode: str
    device: str
    total_steps: int
    config: dict[str, Any]
    cache: CacheUsed | None
    libraries: dict[str, str]
    history: list[Validation]


def write_run(folder: Path, run: Run) -> None:
    """Write `run.json` into a run's folder, whole or not at all."""
    partial = folder / f".{RUN}.partial"
    partial.write_text(run.model_dump_json(indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / RUN)


def paces_of_other_modes(folder: Path, mode: str) -> dict[str, float]:
    """
    Seconds a step of the runs that `--kd` made beside a run of `mode`, by name; one that was never validated, or is damaged,
    has none to say.

    A run's name ends in its mode where that is not its config's own (`training.with_mode`).
    """
    name = folder.name.removesuffix(f"-{mode}")
    paces = {}
    for other in (name, f"{name}-cached", f"{name}-online", f"{name}-none"):
        file = folder.with_name(other) / RUN
        if other == folder.name or not file.is_file():
            continue
        with suppress(DataError):  # another run's file must not end this one
            first, last = (history := read_run(file).history)[0], history[-1]
            # Where two validations are told, without the first steps, which take longer.
            paces[other] = (
                (last.seconds - first.seconds) / (last.steps - first.steps)
                if last.steps > first.steps
                else last.seconds / last.steps
            )
    return paces


def run_folder(path: str | Path) -> Path:
    """The folder of a run that is named by its folder or by its `run.json`."""
    return Path(path) if Path(path).is_dir() else Path(path).parent


def read_run(path: str | Path) -> Run:
    """
    The run in a folder of `kdpipe train-student`, or in its `run.json`.

    Raises `DataError` where there is none, it is damaged, or it has no validation to show.
    """
    file = Path(path) / RUN if Path(path).is_dir() else Path(path)
    try:
        run = Run.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except OSError as err:
        if (file.parent / CONFIG).is_file():
            raise DataError(f"{file.parent} {UNVALIDATED}") from err
        raise DataError(
            f"no run in {Path(path).absolute()}: expected a folder that `kdpipe train-student` wrote, such as "
            f"model_weights/<group>/<name>, with a {RUN} in it"
        ) from err
    except (ValueError, ValidationError) as err:
        raise DataError(f"{file} is not what `kdpipe train-student` writes: {str(err).splitlines()[0]}") from err
    if not run.history:
        raise DataError(f"{file} {UNVALIDATED}")
    return run
