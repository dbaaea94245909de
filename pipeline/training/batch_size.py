"""
`train.batch_size: auto`: the largest batch that fits in memory, accumulated to `train.effective_batch_size`.

Real steps are tried, with a student and an optimizer that are thrown away before the run builds its own from its seed.
"""

from __future__ import annotations

import copy
import gc
import math
import resource
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from kdpipe.configs.errors import ConfigError, OutOfMemory, count_text
from kdpipe.configs.schema import Config
from kdpipe.pipeline.distributed import open_fabric
from kdpipe.pipeline.memory import is_out_of_memory
from kdpipe.pipeline.models.limits.training import refuse_crops, trains_on
from kdpipe.pipeline.models.normalize import student_inputs
from kdpipe.pipeline.models.student import untrained_student, with_own_normalization
from kdpipe.pipeline.progress import Progress
from kdpipe.pipeline.training.objective import Objective
from kdpipe.pipeline.training.optimizer import make_optimizer

# Share of the available memory that steps on the CPU may take: loader workers and validation need some too, and a machine that swaps
# is too slow to use.
CPU_SHARE = 0.8
STEPS = 2  # the first allocates the optimizer's state, the second holds it beside the activations
SAMPLE_EVERY_SECONDS = 0.002
CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")  # Linux, version 2: absent elsewhere


def resolve_batch_size(
    config: Config, device: torch.device, progress: Progress, recorded: Mapping[str, Any] | None = None
) -> Config:
    """
    The configuration with numbers for `train.batch_size` and `train.accumulate`, whose product is the effective size.

    `recorded` is the resolved config of the run to resume: its numbers are taken without a trial. A trial draws random numbers, so seed
    after it. Raises `OutOfMemory` where nothing fits, `ConfigError` where the recorded effective size differs.
    """
    if config.train.batch_size != "auto":
        return config
    effective = config.train.samples_per_step
    if recorded is not None:
        size, accumulate = recorded["train"]["batch_size"], recorded["train"]["accumulate"]
        if size * accumulate != effective:
            raise ConfigError(
                f"the run to resume has steps of {size * accumulate} samples (train.batch_size {size} x train.accumulate "
                f"{accumulate}), and train.effective_batch_size is now {effective}; set it back, or start a new run"
            )
        progress.say(f"train.batch_size auto: {size} x {accumulate} accumulated, as in the run that is resumed")
        return _with_sizes(config, size)
    start = time.perf_counter()
    size, why = largest_batch(config, device)
    progress.say(
        f"train.batch_size auto: {count_text(size, 'samples')} at a time x {effective // size} accumulated = {effective} a step "
        f"(train.effective_batch_size){why}; found in {time.perf_counter() - start:.0f} s"
    )
    return _with_sizes(config, size)


def largest_batch(config: Config, device: torch.device) -> tuple[int, str]:
    """
    The largest divisor of the effective size whose step fits, and a clause on what a larger one would have taken.

    The CPU's system overcommits memory and kills the process later, so there the two smallest divisors are measured, and only those
    that fit by the line through both are tried. Raises `SizeRefused` for a network that trains on none of them; one with batch norm
    after pooling to one pixel cannot train on a batch of one.
    """
    effective = config.train.samples_per_step
    student, why = _built(config), ""
    sizes = [size for size in range(effective, 0, -1) if effective % size == 0 and trains_on(student, config, size)]
    if not sizes:
        refuse_crops(student, config, effective)
    del student
    if device.type == "cpu":
        room = CPU_SHARE * available_bytes()
        forecast = _forecast(config, device, sizes, room)
        too_large = [size for size in sizes if forecast(size) > room]
        if too_large and math.isfinite(forecast(min(too_large))):
            why = f"; {min(too_large)} would take about {forecast(min(too_large)) / 1e9:.2g} GB of {room / 1e9:.2g} GB"
        sizes = [size for size in sizes if size not in too_large]
    failed: list[int] = []
    for size in sizes:
        if _fits(config, device, size):
            return size, f"; {min(failed)} was out of memory" if failed else why
        failed.append(size)
    smallest = f"not even {min(failed)}" if failed else "none"
    raise OutOfMemory(
        f"train.batch_size auto: of the divisors of {effective} (train.effective_batch_size) {smallest} fits with crops of "
        f"{config.train.crop} x {config.train.crop} px on {device}{why}. To fit: train.crop: "
        f"{max(32, config.train.crop // 2 // 32 * 32)} (now {config.train.crop}); train.precision: bf16; "
        "a smaller student.encoder or student.architecture"
    )


def _forecast(config: Config, device: torch.device, sizes: list[int], room: float) -> Callable[[int], float]:
    """Bytes of a step by batch size on the CPU, extrapolated from the smallest size and, if it surely fits, the next one."""
    # Read once: memory that malloc keeps after the first trial would hide what the second one takes.
    before = psutil.Process().memory_info().rss
    measured: list[tuple[int, int]] = []
    for size in sorted(sizes):
        if measured and size / measured[0][0] * measured[0][1] > room:
            break
        with _watched() as largest_bytes:
            fits = _fits(config, device, size)
        if fits:
            measured.append((size, largest_bytes() - before))
        if len(measured) == 2:
            break
    if not measured:
        return lambda size: float("inf")
    (small, least), (large, most) = measured[0], measured[-1]
    # A single measurement cannot tell the constant share (weights, optimizer), so all of it is assumed to grow with the batch.
    slope = (most - least) / (large - small) if large > small else least / small
    return lambda size: least + max(0.0, slope) * (size - small) if size >= small else float("inf")


def _fits(config: Config, device: torch.device, size: int) -> bool:
    """Whether steps of a batch size fit in memory, which is released again."""
    try:
        take_steps(config, device, size, STEPS)
    except (RuntimeError, MemoryError) as err:
        if not is_out_of_memory(err):
            raise
        return False
    finally:
        gc.collect()  # modules hold reference cycles
        if device.type == "cuda":
            torch.cuda.empty_cache()
        elif device.type == "mps":
            torch.mps.empty_cache()
    return True


def take_steps(config: Config, device: torch.device, size: int, steps: int) -> list[float]:
    """
    Seconds of each of `steps` steps of a student like the run's, on the most expensive batch: every pixel has a label and a soft target.

    The first step allocates. Raises `SizeRefused` for a batch or crop that the student cannot train on.
    """
    seconds = []
    config = with_own_normalization(config)
    student = _built(config)
    refuse_crops(student, config, size)
    fabric = open_fabric(config, device)
    model, optimizer = fabric.setup(student, make_optimizer(student, config.train))
    averaged = copy.deepcopy(student) if config.train.average is not None else None  # as much memory as the run's
    classes, crop = len(config.classes.names), config.train.crop
    images = torch.zeros(size, len(config.data.bands), crop, crop, dtype=torch.uint8, device=device)
    mask = torch.zeros(size, crop, crop, dtype=torch.int64, device=device)
    inside = torch.ones(size, crop, crop, dtype=torch.bool, device=device)
    distills = config.distill.mode != "none"
    targets = torch.full((size, classes, crop, crop), 1 / classes, device=device) if distills else None
    objective = Objective(config, device)
    model.train()
    for _ in range(steps):
        start = time.perf_counter()
        output = model(student_inputs(images, config))
        terms = objective(output, mask, inside, targets)
        fabric.backward(terms.total)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    del averaged
    return seconds


def _built(config: Config) -> nn.Module:
    """A student like the run's."""
    return untrained_student(config).to(memory_format=torch.channels_last)


@contextmanager
def _watched() -> Iterator[Callable[[], int]]:
    """Yields a function that returns the peak memory of the process within the block, in bytes."""
    process = psutil.Process()
    largest = process.memory_info().rss
    done = threading.Event()

    def watch() -> None:
        nonlocal largest
        while not done.wait(SAMPLE_EVERY_SECONDS):
            largest = max(largest, process.memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: largest
    finally:
        done.set()
        thread.join()


def available_bytes(cgroups: Path = CGROUPS, own: Path = OWN_CGROUP) -> int:
    """Bytes that can be allocated without swapping: free on the machine, or left by the limit of a container, job or shell."""
    available: int = psutil.virtual_memory().available
    address_space = resource.getrlimit(resource.RLIMIT_AS)[0]  # `ulimit -v`
    if address_space != resource.RLIM_INFINITY:
        available = min(available, address_space - psutil.Process().memory_info().vms)
    name = next((line[3:] for line in _lines(own) if line.startswith("0::")), "/").strip("/")
    for folder in (cgroups / name, *(cgroups / name).parents):
        if not folder.is_relative_to(cgroups):
            break
        limit, used = _lines(folder / "memory.max"), _lines(folder / "memory.current")
        if limit and used and limit[0] != "max":
            cached = dict(line.split() for line in _lines(folder / "memory.stat")).get("inactive_file", "0")
            available = min(available, int(limit[0]) - int(used[0]) + int(cached))
    return available


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def _with_sizes(config: Config, size: int) -> Config:
    effective = config.train.samples_per_step
    sizes = {"batch_size": size, "accumulate": effective // size, "effective_batch_size": effective}
    return config.model_copy(update={"train": config.train.model_copy(update=sizes)})
