"""
`train.batch_size: auto`: the largest batch that fits, accumulated to the size that an optimizer step should see.

Steps are taken for real, with a student and an optimizer that are thrown away before the run makes its own from its seed.
"""

from __future__ import annotations

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

from kdpipe.configs.errors import ConfigError, OutOfMemory
from kdpipe.configs.schema import Config
from kdpipe.pipeline.distributed import open_fabric
from kdpipe.pipeline.losses import distillation_loss
from kdpipe.pipeline.memory import is_out_of_memory
from kdpipe.pipeline.models.normalize import normalized
from kdpipe.pipeline.models.student import build_student
from kdpipe.pipeline.progress import Progress
from kdpipe.pipeline.training.optimizer import make_optimizer

# The share of the available memory that the CPU's steps may take: loader workers and validation want some as well, and a
# machine that begins to swap is as good as stopped.
CPU_SHARE = 0.8
STEPS = 2  # the first makes the optimizer's state, the second has it beside the activations
SAMPLE_EVERY_SECONDS = 0.002
CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")  # Linux, version 2: absent elsewhere


def resolve_batch_size(
    config: Config, device: torch.device, progress: Progress, recorded: Mapping[str, Any] | None = None
) -> Config:
    """
    The configuration with `train.batch_size` and `train.accumulate` as numbers, whose product is the effective size.

    `recorded` is the resolved config of a run to go on with: its numbers are taken, and nothing is tried. Draws random
    numbers: seed after it. Raises `OutOfMemory` where nothing fits, `ConfigError` where the recorded effective size is
    another one.
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
        progress.say(f"train.batch_size auto: {size} x {accumulate} accumulated, as the run was begun")
        return _with_sizes(config, size)
    start = time.perf_counter()
    size, why = largest_batch(config, device)
    progress.say(
        f"train.batch_size auto: {size} sample{'s' if size > 1 else ''} at a time x {effective // size} accumulated = {effective} a step "
        f"(train.effective_batch_size){why}; found in {time.perf_counter() - start:.0f} s"
    )
    return _with_sizes(config, size)


def largest_batch(config: Config, device: torch.device) -> tuple[int, str]:
    """
    The largest divisor of the effective size with which a step fits, and a clause on what larger ones would have taken.

    On the CPU, where the system lends memory that it does not have and kills later, the two smallest divisors are measured,
    and no larger one is tried than fits by the line through them. A batch of one is passed over where a network's batch
    norm, after pooling to one pixel, has nothing to take a deviation of.
    """
    effective = config.train.samples_per_step
    sizes = [size for size in range(effective, 0, -1) if effective % size == 0]
    why = ""
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
    """Bytes that a step of a size would take on the CPU, from the smallest size, and the next one if that surely fits."""
    # Once for all: what a first try gave back to malloc but malloc not to the system would hide from a second one.
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
    # One measurement says no share that does not grow with the batch (weights, optimizer): all of it is taken to grow.
    slope = (most - least) / (large - small) if large > small else least / small
    return lambda size: least + max(0.0, slope) * (size - small) if size >= small else float("inf")


def _fits(config: Config, device: torch.device, size: int) -> bool:
    """Whether steps of a size can be taken; what they held is given back."""
    try:
        take_steps(config, device, size, STEPS)
    except (RuntimeError, MemoryError) as err:
        if not is_out_of_memory(err):
            raise
        return False
    except ValueError as err:
        if size > 1 or "Expected more than 1 value per channel" not in str(err):
            raise
        return False
    finally:
        gc.collect()  # modules refer to themselves
        if device.type == "cuda":
            torch.cuda.empty_cache()
        elif device.type == "mps":
            torch.mps.empty_cache()
    return True


def take_steps(config: Config, device: torch.device, size: int, steps: int) -> list[float]:
    """
    Forward, backward and optimizer of a student like the run's, every pixel labelled and taught: the dearest batch.

    Returns the seconds of each of `steps` batches; the first allocates.
    """
    seconds = []
    student = build_student(config.student.architecture, len(config.classes.names), encoder=config.student.encoder).to(
        memory_format=torch.channels_last
    )
    fabric = open_fabric(config, device)
    model, optimizer = fabric.setup(student, make_optimizer(student, config.train))
    classes, crop = len(config.classes.names), config.train.crop
    images = torch.zeros(size, 3, crop, crop, dtype=torch.uint8, device=device)
    mask = torch.zeros(size, crop, crop, dtype=torch.int64, device=device)
    inside = torch.ones(size, crop, crop, dtype=torch.bool, device=device)
    taught = config.distill.mode != "none"
    targets = torch.full((size, classes, crop, crop), 1 / classes, device=device) if taught else None
    model.train()
    for _ in range(steps):
        start = time.perf_counter()
        answer = model(normalized(images, config.student.normalize))
        logits, auxiliary = answer if isinstance(answer, tuple) else (answer, None)
        terms = distillation_loss(
            logits, mask, inside, targets, alpha=config.distill.alpha, temperature=config.distill.temperature,
            ignore_index=config.classes.ignore_index, auxiliary_NCHW=auxiliary,
        )  # fmt: skip
        fabric.backward(terms.total)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return seconds


@contextmanager
def _watched() -> Iterator[Callable[[], int]]:
    """A function that says, after the block, how many bytes the process held at its largest."""
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
    """The memory that can be had without swapping: of the machine, or what a container's, job's or shell's limit leaves."""
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
