"""Consent to run the code that a checkpoint names, which `--trust-code` gives for one command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from kdpipe.configs.errors import CheckpointError

_TRUSTED: ContextVar[bool] = ContextVar("trusted", default=False)


@contextmanager
def trusting_code() -> Iterator[None]:
    """A block in which modules that checkpoints name, as `student.model` and `teacher.model`, are imported."""
    token = _TRUSTED.set(True)
    try:
        yield
    finally:
        _TRUSTED.reset(token)


def require_trust(module: str, path: str | Path) -> None:
    """Raise `CheckpointError` for a module that the checkpoint at `path` names, outside of `trusting_code`."""
    if not _TRUSTED.get():
        raise CheckpointError(
            f"{path} needs the network {module}, code that is not part of kdpipe. A checkpoint may come from anyone, so a module that it "
            "names is not imported unasked: if you know where the file came from, and what the module does, add --trust-code"
        )
