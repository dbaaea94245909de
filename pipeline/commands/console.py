"""Progress for people: bars where someone watches, plain lines where the output is a file. Used by the commands only."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from kdpipe.pipeline.progress import Advance
from kdpipe.pipeline.text import duration_text, size_text

PLAIN_EVERY_SECONDS = 10.0  # a log file wants few lines


class ConsoleProgress:
    """Reports to a terminal with bars, or to a file with a line every ten seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, line: str) -> None:
        """Show one line."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def bar(self, title: str, total: int, unit: str, done: int = 0) -> Iterator[Advance]:
        """A bar, or plain lines, over `total` units of which `done` are done already; yields what advances it."""
        rate = _Rate(total, done, unit)
        if not self._console.is_terminal:
            yield self._plain(title, rate)
            if rate.count > done:
                self.say(f"{title}: {rate.count}/{total} {rate.text()} in {duration_text(rate.elapsed())}")
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        with RichProgress(*columns, console=self._console) as progress:
            task = progress.add_task(title, total=total, completed=done, figures="")

            def advance(steps: int = 1, **figures: float) -> None:
                rate.add(steps, figures)
                progress.update(task, advance=steps, figures=rate.text())

            yield advance

    def _plain(self, title: str, rate: _Rate) -> Advance:
        last = time.monotonic()

        def advance(steps: int = 1, **figures: float) -> None:
            nonlocal last
            rate.add(steps, figures)
            if time.monotonic() - last >= PLAIN_EVERY_SECONDS and rate.count < rate.total:
                last = time.monotonic()
                self.say(f"{title}: {rate.count}/{rate.total} {rate.text()}, {duration_text(rate.left())} left")

        return advance


class _Rate:
    """Counts units, and bytes where told of them, since the start of the bar."""

    def __init__(self, total: int, done: int, unit: str) -> None:
        self.total, self.count, self._first, self._unit = total, done, done, unit
        self._bytes = 0.0
        self._figures: dict[str, float] = {}
        self._start = time.monotonic()

    def add(self, steps: int, figures: dict[str, float]) -> None:
        self.count += steps
        self._bytes += figures.pop("bytes", 0)
        self._figures |= figures

    def elapsed(self) -> float:
        return max(time.monotonic() - self._start, 1e-9)

    def left(self) -> float:
        return (self.total - self.count) * self.elapsed() / max(1, self.count - self._first)

    def text(self) -> str:
        parts = [f"{(self.count - self._first) / self.elapsed():.2f} {self._unit}/s"]
        if self._bytes:
            parts += [f"{self._bytes / self.elapsed() / 1e6:.1f} MB/s", f"{size_text(self._bytes)} written"]
        parts += [f"{name} {value:.4g}" for name, value in self._figures.items()]
        return ", ".join(parts)
