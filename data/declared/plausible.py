"""
What a raster's header claims, compared with what its file can hold, before memory is asked for.

A header of 200 bytes may claim any size, and GDAL and Pillow allocate for it before they read a pixel. Whatever decodes at once, a whole
image or one of a scene's blocks, must therefore be small, or have a file of such a size that the compression could have made it from it.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kdpipe.configs.errors import DataError, count_text

if TYPE_CHECKING:
    from rasterio.io import DatasetReader

# A larger scene than 16 million px a side would take years to predict; the earth at 2.4 m is as wide.
MAX_SIDE_PX = 2**24
FREE_BYTES = 2**26  # decoded at once without a look at the file
FREE_BLOCKS = 2**12
INDEX_BYTES = 4  # that a TIFF has for each block at least, also where the block is missing
# The most pixels that a byte of a file can stand for, times their bytes. Of deflate 1032, times 8 for a PNG of 1 bit a pixel.
_RATIOS = {"NONE": 1, "PACKBITS": 64, "DEFLATE": 1032 * 8, "LZW": 4096 * 8, "JPEG": 2**11, "PNG": 1032 * 8}
_OTHER_RATIO = 2**15  # ZSTD, WebP, LERC and others; all of a constant image
# Read by blocks, which may be missing, so that all of it may be far larger than its file.
_BLOCKWISE = {"GTiff", "VRT", "HFA"}


def require_plausible(path: Path | str, raster: DatasetReader, *, whole: bool) -> None:
    """
    Raise `DataError` where an open raster claims more than its file can hold, or than could ever be read.

    `whole` is whether all of it will be read at once, as a tile or a mask; a scene is read by rows, through its blocks.
    """
    if max(raster.height, raster.width) > MAX_SIDE_PX:
        raise _implausible(path, raster, f"more than the {MAX_SIDE_PX} px that a side may have")
    file_bytes = _file_bytes(path)
    if file_bytes is None or raster.driver == "VRT":  # of a URL the size is not known, and a VRT is a text
        return
    sizes = [np.dtype(_numpy_name(dtype)).itemsize for dtype in raster.dtypes] or [1]
    # Of blocks with pixels interleaved GDAL holds all bands.
    block_bytes = max(prod(shape) for shape in raster.block_shapes or [(1, 1)]) * sum(sizes)
    ratio = _ratio(raster)
    if raster.driver in _BLOCKWISE and block_bytes > max(FREE_BYTES, ratio * file_bytes):
        raise _implausible(path, raster, f"in blocks of {block_bytes} bytes, more than its {file_bytes} bytes can hold")
    if raster.driver == "GTiff" and _blocks(raster) > max(FREE_BLOCKS, file_bytes // INDEX_BYTES):
        raise _implausible(path, raster, f"in {_blocks(raster)} blocks, more than its {file_bytes} bytes can name")
    total_bytes = raster.height * raster.width * sum(sizes)
    whole_ratio = max(ratio, _OTHER_RATIO) if raster.driver in _BLOCKWISE else ratio
    if (whole or raster.driver not in _BLOCKWISE) and total_bytes > max(FREE_BYTES, whole_ratio * file_bytes):
        raise _implausible(path, raster, f"{total_bytes} bytes, more than its {file_bytes} bytes can hold")


def _implausible(path: Path | str, raster: DatasetReader, why: str) -> DataError:
    return DataError(
        f"{path} declares {raster.height} x {raster.width} px of {count_text(raster.count, 'bands')}, {why}: its header is damaged, or "
        "the file was cut "
        "off. Copy it again"
    )


def _file_bytes(path: Path | str) -> int | None:
    """The size of a local file; None for anything else."""
    try:
        return Path(path).stat().st_size
    except (OSError, ValueError):
        return None


def _ratio(raster: DatasetReader) -> int:
    if raster.driver in ("PNG", "JPEG"):
        return _RATIOS[raster.driver]
    compression = raster.tags(ns="IMAGE_STRUCTURE").get("COMPRESSION", "NONE" if raster.driver == "GTiff" else "")
    return _RATIOS.get(compression.rpartition(" ")[2], _OTHER_RATIO)  # `YCbCr JPEG` is JPEG


def _blocks(raster: DatasetReader) -> int:
    """The number of blocks of a band."""
    height, width = raster.block_shapes[0] if raster.block_shapes else (1, 1)
    count: int = -(-raster.height // height) * -(-raster.width // width)
    return count


def _numpy_name(dtype: str) -> str:
    """NumPy's name for one of rasterio's types, some of which are GDAL's own."""
    return {"complex_int16": "complex64"}.get(dtype, dtype)
