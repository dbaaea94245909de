"""What may differ between a run and the configuration that it is resumed with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Keys that may differ when a run is resumed: they change how long it trains or where its data lie, not what is computed.
RESUMABLE_KEYS = (
    "train.epochs",
    "train.max_steps",
    "train.workers",
    "train.effective_batch_size",  # the product of two keys that must not differ
    "train.val_batch_size",
    "train.checkpoint_every_steps",
    "cache.path",
)


def changed_keys(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """`key: was a, is b` for every dotted key in which two resolved configurations differ, `RESUMABLE_KEYS` excepted."""
    before, after = flat_keys(recorded), flat_keys(current)
    return [
        f"{key}: was {before.get(key)!r}, is {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if key not in RESUMABLE_KEYS and before.get(key) != after.get(key)
    ]


def flat_keys(content: Any, prefix: str = "") -> dict[str, Any]:
    """A nested mapping flattened to dotted keys: `{"train": {"lr": 1}}` becomes `{"train.lr": 1}`."""
    if not isinstance(content, Mapping) or not content:
        return {prefix: content}
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= flat_keys(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
