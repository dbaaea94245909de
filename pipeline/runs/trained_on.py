"""
The tiles of a run, in `tiles.jsonl.gz` in its folder: each tile's id with the size and time of its image and its mask.

A resumed run compares them with the tiles of today. A line is `["train", id, image bytes, image ns, mask bytes, mask ns]`; a missing
file has null.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kdpipe.configs.errors import summarise
from kdpipe.configs.files import make_folder, write_atomically
from kdpipe.data.tiles import Tile
from kdpipe.pipeline.runs.layout import TILES

THREADS = 16  # they wait for a file server, if at all
CHUNK = 1000  # tiles that a thread looks at in turn

State = tuple[int | None, int | None, int | None, int | None]  # size and time of the image, then of the mask


def note_tiles(splits: Mapping[str, Sequence[Tile]]) -> list[str]:
    """One line for each tile of `train` and of `val`, as the file holds it; no file is opened."""
    chunks = [
        (split, tiles[first : first + CHUNK])
        for split, tiles in splits.items()
        for first in range(0, len(tiles), CHUNK)
    ]
    with ThreadPoolExecutor(THREADS) as threads:
        return [line for lines in threads.map(lambda chunk: list(_lines(*chunk)), chunks) for line in lines]


def write_tiles(folder: Path, lines: Sequence[str]) -> None:
    """Write the tiles of a run into its folder, whole or not at all."""
    make_folder(folder)
    with write_atomically(folder / TILES) as file, gzip.GzipFile("", "wb", 1, file, mtime=0) as compressed:
        compressed.writelines(f"{line}\n".encode() for line in lines)


def changes_since(folder: Path, now: Sequence[str], *, images_are_known: bool) -> list[str]:
    """
    What has changed since the tiles in `folder` were written, as lines to say; none if nothing has, or if none were written.

    Args:
        folder: of the run.
        now: `note_tiles` of today.
        images_are_known: whether the training images are certainly the same, as the fingerprint of a cache says.
    """
    try:
        before = gzip.decompress((folder / TILES).read_bytes()).decode().splitlines()
        if before == now:
            return []
        if not before:
            raise EOFError
        found, today = _by_split(before), _by_split(now)
    except FileNotFoundError:  # an earlier version's run
        return []
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError):
        return [f"warning: {folder / TILES} is damaged, so it is not known whether the tiles have changed"]
    train = _differences(found["train"], today["train"], images_are_known=images_are_known)
    val = _differences(found["val"], today["val"], images_are_known=False)
    said = []
    if train:
        said.append(
            f"warning: since this run began, its training tiles have changed: {train}. The run goes on with the tiles as they are now, "
            "and does not reach the weights of an uninterrupted one unless their content is the same"
        )
    if val:
        said.append(
            f"warning: since this run began, its validation tiles have changed: {val}. Scores before and after cannot be compared "
            "unless their content is the same"
        )
    return said


def _lines(split: str, tiles: Sequence[Tile]) -> Iterator[str]:
    for tile in tiles:
        yield json.dumps([split, tile.id, *_state(tile.image), *_state(tile.mask)])


def _state(path: Path | None) -> tuple[int | None, int | None]:
    try:
        found = os.stat(path) if path is not None else None  # noqa: PTH116  a Path's own costs more, a million times
    except OSError:  # whoever reads it says why
        found = None
    return (found.st_size, found.st_mtime_ns) if found else (None, None)


def _by_split(lines: Sequence[str]) -> dict[str, dict[str, State]]:
    found: dict[str, dict[str, State]] = {"train": {}, "val": {}}
    for line in lines:
        split, tile, *(image_size, image_ns, mask_size, mask_ns) = json.loads(line)
        found[split][tile] = image_size, image_ns, mask_size, mask_ns
    return found


def _differences(before: dict[str, State], now: dict[str, State], *, images_are_known: bool) -> str:
    """`1 added (a), 2 with another mask (b, c)`; empty if there is no difference."""
    kinds: dict[str, list[str]] = {
        "added": [tile for tile in now if tile not in before],
        "removed": [tile for tile in before if tile not in now],
        "with another image": [],
        "with another mask": [],
        "with files of another time and the same size, as copies have": [],
    }
    for tile, state in now.items():
        if (known := before.get(tile)) is None or known == state:
            continue
        is_other_image = known[0] != state[0] and not images_are_known
        is_other_mask = known[2] != state[2]
        is_later = known[3] != state[3] or (known[1] != state[1] and not images_are_known)
        if is_other_image:
            kinds["with another image"].append(tile)
        if is_other_mask:
            kinds["with another mask"].append(tile)
        if is_later and not is_other_image and not is_other_mask:
            kinds["with files of another time and the same size, as copies have"].append(tile)
    return ", ".join(f"{len(tiles)} {kind} ({summarise(tiles, 3)})" for kind, tiles in kinds.items() if tiles)
