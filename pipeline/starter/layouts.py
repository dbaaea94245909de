"""
Layouts of folders and names that data sets have, recognised by what is there: other folder names, suffixes, nested folders, lists.

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
from kdpipe.data.tiles import EXTENSIONS, has_star, read_names

SEPARATORS = "_-. "
SHARED_PART = 0.9  # of the masks that a suffix must pair with an image, and of the lines of a list that must name tiles
MOST_NAMES = 10_000  # of a folder that are looked at for suffixes

_WORD = r"(?:^|[^a-z]){}(?:$|[^a-z])"
MASK_NAME = re.compile(
    "|".join(["mask", "label", "annot", "truth", "target", "segmentation", "lbl", "gt(?:fine|coarse)",
              *(_WORD.format(word) for word in ("gts?", "ann?o?", "anns", "seg", "lab", "l"))]),
    re.IGNORECASE,
)  # fmt: skip
IMAGE_NAME = re.compile(r"ima?ge?|rgb|jpeg|sat", re.IGNORECASE)
SPLIT_NAME = re.compile(r"(?:.*[_\- ])?(?P<split>train|val|test)(?:ing|id|idation|ation)?[\d*]*", re.IGNORECASE)
# Of several kinds of masks of one image, the first that is there; those for viewers are the last.
KINDS = (re.compile("trainid", re.I), re.compile("labelid", re.I), MASK_NAME, re.compile("$"))
FOR_VIEWERS = re.compile("colou?r|rgb|instance|vis|overlay|preview", re.IGNORECASE)
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
    image_suffix: str = ""
    mask_suffix: str = ""
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
    suffixes: tuple[str, str]

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
    suffixes = Counter(pair.suffixes for pair in pairs).most_common(1)[0][0]
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
            more = _root_without_masks(folder, pairs, images, suffixes[0], is_part=parts is not None, by_split=by_split)
            found |= dict.fromkeys(more)
    if names == (".", "."):
        source = f"its names, which end in {suffixes[0] or 'nothing'} and {suffixes[1]}"
    else:
        source = f"its folders {names[0]} and {names[1]}"
    roots, nested = sorted(path for path, _ in found), any(is_nested for _, is_nested in found)
    notes, problems = _remarks(pairs, suffixes)
    return Layout(roots, images, masks, *suffixes, nested, source=source, notes=tuple(notes), problems=tuple(problems))


def paired(layout: Layout) -> Layout:
    """The layout with the suffixes by which images and masks pair, if they do not without."""
    images, masks = (_stems(layout.roots, name) for name in (layout.images, layout.masks))
    image_suffix, mask_suffix = suffixes_of(images, masks)
    nested = layout.nested or any("/" in stem for stem in [*images, *masks])
    return replace(layout, image_suffix=image_suffix, mask_suffix=mask_suffix, nested=nested)


def with_lists(layout: Layout, folders: Sequence[str]) -> Layout:
    """
    The layout with the lists `train.txt` and `val.txt` of the one folder that was given, if both name its tiles.

    Not where folders are called after splits: these are then what the lists say, or newer.
    """
    if len(folders) != 1 or any(split_of(root, layout.roots) for root in layout.roots):
        return layout
    stems = {_last(stem) for stem in _stems(layout.roots, layout.images)}
    known = stems | {stem.removesuffix(layout.image_suffix) for stem in stems}
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
    shared = min((_shared(parts, other) for other in others), default=len(parts) - 1)
    for part in reversed(parts[min(shared, len(parts) - 1) :]):
        if found := SPLIT_NAME.fullmatch(part):
            return found["split"].lower()
    return None


def suffixes_of(images: Sequence[str], masks: Sequence[str]) -> tuple[str, str]:
    """
    The suffixes without which the stems of images and masks are the same; two empty ones if they are already, or if there are none.

    Found on an image and the masks whose names begin as its own does, and kept if they pair `SHARED_PART` of the masks with that suffix.
    Of several kinds of masks, labels are taken rather than colours and instances.
    """
    if not images or not masks or set(images) & set(masks):
        return "", ""
    known = set(images)
    for mask in sorted(masks)[:3]:
        image = max(sorted(images), key=lambda stem: _shared(stem, mask))
        start = _shared(image, mask)
        while start and image[start - 1] in SEPARATORS:
            start -= 1
        if not start:
            continue
        base, image_suffix = image[:start], image[start:]
        ends = {
            stem[start:] for stem in masks if stem.startswith(base) and stem[start : start + 1] in ("", *SEPARATORS)
        }
        for end in sorted(ends, key=_kind):
            of_kind = [stem.removesuffix(end) + image_suffix for stem in masks if stem.endswith(end)]
            if sum(stem in known for stem in of_kind) >= SHARED_PART * len(of_kind):
                return image_suffix, end
    return "", ""


def _kind(suffix: str) -> tuple[bool, int, str]:
    """The order of preference of a mask's suffix."""
    return bool(FOR_VIEWERS.search(suffix)), next(i for i, kind in enumerate(KINDS) if kind.search(suffix)), suffix


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
            candidates = [_Pair(images, masks, place, suffixes_of(images.stems, masks.stems)) for images in beside]
            fitting = [pair for pair in candidates if _share(pair) > 0]
            if fitting:
                yield max(fitting, key=_fit)
                found.add(masks)
                break
    for folder in held:
        masks_of = [stem for stem in folder.stems if MASK_NAME.search(_end(stem))]
        images_of = [stem for stem in folder.stems if stem not in set(masks_of)]
        suffixes = suffixes_of(images_of, masks_of)
        if folder not in found and any(suffixes):
            yield _Pair(replace(folder, stems=tuple(images_of)), replace(folder, stems=tuple(masks_of)), None, suffixes)


def _fit(pair: _Pair) -> tuple[float, int, bool]:
    """How well two folders fit together: by their files, by what their names have in common, and by whether one is called after images."""
    before, _, _, after = _differing(*pair.names)
    return _share(pair), len(before) + len(after), bool(IMAGE_NAME.search(pair.names[0]))


def _share(pair: _Pair) -> float:
    """The share of the masks that have an image."""
    image_suffix, mask_suffix = pair.suffixes
    images = set(pair.images.stems)
    masks = [stem for stem in pair.masks.stems if stem.endswith(mask_suffix)]
    return sum(stem.removesuffix(mask_suffix) + image_suffix in images for stem in masks) / max(1, len(masks))


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
    folder: _Folder, pairs: Sequence[_Pair], images: str, suffix: str, *, is_part: bool, by_split: bool
) -> Iterator[tuple[str, bool]]:
    """The root of a folder of images that has no masks, if it is called as the other folders of images are."""
    for place in {pair.place for pair in pairs}:
        if place is None:
            if suffix and folder.stems and all(stem.endswith(suffix) for stem in folder.stems):
                yield _root(folder, None, None, by_split=by_split)
        elif place < len(folder.parts) and not is_part and folder.parts[place] == images:
            yield _root(folder, place, None, by_split=by_split)
        elif place < len(folder.parts) and is_part and not images and SPLIT_NAME.fullmatch(folder.parts[place]):
            yield _root(folder, place, (folder.parts[place], f"{folder.parts[place]}-masks"), by_split=by_split)


def _differing(one: str, other: str) -> tuple[str, str, str, str]:
    """What two names begin with, the parts in which they differ, and what both end with."""
    start = _shared(one, other)
    end = min(_shared(one[::-1], other[::-1]), min(len(one), len(other)) - start)
    return one[:start], one[start : len(one) - end], other[start : len(other) - end], one[len(one) - end :]


def _remarks(pairs: Sequence[_Pair], suffixes: tuple[str, str]) -> tuple[list[str], list[str]]:
    """`notes` and `problems` of the files that a layout leaves out."""
    notes, problems = [], []
    image_suffix, mask_suffix = suffixes
    masks = [stem for pair in pairs for stem in pair.masks.stems]
    others = sum(not stem.endswith(mask_suffix) for stem in masks)
    if others:
        example = next(stem for stem in masks if not stem.endswith(mask_suffix))
        notes.append(
            f"of the masks, those that end in {mask_suffix} are taken; {count_text(others, 'others')} {'is' if others == 1 else 'are'} "
            "left "
            f"out, such as {example}"
        )
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


def _end(stem: str) -> str:
    """The last part of a name, with its separator: `_mask` of `12_mask`; empty where it has none."""
    start = max(stem.rfind(separator) for separator in SEPARATORS)
    return stem[start:] if start > 0 else ""


def _shared(one: Sequence[str], other: Sequence[str]) -> int:
    """The number of characters that two names, or of names that two paths, have in common from the start."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


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
