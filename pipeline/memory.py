"""Out of memory, on any device and in any process: recognised in one place, and said with the keys that would help."""

from __future__ import annotations

import errno
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from kdpipe.configs.errors import KdpipeError, OutOfMemory
from kdpipe.configs.schema import Config, Precision

# What torch says where it raises a plain RuntimeError: the CPU's allocator, cuBLAS, the driver, Apple's MPS, and C++ itself.
# A worker's numpy error of two arguments comes back as a RuntimeError that holds its name.
PHRASES = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
    "std::bad_alloc",
    "_ArrayMemoryError",
)
# Batches of DataLoader workers come through shared memory, a file system of its own (/dev/shm).
SHARED_MEMORY_PHRASES = (
    "is killed by signal: Bus error",
    "insufficient shared memory",
    "unable to allocate shared memory",
    "unable to write to file </torch_",
    "unable to mmap",
)
WORKER_DIED = re.compile(r"DataLoader worker \(pid[^)]*\)* (?:is )?(killed by signal: [\w ]+|exited unexpectedly)")
SHARED_MEMORY = Path("/dev/shm")
WINDOWS_PX = (512, 256)  # of a teacher, to try


@contextmanager
def fits_in_memory(stage: str, advice: Sequence[str], *, workers: int | None = None) -> Iterator[None]:
    """
    Turn what torch, NumPy and the DataLoader raise for want of memory within the block into `OutOfMemory`.

    `stage` says what was done and at which size, `advice` which keys to set to what, the best first. `workers` is
    `train.workers` where the block waits for a loader's workers, whose deaths are explained then too; their own
    `KdpipeError`s come out as they were raised, without the traceback that torch writes into them.
    """
    try:
        yield
    except KdpipeError as err:
        if (as_raised := _as_raised(err)) is err:
            raise  # not from itself: who follows the causes, as dask does, would never come to an end
        raise as_raised from err
    except Exception as err:
        if is_out_of_memory(err):
            raise OutOfMemory(f"out of memory {stage}{_figures(str(err))}. To fit: {'; '.join(advice)}") from err
        if workers is not None and (explained := _worker_failure(err, workers)):
            raise OutOfMemory(explained) from err
        raise


def is_out_of_memory(err: BaseException) -> bool:
    """Whether an exception of torch, NumPy, Python or the system says that memory ran out."""
    if isinstance(err, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(err, OSError):
        return err.errno == errno.ENOMEM
    return isinstance(err, RuntimeError) and any(phrase in str(err) for phrase in PHRASES)


def sized(noun: str, count: int, height: int, width: int) -> str:
    """`4 crops of 512 x 512 px`."""
    return f"{count} {noun}{'s' if count != 1 else ''} of {height} x {width} px"


def training_advice(config: Config, precision: Precision) -> list[str]:
    """The keys that make a training step smaller; `precision` is the one computed in."""
    train = config.train
    advice = []
    if train.batch_size != "auto" and train.batch_size > 1:
        # A size that was found by auto did fit: on this device as it is now, a smaller one must be named.
        samples = train.batch_size * train.accumulate
        smaller = max(size for size in range(1, train.batch_size) if samples % size == 0)
        advice.append(
            f"train.batch_size: auto with train.effective_batch_size: {train.samples_per_step} (now {train.batch_size}; the "
            "largest batch that fits, accumulated)"
            if train.effective_batch_size is None and train.devices == 1
            else f"train.batch_size: {smaller} with train.accumulate: {samples // smaller} (now "
            f"{train.batch_size} and {train.accumulate})"
        )
    if train.crop >= 64:
        advice.append(f"train.crop: {train.crop * 3 // 4 // 32 * 32} (now {train.crop})")
    if precision == "fp32":
        advice.append("train.precision: bf16 (now fp32)")
    return [*advice, "a smaller student.encoder or student.architecture"]


def validation_advice(config: Config, precision: Precision) -> list[str]:
    """The keys that make validation on whole tiles smaller."""
    advice = ["smaller tiles in data.val"]
    if precision == "fp32":
        advice.insert(0, "train.precision: bf16 (now fp32)")
    if config.train.val_batch_size > 1:
        advice.insert(0, f"train.val_batch_size: 1 (now {config.train.val_batch_size}; --resume accepts the change)")
    return advice


def teacher_advice(config: Config, batch_size: int, device: torch.device, side_px: int | None = None) -> list[str]:
    """
    The keys that make the teachers' forward pass smaller, those that leave its values alone first; `side_px` is the tile's.

    Views of test-time augmentation are taken one after another, so that `tta` costs time and hardly any memory.
    """
    advice = [f"{next(iter(config.members))}.batch_size: 1 (now {batch_size})"] if batch_size > 1 else []
    for key, teacher in config.members.items():
        limit = min(side_px or math.inf, teacher.window or math.inf)
        smaller = next((window for window in WINDOWS_PX if window < limit), None)
        if smaller is not None:
            now = teacher.window or "whole tiles"
            advice.append(f"{key}.window: {smaller} (now {now}; other values: another cache.path)")
        if max(teacher.scales) > 1:
            advice.append(
                f"{key}.scales without those above 1 (now {teacher.scales}; other values: another cache.path)"
            )
    advice.append(
        "smaller tiles" if device.type == "cpu" else "--device cpu, if the machine has more memory than its GPU"
    )
    return advice


def _figures(text: str) -> str:
    """` (2.00 GiB more were asked for; 1.20 GiB of 23.68 GiB were free)`, as far as the error tells."""
    asked = re.search(r"allocate ([\d.]+ [kKMGTPE]?i?[Bb]\w*)", text)
    free = re.search(r"total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+) is free", text)
    figures = [f"{asked[1]} more were asked for"] if asked else []
    figures += [f"{free[2]} of {free[1]} were free"] if free else []
    return f" ({'; '.join(figures)})" if figures else ""


def _worker_failure(err: Exception, workers: int) -> str | None:
    """What a worker died of, if it is memory; torch says `exited unexpectedly`, and the signal in that error's cause."""
    text = f"{err.__cause__ or ''}\n{err}"
    fewer = f"train.workers: {workers // 2} (now {workers}; 0 reads in the main process and needs none)"
    if any(phrase in text for phrase in SHARED_MEMORY_PHRASES):
        size = f" ({shutil.disk_usage(SHARED_MEMORY).total / 1e9:.2g} GB)" if SHARED_MEMORY.is_dir() else ""
        return (
            f"the data loader's workers ran out of shared memory, {SHARED_MEMORY}{size}, through which they hand over batches. "
            f"To fit: {fewer}; in a container a larger one (docker run --shm-size=8g)"
        )
    died = WORKER_DIED.search(text)
    if died and died[1] in ("killed by signal: Killed", "exited unexpectedly"):
        return (
            f"a worker of the data loader died ({died[1]}), most often because the machine ran out of memory and the system "
            f"killed it. To fit: {fewer}; a lower train.batch_size or train.crop"
        )
    return None


def _as_raised(err: KdpipeError) -> KdpipeError:
    """An error as a worker raised it: torch puts `Caught X in DataLoader worker process 0` and the traceback before it."""
    text = str(err)
    if "in DataLoader worker process" not in text:
        return err
    return type(err)(text.rpartition(f"{type(err).__name__}: ")[2].strip())
