"""What the stages tell of their progress, and how they are asked to stop: no printing here, see `console.py`."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import Protocol

Advance = Callable[..., None]  # advance(steps=1, **figures): figures such as loss=0.3 stand beside the bar


class Progress(Protocol):
    """Where a stage reports to."""

    def say(self, line: str) -> None:
        """Show one line."""

    def bar(self, title: str, total: int, unit: str, done: int = 0) -> AbstractContextManager[Advance]:
        """A bar, or plain lines, over `total` units of which `done` are done already; yields what advances it."""


class Silent:
    """Reports nothing: the default for library calls."""

    def say(self, line: str) -> None:
        """Show nothing."""

    def bar(self, title: str, total: int, unit: str, done: int = 0) -> AbstractContextManager[Advance]:
        """A bar that is not shown."""
        return nullcontext(lambda steps=1, **figures: None)


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """
    An event that is set by Ctrl-C or SIGTERM, so that work can end at a safe point; a second Ctrl-C ends it at once.

    Outside of the main thread, where signals cannot be handled, the event is never set.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
