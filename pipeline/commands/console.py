"""The terminal, or the log file in its place, to which the commands report progress and print results."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from kdpipe.configs.files import write_file
from kdpipe.configs.urls import hide_secrets
from kdpipe.pipeline.progress import Advance
from kdpipe.pipeline.text import duration_text, printable, size_text

PLAIN_EVERY_SECONDS = 10.0  # a log file wants few lines


class Terminal:
    """Prints results as they are, and progress as bars on a terminal or as a line every ten seconds in a file."""

    def __init__(self) -> None:
        self.console = _Console(markup=False, emoji=False, highlight=False)

    def show(self, *parts: RenderableType, wrap_tables: bool = False) -> None:
        """Print tables and texts. Lines of texts stay whole, as some are for pasting; `wrap_tables` breaks cells that are too wide."""
        for part in parts:
            whole = isinstance(part, str) or not wrap_tables
            self.console.print(part, soft_wrap=whole)

    def say(self, line: str) -> None:
        self.show(line)

    @contextmanager
    def bar(self, title: str, total: int, unit: str, done: int = 0) -> Iterator[Advance]:
        rate = _Rate(total, done, unit)
        if not self.console.is_terminal:
            yield self._plain(title, rate)
            if rate.count > done:
                self.say(f"{title}: {rate.count}/{total} {rate.text()} in {duration_text(rate.elapsed())}")
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        with RichProgress(*columns, console=self.console) as progress:
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


class _Console(Console):
    """A console for which names from files are text alone: no markup, and nothing that a terminal obeys."""

    def render_str(
        self, text: str, **options: Any
    ) -> Text:  # of all texts that are printed, and of all cells of tables
        return super().render_str(printable(text), **options)


class _Rate:
    """Units per second since the start of a bar, and bytes per second if it is told of bytes."""

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


def write_json(path: str | None, content: dict[str, Any]) -> None:
    """Write a result to the file that `--json` names, if it names one."""
    if path is not None:
        write_file(path, hide_secrets(json.dumps(content, indent=1)) + "\n")
