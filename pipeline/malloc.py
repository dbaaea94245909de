"""
How a process holds its tensors in main memory: freed memory is kept, as CUDA's allocator keeps it, and lies in pages of 2 MB.

By default glibc maps each tensor of a few MB anew and unmaps it when it is freed; the kernel then clears and maps its pages at
every step, which took a quarter of a small student's step on a CPU. Pages of 4 kB are so many that a processor looks most of
them up again at each layer; where Linux may take large ones (`/sys/kernel/mm/transparent_hugepage/enabled`), torch asks for them.
"""

from __future__ import annotations

import ctypes
import os
import sys

# From glibc's malloc.h, and the largest values that it takes.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_TRIM, LARGEST_MMAP = 2**31 - 1, 32 * 2**20
USERS_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def ask_for_huge_pages() -> None:
    """Have torch ask for pages of 2 MB, in this process and those that it starts; call it before the first tensor is made."""
    # https://docs.pytorch.org/tutorials/recipes/inference_tuning_on_aws_graviton.html
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def keep_freed_memory() -> bool:
    """Whether malloc was told so: glibc's alone can be, and a user's own settings or allocator stay as they are."""
    if sys.platform != "linux" or any(name in os.environ for name in USERS_OWN):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP) and mallopt(M_TRIM_THRESHOLD, LARGEST_TRIM))
