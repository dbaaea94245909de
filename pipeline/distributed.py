"""
Processes of stage two: Lightning Fabric with the configured precision, and sums over the ranks of a distributed run (DDP).

Outside of a distributed run there is one process, of rank 0.
"""

from __future__ import annotations

import logging
import os
import subprocess
import threading
import time
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdpipe.configs.errors import ConfigError
from kdpipe.configs.schema import Config, Precision

if TYPE_CHECKING:
    from lightning.fabric import Fabric  # takes seconds to import, which a loss must not wait for

LIGHTNING_NAMES: dict[Precision, Any] = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


def computed_precision(config: Config, device: torch.device) -> Precision:
    """The precision that `train.precision` means on a device; `auto` is bf16 on a GPU with native bf16, else fp32."""
    precision = config.train.precision
    if precision == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if native else "fp32"
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("train.precision fp16 needs a GPU, because the CPU has no loss scaling; use bf16 or fp32")
    return precision


def open_fabric(config: Config, device: torch.device, devices: int = 1) -> Fabric:
    """
    A new Fabric, with its own loss scaling in fp16, on one device, or with one process on each of several (DDP).

    Raises `ConfigError` where there are fewer devices.
    """
    from lightning.fabric import Fabric

    if devices > 1 and str(device) not in ("cuda", "cpu"):
        raise ConfigError(
            f"train.devices {devices} takes the first devices of a kind, found --device {device}; use cuda or cpu"
        )
    if devices > 1 and device.type == "cuda" and devices > torch.cuda.device_count():
        raise ConfigError(f"train.devices is {devices}, and there are {torch.cuda.device_count()} GPUs")
    precision = LIGHTNING_NAMES[computed_precision(config, device)]
    # It would report the precision, tips, and how processes found each other.
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    if devices == 1:
        own = [device.index or 0] if device.type == "cuda" else 1
        return Fabric(accelerator=device.type, devices=own, precision=precision)
    return Fabric(accelerator=device.type, devices=devices, strategy="ddp", precision=precision)


def is_further_process(config: Config) -> bool:
    """Whether Lightning started this process beside the first one, which alone prints and writes."""
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    return config.train.devices > 1 and vars(rank_zero_only)["rank"] != 0


def launch(fabric: Fabric) -> None:
    """
    Start the other processes of a run and wait until they have joined it.

    The wait is one of another thread, because it is deaf to signals, and the others may import libraries for a long time.
    """
    ended: SimpleQueue[BaseException | None] = SimpleQueue()
    chosen = "OMP_NUM_THREADS" in os.environ

    def wait() -> None:
        try:
            fabric.launch()
        except BaseException as err:
            ended.put(err)
        else:
            ended.put(None)

    threading.Thread(target=wait, daemon=True).start()
    if (err := ended.get()) is not None:
        raise err
    # What a thread sets for itself alone: its device, and the number of threads that its operators use, which Lightning chooses.
    if fabric.device.type == "cuda":
        torch.cuda.set_device(fabric.device)
    if not chosen:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def end_ranks(fabric: Fabric, seconds: float) -> None:
    """Wait so long for the processes that `launch` started, and kill those that are left; nothing in these processes themselves."""
    started = getattr(fabric.strategy.launcher, "procs", [])
    processes = list(started)
    started.clear()  # Lightning watches its list, and would kill this process for the death of another
    until = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def freeze_unused(student: nn.Module, images_NCHW: Tensor) -> None:
    """
    Take from training the parameters that get no gradient, such as those of encoder stages that PSPNet does not use.

    They stay as they are in any run. DDP would wait for their gradients, and fail at the second step. A trial on images finds them; it
    leaves weights and statistics as they are, and takes random numbers.
    """
    statistics = {name: buffer.clone() for name, buffer in student.named_buffers()}
    output = student.train()(images_NCHW)
    sum(part.float().sum() for part in (output if isinstance(output, tuple) else (output,))).backward()
    for parameter in student.parameters():
        parameter.requires_grad_(parameter.requires_grad and parameter.grad is not None)
    student.zero_grad()
    with torch.no_grad():
        for name, buffer in student.named_buffers():
            buffer.copy_(statistics[name])


class Alone(nn.Module):
    """A student that predicts in the run's precision, in this process only."""

    def __init__(self, student: nn.Module, fabric: Fabric) -> None:
        super().__init__()
        self._student, self._fabric = student, fabric

    def forward(self, images_NCHW: Tensor) -> Any:
        """Logits `(N, C, H, W)`, float32; no other process takes part."""
        with self._fabric.autocast():
            output = self._student(images_NCHW)
        return output[0].float() if isinstance(output, tuple) else output.float()


def world_size() -> int:
    """How many processes train one student."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sums_over_ranks(*sums: Tensor) -> tuple[Tensor, ...]:
    """
    Each tensor's sum over all ranks, in float64; unchanged in a single process.

    The gradient to a rank's own part is multiplied by the number of ranks, because DDP takes the mean of their gradients: after DDP, a
    loss computed from such sums has the gradients of the whole batch. All ranks must call this equally often.
    """
    if world_size() == 1:
        return sums
    parts = torch.cat([part.double().flatten() for part in sums])
    whole: Tensor = _SumOverRanks.apply(parts)
    split = torch.split(whole, [own.numel() for own in sums])
    return tuple(part.view(own.shape) for part, own in zip(split, sums, strict=True))


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, parts: Tensor) -> Tensor:
        whole = parts.clone()
        dist.all_reduce(whole)
        return whole

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        return gradients[0] * world_size()


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set in at least one rank; all ranks get the same result."""
    if world_size() == 1:
        return flag
    flags = torch.tensor([int(flag)], device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags.item())
