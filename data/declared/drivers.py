"""
Which driver of GDAL may open a scene, and which files a mosaic may name.

GDAL takes a file for what its content says. A VRT, or the description of a web service, under the name `scene.tif` would read any file
of the machine, or ask any server. So a local file is opened by the drivers of its ending, and a VRT may only name files below its own
folder. URLs and `/vsi` paths that the user typed are opened as they are.
"""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from kdpipe.configs.errors import DataError
from kdpipe.configs.files import open_file

_IMAGES = ["PNG", "JPEG", "GTiff"]  # any of them under any of their names, as for tiles
_BY_ENDING = {
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".tif", ".tiff"), _IMAGES),
    ".jp2": ["JP2OpenJPEG"],
    ".img": ["HFA"],
    ".vrt": ["VRT"],
}
# Drivers whose files name other files, servers or data bases.
_REFERRING = {
    "VRT", "GTI", "GDALG", "DERIVED", "WMS", "WMTS", "WCS", "HTTP", "OGCAPI", "STACIT", "STACTA", "PLMOSAIC", "DAAS", "EEDAI", "NGW",
    "TileDB", "PostGISRaster", "KMLSUPEROVERLAY", "SQLite", "CAD", "PDF", "MRF", "ISIS2", "ISIS3", "PDS", "PDS4", "EEDA", "OSM", "ESRIC",
}  # fmt: skip
_MOST_NESTED = 4  # VRTs in VRTs
_SOURCES = {"SourceFilename", "SourceDataset", "MSDataset", "Dataset"}  # elements of a VRT whose text is a data set


def drivers_for(path: str) -> list[str] | None:
    """
    The drivers that may open a scene; None for a URL or a `/vsi` path, which may be opened by all.

    Raises `DataError` for a VRT that names anything but files below its own folder.
    """
    if "://" in path or path.startswith("/vsi"):
        return None
    ending = Path(path).suffix.lower()
    if ending == ".vrt":
        _check_vrt(Path(path), Path(path).resolve().parent, _MOST_NESTED)
    if ending in _BY_ENDING:
        return _BY_ENDING[ending]
    import rasterio

    with rasterio.Env() as env:  # type: ignore[no-untyped-call]
        return sorted(set(env.drivers()) - _REFERRING)


def _check_vrt(path: Path, home: Path, nested: int) -> None:
    try:
        with open_file(path) as file:
            root = ElementTree.fromstring(file.read())
    except (OSError, ValueError, ElementTree.ParseError) as err:
        raise DataError(f"cannot read {path}, which is damaged or not a VRT: {err}") from err
    for element in root.iter():
        if element.tag not in _SOURCES or element.text is None:
            continue
        name = element.text.strip()
        source = Path(name)
        if element.get("relativeToVRT", element.get("relativetoVRT", "0")) == "1":
            source = path.parent / name
        if "://" in name or name.startswith(("/vsi", "<")) or ":" in name or not source.resolve().is_relative_to(home):
            raise DataError(
                f"the VRT {path} names {name!r}, and only files below its own folder, {home}, are read: put the files there, or build "
                "the VRT beside them"
            )
        if source.suffix.lower() == ".vrt":
            if nested == 0:
                raise DataError(
                    f"the VRT {path} holds VRTs in VRTs, more than {_MOST_NESTED} deep: name their files in one"
                )
            _check_vrt(source, home, nested - 1)
        elif source.is_file():
            with open_file(source) as file:
                if file.read(256).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
                    raise DataError(
                        f"the VRT {path} names {name!r}, which is no image but a text that would name others"
                    )
