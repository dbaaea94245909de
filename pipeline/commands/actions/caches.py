"""`pack` and `unpack`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from kdpipe.cache.packing.pack import pack
from kdpipe.cache.packing.unpack import unpack
from kdpipe.configs.errors import count_text
from kdpipe.pipeline.commands.console import Terminal, write_json
from kdpipe.pipeline.text import file_text, size_text


def pack_cache(cache: str, out: str, *, most_bytes: int | None, overwrite: bool, json_path: str | None) -> None:
    """Write a cache as one file or several, and report them."""
    terminal = Terminal()
    packed = pack(
        cache, out, most_bytes=most_bytes, overwrite=overwrite, bar=lambda total: terminal.bar("pack", total, "tiles")
    )
    write_json(json_path, asdict(packed))
    for file, tiles in zip(packed.files, packed.tiles, strict=True):
        terminal.show(file_text(count_text(tiles, "tiles"), file))
    if packed.kept_bytes:
        terminal.show(f"an earlier run had written {size_text(packed.kept_bytes)} of it")


def unpack_cache(packs: Sequence[str], out: str, *, json_path: str | None) -> None:
    """Write the cache of packs as a folder, and report it."""
    terminal = Terminal()
    unpacked = unpack(packs, out, bar=lambda total: terminal.bar("unpack", total, "tiles"))
    write_json(json_path, asdict(unpacked))
    part = f" of {unpacked.partial_of}" if unpacked.partial_of else ""
    terminal.show(f"{count_text(unpacked.tiles, 'tiles')}{part} in {unpacked.cache}")
    if unpacked.kept:
        terminal.show(f"{count_text(unpacked.kept, 'tiles')} were there already")
    if unpacked.partial_of:
        terminal.show("It is a part of a cache: give all its packs at once to have the whole.")
