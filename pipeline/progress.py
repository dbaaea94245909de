"""How a stage reports its progress, and how it is stopped. Printing is left to `commands/console.py`."""

from __future__ import annotations

import signal
import threading
from _thread import interrupt_main
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from multiprocessing import resource_tracker
from types import FrameType
from typing import Protocol

from kdpipe.configs.errors import Interrupted

STOPPING = (signal.SIGINT, signal.SIGTERM)
SECONDS_TO_HEAR = 0.05
Advance = Callable[..., None]  # advance(steps=1, **figures): figures such as loss=0.3 are shown beside the bar


class Progress(Protocol):
    """Where a stage reports to."""

    def say(self, line: str) -> None:
        """Show one line."""

    def bar(self, title: str, total: int, unit: str, done: int = 0) -> AbstractContextManager[Advance]:
        """A bar, or plain lines, over `total` units of which `done` are done; yields the function that advances it."""


class Silent:
    """Reports nothing: the default for library calls."""

    def say(self, line: str) -> None:
        pass

    def bar(self, title: str, total: int, unit: str, done: int = 0) -> AbstractContextManager[Advance]:
        return nullcontext(lambda steps=1, **figures: None)


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """
    An event that Ctrl-C or SIGTERM sets, so that work can end at a safe point; a second Ctrl-C ends it at once.

    A second SIGTERM means nothing new: `timeout`, SLURM and others send it to a process and again to its group. The event is never set
    outside the main thread, where signals cannot be handled.
    """
    stop = threading.Event()
    if not _is_main_thread():
        yield stop
        return

    unheard = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal unheard
        is_first = unheard or not stop.is_set()
        stop.set()
        ends_at_once = bool(_hurried) if is_first else number == signal.SIGINT
        unheard = ends_at_once and _is_deaf(frame)
        if unheard:
            threading.Timer(SECONDS_TO_HEAR, interrupt_main, [number]).start()
        elif ends_at_once:
            raise KeyboardInterrupt

    previous = {number: signal.signal(number, handle) for number in STOPPING}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def at_once(stop: threading.Event, so_far: str) -> Iterator[None]:
    """
    A block that a signal to `stop_on_signal` ends wherever it is, because there is nothing to save.

    Raises `Interrupted` with the text `so_far` then, or at the start if `stop` is set already.
    """
    if not _is_main_thread():
        yield
        return
    try:
        _hurried.append(so_far)
        if stop.is_set():
            raise KeyboardInterrupt
        yield
    except KeyboardInterrupt as err:
        if not stop.is_set():
            raise
        raise Interrupted(so_far) from err
    finally:
        _hurried.pop()


@contextmanager
def out_of_reach() -> Iterator[None]:
    """
    Processes that this thread starts in the block, or threads that it starts there, never receive Ctrl-C or SIGTERM.

    Both are sent to all processes of a job, and the main process needs its helpers until it has reached a safe point. They inherit the
    blocked signals, so that there is no moment in which they would die of one; this process must end them itself, by SIGKILL if need be.
    """
    resource_tracker.ensure_running()  # with the first process of a program, it would unblock the signals again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_hurried: list[str] = []  # the blocks of `at_once` that are open


def _is_deaf(frame: FrameType | None) -> bool:
    """Whether Python would print an exception raised in a frame and go on, as it does for destructors and callbacks of the collector."""
    while frame is not None and frame.f_code.co_name not in ("__del__", "_gc_callback"):
        frame = frame.f_back
    return frame is not None


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
