"""A scene from a stranger reads no other file of the machine and asks no server: drivers by ending, and mosaics of their own folder."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import rasterio

from kdpipe.configs.errors import DataError
from kdpipe.data.scenes import open_scene


def vrt(source, relative=0, kind="SourceFilename"):
    bands = "".join(
        f'<VRTRasterBand dataType="Byte" band="{band}"><SimpleSource><{kind} relativeToVRT="{relative}">{source}</{kind}>'
        f"<SourceBand>{band}</SourceBand></SimpleSource></VRTRasterBand>"
        for band in (1, 2, 3)
    )
    return f'<VRTDataset rasterXSize="32" rasterYSize="32">{bands}</VRTDataset>'


RAW = "".join(
    f'<VRTRasterBand dataType="Byte" band="{band}" subClass="VRTRawRasterBand"><SourceFilename relativetoVRT="0">/etc/passwd'
    "</SourceFilename><ImageOffset>0</ImageOffset><PixelOffset>1</PixelOffset><LineOffset>32</LineOffset></VRTRasterBand>"
    for band in (1, 2, 3)
)


@pytest.fixture
def pixels(tmp_path):
    """Those of `mine/part.tif` and of `theirs.tif` beside that folder."""
    pixels_3HW = np.random.default_rng(0).integers(0, 256, (3, 32, 32), dtype=np.uint8)
    (tmp_path / "mine/deep").mkdir(parents=True)
    for name in ("mine/part.tif", "mine/deep/part.tif", "theirs.tif"):
        with rasterio.open(
            tmp_path / name,
            "w",
            driver="GTiff",
            width=32,
            height=32,
            count=3,
            dtype="uint8",
            crs="EPSG:3857",
            transform=rasterio.Affine(1, 0, 9, 0, -1, 9),
        ) as file:
            file.write(pixels_3HW)
    return pixels_3HW


def read(path):
    with open_scene(str(path), (1, 2, 3), None) as scene:
        return scene.read(0, 32).transpose(2, 0, 1)


@pytest.mark.parametrize("name", ["a.tif", "a.png", "a.jp2", "a.img", "a.dat", "a"])
@pytest.mark.parametrize(
    "content", [f'<VRTDataset rasterXSize="32" rasterYSize="16">{RAW}</VRTDataset>', "<GDAL_WMS></GDAL_WMS>"]
)
def test_a_text_that_names_others_is_no_scene_under_another_ending(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match="cannot read"):
        read(tmp_path / name)


def test_no_server_is_asked(tmp_path):
    asked = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        source = f"/vsicurl/http://127.0.0.1:{server.server_port}/internal"
        for name in ("a.tif", "a.vrt"):
            (tmp_path / name).write_text(vrt(source))
            with pytest.raises(DataError):
                read(tmp_path / name)
        server.shutdown()
    assert asked == []


@pytest.mark.parametrize(
    ("source", "relative"),
    [("/etc/passwd", 0), ("../theirs.tif", 1), ("{folder}/theirs.tif", 0), ("http://localhost/x.tif", 0), ("NETCDF:x.nc:a", 0),
     ("link.tif", 1), ("text.tif", 1), ("outside.vrt", 1), ("&lt;VRTDataset/&gt;", 0)],
)  # fmt: skip
def test_a_mosaic_that_names_others_is_refused(tmp_path, pixels, source, relative):
    (tmp_path / "mine/link.tif").symlink_to(tmp_path / "theirs.tif")
    (tmp_path / "mine/text.tif").write_text(vrt("/etc/passwd"))
    (tmp_path / "mine/outside.vrt").write_text(vrt("../theirs.tif", 1))
    (tmp_path / "mine/all.vrt").write_text(vrt(source.format(folder=tmp_path), relative))
    with pytest.raises(
        DataError, match=r"the VRT .* names '.*', (and only files below its own folder|which is no image)"
    ):
        read(tmp_path / "mine/all.vrt")


@pytest.mark.parametrize(
    ("source", "relative"), [("part.tif", 1), ("deep/part.tif", 1), ("{folder}/mine/part.tif", 0), ("inner.vrt", 1)]
)
def test_a_mosaic_of_its_own_folder_is_read(tmp_path, pixels, source, relative):
    (tmp_path / "mine/inner.vrt").write_text(vrt("deep/part.tif", 1))
    (tmp_path / "mine/all.vrt").write_text(vrt(source.format(folder=tmp_path), relative))
    np.testing.assert_array_equal(read(tmp_path / "mine/all.vrt"), pixels)


def test_a_named_file_may_have_any_ending(tmp_path, pixels):
    (tmp_path / "theirs.tif").rename(tmp_path / "theirs.dat")
    np.testing.assert_array_equal(read(tmp_path / "theirs.dat"), pixels)
