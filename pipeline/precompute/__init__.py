"""Stage one: the teacher predicts every training tile once, and the cache stores the soft targets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdpipe.pipeline.precompute.run import precompute

__all__ = ["precompute"]


def __getattr__(name: str) -> Any:
    """`precompute` itself is imported when it is first used, so that the rest of this package can be imported without torch."""
    if name != "precompute":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kdpipe.pipeline.precompute.run import precompute

    return precompute
