"""Files that tests write and compare."""

import warnings
from pathlib import Path

import numpy as np
import rasterio
from affine import Affine
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_image(path: Path, height: int, width: int, seed: int = 0) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)


def write_tiff(path, bands_BHW, colours=None, **profile):
    """Write a GeoTIFF; `colours` are GDAL's names for its bands, such as `red`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count, height, width = bands_BHW.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(
            path, "w", driver="GTiff", count=count, height=height, width=width, dtype=bands_BHW.dtype, **profile
        ) as raster:
            if colours:
                raster.colorinterp = [ColorInterp[name] for name in colours]
            raster.write(bands_BHW)
    return path


PLACE = Affine(0.5, 0, 320000, 0, -0.5, 2790000)


def write_scene(path, pixels_BHW, *, mask=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {
        "driver": "GTiff",
        "count": len(pixels_BHW),
        "dtype": pixels_BHW.dtype,
        "transform": PLACE,
        "crs": "EPSG:32640",
    }
    profile |= {"height": pixels_BHW.shape[1], "width": pixels_BHW.shape[2], **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "w", **profile) as raster:
            raster.write(pixels_BHW)
            if mask is not None:
                raster.write_mask(mask)
    return path


def read_raster(path):
    """All bands, `(B, H, W)`, without a warning about a missing georeference."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path) as raster:
            return raster.read()


def noise(height, width, bands=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (bands, height, width), dtype=np.uint8)


def flip(path):
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
