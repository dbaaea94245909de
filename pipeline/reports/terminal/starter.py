"""The survey of `kdpipe init` and the next commands, as tables and text."""

from __future__ import annotations

import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator

from rich.table import Table

from kdpipe.configs.errors import count_text
from kdpipe.configs.fill_in import FILL_IN, places_text
from kdpipe.data.survey import Root
from kdpipe.pipeline.starter.write import FirstConfig

SHOWN = 5  # kinds of problems; the others are in the JSON
FILE = re.compile(r"/.*?\.[A-Za-z]{3,4}\b")  # by which problems of one kind differ
SHOWN_VALUES = 12


def first_config_parts(found: FirstConfig) -> Iterator[Table | str]:
    """Tables and paragraphs, in the order in which they are printed."""
    parent = _common_parent(found.roots)
    table = Table(title=f"Tiles in {parent}" if parent else "Tiles", title_justify="left")
    for column in ("folder", "for", "tiles", "masks", "px", "bands", "type", "mask values, % of px"):
        table.add_column(column, justify="right" if column in ("tiles", "masks") else "left", overflow="fold")
    for root in found.roots:
        table.add_row(
            os.path.relpath(root.path, parent) if parent else root.path, found.draft.roles[root.path], str(len(root.tiles)),
            str(root.masks), _sizes_text(root), _keys_text(root.bands), _keys_text(root.dtypes), _values_text(root),
        )  # fmt: skip
    yield table
    partly = [
        f"{count_text(root.headers, 'headers')}, {count_text(root.images_read, 'images')} and {count_text(root.masks_read, 'masks')} of "
        f"{root.path}"
        for root in found.roots
        if root.images_tried < len(root.tiles) or root.masks_tried < root.masks
    ]
    if partly:
        yield f"Only a sample was read, evenly spread: {'; '.join(partly)}."
    if found.teacher:
        yield f"Teacher: {found.teacher.path} is {found.teacher.network}."
    for note in found.draft.notes:
        yield f"Note: {note}."
    kinds: dict[str, list[str]] = {}
    for problem in found.draft.problems:
        kinds.setdefault(FILE.sub("", problem), []).append(problem)
    for alike in list(kinds.values())[:SHOWN]:
        more = f" (and {count_text(len(alike) - 1, 'more files')}: --json FILE lists all)" if len(alike) > 1 else ""
        yield f"To fix: {alike[0]}{more}"
    if len(kinds) > SHOWN:
        yield f"To fix: {len(kinds) - SHOWN} more (--json FILE lists all)."
    yield from _next(found)


def _next(found: FirstConfig) -> Iterator[str]:
    config = shlex.quote(found.path)
    labelled = any(root.masks for root in found.roots if found.draft.roles[root.path] == "train")
    if not found.unfilled:
        yield f"Wrote {found.path}, which is complete. Next:\n"
    else:
        yield (
            f"Wrote {found.path}. No file holds the values of its {FILL_IN}: {places_text(found.unfilled)}. "
            f"Edit these lines{_options(found)}. Then:\n"
        )
    if labelled and any(key.startswith("class_map") for key in found.unfilled):
        yield f"    kdpipe suggest-map -c {config}                    # rows of class_map, from your labels"
    yield f"    kdpipe precompute-teacher -c {config} --dry-run   # what stage one will cost"
    yield f"    kdpipe precompute-teacher -c {config}"
    yield f"    kdpipe verify-cache -c {config} --level parity    # proves the cache; compares the class map with labels"
    yield f"    kdpipe train-student -c {config}"


def _options(found: FirstConfig) -> str:
    """The options that would fill in the missing keys, if there are any."""
    options = {
        "classes.names": "--classes A,B,…",
        "data.bands": "--bands 3,2,1",
        "teacher.checkpoint": "--teacher FILE",
        "teacher.classes": "--teacher-classes A,B,…",
        "teacher.normalize": "--teacher-normalize unit",
    }
    given = " ".join(option for key, option in options.items() if key in found.unfilled)
    return f", or run init again with {given} --overwrite" if given else ""


def _common_parent(roots: list[Root]) -> str:
    """The folder that holds all roots, to shorten their paths in the table; empty if there is none."""
    if len(roots) == 1:
        return os.path.dirname(roots[0].path)  # noqa: PTH120 - as written, without a `.` where there is none
    try:
        return os.path.commonpath([root.path for root in roots])
    except ValueError:  # absolute and relative ones
        return ""


def _sizes_text(root: Root) -> str:
    if not root.sizes_HW:
        return "unreadable"
    least, most = min(root.sizes_HW), max(root.sizes_HW)
    return f"{least[0]} x {least[1]}" + (f" to {most[0]} x {most[1]}" if most != least else "")


def _keys_text(counts: Counter[int] | Counter[str]) -> str:
    return ", ".join(str(key) for key in sorted(counts, key=str)) or "–"


def _values_text(root: Root) -> str:
    total = sum(root.values.values())
    if not total:
        return "–"
    shown = [f"{value}:{100 * root.values[value] / total:.1f}" for value in sorted(root.values)[:SHOWN_VALUES]]
    more = len(root.values) - SHOWN_VALUES
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")
