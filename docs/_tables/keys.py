"""The keys of the configuration as Markdown tables, from the schema."""

from __future__ import annotations

import inspect
import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from _tables.markdown import cell
from annotated_types import Ge, Gt, Le, Lt, MinLen, MultipleOf
from pydantic.fields import FieldInfo

from kdpipe.configs.schema import Config, Section

MOST_LISTED = 2  # a section with no more keys is named by them
END_OF_DOCUMENT = "...\n"  # PyYAML writes it after a bare value


def section(_given: str = "") -> str:
    """A heading and a table for each section, followed by the sections within it."""
    parts, seen = [], set()

    def add(key: str, kind: type[Section]) -> None:
        if kind in seen:
            return
        seen.add(kind)
        names = [f"`{name}`" for name in kind.model_fields]
        title = f"`{key}`" if len(names) > MOST_LISTED else f"`{key}` with {' and '.join(names)}"
        heading = title if key else "Top level"
        parts.append(f"## {heading}\n\n{inspect.cleandoc(kind.__doc__ or '')}\n\n{_table(kind)}")
        for name, field in kind.model_fields.items():
            for inner in _sections(field.annotation):
                add(f"{key}.{name}".strip("."), inner)

    add("", Config)
    return "\n\n".join(parts)


def _table(section: type[Section]) -> str:
    rows = [
        f"| `{name}` | {_type(field.annotation, field.metadata)} | {_default(field)} | {cell(field.description or '')} |"
        for name, field in section.model_fields.items()
    ]
    return "\n".join(["| key | type | default | meaning |", "| --- | --- | --- | --- |", *rows])


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, Section):
        return "see its keys"
    plain = list(value) if isinstance(value, tuple) else value
    return f"`{yaml.safe_dump(plain, default_flow_style=True).removesuffix(END_OF_DOCUMENT).strip()}`"


def _type(kind: Any, constraints: list[Any] = []) -> str:  # noqa: B006, only read
    """A type in words, with the allowed range."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _type(inner[0], [part for more in inner[1:] for part in getattr(more, "metadata", [more])])
    if origin in (Union, types.UnionType):
        return " or ".join(_type(part, constraints) for part in inner)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in inner)
    if origin is list or inner[1:] == (...,):
        least = next((f", {c.min_length} or more" for c in constraints if isinstance(c, MinLen)), "")
        return f"list of {_plural(_type(inner[0]))}{least}"
    if origin is tuple:
        return f"{len(inner)} {_plural(_type(inner[0]))}"
    if origin is dict:
        return "mapping" if get_origin(inner[1]) is not dict else "mapping of mappings"
    if kind is type(None):
        return "null"
    if isinstance(kind, type) and issubclass(kind, Section):
        keys = [f"`{key}`" for key in kind.model_fields]
        return f"mapping of {' and '.join(keys)}" if len(keys) <= MOST_LISTED else "section"
    names = {str: "text", int: "integer", float: "number", bool: "`true` or `false`"}
    return names[kind] + _range(constraints)


def _range(constraints: list[Any]) -> str:
    words = {
        Ge: ("≥", "ge"),
        Gt: (">", "gt"),
        Le: ("≤", "le"),
        Lt: ("<", "lt"),
        MultipleOf: ("multiple of", "multiple_of"),
    }
    found = [f"{words[type(c)][0]} {getattr(c, words[type(c)][1])}" for c in constraints if type(c) in words]
    return f" ({', '.join(found)})" if found else ""


def _plural(words: str) -> str:
    """`integer (≥ 0)` as `integers (≥ 0)`; text has no plural."""
    first, rest = words.partition(" ")[::2]
    return words if first in ("text", "mapping") or first[0].isdigit() else f"{first}s {rest}".strip()


def _sections(kind: Any) -> list[type[Section]]:
    if isinstance(kind, type) and issubclass(kind, Section):
        return [kind]
    return [section for part in get_args(kind) for section in _sections(part)]
