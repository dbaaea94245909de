"""
Estimate of stage one, and of what its cache saves stage two, from short trials: `precompute-teacher --dry-run`.

A few tiles are computed in memory, and the student takes a few steps. Nothing is written.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdpipe.cache.tile import encode_tile
from kdpipe.configs.errors import ConfigError, DataError, OutOfMemory
from kdpipe.configs.schema import Config
from kdpipe.pipeline.distributed import computed_precision
from kdpipe.pipeline.memory import fits_in_memory, sized, teacher_advice, training_advice
from kdpipe.pipeline.precompute.batches import teacher_batch_size
from kdpipe.pipeline.precompute.plan import Plan, make_plan
from kdpipe.pipeline.precompute.run import stage_threads
from kdpipe.pipeline.precompute.subjects import Seen, Subject, subject_noun
from kdpipe.pipeline.precompute.worth import Worth, worth_of
from kdpipe.pipeline.progress import Progress, Silent
from kdpipe.pipeline.teacher import precision
from kdpipe.pipeline.teacher.frozen import FrozenTeacher, open_teacher, predicts_in_bands
from kdpipe.pipeline.training.batch_size import resolve_batch_size, take_steps
from kdpipe.pipeline.training.loaders import batches_per_epoch, steps_in

SAMPLED_TILES = 3
TRIALS = 3  # runs of a batch on CUDA: the first sets up its kernels
TIMED_STEPS = 3  # of the student; the first, with its allocations, is left out


@dataclass(frozen=True)
class Estimate:
    """
    What stage one still has to do: tiles, pixels, bytes and seconds, beside the free bytes of the disk (None if unlimited).

    `temporary_bytes` are needed for a moment in addition, for the largest scene that is predicted in windows (`cache/spill.py`). `worth`
    compares the cache with a live teacher, or says why it cannot be told; None if nothing is to do. With `limit`, `tiles` are those of the
    trial, and `configured` all of the configuration.
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
    limit: int | None = None
    configured: int = 0

    @property
    def fits(self) -> bool:
        """Whether the disk has room for what is still to be written."""
        return self.free_bytes is None or self.bytes + self.temporary_bytes <= self.free_bytes

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "worth": self.worth.as_dict() if isinstance(self.worth, Worth) else self.worth}


def estimate(config: Config, device: torch.device, progress: Progress | None = None) -> Estimate:
    """
    Estimate of stage one from a seeded sample of the missing tiles, scaled by pixels.

    Assumes that tiles compress and compute alike per pixel, one at a time. On a CUDA device that rounds, reading, computing and storing
    overlap, and the slowest of them counts. Raises what `plan.make_plan` raises.
    """
    progress = progress or Silent()
    plan = make_plan(
        config,
        lambda recipe, tiles, stretch: precision.resolve(config, recipe, tiles, stretch, device),
        checked=progress,
    )
    unreadable, sizes = {}, {}
    for tile in plan.missing:
        try:
            sizes[tile.id] = tile.size()
        except DataError as err:
            unreadable[tile.id] = str(err)
    areas = {tile: height * width for tile, (height, width) in sizes.items()}
    readable = [tile for tile in plan.missing if tile.id in areas]
    chosen: Any = np.random.default_rng(config.seed).permutation(len(readable))[:SAMPLED_TILES] if readable else []
    sampled = [readable[index] for index in chosen]
    trials = _Trials()
    worth: Worth | str | None = None
    seconds = share = 0.0
    if sampled:
        teacher = open_teacher(config, plan.recipe, device)
        trials = _try_tiles(config, device, plan, teacher, sampled)
        unreadable |= trials.unreadable
    if trials.image_HWC is not None:
        share = sum(areas.values()) / trials.pixels
        sampled_sizes = {tile.size() for tile in sampled}
        seconds = trials.seconds * share + trials.set_up_seconds / len(sampled_sizes) * len(set(sizes.values()))
        tile_seconds = trials.teacher_seconds * share / len(areas)
        if config.has_predictions:
            worth = "the predictions are there already, and there is no live teacher to compare a cache with"
        else:
            worth = measure_worth(
                config, device, teacher, trials.image_HWC, plan.samples, seconds, tile_seconds, progress
            )
    in_windows = [
        areas[tile]
        for tile, size in sizes.items()
        if predicts_in_bands(plan.recipe, (1, *size, len(plan.recipe.bands)))
    ]
    return Estimate(
        cache=plan.storage.url,
        tiles=len(plan.tiles),
        finished=len(plan.finished),
        noun=subject_noun(config),
        pixels=sum(areas.values()),
        bytes=round(trials.bytes * share),
        temporary_bytes=round(trials.bytes * max(in_windows, default=0) / trials.pixels) if trials.pixels else 0,
        seconds=seconds,
        free_bytes=plan.storage.free_bytes(),
        unreadable=unreadable,
        worth=worth,
        limit=config.data.limit,
        configured=len(plan.configured),
    )


def measure_worth(
    config: Config, device: torch.device, teacher: FrozenTeacher, image_HWC: Seen, samples: int,
    precompute_seconds: float, tile_seconds: float, progress: Progress,
) -> Worth | str:  # fmt: skip
    """
    Worth of a cache from timed steps of the student and predictions of a crop of `image_HWC`; an epoch has `samples` samples.

    A sentence with the reason instead, where the student's step does not run on this machine.
    """
    advice = training_advice(config, computed_precision(config, device))
    try:
        config = resolve_batch_size(config, device, progress)
        batch_size, accumulate = config.train.batch_size, config.train.accumulate
        assert batch_size != "auto"  # it is resolved
        per_epoch = batches_per_epoch(config, samples)
        with fits_in_memory("while timing the student", advice):
            step_seconds = accumulate * min(take_steps(config, device, batch_size, TIMED_STEPS)[1:])
    except (OutOfMemory, ConfigError) as err:
        return f"a step of the student cannot be timed here: {err}"
    side = config.train.crop
    crop_HWC = np.ascontiguousarray(image_HWC[:side, :side])
    for _ in range(2):  # the first sets up kernels for this size, which takes seconds on CUDA
        start = time.perf_counter()
        teacher.soft_targets(crop_HWC[None])
        crop_seconds = (time.perf_counter() - start) * side**2 / crop_HWC[..., 0].size
    steps = steps_in(config, per_epoch)
    epochs = steps * accumulate / per_epoch
    return worth_of(config, precompute_seconds, step_seconds, tile_seconds, crop_seconds, steps, epochs)


@dataclass
class _Trials:
    """
    Sums over the sampled tiles: pixels, bytes, and seconds in all, of the teacher alone, and of the first batch of each size beyond
    those of the next. `image_HWC` is the last tile that could be read.
    """

    pixels: int = 0
    bytes: int = 0
    seconds: float = 0.0
    teacher_seconds: float = 0.0
    set_up_seconds: float = 0.0
    unreadable: dict[str, str] = field(default_factory=dict)
    image_HWC: Seen | None = None


def _try_tiles(
    config: Config, device: torch.device, plan: Plan, teacher: FrozenTeacher, sampled: Sequence[Subject]
) -> _Trials:
    trials = _Trials()
    for tile in sampled:
        start = time.perf_counter()
        try:
            image_HWC, digest = tile.load()
        except (DataError, OSError) as err:
            trials.unreadable[tile.id] = str(err)
            continue
        read = time.perf_counter() - start
        height, width = image_HWC.shape[:2]
        advice = teacher_advice(config, 1, device, max(height, width))
        with fits_in_memory(f"while the teacher predicted {sized('tile', 1, height, width)}", advice):
            found = _predict(teacher, image_HWC, teacher_batch_size(config, device))
        start = time.perf_counter()
        shard, metadata, _ = encode_tile(found.units_CHW, tile.id, digest, plan.recipe, found.lost)
        stored = time.perf_counter() - start
        if teacher.rounds_on_device:
            readers, writers = stage_threads(device)
            trials.seconds += max(read / readers, found.seconds, stored / writers)
        else:
            trials.seconds += read + found.seconds + stored
        trials.teacher_seconds += found.alone_seconds
        trials.set_up_seconds += found.set_up_seconds
        trials.pixels += height * width
        trials.bytes += len(shard) + len(metadata)
        trials.image_HWC = image_HWC
    return trials


@dataclass(frozen=True)
class _Prediction:
    """
    The teacher's prediction of a tile as integers, and its times in seconds.

    `seconds` is the tile's share of a batch, encoding included; `alone_seconds` the prediction of this tile only; `set_up_seconds` what
    the first batches of this size take longer.
    """

    units_CHW: NDArray[Any]
    lost: NDArray[np.float64] | None
    seconds: float
    alone_seconds: float
    set_up_seconds: float = 0.0


def _predict(teacher: FrozenTeacher, image_HWC: Seen, batch_size: int) -> _Prediction:
    start = time.perf_counter()
    if not teacher.rounds_on_device:
        (encode,) = teacher.encoded(image_HWC[None])
        units_CHW, lost, *_ = encode()
        return _Prediction(units_CHW, lost, time.perf_counter() - start, teacher.seconds_taken())
    images_NHWC = np.repeat(image_HWC[None], batch_size, axis=0)
    batches, alone = [], []
    for _ in range(TRIALS):
        start = time.perf_counter()
        units_CHW, lost, *_ = teacher.encoded(images_NHWC)[0]()
        batches.append(time.perf_counter() - start)
    for _ in range(TRIALS - 1):
        start = time.perf_counter()
        teacher.soft_targets(image_HWC[None])
        alone.append(time.perf_counter() - start)
    return _Prediction(units_CHW, lost, batches[-1] / batch_size, alone[-1], sum(batches) - TRIALS * batches[-1])
