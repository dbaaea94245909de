"""
Listing tiles: images and masks paired by stem, each with the id of its soft target in the cache.

Only names are read; the content of files is read in `rasters.py`.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, TypeVar

from kdpipe.configs import schema
from kdpipe.configs.errors import DataError
from kdpipe.configs.node_names import why_unstorable
from kdpipe.configs.schema.affixes import NO_AFFIXES, Affixes

EXTENSIONS = (".png", ".jpg", ".jpeg", ".tif", ".tiff")

_SHOWN_NAMES = 3
SplitKey = Literal["train", "val", "unlabelled"]
Item = TypeVar("Item")


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
    other configured roots; adding a root can thus change ids. With `data.limit`, some of the tiles (see `limited`): to train on, the
    same ones whether or not `labelled_only`; to validate on, tiles with a mask where there are any.

    Raises `DataError` for a missing folder, a folder without images, a folder configured twice (in train and val: a leak), an image
    without a mask or a mask without an image, two files with one stem, and names that the cache cannot store.
    """
    names = _root_names(data)
    without_unlabelled = split == "val" or (labelled_only and data.limit is None)
    keys: list[SplitKey] = [split] if without_unlabelled else ["train", "unlabelled"]
    tiles = [tile for key in keys for tile in _tiles_of(key, data, names)]
    _refuse_repeated(tiles)
    if split == "val":
        _refuse_leak(tiles, data, names)
    taken = _groups(names.values()) | (_groups(tile.id.rpartition("/")[0] for tile in tiles) if data.nested else set())
    for tile in tiles:
        if tile.id in taken:
            raise DataError(
                f"the tile {tile.image} would have the id {tile.id}, which is also the name of a "
                f"{'folder' if data.nested else 'root'}: rename one of them"
            )
    if split == "val":
        tiles = limited([tile for tile in tiles if tile.mask is not None] or tiles, data.limit)
    else:
        tiles = limited(tiles, data.limit)
    return [tile for tile in tiles if tile.mask is not None or not labelled_only]


def limited(items: Sequence[Item], limit: int | None) -> list[Item]:
    """
    At most `limit` of the items, spread evenly, in their order; all of them for None.

    Those of a smaller limit are among those of a larger one: places are taken by their binary digits in reverse, 0, 1/2, 1/4, 3/4, 1/8, …
    """
    if limit is None or limit >= len(items):
        return list(items)
    digits = (len(items) - 1).bit_length()
    reversed_digits = (int(f"{number:0{digits}b}"[::-1], 2) for number in range(2**digits))
    chosen = islice((place for place in reversed_digits if place < len(items)), limit)
    return [items[place] for place in sorted(chosen)]


def without_limit(data: schema.Data) -> schema.Data:
    """The same section without `limit`: what is computed for some tiles must be what it would be for all of them."""
    return data.model_copy(update={"limit": None})


def _listed(tiles: Sequence[Tile], roots: Iterable[str], data: schema.Data, key: SplitKey) -> list[Tile]:
    """
    The tiles that the list of a split names, in the order of the tiles; all of them without a list.

    A line is the name of a tile within its root, its id, or the path of its image or the end of it. Raises `DataError` for a line that
    names no tile.
    """
    path = getattr(data.split, key) if data.split is not None else None
    if path is None or not getattr(data, key):
        return list(tiles)
    try:
        wanted = set(read_names(Path(path)))
    except DataError as err:
        raise DataError(f"data.split.{key}: {err}") from err
    depth = max(name.count("/") for name in wanted) + 1
    prefixes = sorted((f"{root}/" for root in roots), key=len, reverse=True)
    chosen, met = [], set()
    for tile in tiles:
        within = next((tile.id.removeprefix(prefix) for prefix in prefixes if tile.id.startswith(prefix)), tile.id)
        ending = tile.image.suffix
        called = {tile.id, within, tile.id + ending, within + ending, *_ends(tile.image, depth)} & wanted
        if called:
            chosen.append(tile)
            met |= called
    missing = sorted(wanted - met)
    if missing:
        shown = f"{', '.join(missing[:_SHOWN_NAMES])}{', …' if len(missing) > _SHOWN_NAMES else ''}"
        few = "the one name" if len(wanted) == 1 else f"{len(missing)} of the {len(wanted)} names"
        raise DataError(
            f"data.split.{key}: {few} in {path} {'is' if len(missing) == 1 else 'are'} no tile of data.{key} ({shown}): expected one name "
            f"a line, such as {tiles[0].id.rpartition('/')[2] if tiles else 'tile_001'}, or the path of its image"
        )
    return chosen


def read_names(path: Path) -> list[str]:
    """
    The lines of a list of tiles, without empty ones and those that begin with `#`; a byte order mark does not count.

    Raises `DataError` where the file cannot be read or holds no line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as err:
        reason = "it is no text in UTF-8" if isinstance(err, UnicodeDecodeError) else err.strerror
        raise DataError(
            f"cannot read {path.absolute()}: {reason}; expected a text file with a name of a tile on each line"
        ) from err
    names = [unicodedata.normalize("NFC", line.strip()).removeprefix("./").replace("\\", "/") for line in lines]
    found = [name for name in names if name and not name.startswith("#")]
    if not found:
        raise DataError(f"{path} names no tile")
    return found


def _ends(image: Path, depth: int) -> Iterator[str]:
    """The path of an image from its last `depth` names on, and shorter ends of it, each with and without the file's ending."""
    parts = [unicodedata.normalize("NFC", part) for part in image.parts]
    for start in range(max(0, len(parts) - depth), len(parts)):
        path = "/".join(parts[start:]).replace("//", "/")
        yield path
        yield path.removesuffix(image.suffix)


def _tiles_of(key: SplitKey, data: schema.Data, names: dict[Path, str]) -> list[Tile]:
    """The tiles of a key's roots that its list names; `names` are those of all roots."""
    found: list[Tile] = []
    for root in getattr(data, key):
        folder = Path(root).resolve()
        found += _tiles_of_root(folder, names[folder], data, labelled=key != "unlabelled")
    return _listed(found, names.values(), data, key)


def _refuse_leak(val: Sequence[Tile], data: schema.Data, names: dict[Path, str]) -> None:
    """Raise `DataError` for tiles that the lists of `data.split` name to train on and to validate on."""
    keys: list[SplitKey] = ["train", "unlabelled"]
    roots = {key: {Path(root).resolve() for root in getattr(data, key)} for key in (*keys, "val")}
    trained = {tile.id for key in keys if roots[key] & roots["val"] for tile in _tiles_of(key, data, names)}
    both = [tile.id for tile in val if tile.id in trained]
    if both:
        raise DataError(
            f"the lists of data.split name {_few(both, 'tile')} for training and for validation: scores on training tiles mean nothing; "
            "leave each of them in one list"
        )


def _refuse_repeated(tiles: Sequence[Tile]) -> None:
    """Raise `DataError` for a tile that two splits with lists take from one root."""
    seen: set[str] = set()
    for tile in tiles:
        if tile.id in seen:
            raise DataError(
                f"the lists of data.split name the tile {tile.id} more than once: leave it out of one of them"
            )
        seen.add(tile.id)


def has_star(root: str | Path) -> bool:
    """Whether a `*` in a root stands for the folder's name: it does unless a folder is really called so."""
    return "*" in str(root) and not Path(root).is_dir()


def folders_of(root: str | Path, data: schema.Data) -> tuple[Path, Path]:
    """The folders of images and of masks of a root, which need not exist."""
    if has_star(root):
        images, masks = (Path(str(root).replace("*", name)) for name in (data.images, data.masks))
        return images, masks
    return Path(root) / data.images, Path(root) / data.masks


def _tiles_of_root(root: Path, name: str, data: schema.Data, labelled: bool) -> list[Tile]:
    image_dir, mask_dir = folders_of(root, data)
    if not has_star(root) and not root.is_dir():
        raise DataError(f"there is no folder {root}, which data names as a root of tiles")
    if not image_dir.is_dir():
        raise DataError(f"there is no folder {image_dir}: a root holds its images in {data.images!r} (data.images)")
    images = _files_by_stem(image_dir, data.image_affixes, nested=data.nested)
    if not images:
        raise DataError(
            f"no images in {image_dir}: {contents_text(image_dir, data.images, data.image_affixes, 'image')}"
        )
    if not labelled:
        return [Tile(f"{name}/{stem}", images[stem], None) for stem in sorted(images)]
    if not mask_dir.is_dir() and not data.allow_missing_masks:
        raise DataError(
            f"there is no folder {mask_dir}: a labelled root holds its masks in {data.masks!r} (data.masks); list a root "
            "without masks under data.unlabelled"
        )
    masks = _files_by_stem(mask_dir, data.mask_affixes, nested=data.nested) if mask_dir.is_dir() else {}
    if (
        any(data.mask_affixes)
        and not masks
        and mask_dir.is_dir()
        and any(_is_image(entry.name) for entry in mask_dir.iterdir())
    ):
        raise DataError(f"no masks in {mask_dir}: {contents_text(mask_dir, data.masks, data.mask_affixes, 'mask')}")
    if image_dir == mask_dir:
        images, masks = _parted(images, masks, data)
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


def _parted(
    images: dict[str, Path], masks: dict[str, Path], data: schema.Data
) -> tuple[dict[str, Path], dict[str, Path]]:
    """Images and masks of one folder, without the files that the longer affixes give to the others: `a` and `a_mask`."""
    if len(data.mask_affixes.around("")) > len(data.image_affixes.around("")):
        taken = set(masks.values())
        return {stem: path for stem, path in images.items() if path not in taken}, masks
    taken = set(images.values())
    return images, {stem: path for stem, path in masks.items() if path not in taken}


def contents_text(folder: Path, images: str, affixes: Affixes = NO_AFFIXES, kind: str = "") -> str:
    """What a folder without images (or masks) holds instead, and what to do, for an error; `kind` names the keys of the `affixes`."""
    there = sorted(entry.name for entry in folder.iterdir() if _is_image(entry.name)) if any(affixes) else []
    if there:
        before, after = map(len, affixes)
        ends = {
            (stem[:before], stem[max(0, len(stem) - after) :]): name
            for name in reversed(there)
            for stem in (Path(name).stem,)
        }
        shown = ", ".join(sorted(ends.values())[:_SHOWN_NAMES])  # one for each beginning and ending
        keys = " and ".join(f"data.{kind}_{name}" for name, affix in affixes._asdict().items() if affix)
        return f"none has a stem that {affixes.text()}, {keys}; there are such as {shown}"
    inner = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    nested = [name for name in inner if any(_is_image(entry.name) for entry in (folder / name).iterdir())]
    if nested:
        names = ", ".join(nested[:_SHOWN_NAMES]) + (", …" if len(nested) > _SHOWN_NAMES else "")
        return (
            f"the images are one folder deeper, in {names}; tiles are taken from the folder itself, so set data.nested: true, move them "
            f"up, or make each a root with {images}/ of its own"
        )
    if not any(folder.iterdir()):
        return f"the folder is empty; expected files that end in {', '.join(EXTENSIONS)}"
    return f"expected files that end in {', '.join(EXTENSIONS)}"


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS  # noqa: PTH122 - as below


def _files_by_stem(folder: Path, affixes: Affixes, *, nested: bool, within: str = "") -> dict[str, Path]:
    """
    Image files by stem without its `affixes`, without hidden files, other types and folders. A dead link counts, and fails when it is read.

    With `nested`, files in folders below too, by their path `within` the first; links to folders are not followed.

    Stems are in the composed form of Unicode (NFC): macOS and some archives write `ü` as two characters, so that an image and its mask
    may differ in nothing that is seen.
    """
    files: dict[str, Path] = {}
    folders: list[str] = []
    names: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith("."):
                (folders if _is_folder(entry) else names).append(entry.name)
    for name in sorted(folders) if nested else ():
        if not (folder / name).is_symlink():
            _require_storable(name, folder / name)
            files |= _files_by_stem(folder / name, affixes, nested=True, within=f"{within}{name}/")
    for name in sorted(names):
        stem, extension = os.path.splitext(name)  # noqa: PTH122 - for a million names, a Path each would cost ten times as much
        if extension.lower() not in EXTENSIONS:
            continue
        inner = affixes.within(stem)
        if inner is None:
            continue
        path = folder / name
        inner = unicodedata.normalize("NFC", inner)
        _require_storable(inner, path)
        stem = within + inner
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
            listed = (
                data.split is not None and getattr(data.split, key) and getattr(data.split, key_of.get(folder, key))
            )
            if folder in key_of and (not listed or key_of[folder] == key):
                keys = f"data.{key_of[folder]} and data.{key}" if key_of[folder] != key else f"data.{key}, twice"
                leak = "; scores on training tiles mean nothing" if "val" in {key, key_of[folder]} else ""
                raise DataError(f"the folder {folder} is in {keys}{leak}: list it once")
            key_of[folder] = key
    names: dict[Path, str] = {}
    for folder in key_of:
        parts = _named_parts(folder)
        if not parts:
            raise DataError(f"the root {folder} has no name: tiles need a folder to be named after")
        others = [_named_parts(other) for other in key_of if other != folder]
        length = 1
        while any(other[-length:] == parts[-length:] for other in others):
            length += 1
        for part in parts[-length:]:
            _require_storable(part, folder)
        names[folder] = "/".join(parts[-length:])
    return names


def _named_parts(root: Path) -> tuple[str, ...]:
    """The parts of a root's path that may name it: without the one that stands for the folders of images and masks."""
    if not has_star(root):
        return root.parts[1:]
    return tuple(part.replace("*", "") for part in root.parts[1:] if part != "*")


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
