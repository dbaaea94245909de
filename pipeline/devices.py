"""
The device to compute on, and the handling of tensors in main memory. Imports torch only to resolve a device.

By default glibc maps each tensor of a few MB anew and unmaps it when it is freed. The kernel then clears and maps its pages at every
step: a quarter of a small student's step on a CPU. So freed memory is kept, as CUDA's allocator does. Pages of 4 kB are so many that
most of them are no longer in the processor's TLB when the next layer needs them; where Linux offers pages of 2 MB
(`/sys/kernel/mm/transparent_hugepage/enabled`), torch requests them.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# From glibc's malloc.h, and the largest values that it takes.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_TRIM, LARGEST_MMAP = 2**31 - 1, 32 * 2**20
AMPERE = (8, 0)  # the first CUDA capability with bf16 in its tensor cores
USERS_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def ask_for_huge_pages() -> None:
    """Make torch request pages of 2 MB, in this process and its children; call it before the first tensor is created."""
    # https://docs.pytorch.org/tutorials/recipes/inference_tuning_on_aws_graviton.html
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def keep_freed_memory() -> bool:
    """Make malloc keep freed memory; False without glibc, or where the user's own settings or allocator take precedence."""
    if sys.platform != "linux" or any(name in os.environ for name in USERS_OWN):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP) and mallopt(M_TRIM_THRESHOLD, LARGEST_TRIM))


def resolve_device(name: str | None) -> torch.device:
    """
    The named device, or the first available of CUDA, Apple's MPS and the CPU.

    Raises `ConfigError` for a device that is not available.
    """
    import torch

    from kdpipe.configs.errors import ConfigError

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as err:
        raise ConfigError(f"--device {name} cannot be used here: {str(err).splitlines()[0]}") from err
    return device


def is_fast_at_bf16(device: torch.device) -> bool:
    """Whether the device has native bf16: NVIDIA GPUs since Ampere, and processors with AMX; others only emulate it."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= AMPERE
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()
