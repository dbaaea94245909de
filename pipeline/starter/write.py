"""`kdpipe init`: survey tiles, inspect a teacher, and write a first config for them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kdpipe.configs.errors import ConfigError
from kdpipe.configs.files import make_folder, write_file
from kdpipe.configs.load import unfilled_in
from kdpipe.configs.outputs import output_path
from kdpipe.data.survey import Root, find_roots, list_root, survey_root, survey_steps
from kdpipe.pipeline.inspection.checkpoint import Inspection, inspect_checkpoint
from kdpipe.pipeline.inspection.external import External, inspect_external, is_external
from kdpipe.pipeline.progress import Progress, Silent
from kdpipe.pipeline.starter.draft import Draft, draft_config
from kdpipe.pipeline.starter.given import Given
from kdpipe.pipeline.starter.layouts import Layout, affix_keys, paired, recognise, with_lists


@dataclass(frozen=True)
class FirstConfig:
    """The written config and its sources; `unfilled` are the keys left to the user, with their lines."""

    path: str
    roots: list[Root]
    teacher: Inspection | External | None
    draft: Draft
    unfilled: dict[str, list[int]]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "config": self.path,
            "unfilled": self.unfilled,
            "problems": self.draft.problems,
            "notes": self.draft.notes,
            "roots": [{"role": self.draft.roles[root.path], **_plain(root)} for root in self.roots],
            "teacher": _teacher_dict(self.teacher),
        }


def write_first_config(
    folders: Sequence[str],
    teacher: str | None,
    out: str,
    given: Given,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> FirstConfig:
    """
    Write a config to `out` for the tiles in `folders` and in `given.val` and for the teacher in the file or folder `teacher`.

    Raises `ConfigError` if `out` exists and `overwrite` is false, or if an option contradicts the files; `DataError` if there are no
    tiles or none can be read; `CheckpointError` if the file does not hold a teacher's weights. Nothing is written then.
    """
    progress = progress or Silent()
    file = output_path(out, "--out")
    if file.is_dir():
        raise ConfigError(f"--out {out} is a folder: name the config to write in it, such as {Path(out) / 'mine.yaml'}")
    if file.exists() and not overwrite:
        raise ConfigError(f"{out} exists already: --overwrite replaces it, --out NAME.yaml writes another")
    given = _laid_out(folders, given)
    assert given.layout is not None
    # Each root once, however its path is written: --val may name a folder that `folders` contain too.
    once = {Path(path).resolve(): path for path in reversed([*given.val, *given.layout.roots])}
    roots = [_listed(path, given.layout) for path in sorted(once.values())]
    inspection = (
        None if teacher is None else inspect_external(teacher) if is_external(teacher) else inspect_checkpoint(teacher)
    )
    with progress.bar("tiles", sum(survey_steps(root, given.limit) for root in roots), "files") as advance:
        for root in roots:
            survey_root(root, advance, given.codes, given.limit)
    draft = draft_config(roots, inspection, given)
    unfilled = unfilled_in(draft.text, out)
    make_folder(file.parent)
    write_file(file, draft.text)
    return FirstConfig(out, roots, inspection, draft, unfilled)


def _laid_out(folders: Sequence[str], given: Given) -> Given:
    """The options with the roots of `folders` and of `--val`, and with the layout that their names show."""
    by_default = (given.images, given.masks) == ("images", "masks")
    found = recognise(folders) if by_default and not _is_own_layout(folders, given) else None
    if found is None:
        roots = [path for folder in folders for path in find_roots(folder, given.images, given.masks)]
        found = paired(Layout(roots, given.images, given.masks))
    found = with_lists(found, folders)
    val = [path for folder in given.val for path in find_roots(folder, found.images, found.masks)]
    return replace(given, val=val, images=found.images, masks=found.masks, layout=found)


def _is_own_layout(folders: Sequence[str], given: Given) -> bool:
    """Whether each folder holds masks where kdpipe looks for them, itself or in a folder of it."""
    return all(
        (Path(folder) / given.masks).is_dir() or any(path.is_dir() for path in Path(folder).glob(f"*/{given.masks}"))
        for folder in folders
    )


def _listed(path: str, layout: Layout) -> Root:
    return list_root(path, layout.images, layout.masks, **affix_keys(layout), nested=layout.nested)


def _teacher_dict(teacher: Inspection | External | None) -> dict[str, Any] | None:
    """The network of the teacher for JSON."""
    if teacher is None:
        return None
    return asdict(teacher if isinstance(teacher, External) else teacher.network)


def _plain(root: Root) -> dict[str, Any]:
    """A root's counts for JSON; sizes as `[height, width, count]`."""
    return {
        "path": root.path,
        "tiles": len(root.tiles),
        "masks": root.masks,
        "headers_read": root.headers,
        "sizes": [[*size, count] for size, count in sorted(Counter(root.sizes_HW).items())],
        "bands": dict(root.bands),
        "dtypes": dict(root.dtypes),
        "images_read": root.images_read,
        "ranges": root.ranges,
        "pixels": root.pixels,
        "pixels_without_data": root.pixels_without_data,
        "masks_read": root.masks_read,
        "mask_values": dict(sorted(root.values.items())),
        "problems": root.problems,
    }


def run_name(out: str) -> str:
    """The run's name from the config's file name, with anything but letters, digits and `._-` replaced by `-`."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(out).stem).strip("-._") or "student"
