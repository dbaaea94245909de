"""
Values that only the user knows. `kdpipe init` writes `FILL_IN` in their place, and a config that contains it is not loaded.

A wrong guess in its place, such as a wrong order of the teacher's channels, would train without an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

FILL_IN = "FILL_IN"


class Unfilled(str):
    """The text `FILL_IN` and its line in the file, counted from 1."""

    line: int

    def __new__(cls, line: int) -> Unfilled:
        """`FILL_IN` at `line`."""
        text = super().__new__(cls, FILL_IN)
        text.line = line
        return text


def unfilled_places(raw: Any) -> dict[str, list[int]]:
    """The dotted keys that hold `Unfilled`, each with its lines; an item of a list counts under the list's key."""
    places: dict[str, list[int]] = {}
    for key, line in _places(raw, ""):
        places.setdefault(key, []).append(line)
    return places


def places_text(places: dict[str, list[int]]) -> str:
    """The places as `teacher.normalize (line 29), class_map (lines 45, 47 to 49)`; all rows of the class map count as one key."""
    joined: dict[str, list[int]] = {}
    for key, lines in places.items():
        joined.setdefault("class_map" if key.startswith("class_map.") else key, []).extend(lines)
    return ", ".join(f"{key} ({_lines_text(sorted(lines))})" for key, lines in joined.items())


def with_open_rows_even(raw: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """
    `raw` with unfilled rows of its class map replaced by even shares of all student classes, and the names of those rows.

    If all of `class_map` is unfilled, every class that `teacher` predicts gets such a row. Anything without the form of a
    config stays as it is.
    """
    names = _get(raw, "classes", "names")
    rows = raw.get("class_map")
    if isinstance(rows, Unfilled):
        dropped = _get(raw, "teacher", "drop_channels") or []
        classes = _get(raw, "teacher", "classes")
        if not isinstance(classes, list) or not isinstance(dropped, list):
            return raw, []
        rows = {name: rows for channel, name in enumerate(classes) if channel not in dropped and isinstance(name, str)}
    if not isinstance(rows, dict) or not isinstance(names, list) or not names or unfilled_places(names):
        return raw, []
    opened = [name for name, row in rows.items() if unfilled_places(row)]
    even = {name: 1 / len(names) for name in names if isinstance(name, str)}
    return {**raw, "class_map": {name: even if name in opened else row for name, row in rows.items()}}, opened


def _get(raw: dict[str, Any], section: str, key: str) -> Any:
    found = raw.get(section)
    return found.get(key) if isinstance(found, dict) else None


def _places(value: Any, key: str) -> Iterator[tuple[str, int]]:
    if isinstance(value, Unfilled):
        yield key, value.line
    elif isinstance(value, dict):
        for name, part in value.items():
            inner = f"{key}.{name}" if key else str(name)
            if isinstance(name, Unfilled):
                yield inner, name.line
            yield from _places(part, inner)
    elif isinstance(value, list):
        for part in value:
            yield from _places(part, key)


def _lines_text(lines: list[int]) -> str:
    spans: list[tuple[int, int]] = []
    for line in lines:
        if spans and line <= spans[-1][1] + 1:
            spans[-1] = (spans[-1][0], line)
        else:
            spans.append((line, line))
    texts = [str(first) if first == last else f"{first} to {last}" for first, last in spans]
    return f"line{'s' if len(lines) > 1 else ''} {', '.join(texts)}"
