"""
Freed memory is kept by the process, as CUDA's allocator keeps it, and not given back to the system at every step.

By default glibc maps each tensor of a few MB anew and unmaps it when it is freed; the kernel then clears and maps its pages at
every step, which took a quarter of a small student's step on a CPU.
"""

from __future__ import annotations

import ctypes
import os
import sys

# From glibc's malloc.h, and the largest values that it takes.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_TRIM, LARGEST_MMAP = 2**31 - 1, 32 * 2**20
USERS_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """Whether malloc was told so: glibc's alone can be, and a user's own settings or allocator stay as they are."""
    if sys.platform != "linux" or any(name in os.environ for name in USERS_OWN):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # another C library
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP) and mallopt(M_TRIM_THRESHOLD, LARGEST_TRIM))
