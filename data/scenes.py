"""
Scenes of any size, read by rows, with their place on earth.

A scene is anything that rasterio opens: files, mosaics (VRT), URLs. Its pixels become 8-bit images just as those of training tiles
do (`rasters.py`).
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
from kdpipe.configs.schema import Alpha
from kdpipe.data.declared.drivers import drivers_for
from kdpipe.data.declared.header import called
from kdpipe.data.declared.opening import GDAL_OPTIONS, MAX_PIXELS, explained
from kdpipe.data.declared.plausible import require_plausible
from kdpipe.data.declared.scene import Bands, bands_of_scene
from kdpipe.data.decoders import with_pixels_of_pillow
from kdpipe.data.rasters import Rows, Stretch, Values, require_8_bit
from kdpipe.data.tiles import EXTENSIONS

if TYPE_CHECKING:
    from rasterio.io import DatasetReader

# Files that are taken from a folder; a file that is named may have any suffix.
SCENE_EXTENSIONS = (*EXTENSIONS, ".jp2", ".vrt", ".img")

_SCENE_OPTIONS = GDAL_OPTIONS | {
    "GDAL_CACHEMAX": 256,  # MB, enough for a row of blocks. By default a twentieth of the machine's memory
    "GDAL_NUM_THREADS": "ALL_CPUS",  # to compress the blocks of a map
}
TENTH = 255 / 10  # of the values of an 8-bit image


@dataclass(frozen=True)
class Georeference:
    """The place of pixels: `crs` with `transform` or ground control points, or a sensor's `rpcs`; None is unknown."""

    crs: Any = None
    transform: Any = None
    gcps: Any = None
    rpcs: Any = None


@dataclass
class Seen:
    """
    The values of a scene's pixels with data, as far as they have been read.

    `low` and `high` are the extremes in the file's own units. Of `values` (bands times pixels), `dark` and `bright` became an image's
    darkest or brightest tenth.
    """

    dtype: str
    low: float = np.inf
    high: float = -np.inf
    values: int = 0
    dark: int = 0
    bright: int = 0


class Scene(Rows):
    """
    An open raster. Read its rows in order: a PNG cannot be entered in the middle. A JPEG is kept in memory, decoded.

    `seen` describes the values read so far; `bands_note` is a line for the user if the bands are not simply those of the student.
    """

    def __init__(self, path: str, raster: DatasetReader, bands: Bands, stretch: Stretch, alpha: Alpha) -> None:
        super().__init__(path, raster, bands.numbers, stretch, alpha)
        self.bands_note = bands.note
        self.seen = Seen(raster.dtypes[bands.numbers[0] - 1])

    @property
    def georeference(self) -> Georeference:
        """The scene's place on earth, as far as the file says."""
        gcps, gcps_crs = self._raster.gcps
        transform = self._raster.transform
        return Georeference(
            crs=self._raster.crs or gcps_crs,
            transform=None if transform.is_identity else transform,
            gcps=gcps or None,
            rpcs=self._raster.rpcs,
        )

    def _values(self, top: int, count: int) -> Values:
        with explained(str(self.path), "not a raster"):
            read = super()._values(top, count)
        kept = read.values_BHW[~read.missing_BHW]
        if kept.size:
            self.seen.low = min(self.seen.low, kept.min().item())
            self.seen.high = max(self.seen.high, kept.max().item())
        return read

    def _rows(self, top: int, count: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        image_hWB, data_hW = super()._rows(top, count)
        seen, data_hW1 = self.seen, data_hW[..., None]
        seen.values += int(np.count_nonzero(data_hW)) * image_hWB.shape[-1]
        seen.dark += int(np.count_nonzero((image_hWB < TENTH) & data_hW1))
        seen.bright += int(np.count_nonzero((image_hWB > 255 - TENTH) & data_hW1))
        return image_hWB, data_hW


@contextmanager
def open_scene(
    path: str,
    bands: Sequence[int],
    stretch: Stretch,
    trained_colours: Sequence[str] | None = None,
    alpha: Alpha = "opacity",
    trained_count: int | None = None,
) -> Iterator[Scene]:
    """
    The open scene; `bands`, `stretch` and `alpha` are the student's (see `rasters.read_image`), `trained_colours` what its training images
    called these bands, `trained_count` how many they had (see `bands_of_scene`).

    Raises `DataError` if rasterio cannot open it, it holds several images, lacks a band or calls it alpha where that is opacity, or needs a
    stretch and has none.
    """
    import rasterio

    with rasterio.Env(**_SCENE_OPTIONS):  # type: ignore[no-untyped-call]
        drivers = drivers_for(path)
        with explained(path, "not a raster"):
            raster = open_quietly(path, drivers=drivers)
        with raster:
            if raster.count == 0:
                inside = ", ".join(raster.subdatasets[:3]) or "nothing"
                raise DataError(f"{path} holds no bands but further images inside: name one of them ({inside})")
            require_plausible(path, raster, whole=raster.driver == "JPEG")
            colours = called([colour.name for colour in raster.colorinterp], alpha)
            chosen = bands_of_scene(path, colours, bands, trained_colours, trained_count)
            if stretch is None:
                require_8_bit(path, raster, chosen.numbers)
            if raster.driver == "JPEG":
                _require_decodable(path, raster)
            yield Scene(path, with_pixels_of_pillow(path, raster), chosen, stretch, alpha)


def _require_decodable(path: str, raster: DatasetReader) -> None:
    """Raise `DataError` unless an open JPEG is a local file that fits in memory, where it is decoded whole."""
    remedy = "convert it to GeoTIFF"
    if not Path(path).is_file():
        raise DataError(f"{path} is a JPEG, which is read from a local file only: download it, or {remedy}")
    if raster.height * raster.width > MAX_PIXELS:
        raise DataError(
            f"{path} is a JPEG of {raster.height} x {raster.width} px, more than the {MAX_PIXELS} that are decoded at once: {remedy}"
        )


def list_scenes(inputs: Sequence[str]) -> list[str]:
    """
    The scenes that `inputs` name: files, folders (their files with `SCENE_EXTENSIONS`), glob patterns, URLs.

    They are in the order of the inputs, and by name within a folder or a pattern. Raises `DataError` if an input names nothing or a
    scene is named twice.
    """
    scenes: list[str] = []
    for given in inputs:
        if "://" in given or given.startswith("/vsi") or Path(given).is_file():
            scenes.append(given)
        elif Path(given).is_dir():
            scenes += _in_folder(Path(given))
        else:
            found = sorted(glob.glob(given, recursive=True))  # noqa: PTH207 - the pattern may be absolute
            matches = [match for match in found if Path(match).is_file()]
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


def open_quietly(path: str | Path, mode: str = "r", drivers: Sequence[str] | None = None, **profile: Any) -> Any:
    """An opened raster, without `rasterio.open`'s warning about a missing georeference; `drivers` are all that may read it."""
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning
    from rasterio.io import DatasetReader

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        if drivers is not None:  # `rasterio.open` takes one
            return DatasetReader(path, driver=drivers)
        return rasterio.open(path, mode, **profile)
