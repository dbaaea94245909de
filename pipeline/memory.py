"""Out of memory, on any device and in any process: recognised in one place, and explained with the keys that help."""

from __future__ import annotations

import errno
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from kdpipe.configs.errors import KdpipeError, OutOfMemory, count_text
from kdpipe.configs.schema import Config, Precision

# In the message of a plain RuntimeError: torch's CPU allocator, cuBLAS, the driver, Apple's MPS, C++ itself, and NumPy in a worker,
# whose error comes back as a RuntimeError with its name in it.
PHRASES = (
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "MPS backend out of memory",
    "std::bad_alloc",
    "_ArrayMemoryError",
)
# oneDNN's, where it cannot allocate an operation's code or memory. A "primitive descriptor" that it cannot create is something else.
NO_PRIMITIVE = re.compile(r"could not create a primitive(?! descriptor)")
# DataLoader workers pass batches through shared memory, a file system of its own (/dev/shm).
SHARED_MEMORY_PHRASES = (
    "is killed by signal: Bus error",
    "insufficient shared memory",
    "unable to allocate shared memory",
    "unable to write to file </torch_",
    "unable to mmap",
)
WORKER_DIED = re.compile(r"DataLoader worker \(pid[^)]*\)* (?:is )?(killed by signal: [\w ]+|exited unexpectedly)")
SHARED_MEMORY = Path("/dev/shm")
WINDOWS_PX = (512, 256)  # values to try for a teacher's window


@contextmanager
def fits_in_memory(stage: str, advice: Sequence[str], *, workers: int | None = None) -> Iterator[None]:
    """
    Turn the errors of torch, NumPy and the DataLoader for lack of memory within the block into `OutOfMemory`.

    `stage` names the work and its size, `advice` the keys to set and their values, the best first. With `workers` (`train.workers`, where
    the block waits for a loader) the death of a worker is explained too, and a `KdpipeError` raised in a worker comes out without the
    traceback that torch writes into it.
    """
    try:
        yield
    except KdpipeError as err:
        if (as_raised := _as_raised(err)) is err:
            raise  # not from itself: dask follows the causes, and would never come to an end
        raise as_raised from err
    except Exception as err:
        if is_out_of_memory(err):
            raise OutOfMemory(f"out of memory {stage}{_figures(str(err))}. To fit: {'; '.join(advice)}") from err
        if workers is not None and (explained := _worker_failure(err, workers)):
            raise OutOfMemory(explained) from err
        raise


def is_out_of_memory(err: BaseException) -> bool:
    """Whether an exception of torch, NumPy, Python or the system means that memory ran out."""
    if isinstance(err, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(err, OSError):
        return err.errno == errno.ENOMEM
    if not isinstance(err, RuntimeError):
        return False
    return any(phrase in str(err) for phrase in PHRASES) or NO_PRIMITIVE.search(str(err)) is not None


def sized(noun: str, count: int, height: int, width: int) -> str:
    """`4 crops of 512 x 512 px`."""
    return f"{count_text(count, f'{noun}s')} of {height} x {width} px"


def training_advice(config: Config, precision: Precision) -> list[str]:
    """The keys that make a training step smaller; `precision` is the resolved one."""
    train = config.train
    advice = []
    if train.batch_size != "auto" and train.batch_size > 1:
        # A size found by auto did fit once, so auto is no advice: a smaller size must be named.
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
    The keys that make the teachers' forward pass smaller, those that keep its values first; `side_px` is the side of the tile.

    `tta` is not among them: its views are predicted one after another, and cost time but hardly any memory.
    """
    advice = [f"{next(iter(config.members))}.batch_size: 1 (now {batch_size})"] if batch_size > 1 else []
    for key, teacher in config.members.items():
        if teacher.predictions is not None:
            continue
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
    """` (2.00 GiB more were requested; 1.20 GiB of 23.68 GiB were free)`, as far as the error tells."""
    asked = re.search(r"allocate ([\d.]+ [kKMGTPE]?i?[Bb]\w*)", text)
    free = re.search(r"total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+) is free", text)
    figures = [f"{asked[1]} more were requested"] if asked else []
    figures += [f"{free[2]} of {free[1]} were free"] if free else []
    return f" ({'; '.join(figures)})" if figures else ""


def _worker_failure(err: Exception, workers: int) -> str | None:
    """Why a worker died, if for lack of memory; torch says `exited unexpectedly` and names the signal in the error's cause."""
    text = f"{err.__cause__ or ''}\n{err}"
    fewer = f"train.workers: {workers // 2} (now {workers}; 0 reads in the main process and needs none)"
    if any(phrase in text for phrase in SHARED_MEMORY_PHRASES):
        size = f" ({shutil.disk_usage(SHARED_MEMORY).total / 1e9:.2g} GB)" if SHARED_MEMORY.is_dir() else ""
        return (
            f"the data loader's workers ran out of shared memory, {SHARED_MEMORY}{size}, through which they pass batches. "
            f"To fit: {fewer}; in a container a larger one (docker run --shm-size=8g)"
        )
    died = WORKER_DIED.search(text)
    if died and died[1] in ("killed by signal: Killed", "exited unexpectedly"):
        return (
            f"a worker of the data loader died ({died[1]}), usually because the machine ran out of memory and the system "
            f"killed it. To fit: {fewer}; a lower train.batch_size or train.crop"
        )
    return None


def _as_raised(err: KdpipeError) -> KdpipeError:
    """The error that a worker raised, without torch's `Caught X in DataLoader worker process 0` and traceback before it."""
    text = str(err)
    if "in DataLoader worker process" not in text:
        return err
    return type(err)(text.rpartition(f"{type(err).__name__}: ")[2].strip())
