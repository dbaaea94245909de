"""`run.json` in a run's folder, by which it is compared with others: rewritten at each validation and at the run's end."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kdpipe.configs.errors import DataError
from kdpipe.configs.files import open_file, write_atomically
from kdpipe.configs.schema.section import is_none
from kdpipe.pipeline.runs.layout import CONFIG, RUN

UNVALIDATED = "has no validation yet: let it train on, or give it data.val"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Validation(_Record):
    """
    Scores in 0..1 (None where no label is scored) after `steps` steps that took `seconds`, validation not included.

    Where the weights are averaged, the scores are those of the average, and `raw_miou` is that of the weights themselves.
    """

    steps: int
    seconds: float
    miou: float | None
    overall_accuracy: float | None
    iou: dict[str, float | None]
    raw_miou: float | None = Field(None, exclude_if=is_none)


class CacheUsed(_Record):
    """The cache that a run was trained from."""

    path: str
    fingerprint: str
    tiles: int


class OwnLoss(_Record):
    """The file that a `distill.loss` of the user's own came from, and the version of the package that installed it."""

    name: str
    path: str
    sha256: str
    version: str | None


class Run(_Record):
    """
    One run: configuration, cache, scores of each validation, and times.

    `wall_seconds` is the time from start to now over all resumes, `seconds_per_step` the median step since its last start, and
    `stage_one_seconds` the wall time of the cache's stage one; None where it is not known. `class_weights` are those that
    `train.class_weights` gave or had counted, by class, and `class_trust` those of `distill.class_trust`.
    """

    name: str
    seed: int
    mode: str
    device: str
    total_steps: int
    config: dict[str, Any]
    cache: CacheUsed | None
    libraries: dict[str, str]
    history: list[Validation]
    wall_seconds: float | None = None
    seconds_per_step: float | None = None
    stage_one_seconds: float | None = None
    class_weights: dict[str, float] | None = Field(None, exclude_if=is_none)
    class_trust: dict[str, float] | None = Field(None, exclude_if=is_none)
    own_loss: OwnLoss | None = Field(None, exclude_if=is_none)


def write_run(folder: Path, run: Run) -> None:
    """Write `run.json` into a run's folder, whole or not at all."""
    with write_atomically(folder / RUN) as file:
        file.write(f"{run.model_dump_json(indent=1)}\n".encode())


def read_run(path: str | Path) -> Run:
    """
    The run in a folder of `kdpipe train-student`, or in its `run.json`.

    Raises `DataError` where there is none, it is damaged, or it has no validation yet.
    """
    file = Path(path) / RUN if Path(path).is_dir() else Path(path)
    try:
        with open_file(file) as opened:
            run = Run.model_validate(json.loads(opened.read().decode()))
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


def paces_of_other_modes(folder: Path, mode: str) -> dict[str, float]:
    """
    Seconds per step of the runs that `--kd` made beside the run of `mode` in `folder`, by name.

    Such a run's name ends in its mode unless the config itself asks for that mode. A run without a recorded pace is left out.
    """
    name = folder.name.removesuffix(f"-{mode}")
    paces = {}
    for other in (name, f"{name}-cached", f"{name}-online", f"{name}-none"):
        if other == folder.name:
            continue
        with suppress(DataError):  # absent, or damaged: no reason to fail at the end of this one
            if (pace := read_run(folder.with_name(other)).seconds_per_step) is not None:
                paces[other] = pace
    return paces
