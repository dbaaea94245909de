"""The names that a tile or a folder of tiles may have: valid for a Zarr v3 node, and as a file name on any system."""

from __future__ import annotations

import unicodedata


def why_unstorable(part: str) -> str | None:
    """
    The reason why `part` cannot be a part of a tile's id, or None if it can.

    https://zarr-specs.readthedocs.io/en/latest/v3/core/index.html#node-names: not only periods, no leading "__", no "/".
    """
    if not part.strip("."):
        return "consists of periods"
    if part.startswith("__"):
        return 'starts with "__", which Zarr reserves'
    if part == "zarr.json":
        return "is Zarr's own name for metadata"
    # `isprintable` also rejects other characters, such as a soft hyphen. It comes first because a million names are checked.
    if "\\" in part or (
        not part.isprintable() and any(unicodedata.category(character) in {"Cc", "Cs"} for character in part)
    ):
        return "holds a backslash, a control character or bytes that are not UTF-8"
    return None
