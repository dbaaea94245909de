"""
Layouts of folders and names that data sets have, recognised by what is there: other folder names, affixes, nested folders, lists.

A folder of masks is told by its name, and its images lie in the folder whose path differs from it in one name. So this holds for layouts
that nobody has listed. Only names are looked at.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kdpipe.configs.errors import DataError, count_text
from kdpipe.configs.schema.affixes import NO_AFFIXES, Affixes
from kdpipe.data.tiles import EXTENSIONS, has_star, read_names
from kdpipe.pipeline.starter.affixes import IMAGE_NAME, MASK_NAME, SHARED_PART, Pairing, affixes_of, is_of_masks, shared

MOST_NAMES = 10_000  # of a folder that are looked at for affixes
SPLIT_NAME = re.compile(r"(?:.*[_\- ])?(?P<split>train|val|test)(?:ing|id|idation|ation)?[\d*]*", re.IGNORECASE)
CHANNEL = re.compile(r"_\d{4}")  # of nnU-Net: each band in a file of its own
LISTS = ("", "splits", "split", "lists", "ImageSets/Segmentation")


@dataclass(frozen=True)
class Layout:
    """
    Where the tiles lie: the roots, and the keys of `data` that say how.

    `source` says after what it was recognised; None for kdpipe's own layout or the user's options. `notes` are said, `problems` are to be
    fixed.
    """

    roots: list[str]
    images: str = "images"
    masks: str = "masks"
    image_affixes: Affixes = NO_AFFIXES
    mask_affixes: Affixes = NO_AFFIXES
    nested: bool = False
    train_list: str | None = None
    val_list: str | None = None
    source: str | None = None
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Folder:
    """A folder that holds image files: the names on its path below a folder of the user's, and the stems."""

    base: str
    parts: tuple[str, ...]
    stems: tuple[str, ...]


@dataclass(frozen=True)
class _Pair:
    """A folder of images and one of masks, whose paths differ in the name at `place`; both are one folder where that is None."""

    images: _Folder
    masks: _Folder
    place: int | None
    affixes: Pairing

    @property
    def names(self) -> tuple[str, str]:
        """The names in which the paths differ."""
        return (".", ".") if self.place is None else (self.images.parts[self.place], self.masks.parts[self.place])


def recognise(folders: Sequence[str]) -> Layout | None:
    """The layout of folders that are not laid out as kdpipe's own; None where no folder of masks is found beside its images."""
    held = [found for folder in folders for found in _folders_with_images(folder)]
    pairs = list(_pairs(held))
    if not pairs:
        return None
    affixes = Counter(pair.affixes for pair in pairs).most_common(1)[0][0]
    names = pairs[0].names
    parts = None
    if any(pair.names != names for pair in pairs):  # as of train and train_labels, val and val_labels
        parts = Counter(_differing(*pair.names)[1:3] for pair in pairs).most_common(1)[0][0]
        pairs = [pair for pair in pairs if _differing(*pair.names)[1:3] == parts]
    images, masks = parts or names
    by_split = any(_is_split_below(pair) for pair in pairs)
    found = dict.fromkeys(_root(pair.images, pair.place, parts and pair.names, by_split=by_split) for pair in pairs)
    images_of_pairs = {(pair.images.base, pair.images.parts) for pair in pairs}
    for folder in held:  # of images alone, as those of tests are
        if (folder.base, folder.parts) not in images_of_pairs:
            more = _root_without_masks(folder, pairs, images, affixes[0], is_part=parts is not None, by_split=by_split)
            found |= dict.fromkeys(more)
    if names == (".", "."):
        text = [affix.around("…") for affix in affixes]
        source = f"its names: {text[0]} of images and {text[1]} of masks"
    else:
        source = f"its folders {names[0]} and {names[1]}"
    roots, nested = sorted(path for path, _ in found), any(is_nested for _, is_nested in found)
    notes, problems = _remarks(pairs, affixes)
    return Layout(roots, images, masks, *affixes, nested, source=source, notes=tuple(notes), problems=tuple(problems))


def paired(layout: Layout) -> Layout:
    """The layout with the affixes by which images and masks pair, if they do not without."""
    images, masks = (_stems(layout.roots, name) for name in (layout.images, layout.masks))
    image_affixes, mask_affixes = affixes_of(images, masks)
    nested = layout.nested or any("/" in stem for stem in [*images, *masks])
    return replace(layout, image_affixes=image_affixes, mask_affixes=mask_affixes, nested=nested)


def affix_keys(layout: Layout) -> dict[str, str]:
    """The keys of `data` that say what surrounds the names of tiles in those of files, empty ones too."""
    images, masks = layout.image_affixes, layout.mask_affixes
    return {
        "image_prefix": images.prefix,
        "mask_prefix": masks.prefix,
        "image_suffix": images.suffix,
        "mask_suffix": masks.suffix,
    }


def with_lists(layout: Layout, folders: Sequence[str]) -> Layout:
    """
    The layout with the lists `train.txt` and `val.txt` of the one folder that was given, if both name its tiles.

    Not where folders are called after splits: these are then what the lists say, or newer.
    """
    if len(folders) != 1 or any(split_of(root, layout.roots) for root in layout.roots):
        return layout
    stems = {_last(stem) for stem in _stems(layout.roots, layout.images)}
    known = stems | {layout.image_affixes.within(stem) or stem for stem in stems}
    for place in LISTS:
        train, val = (Path(folders[0]) / place / f"{split}.txt" for split in ("train", "val"))
        if _names_tiles(train, known) and _names_tiles(val, known):
            return replace(
                layout, train_list=str(train), val_list=str(val), source=layout.source or "its lists of tiles"
            )
    return layout


def split_of(path: str, beside: Sequence[str]) -> str | None:
    """`train`, `val` or `test`, where a root is called so, or a folder on its path that not all roots `beside` it share."""
    parts = Path(path).parts
    others = [Path(other).parts for other in beside if other != path]
    common = min((shared(parts, other) for other in others), default=len(parts) - 1)
    for part in reversed(parts[min(common, len(parts) - 1) :]):
        if found := SPLIT_NAME.fullmatch(part):
            return found["split"].lower()
    return None


def _folders_with_images(base: str) -> Iterator[_Folder]:
    for parent, folders, files in os.walk(base):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        stems = tuple(_image_stems(sorted(files)[:MOST_NAMES]))
        if stems:
            yield _Folder(base, Path(parent).relative_to(base).parts, stems)


def _pairs(held: Sequence[_Folder]) -> Iterator[_Pair]:
    """Each folder of masks with the folder of its images, or with itself where it holds both."""
    found: set[_Folder] = set()
    for masks in held:
        places = [place for place, part in enumerate(masks.parts) if MASK_NAME.search(part)]
        for place in reversed(places):
            around = masks.parts[:place], masks.parts[place + 1 :]
            beside = [
                other for other in held
                if other.base == masks.base and (other.parts[:place], other.parts[place + 1 :]) == around
                and len(other.parts) == len(masks.parts) and not MASK_NAME.search(other.parts[place])
            ]  # fmt: skip
            candidates = [_Pair(images, masks, place, affixes_of(images.stems, masks.stems)) for images in beside]
            fitting = [pair for pair in candidates if _share(pair) > 0]
            if fitting:
                yield max(fitting, key=_fit)
                found.add(masks)
                break
    for folder in held:
        masks_of = [stem for stem in folder.stems if is_of_masks(stem)]
        images_of = [stem for stem in folder.stems if stem not in set(masks_of)]
        affixes = affixes_of(images_of, masks_of)
        if folder not in found and affixes[0] != affixes[1]:
            yield _Pair(replace(folder, stems=tuple(images_of)), replace(folder, stems=tuple(masks_of)), None, affixes)


def _fit(pair: _Pair) -> tuple[float, int, bool]:
    """How well two folders fit together: by their files, by what their names have in common, and by whether one is called after images."""
    before, _, _, after = _differing(*pair.names)
    return _share(pair), len(before) + len(after), bool(IMAGE_NAME.search(pair.names[0]))


def _share(pair: _Pair) -> float:
    """The share of the masks that have an image."""
    of_images, of_masks = pair.affixes
    images = set(pair.images.stems)
    names = [name for stem in pair.masks.stems if (name := of_masks.within(stem)) is not None]
    return sum(of_images.around(name) in images for name in names) / max(1, len(names))


def _root(folder: _Folder, place: int | None, names: tuple[str, str] | None, *, by_split: bool) -> tuple[str, bool]:
    """
    The root of a folder of images whose name at `place` stands for the folder, and whether its tiles are nested.

    With `names`, those of this folder and of its masks differ in a part, for which the root has a `*`; else as a whole, and `by_split` the
    folders within them are roots of their own.
    """
    parts = folder.parts
    if place is None:
        return str(Path(folder.base, *parts)), False
    head, below = parts[:place], parts[place + 1 :]
    if names is not None:
        before, _, _, after = _differing(*names)
        return str(Path(folder.base, *head, f"{before}*{after}", *below)), False
    if below and by_split:
        return str(Path(folder.base, *head, "*", below[0])), len(below) > 1
    return str(Path(folder.base, *head)), bool(below)


def _is_split_below(pair: _Pair) -> bool:
    """Whether folders called after splits lie in those of images and of masks."""
    below = () if pair.place is None else pair.images.parts[pair.place + 1 :]
    return bool(below) and SPLIT_NAME.fullmatch(below[0]) is not None


def _root_without_masks(
    folder: _Folder, pairs: Sequence[_Pair], images: str, affixes: Affixes, *, is_part: bool, by_split: bool
) -> Iterator[tuple[str, bool]]:
    """The root of a folder of images that has no masks, if it is called as the other folders of images are."""
    for place in {pair.place for pair in pairs}:
        if place is None:
            if any(affixes) and folder.stems and all(affixes.within(stem) is not None for stem in folder.stems):
                yield _root(folder, None, None, by_split=by_split)
        elif place < len(folder.parts) and not is_part and folder.parts[place] == images:
            yield _root(folder, place, None, by_split=by_split)
        elif place < len(folder.parts) and is_part and not images and SPLIT_NAME.fullmatch(folder.parts[place]):
            yield _root(folder, place, (folder.parts[place], f"{folder.parts[place]}-masks"), by_split=by_split)


def _differing(one: str, other: str) -> tuple[str, str, str, str]:
    """What two names begin with, the parts in which they differ, and what both end with."""
    start = shared(one, other)
    end = min(shared(one[::-1], other[::-1]), min(len(one), len(other)) - start)
    return one[:start], one[start : len(one) - end], other[start : len(other) - end], one[len(one) - end :]


def _remarks(pairs: Sequence[_Pair], affixes: Pairing) -> tuple[list[str], list[str]]:
    """`notes` and `problems` of the files that a layout leaves out."""
    notes, problems = [], []
    of_images, of_masks = affixes
    others = [stem for pair in pairs for stem in pair.masks.stems if of_masks.within(stem) is None]
    if others:
        are = "is" if len(others) == 1 else "are"
        notes.append(
            f"of the masks, those that {of_masks.text('begin', 'end')} are taken; {count_text(len(others), 'others')} {are} left "
            f"out, such as {others[0]}"
        )
    image_suffix = of_images.suffix
    if CHANNEL.fullmatch(image_suffix):
        channels = Counter(stem[-len(image_suffix) :] for pair in pairs for stem in pair.images.stems)
        ends = sorted(end for end in channels if CHANNEL.fullmatch(end))
        if len(ends) > 1:
            problems.append(
                f"each image lies in {len(ends)} files, {', '.join(ends)}, one for each of its bands, and a tile is one file: stack them "
                "(`gdal_merge.py -separate`, `rio stack`). As it is, only "
                f"{image_suffix} is read"
            )
    return notes, problems


def _image_stems(files: Sequence[str]) -> Iterator[str]:
    for name in files:
        stem, extension = os.path.splitext(name)  # noqa: PTH122
        if not name.startswith(".") and extension.lower() in EXTENSIONS:
            yield stem


def _stems(roots: Sequence[str], name: str) -> list[str]:
    """Stems of the image files in the folder `name` of roots, by their path within it."""
    stems: list[str] = []
    for root in roots:
        folder = root.replace("*", name) if has_star(root) else str(Path(root) / name)
        for found in _folders_with_images(folder):
            stems += ["/".join((*found.parts, stem)) for stem in found.stems]
            if len(stems) > MOST_NAMES:
                return stems
    return stems


def _names_tiles(path: Path, known: Collection[str]) -> bool:
    """Whether a list of names is there, and names tiles."""
    try:
        names = read_names(path)
    except DataError:
        return False
    return sum(_last(name) in known or _last(Path(name).stem) in known for name in names) >= SHARED_PART * max(
        1, len(names)
    )


def _last(name: str) -> str:
    return name.rpartition("/")[2]
