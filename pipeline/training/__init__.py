"""Stage two: the student is trained from the cache, with the live teacher, or without one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdpipe.pipeline.training.run import train

__all__ = ["train"]


def __getattr__(name: str) -> Any:
    """`train` itself is imported when it is first used, so that the rest of this package can be imported without torch."""
    if name != "train":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kdpipe.pipeline.training.run import train

    return train
