"""
A survey of folders of tiles: sizes, bands, types, ranges of values, and class indices in the masks.

From many tiles a sample is taken, evenly spread over the sorted names: `MAX_HEADERS` headers and the pixels of `MAX_READ` images and
masks per root, without scenes of more than `MAX_VALUES`. Faults are collected as texts that name the file, so that the user gets
all of them at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from kdpipe.configs import schema
from kdpipe.configs.errors import DataError, count_text
from kdpipe.configs.schema.labels import MaskCodes
from kdpipe.data.declared.check import Headers, read_headers, tile_faults
from kdpipe.data.declared.header import Declared
from kdpipe.data.rasters import read_bands, read_mask, read_mask_values
from kdpipe.data.stretch import sample_grid
from kdpipe.data.tiles import EXTENSIONS, Tile, contents_text, list_tiles

MAX_HEADERS = 1000  # per root: opening an image and its mask takes some milliseconds, far more on a network drive
MAX_READ = 100  # per root: decoding a tile of 1024 px and its mask takes about 50 ms
MAX_VALUES = 2**28  # per image over all bands, 512 MB of 16 bits; larger images are not decoded
# Per band of an image: over 100 images, the rank of the 2nd percentile is known to 0.01 % if values are independent.
NO_LABEL = 255  # stands for pixels without a label in masks of colours
SAMPLE_VALUES = 2**14
PERCENTILES = (2.0, 98.0)
FILL_VALUES = (
    -9999,
    -999,
    -99999,
    -32768,
    -32767,
)  # which ArcGIS, GDAL's tools and NASA's products write where nothing was measured
FILL_BELOW = -1e30  # near the lowest float32, which ArcGIS and GRASS write

MOST_BETWEEN = 0.1  # of the values of an opacity; more are infrared or the like. Soft edges and shadows are fewer
MAX_NOTED = 2**24  # pixels of an image whose alpha is looked at before a run, a tenth of a second

Item = TypeVar("Item")


@dataclass
class Root:
    """
    A root of tiles and its survey.

    `sizes_HW`, `bands`, `dtypes`, `rgb` and `alpha` count the `headers` images whose header was read. Of these images' bands
    called alpha, `alpha_values` were read, `alpha_between` of them lie between 0 and the largest. `values` counts pixels by mask
    value in the `masks_read` masks that were decoded. `ranges` are the `PERCENTILES` of each band over the `images_read` images, in
    the files' own units; empty if all are 8-bit. `images_tried` and `masks_tried` count those that could not be read too.
    `pixels_without_data` of these images' `pixels` are transparent, masked or nodata, `hidden_by_alpha` the first alone; where
    `alpha_is_band`, none is transparent.
    `seen` are the headers of the opened images and masks. `problems` describe faults that a run would stop at, or that would spoil it.
    """

    path: str
    tiles: list[Tile] = field(repr=False)
    seen: list[Headers] = field(default_factory=list, repr=False)
    sizes_HW: list[tuple[int, int]] = field(default_factory=list, repr=False)
    bands: Counter[int] = field(default_factory=Counter)
    dtypes: Counter[str] = field(default_factory=Counter)
    rgb: Counter[tuple[int, int, int] | None] = field(default_factory=Counter)
    alpha: int = 0
    alpha_values: int = 0
    alpha_between: int = 0
    images_read: int = 0
    ranges: list[tuple[float, float]] = field(default_factory=list)
    pixels: int = 0
    pixels_without_data: int = 0
    hidden_by_alpha: int = 0
    masks_read: int = 0
    images_tried: int = 0
    masks_tried: int = 0
    values: Counter[int] = field(default_factory=Counter)
    mask_nodata: Counter[float | None] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    @property
    def masks(self) -> int:
        """Number of tiles with a mask."""
        return sum(tile.mask is not None for tile in self.tiles)

    @property
    def alpha_is_band(self) -> bool:
        """Whether the band called alpha is no opacity, by its values."""
        return self.alpha_between > MOST_BETWEEN * self.alpha_values

    @property
    def headers(self) -> int:
        """Number of images whose header was read."""
        return len(self.sizes_HW)


def find_roots(folder: str, images: str = "images", masks: str = "masks") -> list[str]:
    """
    The roots in a folder: the folder itself if it holds a folder `images`, else its folders that hold one with files, by name.

    Raises `DataError` if there is none; the message says what was found instead.
    """
    path = Path(folder)
    if not path.exists():
        raise DataError(f"there is no folder {path.absolute()}")
    if not path.is_dir():
        raise DataError(f"{path} is a file: name the folder that holds {images}/ and {masks}/, or several such folders")
    if (path / images).is_dir():
        return [folder]
    inner = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    roots = [str(path / name) for name in inner if _holds_a_file(path / name / images)]
    bare = [path / name / images for name in inner if (path / name / images).is_dir() and str(path / name) not in roots]
    nested = [folder for folder in bare if any(_holds_a_file(entry) for entry in folder.iterdir())]
    if nested or (bare and not roots):
        first = (nested or bare)[0]
        raise DataError(
            f"no images in {first}: {contents_text(first, images)}. To leave a folder out, name the others one by one"
        )
    if not roots:
        loose = sum(entry.suffix.lower() in EXTENSIONS for entry in path.iterdir())
        found = f"the folders {', '.join(inner[:5])}{', …' if len(inner) > 5 else ''}" if inner else "no folder"
        raise DataError(
            f"neither {path} nor a folder in it holds a folder {images!r}; found {found} and {loose} image files. Lay tiles out as "
            f"ROOT/{images} and ROOT/{masks}, paired by stem, or name your folders with --images and --masks"
        )
    return roots


def list_root(path: str, images: str = "images", masks: str = "masks", **layout: Any) -> Root:
    """
    A root with its tiles, none of them opened; `layout` are further keys of `data`, such as `mask_suffix`.

    Raises `DataError` as `list_tiles` does, except for images without a mask.
    """
    data = schema.Data(train=[path], images=images, masks=masks, allow_missing_masks=True, **layout)
    return Root(path, list_tiles(data, "train"))


def survey_steps(root: Root, limit: int | None = None) -> int:
    """Number of steps of `survey_root`: images to open, and masks to count."""
    return min(len(root.tiles), limit or MAX_HEADERS, MAX_HEADERS) + min(root.masks, limit or MAX_READ, MAX_READ)


def survey_root(
    root: Root, advance: Callable[[], None] = lambda: None, codes: MaskCodes | None = None, limit: int | None = None
) -> None:
    """
    Survey the files of a listed root and fill in its counts; `advance` is called after each step.

    With `codes` masks hold colours, and the indices that these stand for are counted. With `limit`, at most so many images and so many
    masks are opened.
    """
    opened = evenly(root.tiles, min(limit or MAX_HEADERS, MAX_HEADERS))
    with_pixels = {tile.id for tile in evenly(opened, MAX_READ)}
    # Chosen from the labelled tiles, which may be few among many.
    labelled = [tile for tile in root.tiles if tile.mask is not None]
    with_labels = {tile.id for tile in evenly(labelled, min(limit or MAX_READ, MAX_READ))}
    root.images_tried, root.masks_tried = len(with_pixels), len(with_labels)
    samples: list[list[NDArray[Any]]] = []
    for headers in read_headers(opened):
        _look(root, headers, of_colours=codes is not None)
        if headers.tile.id in with_pixels and headers.image is not None:
            _tried(root, _read, root, headers.tile, headers.image, samples)
        advance()
    for tile in root.tiles:
        if tile.id in with_labels:
            _tried(root, _count, root, tile, codes)
            advance()
    if root.alpha_is_band:
        root.pixels_without_data -= root.hidden_by_alpha
        root.hidden_by_alpha = 0
    if root.dtypes.keys() - {"uint8"}:
        joined = [np.concatenate(band) for band in samples]
        root.ranges = [_range(values) for values in joined if values.size]


def evenly(items: Sequence[Item], at_most: int) -> list[Item]:
    """At most `at_most` of the items, evenly spread, in their order."""
    n = min(len(items), at_most)
    return [items[(2 * i + 1) * len(items) // (2 * n)] for i in range(n)]


def _holds_a_file(folder: Path) -> bool:
    return folder.is_dir() and any(entry.is_file() for entry in folder.iterdir())


def _tried(root: Root, step: Callable[..., None], *arguments: Any) -> None:
    try:
        step(*arguments)
    except DataError as err:
        if str(err) not in root.problems:
            root.problems.append(str(err))


def _look(root: Root, headers: Headers, *, of_colours: bool) -> None:
    root.seen.append(headers)
    image, mask = headers.image, headers.mask
    faults = [headers.image_error] if headers.image_error else []
    faults += tile_faults(headers, None, has_stretch=True, of_colours=of_colours)
    root.problems += [fault for fault in faults if fault not in root.problems]
    if image is None:
        return
    root.sizes_HW.append((image.height, image.width))
    root.bands[image.bands] += 1
    root.dtypes[image.dtype] += 1
    root.rgb[image.rgb] += 1
    root.alpha += image.alpha is not None
    if mask is not None:
        root.mask_nodata[mask.nodata[0]] += 1


def _read(root: Root, tile: Tile, image: Declared, samples: list[list[NDArray[Any]]]) -> None:
    if image.bands * image.height * image.width > MAX_VALUES:
        return
    values_BHW, nodata_BHW = read_bands(tile.image, range(1, image.bands + 1), "band")
    colours = [i for i in range(image.bands) if i + 1 != image.alpha]
    missing_HW = nodata_BHW[colours].all(axis=0)
    root.pixels += image.height * image.width
    root.pixels_without_data += int(np.count_nonzero(missing_HW))
    if image.alpha is not None:
        alpha_HW = values_BHW[image.alpha - 1]
        root.alpha_values += alpha_HW.size
        root.alpha_between += count_between(alpha_HW)
        hidden_HW = ~(alpha_HW > 0)
        nodata_BHW |= hidden_HW
        root.hidden_by_alpha += int(np.count_nonzero(hidden_HW & ~missing_HW))
        root.pixels_without_data += int(np.count_nonzero(hidden_HW & ~missing_HW))
    grid = np.ix_(*sample_grid(image.height, image.width, SAMPLE_VALUES))
    for i, (values_HW, nodata_HW) in enumerate(zip(values_BHW, nodata_BHW, strict=True)):
        if i == len(samples):
            samples.append([])
        values = values_HW[grid].astype(np.float64)
        samples[i].append(values[np.isfinite(values) & ~nodata_HW[grid]])
    root.images_read += 1
    texts = (undeclared_text(tile.image, i + 1, values_BHW[i][~nodata_BHW[i]]) for i in colours)
    root.problems += [text for text in texts if text is not None][:1]


def count_between(alpha_HW: NDArray[Any]) -> int:
    """How many values of a band called alpha lie between 0 and the largest: few of an opacity, most of infrared or another band."""
    return int(np.count_nonzero((alpha_HW > 0) & (alpha_HW < np.fmax.reduce(alpha_HW, axis=None))))


def alpha_notes(headers: Sequence[Headers]) -> list[str]:
    """
    At most one line: the band that these images call alpha is no opacity, by its values, and is about to be taken for it.

    Images of more than `MAX_NOTED` pixels and such as cannot be read are not looked at.
    """
    total = between = 0
    named: tuple[Path, int] | None = None
    for header in headers:
        path, image = header.tile.image, header.image
        if image is None or image.alpha is None or image.height * image.width > MAX_NOTED:
            continue
        try:
            ((alpha_HW,), _) = read_bands(path, [image.alpha], "band")
        except DataError:  # said by whoever needs the image
            continue
        total, between = total + alpha_HW.size, between + count_between(alpha_HW)
        named = named or (path, image.alpha)
    if named is None or between <= MOST_BETWEEN * total:
        return []
    path, band = named
    return [
        f"{path} calls band {band} alpha, and {100 * between / total:.0f} % of its values lie between 0 and the largest, so it hardly is "
        "opacity. If it is infrared or another band, set data.alpha: band; as it is, pixels where it is 0 count as no data"
    ]


def undeclared_text(path: Path, band: int, values: NDArray[Any]) -> str | None:
    """
    What spoils the stretch of a band's values that count as data: NaN, infinity, or a usual fill value far below all others.

    None if there is nothing of the kind. One pixel alone is taken for data.
    """
    odd = int(np.count_nonzero(~np.isfinite(values))) if values.dtype.kind == "f" else 0
    if odd:
        return (
            f"{path} holds NaN or infinity in band {band} at {count_text(odd, 'pixels')}: fill them, or declare NaN as the file's nodata "
            f"(`gdal_edit.py -a_nodata nan {path.name}`)"
        )
    if not values.size or values.dtype.kind == "u":
        return None
    lowest = values.min()
    above = values[values != lowest]
    filled = values.size - above.size
    is_usual = lowest in FILL_VALUES or lowest <= FILL_BELOW
    if not is_usual or filled < 2 or (above.size and above.min() < lowest / 2):
        return None
    return (
        f"{path} holds {lowest:g} in band {band} at {filled} pixels, which looks like no data and is not declared as such: it would be "
        f"taken as data, and spoil the percentiles of the stretch. Declare it (`gdal_edit.py -a_nodata {lowest:g} {path.name}`)"
    )


def _count(root: Root, tile: Tile, codes: MaskCodes | None) -> None:
    assert tile.mask is not None
    values_HW = (
        read_mask_values(tile.mask) if codes is None else read_mask(tile.mask, len(codes.colours), NO_LABEL, codes)
    )
    root.masks_read += 1
    if values_HW.dtype == np.uint8:  # ten times as fast as sorting
        counts = np.bincount(values_HW.reshape(-1))
        values = np.flatnonzero(counts)
        counts = counts[values]
    else:
        values, counts = np.unique(values_HW, return_counts=True)
    root.values.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))


def _range(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(values, PERCENTILES).tolist()
    return low, high
