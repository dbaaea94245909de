"""
Opening PNG, JPEG and TIFF files: how GDAL is set, and its errors as one `DataError`.

Side files (`.aux.xml`, `.msk`, world files) are opened by name. No folder is listed, and nothing is written.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdpipe.configs.errors import DataError
from kdpipe.data.declared.plausible import require_plausible
from kdpipe.data.decoders import quiet_reader, with_pixels_of_pillow

if TYPE_CHECKING:
    from rasterio.io import DatasetReader

# 32768 x 32768. An RGB image of that size takes 3 GiB and its float32 soft target of 6 classes 24 GiB. A larger one is a mosaic
# still to be cut into tiles, or has a false header; it is refused before anything is allocated.
MAX_PIXELS = 2**30

_DRIVERS = ["PNG", "JPEG", "GTiff"]  # no VRT or the like, which could name any other file or URL
GDAL_OPTIONS: dict[str, Any] = {
    "GDAL_ERROR_ON_LIBJPEG_WARNING": True,  # by default a truncated JPEG is a warning, and its rest is grey
    "GDAL_PNG_WHOLE_IMAGE_OPTIM": False,  # the fast path of GDAL 3.10 silently returns a truncated PNG as noise
}
_TILE_OPTIONS = GDAL_OPTIONS | {
    # .aux.xml files are read: they may declare nodata or colours. GDAL writes them only where statistics or histograms are asked of it.
    "GDAL_PAM_ENABLED": True,
    # Side files are opened by name. By default each open lists the folder, which may hold a million files.
    "GDAL_DISABLE_READDIR_ON_OPEN": "TRUE",
    "GDAL_CACHEMAX": 64,  # MB. By default a twentieth of the machine's memory; here everything is read once
}


_held = threading.local()


@contextmanager
def settings_held() -> Iterator[None]:
    """GDAL's settings for all files that this thread opens within the context: setting them anew takes half of the time of a header."""
    with _settings():
        _held.now = True
        try:
            yield
        finally:
            _held.now = False


def _settings() -> AbstractContextManager[Any]:
    import rasterio

    if getattr(_held, "now", False):
        return nullcontext()
    environment: AbstractContextManager[Any] = rasterio.Env(**_TILE_OPTIONS)  # type: ignore[no-untyped-call]
    return environment


@contextmanager
def opened(path: Path, *, placed: bool = False) -> Iterator[DatasetReader]:
    """
    The open file, and with `placed` its transform, for which world files are looked up too.

    Errors of GDAL, on opening or in the block, become a `DataError`, as do a missing file and one of more than `MAX_PIXELS`.
    """
    if not path.is_file():
        raise DataError(f"there is no file {path.absolute()}")
    with (
        explained(path, "not a PNG, JPEG or TIFF"),
        _settings(),
        quiet_reader(placed)(path, driver=_DRIVERS) as raster,
    ):
        if raster.height * raster.width > MAX_PIXELS:
            raise DataError(
                f"{path} declares {raster.height} x {raster.width} px, more than the {MAX_PIXELS} that a tile may have: "
                "cut it into tiles"
            )
        require_plausible(path, raster, whole=True)
        yield with_pixels_of_pillow(path, raster)


@contextmanager
def explained(path: Path | str, otherwise: str) -> Iterator[None]:
    """Turn errors of GDAL and of the system about a file into a `DataError`; `otherwise` is what the file may be if not damaged."""
    from rasterio.errors import RasterioError

    try:
        yield
    except (RasterioError, OSError) as err:
        reason = err.__cause__ or err  # rasterio's own text is "Read failed. See previous exception for details."
        raise DataError(f"cannot read {path}, which is damaged or {otherwise}: {reason}") from err
