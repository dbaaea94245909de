"""How a stage reports its progress, and how it is stopped. Printing is left to `commands/console.py`."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType
from typing import Protocol

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

    The event is never set outside the main thread, where signals cannot be handled.
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
