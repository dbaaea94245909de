"""Which names a tile, or a folder of tiles, may have: those of a Zarr v3 node that are files' names on any system."""

from __future__ import annotations

import unicodedata


def why_unstorable(part: str) -> str | None:
    """
    Why `part` cannot be one part of a tile's id, None where it can.

    https://zarr-specs.readthedocs.io/en/latest/v3/core/index.html#node-names: not only periods, no leading "__", no "/".
    """
    if not part.strip("."):
        return "consists of periods"
    if part.startswith("__"):
        return 'starts with "__", which Zarr reserves'
    if part == "zarr.json":
        return "is Zarr's own name for metadata"
    # `isprintable` alone says no to more, such as a soft hyphen; it is asked first since a million names are checked.
    if "\\" in part or (
        not part.isprintable() and any(unicodedata.category(character) in {"Cc", "Cs"} for character in part)
    ):
        return "holds a backslash, a control character or bytes that are not UTF-8"
    return None
