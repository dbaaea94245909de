"""Processes take turns, so that a machine whose pace drifts from minute to minute slows all of them alike."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

TURN_SECONDS = 2.0


def in_turns(scripts: dict[str, list[str]]) -> dict[str, float]:
    """Seconds between the two `stop_here` of each Python script, given with its arguments; the others are stopped meanwhile."""
    # A group of processes each, so that its loader's workers wait with it, and the kernel ends those that wait when this one is killed.
    processes = {name: subprocess.Popen([sys.executable, *script], process_group=0) for name, script in scripts.items()}
    try:
        for process in processes.values():
            _has_stopped(process.pid, wait=True)
        seconds = _take_turns(processes)
        for process in processes.values():
            os.killpg(process.pid, signal.SIGCONT)
            if process.wait():
                raise SystemExit(f"a process ended with {process.returncode}")
    finally:
        for process in processes.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # those that are stopped, where another failed
    return seconds


def stop_here() -> None:
    """Stop until the parent process continues this one; called where the timed part begins and ends."""
    os.killpg(os.getpgrp(), signal.SIGSTOP)


def _take_turns(processes: dict[str, subprocess.Popen]) -> dict[str, float]:
    """Seconds in which each of several stopped processes ran until it stopped itself."""
    seconds = dict.fromkeys(processes, 0.0)
    running = list(processes)
    while running:
        for arm in list(running):
            pid, start = processes[arm].pid, time.perf_counter()
            os.killpg(pid, signal.SIGCONT)
            stopped = _has_stopped(pid)
            while not stopped and time.perf_counter() - start < TURN_SECONDS:
                time.sleep(0.001)
                stopped = _has_stopped(pid)
            if stopped:
                running.remove(arm)
            else:
                os.killpg(pid, signal.SIGSTOP)
                _has_stopped(pid, wait=True)
            seconds[arm] += time.perf_counter() - start
    return seconds


def _has_stopped(pid: int, wait: bool = False) -> bool:
    """Whether a process has stopped itself since it last continued; exits the benchmark if the process has ended."""
    found, status = os.waitpid(pid, os.WUNTRACED | (0 if wait else os.WNOHANG))
    if found and not os.WIFSTOPPED(status):
        raise SystemExit(f"a process ended with {os.waitstatus_to_exitcode(status)} before it was through")
    return bool(found)
