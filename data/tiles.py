"""
Listing tiles: images and masks paired by stem, each with the id of its soft target in the cache.

Only names are read; the content of files is read in `rasters.py`.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kdpipe.configs import schema
from kdpipe.configs.errors import DataError
from kdpipe.configs.node_names import why_unstorable

EXTENSIONS = (".png", ".jpg", ".jpeg", ".tif", ".tiff")

_SHOWN_NAMES = 3


@dataclass(frozen=True, slots=True)
class Tile:
    """One image, and its mask if it has one; `id` is `<root>/<stem>` and names the tile in the cache."""

    id: str
    image: Path
    mask: Path | None


def is_jpeg(path: Path) -> bool:
    """Whether the name of an image says that it is a JPEG; no file is opened, as there may be a million."""
    return path.suffix.lower() in (".jpg", ".jpeg")


def list_tiles(data: schema.Data, split: Literal["train", "val"], labelled_only: bool = False) -> list[Tile]:
    """
    The tiles of a split, by root in the order of the config, then by stem: the same list in every process.

    `train` is `data.train` and `data.unlabelled` (whose masks are ignored), `val` is `data.val`. `labelled_only` leaves out tiles
    without a mask. A root's name in the ids is that of its folder, or the shortest end of its path that distinguishes it from all
    other configured roots; adding a root can thus change ids.

    Raises `DataError` for a missing folder, a folder without images, a folder configured twice (in train and val: a leak), an image
    without a mask or a mask without an image, two files with one stem, and names that the cache cannot store.
    """
    names = _root_names(data)
    roots = [(root, True) for root in (data.train if split == "train" else data.val)]
    if split == "train" and not labelled_only:
        roots += [(root, False) for root in data.unlabelled]
    tiles: list[Tile] = []
    for root, labelled in roots:
        folder = Path(root).resolve()
        tiles += _tiles_of_root(folder, names[folder], data, labelled)
    taken = _groups(names.values())
    for tile in tiles:
        if tile.id in taken:
            raise DataError(
                f"the tile {tile.image} would have the id {tile.id}, which is also the name of a root: rename one of them"
            )
    return [tile for tile in tiles if tile.mask is not None or not labelled_only]


def _tiles_of_root(root: Path, name: str, data: schema.Data, labelled: bool) -> list[Tile]:
    if not root.is_dir():
        raise DataError(f"there is no folder {root}, which data names as a root of tiles")
    image_dir, mask_dir = root / data.images, root / data.masks
    if not image_dir.is_dir():
        raise DataError(f"there is no folder {image_dir}: a root holds its images in {data.images!r} (data.images)")
    images = _files_by_stem(image_dir)
    if not images:
        raise DataError(f"no images in {image_dir}: {contents_text(image_dir, data.images)}")
    if not labelled:
        return [Tile(f"{name}/{stem}", images[stem], None) for stem in sorted(images)]
    if not mask_dir.is_dir() and not data.allow_missing_masks:
        raise DataError(
            f"there is no folder {mask_dir}: a labelled root holds its masks in {data.masks!r} (data.masks); list a root "
            "without masks under data.unlabelled"
        )
    masks = _files_by_stem(mask_dir) if mask_dir.is_dir() else {}
    without_image = [masks[stem].name for stem in sorted(masks.keys() - images.keys())]
    if without_image:
        raise DataError(f"{_few(without_image, 'mask')} in {mask_dir} without an image of the same stem in {image_dir}")
    without_mask = [images[stem].name for stem in sorted(images.keys() - masks.keys())]
    if without_mask and not data.allow_missing_masks:
        raise DataError(
            f"{_few(without_mask, 'image')} in {image_dir} without a mask of the same stem in {mask_dir}: add it, or set "
            "data.allow_missing_masks: true"
        )
    return [Tile(f"{name}/{stem}", images[stem], masks.get(stem)) for stem in sorted(images)]


def contents_text(folder: Path, images: str) -> str:
    """What a folder without images holds instead, and what to do, for an error."""
    inner = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    nested = [name for name in inner if any(_is_image(entry.name) for entry in (folder / name).iterdir())]
    if nested:
        names = ", ".join(nested[:_SHOWN_NAMES]) + (", …" if len(nested) > _SHOWN_NAMES else "")
        return (
            f"the images are one folder deeper, in {names}; tiles are taken from the folder itself, so move them up, or make each a root "
            f"with {images}/ of its own"
        )
    if not any(folder.iterdir()):
        return f"the folder is empty; expected files that end in {', '.join(EXTENSIONS)}"
    return f"expected files that end in {', '.join(EXTENSIONS)}"


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS  # noqa: PTH122 - as below


def _files_by_stem(folder: Path) -> dict[str, Path]:
    """
    Image files by stem, without hidden files, other types and folders. A dead link counts, and fails when it is read.

    Stems are in the composed form of Unicode (NFC): macOS and some archives write `ü` as two characters, so that an image and its mask
    may differ in nothing that is seen.
    """
    files: dict[str, Path] = {}
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries if not e.name.startswith(".") and not _is_folder(e))
    for name in names:
        stem, extension = os.path.splitext(name)  # noqa: PTH122 - for a million names, a Path each would cost ten times as much
        if extension.lower() not in EXTENSIONS:
            continue
        path = folder / name
        stem = unicodedata.normalize("NFC", stem)
        _require_storable(stem, path)
        if stem in files:
            other = files[stem].name
            alike = unicodedata.normalize("NFC", other) == unicodedata.normalize("NFC", name)
            why = ", whose names differ by their Unicode form alone" if alike else ""
            raise DataError(f"two files with one stem in {folder}: {other} and {name}{why}; a stem must name one tile")
        files[stem] = path
    return files


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads back to itself, say: as a dead one, it fails when it is read
        return False


def _root_names(data: schema.Data) -> dict[Path, str]:
    """The name of each configured root, resolved: the shortest end of its path that no other root shares."""
    key_of: dict[Path, str] = {}
    for key in ("train", "val", "unlabelled"):
        for root in getattr(data, key):
            folder = Path(root).resolve()
            if folder in key_of:
                keys = f"data.{key_of[folder]} and data.{key}" if key_of[folder] != key else f"data.{key}, twice"
                leak = "; scores on training tiles mean nothing" if "val" in {key, key_of[folder]} else ""
                raise DataError(f"the folder {folder} is in {keys}{leak}: list it once")
            key_of[folder] = key
    names: dict[Path, str] = {}
    for folder in key_of:
        parts = folder.parts[1:]
        if not parts:
            raise DataError(f"the root {folder} has no name: tiles need a folder to be named after")
        others = [other.parts[1:] for other in key_of if other != folder]
        length = 1
        while any(other[-length:] == parts[-length:] for other in others):
            length += 1
        for part in parts[-length:]:
            _require_storable(part, folder)
        names[folder] = "/".join(parts[-length:])
    return names


def _groups(root_names: Iterable[str]) -> set[str]:
    """All ids that are groups in the cache: a tile with such an id would be array and group at once."""
    groups: set[str] = set()
    for name in root_names:
        parts = name.split("/")
        groups.update("/".join(parts[: i + 1]) for i in range(len(parts)))
    return groups


def _require_storable(part: str, path: Path) -> None:
    """Raise `DataError` unless `part` can be part of a tile's id in the cache."""
    why = why_unstorable(part)
    if why:
        raise DataError(f"the name {part!r} of {str(path)!r} {why}, and cannot name a tile in the cache: rename it")


def _few(names: list[str], noun: str) -> str:
    """`the image a.png`, or `5 images (a.png, b.png, c.png, …)`."""
    if len(names) == 1:
        return f"the {noun} {names[0]}"
    return f"{len(names)} {noun}s ({', '.join(names[:_SHOWN_NAMES])}{', …' if len(names) > _SHOWN_NAMES else ''})"
