"""Freed blocks are reused instead of being mapped anew, and tensors lie in huge pages: counted by the kernel, not timed."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

COUNT_FAULTS = """
import resource, sys
import numpy as np
from kdpipe.pipeline.devices import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else None
faults = []
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(20_000_000, dtype=np.uint8)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(kept, sum(faults[1:]))
"""


def run(argument, **environment):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_"))}
    command = [sys.executable, "-c", COUNT_FAULTS, argument]
    return subprocess.run(command, env=kept | environment, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc has the setting")
def test_blocks_of_20_mb_are_mapped_once_and_then_reused():
    kept, faults = run("keep")
    _, faults_by_default = run("default")
    assert kept == "True"
    # By default glibc raises its own threshold after the first free, up to 32 MB, but still trims the end of the heap.
    assert int(faults) < 100
    assert int(faults_by_default) > 19 * 20_000_000 / 2**21


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc has the setting")
def test_the_users_own_settings_stay():
    assert run("keep", MALLOC_TRIM_THRESHOLD_="65536")[0] == "False"


IN_HUGE_PAGES = """
import torch
{ask}
tensor = torch.ones(2**26, dtype=torch.uint8)
print(*(line.split()[1] for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages")))
"""
ASK = {
    "command": "from kdpipe.pipeline.devices import ask_for_huge_pages; ask_for_huge_pages()",
    "worker": "from types import SimpleNamespace as worker; from kdpipe.pipeline.cluster.worker import facts_of_worker;"
    "facts_of_worker('cpu', worker(state=worker(nthreads=1)))",
}
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.long
@pytest.mark.skipif(
    not SETTING.exists() or "[madvise]" not in SETTING.read_text(),
    reason="this Linux gives huge pages to all processes or to none",
)
@pytest.mark.parametrize(("own", "expected"), [({}, True), ({"THP_MEM_ALLOC_ENABLE": "0"}, False)])
@pytest.mark.parametrize("ask", ASK)
def test_a_tensor_lies_in_huge_pages_unless_the_user_says_otherwise(ask, own, expected):
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    done = subprocess.run(
        [sys.executable, "-c", IN_HUGE_PAGES.format(ask=ASK[ask])],
        env=environment | own,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (int(done.stdout) >= 2**15) == expected, f"{done.stdout} kB of 65536"
