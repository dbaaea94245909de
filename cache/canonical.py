"""JSON of one form alone, so that equal content has equal bytes and an equal digest (see FORMAT.md, JSON)."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def canonical(content: Any) -> bytes:
    """What a file holds: sorted keys, a line for each member, ASCII."""
    return (json.dumps(content, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False) + "\n").encode()


def compact(content: Any) -> str:
    """What digests are taken of: sorted keys, no space, ASCII."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def digest_of(content: Any) -> str:
    """The sha256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(compact(content).encode()).hexdigest()
