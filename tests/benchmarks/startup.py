"""
CPU seconds until `kdpipe` answers without computing, beside those of importing click and pydantic alone.

    python tests/benchmarks/startup.py [--rounds 5] [--json FILE]

Each command is a process of its own. The processes take turns, and the medians of their user and system time are compared: kdpipe's
own share of its start is the difference, which does not depend on how long a machine takes to import what any such program needs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

BASELINE = "import click and pydantic"
COMMANDS = {
    BASELINE: (["-c", "import click, pydantic"], 0),
    "--help": (["-m", "kdpipe.pipeline", "--help"], 0),
    "--set with a wrong key": (["-m", "kdpipe.pipeline", "train-student", "-c", "demo", "--set", "train.epoch=2"], 2),
    "--set with a wrong type": (
        ["-m", "kdpipe.pipeline", "train-student", "-c", "demo", "--set", "train.epochs=many"],
        2,
    ),
}


def cpu_seconds(arguments: list[str], code: int) -> float:
    """User and system time of a Python process, which must end with `code`."""
    before = os.times()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    after = os.times()
    if done.returncode != code:
        raise SystemExit(f"{' '.join(arguments)} ended with {done.returncode}, not with {code}: {done.stderr}")
    return after.children_user - before.children_user + after.children_system - before.children_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    for command in COMMANDS.values():
        cpu_seconds(*command)  # reads files into the page cache, and compiles modules
    times = {name: [] for name in COMMANDS}
    for _ in range(options.rounds):
        for name, command in COMMANDS.items():
            times[name].append(cpu_seconds(*command))
    seconds = {name: statistics.median(found) for name, found in times.items()}
    more = {name: found - seconds[BASELINE] for name, found in seconds.items() if name != BASELINE}
    for name, found in seconds.items():
        print(f"{name}: {found:.2f} s of CPU" + (f", {more[name]:+.2f} s" if name in more else ""))
    if options.json:
        options.json.write_text(json.dumps({"seconds": seconds, "more": more}, indent=1) + "\n")


if __name__ == "__main__":
    main()
