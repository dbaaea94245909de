"""
Batches for stage two: one stream over all epochs that can start anywhere, and whole tiles for validation.

Soft targets travel from a loader to the device as 16-bit integers, half the bytes of float32 to copy between processes and over the
bus, and are unpacked on the device.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.context import SpawnContext, SpawnProcess
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from kdpipe.configs.errors import ConfigError, count_text
from kdpipe.configs.schema import Config
from kdpipe.data.dataset import TrainTiles, ValTiles, batches_of_equal_size, epoch_order
from kdpipe.data.rasters import Stretch, read_image
from kdpipe.data.tiles import Tile
from kdpipe.pipeline.memory import fits_in_memory, sized
from kdpipe.pipeline.progress import out_of_reach

if TYPE_CHECKING:  # a worker imports this module at its start, and needs no network libraries
    from kdpipe.pipeline.teacher.frozen import FrozenTeacher


PACKED_LEVELS = 2**16 - 1  # the integer of a probability of one
END_SECONDS = 3.0  # for all workers to end by themselves: they finish a batch, or still import libraries
ONLINE_ADVICE = (
    "distill.mode: cached (--kd cached), which has no teacher in memory",
    "teacher.window: 512, for tiles that are larger",
    "a lower train.batch_size or train.crop",
)


class OnlineTargets:
    """Soft targets that the live teacher computes at each read, from what it sees in stage one: the tile, or a recorded view."""

    def __init__(self, teacher: FrozenTeacher, tiles: Sequence[Tile], config: Config, stretch: Stretch) -> None:
        self._teacher = teacher
        self._images = {tile.id: tile.image for tile in tiles}
        self._data, self._stretch = config.data, stretch
        self.teacher_seconds = 0.0  # spent in the teacher so far

    def read(self, tile_id: str, window: tuple[int, int, int, int]) -> NDArray[np.float32]:
        """Soft targets, float32 `(C, h, w)`, of the window `(top, left, height, width)` of a tile."""
        image_HWB = read_image(self._images[tile_id], self._data.bands, self._stretch, self._data.alpha)
        probs_CHW = self._ask(image_HWB, "tile")
        top, left, height, width = window
        cropped_CHW: NDArray[np.float32] = probs_CHW[:, top : top + height, left : left + width]
        return cropped_CHW

    def entropy_error(self, tile_id: str, window: tuple[int, int, int, int]) -> float:
        """Zero: these targets were never rounded."""
        return 0.0

    def read_view(
        self, view_id: str, image_BHW: NDArray[np.uint8], inside_HW: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float32], float]:
        """The soft target of a recorded view, float32 `(C, H, W)`, and 0: nothing was rounded."""
        return self._ask(np.ascontiguousarray(image_BHW.transpose(1, 2, 0)), "crop"), 0.0

    def _ask(self, image_HWB: NDArray[np.uint8], noun: str) -> NDArray[np.float32]:
        size = sized(noun, 1, *image_HWB.shape[:2])
        with fits_in_memory(f"while the teacher predicted {size} beside the student", ONLINE_ADVICE):
            start = time.perf_counter()
            probs_CHW: NDArray[np.float32] = self._teacher.soft_targets(image_HWB[None])[0]
            self.teacher_seconds += time.perf_counter() - start
        return probs_CHW


class BatchStream:
    """
    Lists of sample numbers: in each epoch a permutation drawn from (seed, epoch), cut into batches, the incomplete last step dropped.

    `accumulate` batches are one optimizer step; accumulated or not, steps of the same size hold the same samples. In a run on several
    devices each `rank` has its own part of every step: together they take the samples of one process with a batch of
    `ranks * batch_size`.

    The stream runs over all epochs, so that workers do not stop between them, and starts at any batch, so that a resumed run sees the
    batches of an uninterrupted one.
    """

    def __init__(
        self, samples: int, batch_size: int, epochs: int, seed: int, start: int, accumulate: int = 1, rank: int = 0, ranks: int = 1
    ) -> None:  # fmt: skip
        self.per_epoch = samples // (batch_size * ranks * accumulate) * accumulate
        self._samples, self._batch_size, self._epochs = samples, batch_size, epochs
        self._seed, self._start, self._rank, self._ranks = seed, start, rank, ranks

    def __len__(self) -> int:
        return self.per_epoch * self._epochs - self._start

    def __iter__(self) -> Iterator[list[int]]:
        for epoch in range(self._start // self.per_epoch, self._epochs):
            order = epoch_order(self._samples, self._seed, epoch) + epoch * self._samples
            for batch in range(max(0, self._start - epoch * self.per_epoch), self.per_epoch):
                first = (batch * self._ranks + self._rank) * self._batch_size
                yield order[first : first + self._batch_size].tolist()


def batches_per_epoch(config: Config, samples: int) -> int:
    """Batches in an epoch, of whole optimizer steps only; `ConfigError` where there is not one step."""
    per_step, accumulate = config.train.samples_per_step, config.train.accumulate
    if samples < per_step:
        accumulated = f" x train.accumulate {accumulate}" if accumulate > 1 else ""
        on_devices = f" x train.devices {config.train.devices}" if config.train.devices > 1 else ""
        raise ConfigError(
            f"an epoch has {count_text(samples, 'samples')}, fewer than train.batch_size "
            f"{config.train.batch_size}{accumulated}{on_devices}; "
            "raise train.crops_per_tile or lower the batch size"
        )
    return samples // per_step * accumulate


def steps_in(config: Config, per_epoch: int) -> int:
    """Optimizer steps of a whole run with `per_epoch` batches an epoch."""
    steps = config.train.epochs * per_epoch // config.train.accumulate
    return min(steps, config.train.max_steps) if config.train.max_steps else steps


def train_loader(
    config: Config, dataset: TrainTiles, start: int, workers: int, rank: int = 0, ranks: int = 1, *, pin: bool
) -> DataLoader[Any]:
    """
    A rank's batches of `dataset` from batch number `start` to the end of the last epoch, with packed targets.

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
    """A rank's batches of whole tiles of equal size, at most `train.val_batch_size` in each; `sizes` are their `(H, W)`."""
    batches = batches_of_equal_size(sizes, config.train.val_batch_size)[rank::ranks]
    return DataLoader(cast(Any, dataset), batch_sampler=batches, **_worker_options(min(workers, len(batches))))


def collate_packed(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch of samples as `default_collate` makes it, with `target` packed."""
    batch: dict[str, Tensor] = default_collate(
        [{**sample, "target": packed(sample["target"])} if "target" in sample else sample for sample in samples]
    )
    return batch


def packed(target_CHW: NDArray[np.float32]) -> NDArray[np.int16]:
    """
    Probabilities in levels of 1/65535: unsigned integers in the bits of int16, because few devices compute with uint16.

    An entry moves by at most half a level, plus half a level per class once `unpacked`. A pixel with NaN becomes zero.
    """
    levels_CHW = target_CHW * np.float32(PACKED_LEVELS)
    odd_HW = ~np.isfinite(levels_CHW.sum(axis=0))
    if odd_HW.any():
        levels_CHW[:, odd_HW] = 0
    bits_CHW: NDArray[np.int16] = np.rint(levels_CHW, out=levels_CHW).astype(np.uint16).view(np.int16)
    return bits_CHW


def unpacked(packed_NCHW: Tensor, inside_NHW: Tensor) -> Tensor:
    """
    Probabilities of `packed` ones: float32 `(N, C, H, W)`, summing to one over axis 1, zero on padding (outside `inside_NHW`).

    A pixel that was NaN is NaN again, so that the loss shows it.
    """
    levels_NCHW = (packed_NCHW.int() & PACKED_LEVELS).float()
    probs_NCHW = levels_NCHW / levels_NCHW.sum(dim=1, keepdim=True)
    return probs_NCHW.masked_fill(~inside_NHW[:, None], 0)


def end_workers(loader: DataLoader[Any]) -> None:
    """End the worker processes of a loader, which keeps them between its epochs, within `END_SECONDS`."""
    iterator = cast(Any, loader)._iterator
    if iterator is not None:
        iterator._shutdown_workers()


def _worker_options(workers: int) -> dict[str, Any]:
    if workers == 0:
        return {"num_workers": 0}
    # Not fork: zarr's event loop does not survive it, and a forked worker would hang at its first read.
    return {"num_workers": workers, "multiprocessing_context": _WorkerContext(), "persistent_workers": True}


def report_unless_disconnected(kind: type[BaseException], err: BaseException, trace: TracebackType | None) -> None:
    """`sys.excepthook` of a worker, which multiprocessing calls too where it hands over tensors to a process that has ended."""
    if not isinstance(err, ConnectionError | EOFError):
        sys.__excepthook__(kind, err, trace)


class _Worker(SpawnProcess):
    """A worker that no signal of the user or of a job reaches, and that SIGKILL ends where others are sent SIGTERM."""

    end_by: ClassVar[float | None] = None  # once workers are being ended

    def run(self) -> None:
        """What the process does; it says nothing of a reader that ended while it was handed a batch."""
        sys.excepthook = report_unless_disconnected
        super().run()

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        _Worker.end_by = None
        with out_of_reach():
            started: Any = cast(Any, SpawnProcess)._Popen(process_obj)
        started.terminate = started.kill
        return started

    def join(self, timeout: float | None = None) -> None:
        """Wait for the end. The loader gives each worker 5 s in turn; together they get `END_SECONDS`, or a long import takes minutes."""
        if timeout is not None:
            _Worker.end_by = _Worker.end_by or time.monotonic() + END_SECONDS
            timeout = min(timeout, max(0.0, _Worker.end_by - time.monotonic()))
        super().join(timeout)


class _WorkerContext(SpawnContext):
    Process = _Worker
