"""Validation tiles with the answers of several arms, to be laid over each other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from kdpipe.configs.errors import DataError
from kdpipe.pipeline.evaluation.compare import Comparison
from kdpipe.pipeline.evaluation.evaluate import student_model
from kdpipe.pipeline.progress import Progress, Silent
from kdpipe.pipeline.reports.html.layers import TilePictures, draw_tile
from kdpipe.pipeline.reports.html.shown_tiles import spread, validation_subjects
from kdpipe.pipeline.runs.checkpoint import LAST


def comparison_tiles(
    comparison: Comparison,
    folders: Mapping[int, Path],
    device: torch.device,
    count: int,
    progress: Progress | None = None,
) -> tuple[list[TilePictures], list[str]]:
    """
    At most `count` tiles with what the first seed's run of every arm answers after its last step, and what is not shown.

    `folders` are the runs' by `id(run)`. An arm without a `last.ckpt` is left out; without validation tiles here, all are.
    """
    models, notes = {}, []
    for arm in comparison.arms:
        file = folders[id(next(iter(arm.runs.values())))] / LAST
        if file.is_file():
            models[arm.label] = student_model(file, device, tta=None, window=None)
        else:
            notes.append(f"No answers of {arm.label}: there is no {file}.")
    if not models:
        return [], notes
    try:
        # Each arm sees the images as it was trained to: with its own bands and stretch.
        subjects = {label: validation_subjects(model.config, model.stretch) for label, model in models.items()}
    except DataError as err:
        return [], [*notes, f"No tiles: {err}"]
    shown = spread(range(min(map(len, subjects.values()))), count)
    config = next(iter(models.values())).config
    drawn = []
    with (progress or Silent()).bar("tiles to look at", len(shown), "tiles") as advance:
        for i in shown:
            answers = {
                label: model.answer(subjects[label][i].image()).argmax(axis=0) for label, model in models.items()
            }
            subject = next(iter(subjects.values()))[i]
            drawn.append(
                draw_tile(
                    subject.id, "validation tile", subject.image(), len(config.classes.names), config.classes.ignore_index,
                    labels_HW=subject.labels(), answers=answers,
                )
            )  # fmt: skip
            advance(1)
    return drawn, notes
