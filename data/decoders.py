"""
Pixels of JPEG files as Pillow decodes them, which is what teachers were trained on. GDAL reads all other formats.

Where a JPEG stores colour at half resolution (4:2:0), GDAL repeats each colour for 2 x 2 pixels, while Pillow and OpenCV interpolate:
aerial images differ by up to 25 of 255. PNG and TIFF are lossless, so that their pixels are the same everywhere; GDAL reads a PNG in
half of Pillow's time, keeps 16 bits of colour, and checks its checksums. A JPEG inside a TIFF, a VRT or another container is GDAL's too.

Shapes: H W pixels of the file, B bands.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from rasterio.io import DatasetReader
    from rasterio.windows import Window

STRIP_PX = 2**20  # copied at once from Pillow, which holds 4 bytes a pixel


def with_pixels_of_pillow(path: Path | str, raster: DatasetReader) -> DatasetReader:
    """
    The open raster itself, or for a JPEG a stand-in whose `read` returns Pillow's pixels; `path` is its file.

    The stand-in decodes the whole image at the first `read` and keeps it, 1 byte a pixel and band.
    """
    return cast("DatasetReader", _Jpeg(path, raster)) if raster.driver == "JPEG" else raster


class _Jpeg:
    """An open JPEG: its header from GDAL, its pixels from Pillow."""

    def __init__(self, path: Path | str, raster: DatasetReader) -> None:
        self._path, self._raster = path, raster
        self._whole_HWB: NDArray[np.uint8] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raster, name)

    def read(self, indexes: Sequence[int], window: Window | None = None) -> NDArray[np.uint8]:
        """The bands `indexes`, counted from 1, uint8 `(B, H, W)` or of the size of `window`; raises as `decode_jpeg` does."""
        if self._whole_HWB is None:
            self._whole_HWB = decode_jpeg(self._path)
            found = self._whole_HWB.shape
            declared = self._raster.height, self._raster.width, self._raster.count
            if found != declared:
                raise OSError(f"its header declares {declared} rows, columns and bands, and decoded it has {found}")
        pixels_HWB = self._whole_HWB
        if window is not None:
            pixels_HWB = pixels_HWB[window.toslices()]  # type: ignore[no-untyped-call, unused-ignore]
        if list(indexes) != list(range(1, pixels_HWB.shape[2] + 1)):
            pixels_HWB = pixels_HWB[..., [index - 1 for index in indexes]]
        return pixels_HWB.transpose(2, 0, 1)


def decode_jpeg(path: Path | str) -> NDArray[np.uint8]:
    """
    The pixels of a JPEG as Pillow decodes them, uint8 `(H, W, B)`: one band for grey, red, green and blue for all others.

    CMYK becomes RGB by Pillow's formula. EXIF orientation and colour profiles are not applied. Raises `OSError` or rasterio's errors if
    the file is damaged.
    """
    # The class itself: `Image.open` would refuse or warn above its own limit, which is a twelfth of `declared.opening.MAX_PIXELS`.
    from PIL.JpegImagePlugin import JpegImageFile

    _require_undamaged(path)
    try:
        with JpegImageFile(path) as picture:
            bands = 1 if picture.mode == "L" else 3
            whole_HWB = np.empty((picture.height, picture.width, bands), dtype=np.uint8)
            rows = max(1, STRIP_PX // picture.width)
            for top in range(0, picture.height, rows):
                strip = picture.crop((0, top, picture.width, min(top + rows, picture.height)))
                strip = strip if strip.mode in ("L", "RGB") else strip.convert("RGB")
                whole_HWB[top : top + rows] = np.asarray(strip).reshape(-1, picture.width, bands)
    except SyntaxError as err:  # what Pillow raises for a header that it does not understand
        raise OSError(str(err)) from err
    return whole_HWB


def _require_undamaged(path: Path | str) -> None:
    """
    Raise rasterio's error if GDAL finds a JPEG damaged; Pillow ignores libjpeg's warnings, and returns grey where codes are missing.

    GDAL decodes it at the lowest resolution that it offers, an eighth at best, which reads every code in half of the time.
    """
    import rasterio

    options = {
        "GDAL_ERROR_ON_LIBJPEG_WARNING": True,
        "GDAL_PAM_ENABLED": False,
        "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",  # an .ovr file beside the JPEG would be read in its place
    }
    with rasterio.Env(**options), quiet_reader()(path, driver=["JPEG"]) as raster:  # type: ignore[no-untyped-call]
        factor = max(raster.overviews(1), default=1)
        raster.read(1, out_shape=(-(-raster.height // factor), -(-raster.width // factor)))


@cache
def quiet_reader(placed: bool = False) -> Any:
    """
    Rasterio's reader with or without the transform, and without a warning about each plain PNG or JPEG that has none.

    `warnings.catch_warnings` is no alternative, as it swaps the filters of the whole process and readers run in threads.
    """
    from rasterio.io import DatasetReader

    class PlacedReader(DatasetReader):  # type: ignore[misc, unused-ignore]
        def _has_gcps_or_rpcs(self) -> bool:
            return True  # rasterio warns unless there are some

    class PixelReader(DatasetReader):  # type: ignore[misc, unused-ignore]
        def read_transform(self) -> list[float]:
            return [0.0, 1.0, 0.0, 0.0, 0.0, 1.0]  # GDAL's identity

    return PlacedReader if placed else PixelReader
