"""A table of colours: the class of each colour in masks, from a text file."""

from __future__ import annotations

import csv
from pathlib import Path

import yaml

from kdpipe.configs.errors import ConfigError
from kdpipe.configs.schema.labels import IGNORE

NO_LABEL = (
    IGNORE,
    "unlabelled",
    "unlabeled",
    "unknown",
    "void",
    "no data",
    "nodata",
)  # names of rows that are no class


def read_colours(path: str) -> dict[str, list[int]]:
    """
    The colours of a table, by class in its order; rows without a label are called `ignore`.

    Rows are `name,red,green,blue` (also separated by blanks, tabs or semicolons, and with a header, as in many data sets), or a YAML
    mapping `{name: [red, green, blue]}`. Raises `ConfigError` that names the line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as err:
        raise ConfigError(f"--colours: cannot read {path}: {err}") from err
    rows = _of_yaml(text) if Path(path).suffix in (".yaml", ".yml", ".json") else _of_lines(text)
    found: dict[str, list[int]] = {}
    for number, (name, values) in enumerate(rows, start=1):
        rgb = [value for value in values if isinstance(value, int) and 0 <= value <= 255]
        if len(rgb) != 3 or len(values) != 3:
            if number == 1 and not any(isinstance(value, int) for value in values):
                continue  # a header
            raise ConfigError(
                f"--colours {path}, row {number}: expected a name and red, green and blue of 0..255, found {name}: {values}"
            )
        key = IGNORE if name.casefold() in NO_LABEL else name
        if key in found:
            raise ConfigError(f"--colours {path}, row {number}: {name} has a colour already")
        found[key] = rgb
    if len(found.keys() - {IGNORE}) < 2:
        raise ConfigError(f"--colours {path} names fewer than two classes: expected rows such as Forest,34,139,34")
    return found


def _of_yaml(text: str) -> list[tuple[str, list[object]]]:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as err:
        raise ConfigError(f"--colours: not readable as YAML: {' '.join(str(err).split())}") from err
    if not isinstance(content, dict):
        return []
    return [(str(name), list(value) if isinstance(value, list) else [value]) for name, value in content.items()]


def _of_lines(text: str) -> list[tuple[str, list[object]]]:
    rows: list[tuple[str, list[object]]] = []
    for line in text.splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        separator = next((each for each in (",", ";", "\t") if each in line), None)
        cells = next(csv.reader([line], delimiter=separator)) if separator else line.rsplit(None, 3)
        name, *values = (cell.strip() for cell in cells)
        rows.append((name, [int(value) if value.isdecimal() else value for value in values[:3]]))
    return rows
