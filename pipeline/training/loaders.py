"""Batches for stage two: one stream over all epochs that can start anywhere, and whole tiles for validation."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from kdpipe.configs.errors import ConfigError
from kdpipe.configs.schema import Config
from kdpipe.data.dataset import TrainTiles, ValTiles, batches_of_equal_size, epoch_order
from kdpipe.data.rasters import read_image
from kdpipe.data.tiles import Tile
from kdpipe.pipeline.memory import fits_in_memory, sized
from kdpipe.pipeline.training.packing import collate_packed

if TYPE_CHECKING:  # a worker imports this module at its start, and needs no network libraries
    from kdpipe.pipeline.teacher.frozen import FrozenTeacher

Stretch = Sequence[tuple[float, float]] | None

ONLINE_ADVICE = (
    "distill.mode: cached (--kd cached), which has no teacher in memory",
    "teacher.window: 512, for tiles that are larger",
    "a lower train.batch_size or train.crop",
)


class OnlineTargets:
    """
    Soft targets computed on the spot, every time they are asked for: the teacher sees what it sees at precompute, the whole
    tile (`read`) or a recorded view (`answer`).
    """

    def __init__(self, teacher: FrozenTeacher, tiles: Sequence[Tile], config: Config, stretch: Stretch) -> None:
        self._teacher = teacher
        self._images = {tile.id: tile.image for tile in tiles}
        self._bands, self._stretch = config.data.bands, stretch
        self.teacher_seconds = 0.0  # that the teacher took so far

    def read(self, tile_id: str, window: tuple[int, int, int, int]) -> NDArray[np.float32]:
        """Soft targets, float32 `(C, h, w)`, of the window `(top, left, height, width)` of a tile."""
        probs_CHW = self._ask(read_image(self._images[tile_id], self._bands, self._stretch), "tile")
        top, left, height, width = window
        cropped_CHW: NDArray[np.float32] = probs_CHW[:, top : top + height, left : left + width]
        return cropped_CHW

    def entropy_error(self, tile_id: str, window: tuple[int, int, int, int]) -> float:
        """Zero: these targets were never rounded."""
        return 0.0

    def answer(
        self, view_id: str, image_3HW: NDArray[np.uint8], inside_HW: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float32], float]:
        """The soft target of a recorded view, float32 `(C, H, W)`, of which rounding took nothing."""
        return self._ask(np.ascontiguousarray(image_3HW.transpose(1, 2, 0)), "crop"), 0.0

    def _ask(self, image_HW3: NDArray[np.uint8], noun: str) -> NDArray[np.float32]:
        size = sized(noun, 1, *image_HW3.shape[:2])
        with fits_in_memory(f"while the teacher predicted {size} beside the student", ONLINE_ADVICE):
            start = time.perf_counter()
            probs_CHW: NDArray[np.float32] = self._teacher.soft_targets(image_HW3[None])[0]
            self.teacher_seconds += time.perf_counter() - start
        return probs_CHW


class BatchStream:
    """
    Lists of sample numbers: every epoch a permutation of its own from (seed, epoch), cut into batches, the rest dropped.

    `accumulate` batches are one optimizer step, and only whole steps are made: accumulated or not, a step of so many
    samples is made of the same ones, and an epoch has as many.

    Of a run on several devices, each `rank` of `ranks` has its own part of every step: together they take the samples that one process
    with a batch of `ranks * batch_size` would take.

    The stream runs over all epochs at once, so that workers neither stop nor wait between them, and starts at any batch,
    so that a resumed run sees what an uninterrupted one would have seen.
    """

    def __init__(
        self, samples: int, batch_size: int, epochs: int, seed: int, start: int, accumulate: int = 1, rank: int = 0, ranks: int = 1
    ) -> None:  # fmt: skip
        self.per_epoch = samples // (batch_size * ranks * accumulate) * accumulate
        self._rank, self._ranks = rank, ranks
        self._samples, self._batch_size, self._epochs, self._seed, self._start = (
            samples,
            batch_size,
            epochs,
            seed,
            start,
        )

    def __len__(self) -> int:
        return self.per_epoch * self._epochs - self._start

    def __iter__(self) -> Iterator[list[int]]:
        for epoch in range(self._start // self.per_epoch, self._epochs):
            order = epoch_order(self._samples, self._seed, epoch) + epoch * self._samples
            for batch in range(max(0, self._start - epoch * self.per_epoch), self.per_epoch):
                first = (batch * self._ranks + self._rank) * self._batch_size
                yield order[first : first + self._batch_size].tolist()


def batches_per_epoch(config: Config, samples: int) -> int:
    """Batches in an epoch, those of whole optimizer steps; `ConfigError` where there is not one."""
    per_step, accumulate = config.train.samples_per_step, config.train.accumulate
    if samples < per_step:
        accumulated = f" x train.accumulate {accumulate}" if accumulate > 1 else ""
        on_devices = f" x train.devices {config.train.devices}" if config.train.devices > 1 else ""
        raise ConfigError(
            f"an epoch has {samples} samples, fewer than train.batch_size {config.train.batch_size}{accumulated}{on_devices}; "
            "raise train.crops_per_tile or lower the batch size"
        )
    return samples // per_step * accumulate


def steps_in(config: Config, per_epoch: int) -> int:
    """Optimizer steps of a whole run with so many batches an epoch."""
    steps = config.train.epochs * per_epoch // config.train.accumulate
    return min(steps, config.train.max_steps) if config.train.max_steps else steps


def train_loader(
    config: Config, dataset: TrainTiles, start: int, workers: int, rank: int = 0, ranks: int = 1, *, pin: bool
) -> DataLoader[Any]:
    """
    Collated batches of `dataset` from batch number `start` to the last epoch's end, a rank's own, their targets packed.

    With `pin` they lie in page-locked memory, from which CUDA copies while it computes.
    """
    train = config.train
    assert train.batch_size != "auto"  # training has resolved it
    stream = BatchStream(
        len(dataset), train.batch_size, train.epochs, config.seed, start, train.accumulate, rank, ranks
    )
    return DataLoader(
        cast(Any, dataset), batch_sampler=stream, collate_fn=collate_packed, pin_memory=pin, **_worker_options(workers)
    )


def val_loader(
    config: Config, dataset: ValTiles, sizes: list[tuple[int, int]], workers: int, rank: int = 0, ranks: int = 1
) -> DataLoader[Any]:
    """Whole tiles, those of equal size together, at most `train.val_batch_size` in a batch; every `ranks`-th batch."""
    batches = batches_of_equal_size(sizes, config.train.val_batch_size)[rank::ranks]
    return DataLoader(cast(Any, dataset), batch_sampler=batches, **_worker_options(min(workers, len(batches))))


def _worker_options(workers: int) -> dict[str, Any]:
    if workers == 0:
        return {"num_workers": 0}
    # Not fork: zarr's event loop does not survive it, and a forked worker hangs at its first read.
    return {
        "num_workers": workers,
        "multiprocessing_context": "spawn",
        "persistent_workers": True,
        "worker_init_fn": _leave_signals_to_the_main_process,
    }


def _leave_signals_to_the_main_process(worker: int) -> None:
    """Ctrl-C reaches the whole process group; the main process stops at a safe point and needs its workers until then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
