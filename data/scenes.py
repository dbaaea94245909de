"""
A scene of any size, read in bands of rows, with its place on earth and what of it is no data.

Anything rasterio opens: files, mosaics (VRT), URLs. Pixels become 8-bit images just as those of training tiles do
(`rasters.py`). Read rows in order and each of them once: JPEG and PNG cannot be entered in the middle.
"""

from __future__ import annotations

import glob
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kdpipe.configs.errors import DataError
from kdpipe.data.rasters import Stretch, bands_and_nodata, require_8_bit, stretched
from kdpipe.data.tiles import EXTENSIONS

if TYPE_CHECKING:
    from rasterio.io import DatasetReader

# What is taken from a folder; a file that is named may be any.
SCENE_EXTENSIONS = (*EXTENSIONS, ".jp2", ".vrt", ".img")

GDAL_OPTIONS: dict[str, Any] = {
    "GDAL_ERROR_ON_LIBJPEG_WARNING": True,  # by default a truncated JPEG is a warning, and its rest is grey
    "GDAL_PNG_WHOLE_IMAGE_OPTIM": False,  # the fast path of GDAL 3.10 returns a truncated PNG as noise, without a word
    "GDAL_CACHEMAX": 256,  # MB. By default a twentieth of the machine's memory, whatever else needs it; a row of tiles is enough
    "GDAL_NUM_THREADS": "ALL_CPUS",  # to compress the map's tiles
}


@dataclass(frozen=True)
class Georeference:
    """Where pixels lie: `crs` with `transform` or with ground control points, or the `rpcs` of a sensor; None is unknown."""

    crs: Any = None
    transform: Any = None
    gcps: Any = None
    rpcs: Any = None


class Scene:
    """An open raster of `height` x `width` px."""

    def __init__(self, path: str, raster: DatasetReader, bands: Sequence[int], stretch: Stretch) -> None:
        from rasterio.enums import MaskFlags

        self.path = path
        self.height, self.width = raster.height, raster.width
        self._raster, self._bands, self._stretch = raster, list(bands), stretch
        flags = raster.mask_flag_enums[0]
        self._masked = MaskFlags.per_dataset in flags or MaskFlags.alpha in flags

    @property
    def georeference(self) -> Georeference:
        """Where the scene lies, as far as the file says."""
        gcps, gcps_crs = self._raster.gcps
        transform = self._raster.transform
        return Georeference(
            crs=self._raster.crs or gcps_crs,
            transform=None if transform.is_identity else transform,
            gcps=gcps or None,
            rpcs=self._raster.rpcs,
        )

    def read(self, top: int, rows: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """
        Rows `top .. top + rows` as a network sees them, uint8 `(rows, W, 3)`, and which pixels hold data, bool `(rows, W)`.

        A pixel holds none where the file's alpha band or mask is 0, or where each of the bands is the nodata that is declared for it.
        Raises `DataError` where the file is damaged, or its values are none that a stretch is known for.
        """
        from rasterio.windows import Window

        window = Window(0, top, self.width, rows)  # type: ignore[no-untyped-call, unused-ignore]
        with _explained(self.path):
            values_BHW, nodata_BHW = bands_and_nodata(self.path, self._raster, self._bands, window)
            data_HW: NDArray[np.bool_] = np.logical_or.reduce(~nodata_BHW, axis=0)
            if self._masked:
                np.logical_and(data_HW, self._raster.read_masks(self._bands[0], window=window) > 0, out=data_HW)
        if self._stretch is None:
            image_HWB: NDArray[np.uint8] = np.ascontiguousarray(values_BHW.transpose(1, 2, 0))
        else:
            image_HWB = stretched(self.path, self._bands, values_BHW, nodata_BHW, self._stretch, first_row=top)
        return image_HWB, data_HW


@contextmanager
def open_scene(path: str, bands: Sequence[int], stretch: Stretch) -> Iterator[Scene]:
    """
    The open scene; `bands` and `stretch` are those that the student was trained with (`rasters.read_image`).

    Raises `DataError` where rasterio cannot open it, it has several images inside, it lacks a band, or needs a stretch and has none.
    """
    import rasterio

    with rasterio.Env(**GDAL_OPTIONS):  # type: ignore[no-untyped-call]
        with _explained(path):
            raster = open_quietly(path)
        with raster:
            if raster.count == 0:
                inside = ", ".join(raster.subdatasets[:3]) or "nothing"
                raise DataError(f"{path} holds no bands but further images inside: name one of them ({inside})")
            if max(bands) > raster.count:
                raise DataError(f"{path} has {raster.count} bands, and the student was trained on bands {list(bands)}")
            if stretch is None:
                require_8_bit(path, raster, bands)
            yield Scene(path, raster, bands, stretch)


def list_scenes(inputs: Sequence[str]) -> list[str]:
    """
    The scenes that `inputs` name: files, folders (the files in them that end in `SCENE_EXTENSIONS`), glob patterns, URLs.

    In the order of the inputs, and within a folder or a pattern by name. Raises `DataError` for an input that names nothing, and
    where a scene is named twice.
    """
    scenes: list[str] = []
    for given in inputs:
        if "://" in given or given.startswith("/vsi") or Path(given).is_file():
            scenes.append(given)
        elif Path(given).is_dir():
            scenes += _in_folder(Path(given))
        else:
            matches = [match for match in sorted(glob.glob(given, recursive=True)) if Path(match).is_file()]  # noqa: PTH207  one that may be absolute
            if not matches:
                raise DataError(
                    f"there is no file or folder {Path(given).absolute()}, and as a pattern it matches nothing"
                )
            scenes += matches
    seen: dict[str, str] = {}
    for scene in scenes:
        place = str(Path(scene).resolve()) if Path(scene).exists() else scene
        if place in seen:
            raise DataError(f"the scene {scene} is named twice, as {seen[place]} and as {scene}: name it once")
        seen[place] = scene
    return scenes


def _in_folder(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file() and not entry.name.startswith("."))
    scenes = [str(folder / name) for name in names if Path(name).suffix.lower() in SCENE_EXTENSIONS]
    if not scenes:
        raise DataError(
            f"no scenes in {folder}: expected files that end in {', '.join(SCENE_EXTENSIONS)}; name others one by one"
        )
    return scenes


def open_quietly(path: str | Path, mode: str = "r", **profile: Any) -> Any:
    """What `rasterio.open` returns; that an image has no place on earth is no reason for a warning."""
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        return rasterio.open(path, mode, **profile)


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """What GDAL says against a file, as a `DataError`."""
    from rasterio.errors import RasterioError

    try:
        yield
    except (RasterioError, OSError) as err:
        reason = err.__cause__ or err  # rasterio's own text is "Read failed. See previous exception for details."
        raise DataError(f"cannot read {path}, which is damaged or no raster: {reason}") from err
