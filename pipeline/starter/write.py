"""`kdpipe init`: look at tiles and a teacher, and write a first config for them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kdpipe.configs.errors import ConfigError
from kdpipe.configs.load import unfilled_in
from kdpipe.configs.outputs import output_path
from kdpipe.data.survey import Root, find_roots, list_root, looked_at, survey_root
from kdpipe.pipeline.inspection.checkpoint import Inspection, inspect_checkpoint
from kdpipe.pipeline.progress import Progress, Silent
from kdpipe.pipeline.starter.draft import Draft, Said, draft_config


@dataclass(frozen=True)
class FirstConfig:
    """What was looked at and written; `unfilled` are the keys that the user is asked for, with their lines."""

    path: str
    roots: list[Root]
    teacher: Inspection | None
    draft: Draft
    unfilled: dict[str, list[int]]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "config": self.path,
            "unfilled": self.unfilled,
            "problems": self.draft.problems,
            "notes": self.draft.notes,
            "roots": [{"role": self.draft.roles[root.path], **root.as_dict()} for root in self.roots],
            "teacher": asdict(self.teacher.network) if self.teacher else None,
        }


def write_first_config(
    folders: Sequence[str],
    teacher: str | None,
    out: str,
    said: Said,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> FirstConfig:
    """
    Look at the tiles in `folders` and in `said.val` and at the file `teacher`, and write a config to `out`.

    Raises `ConfigError` where `out` exists and is not to be replaced, or what was said contradicts what was found; `DataError` where
    there are no tiles or none can be read; `CheckpointError` where the file is not a teacher's weights. Nothing is written then.
    """
    progress = progress or Silent()
    file = output_path(out, "--out")
    if file.is_dir():
        raise ConfigError(f"--out {out} is a folder: name the config to write in it, such as {Path(out) / 'mine.yaml'}")
    if file.exists() and not overwrite:
        raise ConfigError(f"{out} exists already: --overwrite replaces it, --out NAME.yaml writes another")
    val = [path for folder in said.val for path in find_roots(folder, said.images, said.masks)]
    train = [path for folder in folders for path in find_roots(folder, said.images, said.masks)]
    said = replace(said, val=val)
    # Each once, however it is written: Val is in a folder that holds Train and Val, and may be named by --val too.
    once = {Path(path).resolve(): path for path in reversed([*val, *train])}
    roots = [list_root(path, said.images, said.masks) for path in sorted(once.values())]
    inspection = inspect_checkpoint(teacher) if teacher is not None else None
    with progress.bar("tiles", sum(map(looked_at, roots)), "files") as advance:
        for root in roots:
            survey_root(root, advance)
    draft = draft_config(roots, inspection, said)
    unfilled = unfilled_in(draft.text, out)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(draft.text, encoding="utf-8")
    except OSError as err:
        raise ConfigError(f"--out {out} cannot be written: {err.strerror}") from err
    return FirstConfig(out, roots, inspection, draft, unfilled)


def run_name(out: str) -> str:
    """A name for the run from the config's file name: what is neither letter, digit nor `._-` becomes `-`."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", Path(out).stem).strip("-._") or "student"
