"""Text of docstrings and terminals as Markdown."""

import re


def plain(text: str) -> str:
    """Text of a terminal as Markdown that shows the same: on one line, options as code, markup escaped."""
    parts = re.split(r"(`[^`]+`)", " ".join(text.split()))
    return "".join(part if part.startswith("`") else _escaped(part) for part in parts)


def _escaped(text: str) -> str:
    return re.sub(r"(?<![\w-])(--[a-z][a-z-]*(?: [\w.]+=[\w.]*\w)?)", r"`\1`", re.sub(r"([*<>\[\]])", r"\\\1", text))


def cell(text: str) -> str:
    """`plain` text for a cell of a table."""
    return in_cell(plain(text))


def in_cell(text: str) -> str:
    """Markdown for a cell of a table, where a bar would end it."""
    return text.replace("|", r"\|")
