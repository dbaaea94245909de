"""What stage one will cost and save, from short trials, before any of it is paid: `precompute-teacher --dry-run`."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdpipe.cache.tile import encode_tile
from kdpipe.configs.errors import DataError
from kdpipe.configs.schema import Config
from kdpipe.pipeline.memory import fits_in_memory, sized, teacher_advice
from kdpipe.pipeline.precompute.batches import teacher_batch_size
from kdpipe.pipeline.precompute.plan import make_plan
from kdpipe.pipeline.precompute.run import stage_threads
from kdpipe.pipeline.precompute.subjects import subject_noun
from kdpipe.pipeline.progress import Progress, Silent
from kdpipe.pipeline.teacher import precision
from kdpipe.pipeline.teacher.frozen import FrozenTeacher, open_teacher, predicts_in_bands
from kdpipe.pipeline.training.worth import Worth, measure

SAMPLE = 3  # tiles that are computed, in memory, to predict the others
TRIALS = 3  # runs of a batch on CUDA: the first sets up its kernels


@dataclass(frozen=True)
class Estimate:
    """
    A forecast: tiles, pixels, bytes and seconds still to do, and the free bytes of the disk (None if unlimited).

    `temporary_bytes` are needed for a moment besides: those of the largest scene that is asked in windows (`cache/spill.py`).
    `worth` is what that saves stage two, or why it is not known; None where nothing is to do.
    """

    cache: str
    tiles: int
    finished: int
    noun: str
    pixels: int
    bytes: int
    temporary_bytes: int
    seconds: float
    free_bytes: int | None
    unreadable: dict[str, str]
    worth: Worth | str | None

    @property
    def fits(self) -> bool:
        """Whether the disk holds what is still to be written."""
        return self.free_bytes is None or self.bytes + self.temporary_bytes <= self.free_bytes

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "worth": self.worth.as_dict() if isinstance(self.worth, Worth) else self.worth}


def estimate(config: Config, device: torch.device, progress: Progress | None = None) -> Estimate:
    """
    Predict stage one from a seeded sample of the missing tiles, by their pixels; nothing is written.

    The student takes a few steps, to say what they cost beside the teacher. Raises what `plan.make_plan` raises. Assumes
    that tiles compress and compute alike per pixel, one at a time; where a CUDA device rounds, that whichever is slowest, it or the
    threads that read or that store, is never kept waiting.
    """
    plan = make_plan(config, lambda recipe, tiles, stretch: precision.resolve(config, recipe, tiles, stretch, device))
    unreadable, sizes = {}, {}
    for tile in plan.missing:
        try:
            sizes[tile.id] = tile.size()
        except DataError as err:
            unreadable[tile.id] = str(err)
    areas = {tile: height * width for tile, (height, width) in sizes.items()}
    readable = [tile for tile in plan.missing if tile.id in areas]
    sampled: Any = np.random.default_rng(config.seed).permutation(len(readable))[:SAMPLE] if readable else []
    pixels = written = 0
    seconds = teacher_seconds = set_up = 0.0
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
            read = time.perf_counter() - start
            size = sized("tile", 1, *image_HWC.shape[:2])
            advice = teacher_advice(config, 1, device, max(image_HWC.shape[:2]))
            with fits_in_memory(f"while the teacher predicted {size}", advice):
                answer = _answer(teacher, image_HWC, teacher_batch_size(config, device))
            start = time.perf_counter()
            shard, metadata, _ = encode_tile(answer.units_CHW, tile.id, digest, plan.recipe, answer.lost)
            stored = time.perf_counter() - start
            if teacher.rounds_on_device:
                readers, writers = stage_threads(device)
                seconds += max(read / readers, answer.seconds, stored / writers)
            else:
                seconds += read + answer.seconds + stored
            teacher_seconds += answer.alone_seconds
            set_up += answer.set_up_seconds
            pixels += image_HWC.shape[0] * image_HWC.shape[1]
            written += len(shard) + len(metadata)
    total = sum(areas.values())
    share = total / pixels if pixels else 0.0
    in_windows = [areas[tile] for tile, size in sizes.items() if predicts_in_bands(plan.recipe, (1, *size, 3))]
    seconds *= share
    if pixels:
        shapes = len({readable[index].size() for index in sampled})
        seconds += set_up / shapes * len(set(sizes.values()))
        tile_seconds = teacher_seconds * share / len(areas)
        worth = measure(config, device, teacher, image_HWC, plan.samples, seconds, tile_seconds, progress or Silent())
    return Estimate(
        cache=plan.storage.url,
        tiles=len(plan.tiles),
        finished=len(plan.finished),
        noun=subject_noun(config),
        pixels=total,
        bytes=round(written * share),
        temporary_bytes=round(written * max(in_windows, default=0) / pixels) if pixels else 0,
        seconds=seconds,
        free_bytes=plan.storage.free_bytes(),
        unreadable=unreadable,
        worth=worth,
    )


@dataclass(frozen=True)
class _Answer:
    """
    The teacher's to one tile, as integers; times in seconds.

    `seconds` is a tile's in a batch, with its encoding, `alone_seconds` the teacher's when it is asked about this tile only, and
    `set_up_seconds` what the first batches of this size take longer.
    """

    units_CHW: NDArray[Any]
    lost: NDArray[np.float64] | None
    seconds: float
    alone_seconds: float
    set_up_seconds: float = 0.0


def _answer(teacher: FrozenTeacher, image_HWC: NDArray[np.uint8], batch_size: int) -> _Answer:
    start = time.perf_counter()
    if not teacher.rounds_on_device:
        (encode,) = teacher.encoded(image_HWC[None])
        units_CHW, lost = encode()
        return _Answer(units_CHW, lost, time.perf_counter() - start, teacher.seconds_taken())
    images_NHWC = np.repeat(image_HWC[None], batch_size, axis=0)
    batches, alone = [], []
    for _ in range(TRIALS):
        start = time.perf_counter()
        units_CHW, lost = teacher.encoded(images_NHWC)[0]()
        batches.append(time.perf_counter() - start)
    for _ in range(TRIALS - 1):
        start = time.perf_counter()
        teacher.soft_targets(image_HWC[None])
        alone.append(time.perf_counter() - start)
    return _Answer(units_CHW, lost, batches[-1] / batch_size, alone[-1], sum(batches) - TRIALS * batches[-1])
