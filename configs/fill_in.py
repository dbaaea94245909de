"""
Values that only the user knows: `kdpipe init` writes `FILL_IN` in their place, and a config that holds one is not loaded.

A guess in such a place, above all of the order of a teacher's channels, would train without an error and be wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

FILL_IN = "FILL_IN"


class Unfilled(str):
    """The text `FILL_IN` of a file, and the line that it stands in, counted from 1."""

    line: int

    def __new__(cls, line: int) -> Unfilled:
        """The one that stands in `line`."""
        text = super().__new__(cls, FILL_IN)
        text.line = line
        return text


def unfilled_places(raw: Any) -> dict[str, list[int]]:
    """The dotted keys of plain nested values that hold `Unfilled`, each with its lines; items of a list count as their list's key."""
    places: dict[str, list[int]] = {}
    for key, line in _places(raw, ""):
        places.setdefault(key, []).append(line)
    return places


def places_text(places: dict[str, list[int]]) -> str:
    """`teacher.normalize (line 29), teacher.classes (lines 31 to 38), class_map (lines 45, 47 to 49)`, where the map counts as one."""
    joined: dict[str, list[int]] = {}
    for key, lines in places.items():
        joined.setdefault("class_map" if key.startswith("class_map.") else key, []).extend(lines)
    return ", ".join(f"{key} ({_lines_text(sorted(lines))})" for key, lines in joined.items())


def with_open_rows_even(raw: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """
    `raw` with those rows of its class map that hold `Unfilled` as an even share of all student classes, and their names.

    Where all of `class_map` is to be filled in, every class that the one `teacher` answers in gets such a row. Anything that
    does not have the form of a config is left as it is.
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
