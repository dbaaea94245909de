"""
Pixels of image and mask files. A damaged file is an error, never an image with a grey half.

PNG, TIFF and GeoTIFF through rasterio, JPEG through Pillow (`decoders.py`). Every function opens the file anew and may be
called from any thread. Not covered: georeferencing and other formats (`scenes.py`), and writing (`maps.py`).

Shapes: B bands, H W pixels of the file, h rows that are read at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kdpipe.configs.errors import DataError, count_text
from kdpipe.configs.schema import Alpha
from kdpipe.configs.schema.labels import MaskCodes
from kdpipe.data.declared.header import declared_by
from kdpipe.data.declared.opening import opened
from kdpipe.data.declared.tile import RECIPE, lacks_bands_text, mask_faults, no_stretch_text

if TYPE_CHECKING:
    from rasterio.io import DatasetReader
    from rasterio.windows import Window

Stretch = Sequence[tuple[float, float]] | None
"""A `(low, high)` for each band that is read, in the files' own units; None takes 8-bit values as they are."""

_SHOWN_VALUES = 5


def image_size(path: Path) -> tuple[int, int]:
    """
    `(H, W)` in px, from the file's header alone.

    Raises `DataError` if the file is missing, is not a PNG, JPEG or TIFF, or declares more than `MAX_PIXELS`.
    """
    with opened(path) as raster:
        return raster.height, raster.width


def read_image(
    path: Path, bands: Sequence[int] = (1, 2, 3), stretch: Stretch = None, alpha: Alpha = "opacity"
) -> NDArray[np.uint8]:
    """
    The image as uint8 `(H, W, B)`, values 0..255.

    Args:
        path: an image file of 8-bit, 16-bit, 32-bit or float bands.
        bands: the numbers of the bands to read, counted from 1, in this order; others are left out.
        stretch: a `(low, high)` for each band, in the file's own units: low becomes 0, high 255, linearly, clipped and
            rounded (half to even). The declared nodata becomes 0. None takes 8-bit values as they are and refuses all others.
        alpha: `data.alpha`, whether a band that the file calls alpha hides pixels (`opacity`) or is an ordinary `band`.

    Raises `DataError` if the file is missing, damaged or larger than `MAX_PIXELS`, lacks a band, needs a stretch and has
    none, or holds NaN or infinity other than its declared nodata.
    """
    return read_image_with_data(path, bands, stretch, alpha)[0]


def read_image_with_data(
    path: Path, bands: Sequence[int] = (1, 2, 3), stretch: Stretch = None, alpha: Alpha = "opacity"
) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
    """
    The image as `read_image` returns it, and which pixels hold data, bool `(H, W)`; None if all do.

    A pixel holds none where a band that is opacity or a mask of the file is 0, or where all `bands` are their declared nodata.
    """
    with opened(path) as raster:
        if stretch is None:
            require_8_bit(path, raster, bands)
            if not _may_lack_data(raster, bands, alpha):
                return np.ascontiguousarray(_pixels(path, raster, bands).transpose(1, 2, 0)), None
        read = _read(path, raster, bands, alpha)
    image_HWB = _image(path, bands, read, stretch)
    return np.ascontiguousarray(image_HWB), _none_if_whole(read.data_HW)


def read_data(path: Path, bands: Sequence[int] = (1, 2, 3), alpha: Alpha = "opacity") -> NDArray[np.bool_] | None:
    """The second of `read_image_with_data`; decodes no pixel of a file that declares neither nodata nor a mask nor opacity."""
    with opened(path) as raster:
        if not _may_lack_data(raster, bands, alpha):
            return None
        return _none_if_whole(_read(path, raster, bands, alpha).data_HW)


@dataclass(frozen=True)
class Values:
    """
    Bands as a file stores them, `(B, H, W)` in its dtype, where each is its declared nodata, and which pixels are hidden.

    `hidden_HW` is where a band that is opacity or a mask of the file is 0; None if it has neither.
    """

    values_BHW: NDArray[Any]
    nodata_BHW: NDArray[np.bool_]
    hidden_HW: NDArray[np.bool_] | None

    @property
    def missing_BHW(self) -> NDArray[np.bool_]:
        """Where a value is no data, for either reason."""
        return self.nodata_BHW if self.hidden_HW is None else self.nodata_BHW | self.hidden_HW

    @property
    def data_HW(self) -> NDArray[np.bool_]:
        """Which pixels hold data in one band at least."""
        data_HW: NDArray[np.bool_] = ~np.logical_and.reduce(self.missing_BHW, axis=0)
        return data_HW


class Rows:
    """An open image, read by rows from the top down. The rows read last are kept, as the next call may need them again."""

    def __init__(
        self, path: Path | str, raster: DatasetReader, bands: Sequence[int], stretch: Stretch, alpha: Alpha
    ) -> None:
        self.path, self.height, self.width = path, raster.height, raster.width
        self._raster, self._bands, self._stretch, self._alpha = raster, list(bands), stretch, alpha
        self._top = 0
        self._kept_hWB = np.empty((0, raster.width, len(bands)), dtype=np.uint8)
        self._kept_data_hW = np.empty((0, raster.width), dtype=np.bool_)

    def read(self, top: int, bottom: int) -> NDArray[np.uint8]:
        """Rows `top .. bottom` of the image, uint8 `(bottom - top, W, B)`; raises `DataError` as `read_image` does."""
        return self.read_with_data(top, bottom)[0]

    def read_with_data(self, top: int, bottom: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """The rows as `read` returns them, and which pixels hold data (see `read_image_with_data`), bool `(bottom - top, W)`."""
        end = self._top + len(self._kept_hWB)
        kept = slice(top - self._top, None) if self._top <= top <= end else slice(0, 0)
        image_hWB, data_hW = self._kept_hWB[kept], self._kept_data_hW[kept]
        first = top + len(image_hWB)
        if first < bottom:
            read_hWB, read_data_hW = self._rows(first, bottom - first)
            image_hWB, data_hW = np.concatenate([image_hWB, read_hWB]), np.concatenate([data_hW, read_data_hW])
        self._top, self._kept_hWB, self._kept_data_hW = top, image_hWB, data_hW
        return image_hWB[: bottom - top], data_hW[: bottom - top]

    def _rows(self, top: int, count: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        read = self._values(top, count)
        return _image(self.path, self._bands, read, self._stretch, first_row=top), read.data_HW

    def _values(self, top: int, count: int) -> Values:
        from rasterio.windows import Window

        window = Window(0, top, self.width, count)  # type: ignore[no-untyped-call, unused-ignore]
        return _read(self.path, self._raster, self._bands, self._alpha, window)


@contextmanager
def open_rows(
    path: Path, bands: Sequence[int] = (1, 2, 3), stretch: Stretch = None, alpha: Alpha = "opacity"
) -> Iterator[Rows]:
    """The image of `read_image`, to be read by rows; opening and reading raise `DataError` as there."""
    with opened(path) as raster:
        if stretch is None:
            require_8_bit(path, raster, bands)
        yield Rows(path, raster, bands, stretch, alpha)


def _image(
    path: Path | str, bands: Sequence[int], read: Values, stretch: Stretch, first_row: int = 0
) -> NDArray[np.uint8]:
    """
    The image that `read_image` describes, of values from row `first_row` of the file on. What hidden pixels store stays, if finite.

    Raises `DataError` if pixels that are not hidden hold NaN or infinity other than nodata.
    """
    if stretch is None:
        return read.values_BHW.transpose(1, 2, 0)
    image_HWB = np.empty((*read.values_BHW.shape[1:], len(bands)), dtype=np.uint8)
    for i, (band, (low, high)) in enumerate(zip(bands, stretch, strict=True)):
        values_HW, nodata_HW = read.values_BHW[i], read.nodata_BHW[i]
        if read.hidden_HW is not None and values_HW.dtype.kind == "f":
            nodata_HW = nodata_HW | (read.hidden_HW & ~np.isfinite(values_HW))
        _require_finite(path, band, values_HW, nodata_HW, first_row)
        # float32 holds every 16-bit integer; wider ones are computed in float64.
        values_HW = np.where(nodata_HW, np.zeros((), values_HW.dtype), values_HW)
        values_HW = values_HW.astype(np.result_type(values_HW.dtype, np.float32), copy=False)
        scaled_HW = (np.clip(values_HW, low, high) - low) * (255 / (high - low))
        image_HWB[..., i] = np.where(nodata_HW, 0, np.rint(scaled_HW).clip(0, 255))
    return image_HWB


def read_mask(path: Path, num_classes: int, ignore_index: int, codes: MaskCodes | None = None) -> NDArray[np.int32]:
    """
    The labels, int32 `(H, W)`: class indices 0..num_classes-1, or `ignore_index`. Indices into a palette are labels.

    `codes` say what other values or colours stand for. Raises `DataError` as `read_mask_values` does, and for a value that is neither a
    class nor `ignore_index`, or a value or colour that `codes` lack.
    """
    if codes is not None and codes.colours:
        return _decoded(
            path, _mask_colours(path), {_packed(rgb): i for rgb, i in codes.colours.items()}, "data.colours"
        )
    values_HW = read_mask_values(path)
    if codes is not None and codes.values:
        known = codes.values if ignore_index in codes.values else {**codes.values, ignore_index: ignore_index}
        return _decoded(path, values_HW, known, "data.remap")
    foreign_HW = ((values_HW < 0) | (values_HW >= num_classes)) & (values_HW != ignore_index)
    if foreign_HW.any():
        found = np.unique(values_HW[foreign_HW]).tolist()
        shown = ", ".join(map(str, found[:_SHOWN_VALUES])) + (", …" if len(found) > _SHOWN_VALUES else "")
        raise DataError(
            f"the mask {path} holds {shown}, neither a class (0..{num_classes - 1}) nor ignore_index {ignore_index}: "
            "give each value its class in data.remap, or correct classes.names or classes.ignore_index (class_map maps the teacher's "
            f"predictions, never masks). If these are greys or colours, {RECIPE}"
        )
    labels_HW: NDArray[np.int32] = values_HW.astype(np.int32)
    return labels_HW


def _decoded(path: Path, codes_HW: NDArray[Any], known: Mapping[int, int], key: str) -> NDArray[np.int32]:
    """The label of each code, int32 `(H, W)`; raises `DataError` for codes that are not `known`."""
    labels_HW = np.full(codes_HW.shape, -1, dtype=np.int32)
    for code, label in known.items():
        labels_HW[codes_HW == code] = label
    foreign_HW = labels_HW < 0
    if foreign_HW.any():
        found, counts = np.unique(codes_HW[foreign_HW], return_counts=True)
        first = found[np.argsort(-counts, kind="stable")][:_SHOWN_VALUES].tolist()
        shown = [list(_unpacked(code)) if key == "data.colours" else code for code in first]
        what = "colours" if key == "data.colours" else "values"
        raise DataError(
            f"the mask {path} holds {count_text(len(found), what)} that {key} does not list, on {counts.sum()} of its pixels: "
            f"{', '.join(map(str, shown))}{', …' if len(found) > len(shown) else ''}. Add each with its class, or with `ignore`"
        )
    return labels_HW


def _packed(rgb: Sequence[int]) -> int:
    red, green, blue = rgb
    return (red << 16) | (green << 8) | blue


def _unpacked(code: int) -> tuple[int, int, int]:
    return code >> 16, (code >> 8) & 255, code & 255


def _mask_colours(path: Path) -> NDArray[np.int32]:
    """The colours of a mask as `_packed` numbers, int32 `(H, W)`, of three bands or of a palette."""
    with opened(path) as raster:
        for fault in mask_faults(path, declared_by(raster), of_colours=True):
            raise DataError(fault)
        if raster.count == 1:
            palette = np.full(2 ** (8 * np.dtype(raster.dtypes[0]).itemsize), -1, dtype=np.int32)
            for index, colour in raster.colormap(1).items():
                palette[index] = _packed(colour[:3])
            codes_HW: NDArray[np.int32] = palette[_pixels(path, raster, [1])[0]]
            return codes_HW
        red, green, blue = _pixels(path, raster, [1, 2, 3]).astype(np.int32)
        packed_HW: NDArray[np.int32] = (red << 16) | (green << 8) | blue
        return packed_HW


def read_mask_values(path: Path) -> NDArray[Any]:
    """
    The raw values of a mask, `(H, W)` in the file's integer type, whether or not they are classes.

    Raises `DataError` if the file is missing, damaged or larger than `MAX_PIXELS`, is compressed with loss (which alters indices),
    has several bands, or does not hold integers.
    """
    with opened(path) as raster:
        for fault in mask_faults(path, declared_by(raster)):
            raise DataError(fault)
        values_HW: NDArray[Any] = _pixels(path, raster, [1])[0]
        return values_HW


def read_bands(path: Path, bands: Sequence[int], alpha: Alpha = "opacity") -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """
    The raw bands, `(B, H, W)` in the file's dtype, and where they hold no data, bool `(B, H, W)`.

    A value is no data if it is the band's declared nodata, or if a band that is opacity or a mask of the file is 0 at its
    pixel. Raises `DataError` if the file is missing, damaged or larger than `MAX_PIXELS`, or lacks a band.
    """
    with opened(path) as raster:
        read = _read(path, raster, bands, alpha)
    return read.values_BHW, read.missing_BHW


def _pixels(
    path: Path | str, raster: DatasetReader, bands: Sequence[int], window: Window | None = None
) -> NDArray[Any]:
    missing = [band for band in bands if band > raster.count]
    if missing:
        raise DataError(lacks_bands_text(path, raster.count, bands))
    pixels: NDArray[Any] = raster.read(list(bands), window=window)
    return pixels


def _read(
    path: Path | str, raster: DatasetReader, bands: Sequence[int], alpha: Alpha, window: Window | None = None
) -> Values:
    """The bands of an open file, within `window` if given; raises `DataError` as `read_bands` does."""
    values_BHW = _pixels(path, raster, bands, window)
    if values_BHW.dtype.kind not in "iuf":
        raise DataError(f"{path} holds {values_BHW.dtype} values; an image should hold integers or floats")
    nodata_BHW = np.zeros(values_BHW.shape, dtype=np.bool_)
    for i, band in enumerate(bands):
        nodata = raster.nodatavals[band - 1]
        if nodata is None:
            continue
        with np.errstate(over="ignore"):  # a nodata beyond float32, such as -1.8e308, is -inf there
            nodata_BHW[i] = np.isnan(values_BHW[i]) if np.isnan(nodata) else values_BHW[i] == nodata
    hidden = [~(mask_HW > 0) for mask_HW in _masks(raster, bands, alpha, window)]  # also where a float alpha is NaN
    return Values(values_BHW, nodata_BHW, np.logical_or.reduce(hidden) if hidden else None)


def _masks(raster: DatasetReader, bands: Sequence[int], alpha: Alpha, window: Window | None) -> Iterator[NDArray[Any]]:
    """The bands that are opacity and the masks of an open file, each `(H, W)` and 0 where there is no data."""
    from rasterio.enums import MaskFlags

    # By its name alone: GDAL takes alpha for a mask only where it is the 2nd of 2 or the 4th of 4 bands, and no nodata is declared.
    for number, meaning in enumerate(raster.colorinterp, start=1):
        if meaning.name == "alpha" and alpha == "opacity":
            yield raster.read(number, window=window)
    flags = raster.mask_flag_enums[bands[0] - 1]
    if MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags:
        yield raster.read_masks(bands[0], window=window)


def _may_lack_data(raster: DatasetReader, bands: Sequence[int], alpha: Alpha) -> bool:
    """Whether an open file declares nodata for one of `bands`, a mask or opacity."""
    from rasterio.enums import MaskFlags

    if alpha == "opacity" and any(meaning.name == "alpha" for meaning in raster.colorinterp):
        return True
    whole = {MaskFlags.all_valid, MaskFlags.alpha}  # GDAL's mask by alpha alone, which is no opacity here
    return any(whole.isdisjoint(raster.mask_flag_enums[band - 1]) for band in bands if band <= raster.count)


def _none_if_whole(data_HW: NDArray[np.bool_]) -> NDArray[np.bool_] | None:
    return None if data_HW.all() else data_HW


def require_8_bit(path: Path | str, raster: DatasetReader, bands: Sequence[int]) -> None:
    """Raise `DataError` if `bands` of an open file are not uint8 and so need a stretch."""
    dtypes = {raster.dtypes[band - 1] for band in bands if band <= raster.count}
    wider = sorted(dtypes - {"uint8"})
    if wider:
        raise DataError(no_stretch_text(path, wider))


def _require_finite(
    path: Path | str, band: int, values_HW: NDArray[Any], nodata_HW: NDArray[np.bool_], first_row: int
) -> None:
    strange_HW = ~np.isfinite(values_HW) & ~nodata_HW
    if strange_HW.any():
        row, column = np.argwhere(strange_HW)[0].tolist()
        raise DataError(
            f"{path} holds NaN or infinity in band {band} at {count_text(int(np.count_nonzero(strange_HW)), 'pixels')}, the first at row "
            f"{first_row + row}, "
            f"column {column}: fill them, or declare them as the file's nodata"
        )
