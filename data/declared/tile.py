"""
What a tile's files declare against what is asked of them: bands that are colours, masks that are class indices, one grid for both.

Each finding is certainly wrong, and a text that names the file, what it declares and what to do. Not covered: pixels, and tiles that
contradict each other (`agreement.py`, `leaks.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdpipe.configs.errors import DataError, count_text
from kdpipe.data.declared.header import Declared, read_declared

RECIPE = "give each class its colour in data.colours (`kdpipe init --colours FILE`)"
GRID_PX = 0.5  # corners that differ by more are not rounding: labels belong to other pixels
_CORNERS = np.array([(0, 0), (1, 0), (0, 1), (1, 1)], dtype=np.float64)
_UPSIDE_DOWN = [2, 3, 0, 1]  # the corners in the order of an image that is written from the bottom up


def image_faults(path: Path, image: Declared, bands: Sequence[int], *, has_stretch: bool) -> list[str]:
    """What makes `bands` of an image unusable, by its header: a band that is missing, alpha, a palette, or not 8-bit without a stretch."""
    if max(bands) > image.bands:
        return [lacks_bands_text(path, image.bands, bands)]
    faults = []
    if image.alpha in bands:
        faults.append(
            f"data.bands {list(bands)} takes band {image.alpha} of {path}, which the file calls alpha: opacity is no colour. Choose "
            f"among its other bands ({colours_text(image.colours)}), or, if band {image.alpha} is something else, such as infrared, set "
            "data.alpha: band"
        )
    if _is_coloured(image) and 1 in bands:
        faults.append(
            f"{path} holds indices into a colour table, not colours: write it with three bands "
            f"(`gdal_translate -expand rgb {path.name} OUT.tif`)"
        )
    wider = sorted({image.dtypes[band - 1] for band in bands} - {"uint8"})
    if wider and not has_stretch:
        faults.append(no_stretch_text(path, wider))
    return faults


def mask_faults(path: Path, mask: Declared, *, of_colours: bool = False) -> list[str]:
    """
    What makes a mask unusable, by its header: lossy compression, several bands, or values that are not integers.

    `of_colours` says that `data.colours` is given: masks are three bands of 8 bits, with or without opacity, or a palette.
    """
    if mask.driver == "JPEG":
        return [f"the mask {path} is a JPEG, which alters class indices: export it as PNG or TIFF"]
    if mask.lossy:
        return [
            f"the mask {path} is compressed as {mask.compression} with loss, which alters class indices: export it again as PNG, or "
            "as TIFF with DEFLATE or LZW"
        ]
    if of_colours:
        if (mask.bands in (3, 4) and set(mask.dtypes) == {"uint8"}) or (mask.bands == 1 and _is_coloured(mask)):
            return []
        bands = f"{count_text(mask.bands, 'bands')} of {mask.dtype}"
        return [
            f"data.colours is given, but the mask {path} holds no colours: {bands} "
            f"({colours_text(mask.colours)}). Leave data.colours out for masks of indices, or use data.remap for other codes"
        ]
    if mask.bands != 1:
        return [
            f"the mask {path} should have 1 band of class indices, found {count_text(mask.bands, 'bands')} "
            f"({colours_text(mask.colours)}): {RECIPE}"
        ]
    if np.dtype(mask.dtype).kind not in "iu":
        return [f"the mask {path} should hold integers, class indices, found {mask.dtype}"]
    return []


def pair_faults(image_path: Path, image: Declared, mask_path: Path, mask: Declared) -> list[str]:
    """How an image and its mask do not belong together, by their headers: another size, or another place on earth."""
    size, mask_size = (image.height, image.width), (mask.height, mask.width)
    if size != mask_size:
        return [_size_text(image_path, size, mask_path, mask_size) + _orientation_hint(image)]
    if image.transform is None or mask.transform is None:
        return []
    found = _place_text(image, mask)
    return [f"the mask {mask_path} {found}, by their own headers: labels would belong to other pixels"] if found else []


def require_same_size(image_path: Path, size: tuple[int, int], mask_path: Path, mask_size: tuple[int, int]) -> None:
    """Raise `DataError` for a mask of another `(H, W)` than its image; says so if the image's EXIF orientation may be the reason."""
    if tuple(size) != tuple(mask_size):
        hint = _orientation_hint(read_declared(image_path))
        raise DataError(_size_text(image_path, size, mask_path, mask_size) + hint)


def lacks_bands_text(path: Path | str, count: int, bands: Sequence[int]) -> str:
    """The text for an image of `count` bands, which lacks one of `data.bands`."""
    return (
        f"{path} has {count_text(count, 'bands')}, and data.bands asks for {list(bands)}: leave the image out, or set "
        "data.bands to bands that all images have"
    )


def no_stretch_text(path: Path | str, dtypes: Sequence[str]) -> str:
    """The text for an image of more than 8 bits without `data.stretch`."""
    return (
        f"{path} holds {', '.join(dtypes)} values, and only uint8 is taken as it is: set their stretch to 0..255 in the config, "
        "as data: {stretch: {range: [low, high]}} or data: {stretch: {percentiles: [2, 98]}}"
    )


def colours_text(colours: Sequence[str]) -> str:
    """`red, green, blue`, or `gray, 12 undefined`."""
    named = [colour for colour in colours if colour != "undefined"]
    rest = len(colours) - len(named)
    return ", ".join([*named, *([f"{rest} undefined"] if rest else [])])


def _size_text(image_path: Path, size: tuple[int, int], mask_path: Path, mask_size: tuple[int, int]) -> str:
    return f"the mask {mask_path} is {mask_size[0]} x {mask_size[1]} px, but its image {image_path} is {size[0]} x {size[1]}"


def _orientation_hint(image: Declared) -> str:
    """An addition to an error about an image's size: empty where it is upright."""
    if image.orientation == 1:
        return ""
    return (
        f". The image's EXIF orientation is {image.orientation}: viewers and annotation tools turn it, kdpipe reads the pixels as they "
        "are stored. Store it upright (`mogrify -auto-orient FILE`)"
    )


def _is_coloured(image: Declared) -> bool:
    """Whether the first band indexes a table that is more than a ramp of greys."""
    table = image.colour_table
    return table is not None and any(colour[:3] != (i, i, i) for i, colour in enumerate(table))


def _place_text(image: Declared, mask: Declared) -> str | None:
    """How a mask lies elsewhere than its image; None if their corners agree within `GRID_PX`."""
    pixels = _CORNERS * (image.width, image.height)
    found, note = moved(mask.transform, pixels), ""
    if image.crs is not None and mask.crs is not None and image.crs != mask.crs:
        from rasterio.errors import RasterioError
        from rasterio.warp import transform

        note = f" (the mask is in {crs_text(mask)}, the image in {crs_text(image)})"
        try:
            found = np.column_stack(transform(mask.crs, image.crs, found[:, 0], found[:, 1]))
        except RasterioError:
            return f"lies in another CRS than its image{note}"
    seen = moved(~image.transform, found)
    if not np.isfinite(seen).all():
        return f"lies elsewhere than its image{note}"
    if np.abs(seen - pixels).max() <= GRID_PX:
        return None
    if np.abs(seen[_UPSIDE_DOWN] - pixels).max() <= GRID_PX:
        return f"is written from the bottom up, unlike its image{note}"
    x, y = seen[0] - pixels[0]
    return f"lies {x:+.6g} px in x and {y:+.6g} px in y from its image{note}"


def moved(affine: Any, points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points `(N, 2)`, x before y, after an `Affine`."""
    a, b, c, d, e, f = affine[:6]
    moved: NDArray[np.float64] = points @ np.array([(a, d), (b, e)]) + (c, f)
    return moved


def crs_text(declared: Declared) -> str:
    """`EPSG:32633`, or that a CRS has no such code."""
    code = declared.crs.to_epsg()
    return f"EPSG:{code}" if code else "a CRS without an EPSG code"
