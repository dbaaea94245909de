"""YAML with a comment for each key, written from plain values, which it is read back to."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

COLUMNS = 110  # of a comment


@dataclass(frozen=True)
class Item:
    """An entry of a list, or a value, with a comment beside it."""

    value: Any
    why: str = ""


@dataclass(frozen=True)
class Key:
    """A key with a comment above it. Its value is plain, a list of `Item`, or for a section a list of `Key`."""

    name: str
    value: Any
    why: str = ""


def as_plain(value: Any) -> Any:
    """The plain nested values of `Key` and `Item`, as `as_yaml` writes them."""
    if isinstance(value, Item):
        return value.value
    if isinstance(value, list) and value and isinstance(value[0], Key):
        return {key.name: as_plain(key.value) for key in value}
    if isinstance(value, list):
        return [as_plain(part) for part in value]
    return value


def as_yaml(keys: Sequence[Key], indent: int = 0) -> str:
    """The keys as YAML in their order, each below its comment."""
    margin = " " * indent
    lines: list[str] = []
    for key in keys:
        lines += comment(key.why, indent)
        name = f"{margin}{_flow(key.name)}:"
        if isinstance(key.value, list) and key.value and isinstance(key.value[0], Key):
            lines += [name, as_yaml(key.value, indent + 2).rstrip("\n")]
        elif isinstance(key.value, list) and key.value and isinstance(key.value[0], Item):
            lines.append(name)
            lines += [f"{margin}  - {_beside(item)}" for item in key.value]
        else:
            lines.append(f"{name} {_beside(key.value if isinstance(key.value, Item) else Item(key.value))}")
    return "\n".join(lines) + "\n"


def comment(text: str, indent: int = 0) -> list[str]:
    """The text as lines of a comment, wrapped; line breaks are kept."""
    margin = f"{' ' * indent}# "
    width = max(COLUMNS - indent, 40)
    return [
        wrapped
        for line in text.splitlines()
        for wrapped in textwrap.wrap(
            _printable(line),
            width,
            initial_indent=margin,
            subsequent_indent=margin,
            break_long_words=False,
            break_on_hyphens=False,
        )
    ]


def _beside(item: Item) -> str:
    text = _flow(item.value)
    return f"{text}  # {_printable(item.why)}" if item.why else text


def _flow(value: Any) -> str:
    """A plain value on one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**9)
    return text.removesuffix("\n").removesuffix("...").rstrip("\n")


def _printable(text: str) -> str:
    """The text without line breaks, which names of files may contain and which would end a comment."""
    return "".join(character if character.isprintable() else "?" for character in text)
