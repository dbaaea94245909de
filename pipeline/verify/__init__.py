"""The gate between the stages: is the cache complete, fresh, and what the teacher would have said?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdpipe.pipeline.verify.gate import verify

__all__ = ["verify"]


def __getattr__(name: str) -> Any:
    """`verify` itself is imported when it is first used, so that the rest of this package can be imported without torch."""
    if name != "verify":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kdpipe.pipeline.verify.gate import verify

    return verify
