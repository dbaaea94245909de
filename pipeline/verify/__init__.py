"""The gate between the stages: proof that the cache is complete, fresh, and equal to what the teacher predicts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdpipe.pipeline.verify.gate import verify

__all__ = ["verify"]


def __getattr__(name: str) -> Any:
    """Import `verify` on first use, so that the rest of this package can be imported without torch."""
    if name != "verify":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kdpipe.pipeline.verify.gate import verify

    return verify
