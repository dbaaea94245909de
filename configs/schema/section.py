"""The base of every section."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A mapping of the YAML file. The text under a key describes it in the docs and in editors."""

    model_config = ConfigDict(
        hide_input_in_errors=True,  # in tracebacks: a URL may hold a password
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )


def is_none(value: object) -> bool:
    """Whether a value is None; `exclude_if` of keys that are stored only where they are set."""
    return value is None


def refuse_repeats(values: list[Any], key: str) -> None:
    """Raise `ValueError` naming `key` if a value occurs twice."""
    repeated = sorted({value for value in values if values.count(value) > 1})
    if repeated:
        raise ValueError(f"{key} names {repeated} more than once")
