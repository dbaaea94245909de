"""What stage one will cost and save, from short trials, before any of it is paid: `precompute-teacher --dry-run`."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from kdpipe.cache.layout import encode_tile
from kdpipe.cache.values import encode
from kdpipe.configs.errors import DataError
from kdpipe.configs.schema import Config
from kdpipe.pipeline.memory import fits_in_memory, sized, teacher_advice
from kdpipe.pipeline.models.teacher import open_teacher
from kdpipe.pipeline.precompute import make_plan
from kdpipe.pipeline.progress import Progress, Silent
from kdpipe.pipeline.subjects import subject_noun
from kdpipe.pipeline.worth import Worth, measure

SAMPLE = 3  # tiles that are computed, in memory, to predict the others


@dataclass(frozen=True)
class Estimate:
    """
    A forecast: tiles, pixels, bytes and seconds still to do, and the free bytes of the disk (None if unlimited).

    `worth` is what that saves stage two, or why it is not known; None where nothing is to do.
    """

    cache: str
    tiles: int
    finished: int
    noun: str
    pixels: int
    bytes: int
    seconds: float
    free_bytes: int | None
    unreadable: dict[str, str]
    worth: Worth | str | None

    @property
    def fits(self) -> bool:
        """Whether the disk holds what is still to be written."""
        return self.free_bytes is None or self.bytes <= self.free_bytes

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "worth": self.worth.as_dict() if isinstance(self.worth, Worth) else self.worth}


def estimate(config: Config, device: torch.device, progress: Progress | None = None) -> Estimate:
    """
    Predict stage one from a seeded sample of the missing tiles, by their pixels; nothing is written.

    The student takes a few steps, to say what they cost beside the teacher. Raises what `precompute.make_plan` raises. Assumes
    that tiles compress and compute alike per pixel, one at a time.
    """
    plan = make_plan(config, device)
    unreadable, areas = {}, {}
    for tile in plan.missing:
        try:
            height, width = tile.size()
            areas[tile.id] = height * width
        except DataError as err:
            unreadable[tile.id] = str(err)
    readable = [tile for tile in plan.missing if tile.id in areas]
    sampled: Any = np.random.default_rng(config.seed).permutation(len(readable))[:SAMPLE] if readable else []
    pixels = written = 0
    seconds = teacher_seconds = 0.0
    worth: Worth | str | None = None
    if len(sampled):
        teacher = open_teacher(config, plan.recipe, device)
        for index in sampled:
            tile = readable[index]
            start = time.perf_counter()
            try:
                image_HWC, digest = tile.load()
            except (DataError, OSError) as err:
                unreadable[tile.id] = str(err)
                continue
            size = sized("tile", 1, *image_HWC.shape[:2])
            advice = teacher_advice(config, 1, device, max(image_HWC.shape[:2]))
            with fits_in_memory(f"while the teacher answered {size}", advice):
                asked = time.perf_counter()
                values_CHW = teacher.cached_values(image_HWC[None])[0]
                teacher_seconds += time.perf_counter() - asked
            units_CHW, lost = encode(values_CHW, plan.recipe)
            shard, metadata, _ = encode_tile(units_CHW, tile.id, digest, plan.recipe, lost)
            seconds += time.perf_counter() - start
            pixels += image_HWC.shape[0] * image_HWC.shape[1]
            written += len(shard) + len(metadata)
    total = sum(areas.values())
    share = total / pixels if pixels else 0.0
    if pixels:
        tile_seconds = teacher_seconds * share / len(areas)
        worth = measure(
            config, device, teacher, image_HWC, plan.samples, seconds * share, tile_seconds, progress or Silent()
        )
    return Estimate(
        cache=plan.storage.url,
        tiles=len(plan.tiles),
        finished=len(plan.finished),
        noun=subject_noun(config),
        pixels=total,
        bytes=round(written * share),
        seconds=seconds * share,
        free_bytes=plan.storage.free_bytes(),
        unreadable=unreadable,
        worth=worth,
    )
