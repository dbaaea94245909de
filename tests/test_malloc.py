"""Large blocks are reused instead of being mapped anew: counted in page faults, not timed."""

import os
import platform
import subprocess
import sys

import pytest

COUNT_FAULTS = """
import resource, sys
import numpy as np
from kdpipe.pipeline.malloc import keep_freed_memory
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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc can be told")
def test_blocks_of_20_mb_are_mapped_once_and_then_reused():
    kept, faults = run("keep")
    _, faults_by_default = run("default")
    assert kept == "True"
    # By default glibc raises its own threshold after the first free, up to 32 MB, but still trims the heap's end.
    assert int(faults) < 100
    assert int(faults_by_default) > 19 * 20_000_000 / 2**21


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc can be told")
def test_settings_of_the_users_own_stay():
    assert run("keep", MALLOC_TRIM_THRESHOLD_="65536")[0] == "False"
