from pathlib import Path

import pytest
from helpers.recognised_teacher import finished_cache, teacher_file  # noqa: F401 (fixtures)

from kdpipe.pipeline.inspection.checkpoint import Inspection, inspect_checkpoint
from kdpipe.pipeline.starter import write

INSPECTED: dict[Path, Inspection] = {}


def inspect_once(path: str) -> Inspection:
    """`inspect_checkpoint`, once for each file: recognising a network takes seconds."""
    file = Path(path).resolve()
    if file not in INSPECTED:
        INSPECTED[file] = inspect_checkpoint(path)
    return INSPECTED[file]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Configs are written into `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(write, "inspect_checkpoint", inspect_once)
