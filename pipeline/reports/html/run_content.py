"""What a run of `train-student` came to, to be shown: its scores on the validation tiles, its curves, and tiles to look at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kdpipe.configs.errors import CheckpointError
from kdpipe.configs.schema import Config
from kdpipe.pipeline.evaluation.evaluate import Evaluation, Stretch, evaluate, student_model
from kdpipe.pipeline.precompute.expected_recipe import complete_recipe
from kdpipe.pipeline.progress import Progress, Silent
from kdpipe.pipeline.reports.html.layers import TilePictures
from kdpipe.pipeline.reports.html.shown_tiles import (
    Targets,
    cached_targets,
    draw_subject,
    run_cache,
    spread,
    training_noun,
    training_subjects,
    validation_subjects,
)
from kdpipe.pipeline.runs.checkpoint import BEST
from kdpipe.pipeline.runs.log import logged_curves
from kdpipe.pipeline.runs.record import RUN, Run, read_run, run_folder
from kdpipe.pipeline.teacher.frozen import open_teacher
from kdpipe.pipeline.training.run import LOGS_DIR

SHOWN_TILES = 24


@dataclass
class RunReport:
    """A run, the scores of its best checkpoint, what was logged by step, and tiles; `notes` say what is not shown, and why."""

    folder: str
    run: Run
    config: Config
    evaluation: Evaluation
    logged: dict[str, list[tuple[float, float]]]
    tiles: list[TilePictures]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; pictures are on the page alone."""
        return {
            "folder": self.folder,
            "name": self.run.name,
            "mode": self.run.mode,
            "evaluation": self.evaluation.as_dict(),
            "tiles": [{"tile": tile.tile, "group": tile.group, **tile.figures} for tile in self.tiles],
            "notes": self.notes,
        }


def report_run(
    folder: str | Path,
    device: torch.device,
    *,
    tiles: int = SHOWN_TILES,
    teacher: bool = False,
    window: int | None = None,
    progress: Progress | None = None,
) -> RunReport:
    """
    The report of the run in `folder`, whose `best.ckpt` is evaluated on its `data.val`.

    Half of the `tiles` shown are validation tiles, half training tiles with the soft targets that the cache holds; all are
    validation tiles where there is no cache to read. A validation tile has no cached soft target: with `teacher` it is
    asked, at the run's temperature. `window` is the side in px in which a student is asked for tiles too large for memory.

    Raises `DataError` where there is no run or its tiles are not here, `CheckpointError` where the student's or, with
    `teacher`, the teacher's weights are missing, `CorruptCache` where a shown tile of the cache is damaged.
    """
    progress = progress or Silent()
    run = read_run(folder)
    place = run_folder(folder)
    if not (place / BEST).is_file():
        raise CheckpointError(
            f"no {BEST} in {place.absolute()}, only {RUN}: expected the folder as `kdpipe train-student` left it, with the student's "
            "best weights"
        )
    model = student_model(place / BEST, device, tta=None, window=window)
    config = model.config
    asked = _asked_teacher(config, model.stretch, device) if teacher else None
    evaluation = evaluate(model, progress=progress)
    cache, why_not = run_cache(run, config)
    notes = [why_not] if why_not else []
    if asked is None and tiles:
        notes.append(
            "Validation tiles have no soft target here: a cache holds those of training tiles (--teacher asks for them)."
        )

    training = [] if cache is None else training_subjects(config, model.stretch, cache)
    of_training = spread(training, tiles // 2)
    of_validation = spread(validation_subjects(config, model.stretch), tiles - len(of_training))
    shown = [(subject, "validation tile", asked) for subject in of_validation]
    if cache is not None:
        shown += [(subject, training_noun(config), cached_targets(cache)) for subject in of_training]
    drawn = []
    with progress.bar("tiles to look at", len(shown), "tiles") as advance:
        for subject, group, targets in shown:
            drawn.append(draw_subject(subject, group, config, {"": model}, targets))
            advance(1)
    logs = (place / "../../..").resolve() / LOGS_DIR / config.group / config.name
    logged = logged_curves(logs)
    if not logged:
        notes.append(f"No losses by step: there is no log in {logs}.")
    return RunReport(str(folder), run, config, evaluation, logged, drawn, notes)


def _asked_teacher(config: Config, stretch: Stretch, device: torch.device) -> Targets:
    teacher = open_teacher(config, complete_recipe(config, stretch, None), device)
    return lambda subject, image_HWC: teacher.soft_targets(image_HWC[None])[0]
