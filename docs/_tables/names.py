"""Public names as a Markdown table: each with the first sentence of its docstring."""

import importlib
import inspect
import re
from typing import Any

from _tables.markdown import cell


def section(given: str) -> str:
    """A table of the names that the page lists in its comment."""
    rows = [f"| `{name}` | {cell(_summary(found(name)))} |" for name in given.split()]
    return "\n".join(["| name | what it is |", "| --- | --- |", *rows])


def found(name: str) -> Any:
    """The object that a dotted name stands for."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def _summary(named: Any) -> str:
    paragraph = " ".join((inspect.getdoc(named) or "").split("\n\n")[0].split())
    return re.split(r"(?<=\.) (?=[A-Z`])", paragraph)[0].removesuffix(".")
