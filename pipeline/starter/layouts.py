"""Layouts of folders and names that data sets have, recognised by what is there: other folder names, suffixes, nested folders, lists."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kdpipe.data.tiles import EXTENSIONS, has_star

# Names of the folders of images and of masks, beside kdpipe's own.
PAIRS = (
    ("images", "labels"),
    ("images", "annotations"),
    ("images_png", "masks_png"),  # LoveDA
    ("image", "label"),
    ("image", "mask"),
    ("img", "mask"),
    ("imgs", "masks"),
    ("leftImg8bit", "gtFine"),  # Cityscapes
)
VOC = ("JPEGImages", "SegmentationClass")
VOC_LISTS = "ImageSets/Segmentation"
SEPARATORS = "_-. "
SHARED_PART = 0.9  # of the images that a suffix must pair with a mask
MOST_NAMES = 10_000  # that are looked at for suffixes


@dataclass(frozen=True)
class Layout:
    """
    Where the tiles lie: the roots, and the keys of `data` that say how.

    `source` says after what it was recognised; None for kdpipe's own layout or the user's options.
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


def recognise(folders: Sequence[str]) -> Layout | None:
    """The layout of folders that are not laid out as kdpipe's own; None if it is none of the known ones."""
    for found in _known(folders):
        return found
    return None


def _known(folders: Sequence[str]) -> Iterator[Layout]:
    if all(_holds(folder, "img_dir", "ann_dir") for folder in folders):
        roots = [f"{folder}/*/{split}" for folder in folders for split in _folders_in(Path(folder) / "img_dir")]
        yield _with_suffixes(Layout(roots, "img_dir", "ann_dir", source="mmsegmentation's layout"))
    if all(_holds(folder, "imagesTr", "labelsTr") for folder in folders):
        roots = [f"{folder}/*Tr" for folder in folders]
        yield _with_suffixes(Layout(roots, "images", "labels", source="nnU-Net's layout"))
    if len(folders) == 1 and _holds(folders[0], *VOC):
        lists = [Path(folders[0]) / VOC_LISTS / f"{split}.txt" for split in ("train", "val")]
        train, val = (str(path) if path.is_file() else None for path in lists)
        layout = Layout([folders[0]], *VOC, train_list=train, val_list=val if train else None, source="VOC's layout")
        yield _with_suffixes(layout)
    for images, masks in PAIRS:
        roots = [root for folder in folders for root in _roots_with(folder, images)]
        if all(any(root.startswith(folder) and _holds(root, masks) for root in roots) for folder in folders):
            yield _with_suffixes(Layout(roots, images, masks, source=f"its folders {images} and {masks}"))


def _roots_with(folder: str, images: str) -> list[str]:
    """The folder itself if it holds a folder `images`, else its folders that do."""
    if _holds(folder, images):
        return [folder]
    inner = [str(Path(folder) / name) for name in _folders_in(Path(folder))]
    return [root for root in inner if _holds(root, images)]


def paired(layout: Layout) -> Layout:
    """The layout with the suffixes by which images and masks pair, if they do not without."""
    return _with_suffixes(layout)


def _with_suffixes(layout: Layout) -> Layout:
    images, masks = (_stems(layout.roots, name) for name in (layout.images, layout.masks))
    nested = layout.nested or any("/" in stem for stem in [*images, *masks])
    image_suffix, mask_suffix = suffixes_of(images, masks)
    return Layout(
        layout.roots, layout.images, layout.masks, image_suffix, mask_suffix, nested, layout.train_list, layout.val_list,
        layout.source,
    )  # fmt: skip


def suffixes_of(images: Sequence[str], masks: Sequence[str]) -> tuple[str, str]:
    """
    The suffixes without which the stems of images and masks are the same; two empty ones if they are already, or if there are none.

    Found on the image and mask whose names share most, and kept if they pair `SHARED_PART` of the masks.
    """
    if not images or not masks or set(images) & set(masks):
        return "", ""
    known = set(images)
    for mask in sorted(masks)[:3]:
        image = max(sorted(images), key=lambda stem: _shared(stem, mask))
        start = _shared(image, mask)
        while start and image[start - 1] in SEPARATORS:
            start -= 1
        image_suffix, mask_suffix = image[start:], mask[start:]
        ends = [stem.removesuffix(mask_suffix) + image_suffix for stem in masks if stem.endswith(mask_suffix)]
        if start and sum(stem in known for stem in ends) >= SHARED_PART * len(masks):
            return image_suffix, mask_suffix
    return "", ""


def _shared(one: str, other: str) -> int:
    """The number of characters that two names have in common from the start."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _stems(roots: Sequence[str], name: str) -> list[str]:
    """Stems of the image files in the folder `name` of roots, by their path within it."""
    stems: list[str] = []
    for root in roots:
        folder = Path(root.replace("*", name)) if has_star(root) else Path(root) / name
        for parent, _, files in os.walk(folder):
            within = os.path.relpath(parent, folder)
            prefix = "" if within == "." else f"{within}/"
            names = (os.path.splitext(file) for file in files if not file.startswith("."))  # noqa: PTH122
            stems += [prefix + stem for stem, extension in names if extension.lower() in EXTENSIONS]
            if len(stems) > MOST_NAMES:
                return stems
    return stems


def _holds(folder: str, *names: str) -> bool:
    return all((Path(folder) / name).is_dir() for name in names)


def _folders_in(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
