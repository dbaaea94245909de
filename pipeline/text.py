"""Sizes, shares, times and names from files as text, written one way everywhere."""

import unicodedata
from math import isnan
from pathlib import Path

# Characters that a terminal obeys instead of showing: controls (Cc) and marks that turn the direction of writing (in Cf), and halves of
# characters, which cannot be encoded (Cs).
_OBEYED = {"Cc", "Cf", "Cs"}
_KEPT = "\n\t\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}\N{SOFT HYPHEN}"


def size_text(size_bytes: float) -> str:
    """A size in decimal units: `12.3 MB`."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.1f} {unit}"
    return f"{size_bytes:.0f} B"


def file_text(what: str, path: str | Path) -> str:
    """A file that was written, with its size: `HTML report: report.html (1.2 MB)`."""
    return f"{what}: {path} ({size_text(Path(path).stat().st_size)})"


def percent_text(share: float | None, digits: int = 1) -> str:
    """A share in [0, 1] as a percentage: `12.3 %`; a dash for None and NaN."""
    return "–" if share is None or isnan(share) else f"{percent_cell(share, digits)} %"


def percent_cell(share: float | None, digits: int = 1) -> str:
    """A share in [0, 1] in a table whose head says percent: `12.3`; a dash for None and NaN."""
    return "–" if share is None or isnan(share) else f"{100 * share:.{digits}f}"


def part_text(part: int, whole: int) -> str:
    """A part of a whole as a percentage: `12.3 %`, with more digits where that would be 0.0."""
    if not whole or not part:
        return "0 %"
    share = part / whole
    return percent_text(share) if share >= 0.0005 else f"{100 * share:.2g} %"


def limit_text(limit: int | None, whole: int) -> str:
    """What stands behind a number of tiles where `--limit` chose them: ` of 45 (--limit 4)`; empty without a limit."""
    return "" if limit is None else f" of {whole} (--limit {limit})"


def duration_text(seconds: float) -> str:
    """A duration in its two largest units: `12 s`, `3 min 05 s` or `2 h 07 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def pace_text(seconds: float) -> str:
    """The time of one step, tile or crop, to three digits: `0.486 s`."""
    return f"{seconds:.3g} s"


def run_time_text(wall_seconds: float) -> str:
    """The time of a run of stage two over all its resumes: `run: 12 min 03 s wall time`."""
    return f"run: {duration_text(wall_seconds)} wall time"


def step_time_text(seconds_per_step: float) -> str:
    """The median time of a run's steps, waiting for data included: `step: 0.486 s (median)`."""
    return f"step: {pace_text(seconds_per_step)} (median)"


def stage_one_time_text(seconds: float) -> str:
    """The time that a cache took to compute, over all runs that computed it: `stage one: 3 min 05 s`."""
    return f"stage one: {duration_text(seconds)}"


def printable(text: str) -> str:
    r"""
    A text with names from files, such as classes, tiles or keys of a checkpoint, that a terminal shows and never obeys.

    Control characters and the like become escapes: `\x1b`. Newlines and tabs stay. Passwords and keys in URLs are left out.
    """
    if "://" in text:
        from kdpipe.configs.urls import hide_secrets  # its package imports pydantic, which --help does without

        text = hide_secrets(text)
    return (
        text
        if text.isascii() and text.replace("\n", "").replace("\t", "").isprintable()
        else "".join(map(_shown, text))
    )


def _shown(character: str) -> str:
    if character in _KEPT or unicodedata.category(character) not in _OBEYED:
        return character
    return character.encode("unicode_escape").decode("ascii")


def csv_cell(value: object) -> object:
    """A value for a cell of a CSV file; a text that a spreadsheet would take for a formula gets an apostrophe in front."""
    if not isinstance(value, str):
        return value
    value = printable(value)
    return f"'{value}" if value.startswith(("=", "+", "-", "@", "\t", "\n")) else value
