"""A raster whose header claims more than its file can hold is refused as a tile, a mask and a scene before memory is asked for."""

import io
import re
import struct
import subprocess
import sys
import textwrap
import zipfile
import zlib

import numpy as np
import pytest
import rasterio
from helpers.files import write_tiff
from PIL import Image

from kdpipe.configs.errors import DataError
from kdpipe.data.declared.header import read_declared
from kdpipe.data.rasters import read_image, read_mask
from kdpipe.data.scenes import Scene, open_scene
from kdpipe.pipeline.prediction.maps import predict
from kdpipe.pipeline.prediction.model import Card, Predictor
from kdpipe.pipeline.verify.reference_files import read_scores

DEFLATE, UNCOMPRESSED = 8, 1


def tiff(height, width, bands=3, compression=UNCOMPRESSED, tile_px=None, data=64):
    """A TIFF whose directory claims a size, with `data` bytes of pixels, in one strip or in tiles that share those bytes."""
    tags = {256: (4, width), 257: (4, height), 258: (3, 8), 259: (3, compression), 262: (3, 1), 277: (3, bands)}
    if tile_px is None:
        tags |= {273: (4, 8), 278: (4, height), 279: (4, data)}
    else:
        tags |= {322: (4, tile_px), 323: (4, tile_px), 324: (4, 8), 325: (4, data)}
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, (kind, value) in sorted(tags.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + b"\0" * data


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(height, width):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")


def jpeg(height, width):
    """A real JPEG of 8 x 8 px whose header claims another size."""
    written = io.BytesIO()
    Image.new("RGB", (8, 8)).save(written, "JPEG")
    data = bytearray(written.getvalue())
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def webp(height, width):
    """The start of a lossless WebP that claims a size."""
    bits = struct.pack("<I", (width - 1) | (height - 1) << 14)
    body = b"WEBPVP8L" + struct.pack("<I", 5) + b"\x2f" + bits + b"\0"
    return b"RIFF" + struct.pack("<I", len(body)) + body


ABSURD = {
    "wide.tif": tiff(4, 2**31 - 1),
    "wide28.tif": tiff(4, 2**28),
    "tall.tif": tiff(2**28, 4),
    "square.tif": tiff(30_000, 30_000),
    "strip.tif": tiff(20_000, 20_000, compression=DEFLATE),
    "block.tif": tiff(30_000, 30_000, tile_px=30_000 // 16 * 16),
    "blocks.tif": tiff(30_000, 30_000, tile_px=16),
    "bands.tif": tiff(10_000, 10_000, bands=200),
    "huge.png": png(30_000, 30_000),
    "huge.jpg": jpeg(30_000, 30_000),
}

READ_ALL = """
    import resource, sys
    from pathlib import Path
    from kdpipe.configs.errors import DataError
    from kdpipe.data.declared.header import read_declared
    from kdpipe.data.rasters import read_image, read_mask, read_bands
    from kdpipe.data.scenes import open_scene
    import PIL.JpegImagePlugin, rasterio

    def scene(path):
        with open_scene(str(path), (1, 2, 3), None) as found:
            found.read(0, min(found.height, 1024))

    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    before = peak()
    for path in sorted(Path(sys.argv[1]).iterdir()):
        for read in (read_declared, read_image, lambda p: read_mask(p, 6, 255), lambda p: read_bands(p, (1,)), scene):
            try:
                read(path)
            except DataError as err:
                assert str(path) in str(err), err
                print(path.name, str(err)[len(str(path)):][:60])
            else:
                sys.exit(f"{path} was read")
    print("MB", peak() - before)
"""


@pytest.mark.long
def test_every_reader_refuses_absurd_sizes_within_a_few_megabytes(tmp_path):
    for name, content in ABSURD.items():
        (tmp_path / name).write_bytes(content)
    command = [sys.executable, "-c", textwrap.dedent(READ_ALL), tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, peak = done.stdout.splitlines()
    assert len(lines) == 5 * len(ABSURD)
    assert int(peak.split()[1]) < 300, done.stdout


def test_a_webp_that_claims_16383_px_a_side_is_no_scene(tmp_path):
    (tmp_path / "x.webp").write_bytes(webp(16383, 16383))
    with pytest.raises(DataError, match=r"x\.webp"), open_scene(str(tmp_path / "x.webp"), (1, 2, 3), None) as scene:
        scene.read(0, 1)


@pytest.mark.parametrize(
    "options",
    [{"compress": "deflate"}, {"compress": "zstd"}, {"compress": "lzw"}, {"compress": "packbits"}, {},
     {"compress": "deflate", "tiled": True}, {"compress": "jpeg", "tiled": True, "photometric": "ycbcr"}],
    ids=str,
)  # fmt: skip
def test_the_emptiest_real_image_of_5000_px_is_read(options, tmp_path):
    path = write_tiff(tmp_path / "x.tif", np.zeros((3, 5000, 5000), np.uint8), **options)
    assert read_declared(path).height == 5000
    with open_scene(str(path), (1, 2, 3), None) as scene:
        assert not scene.read(0, 1).any()


@pytest.mark.long
def test_a_mask_of_one_value_and_a_scene_with_missing_blocks_are_read(tmp_path):
    Image.new("L", (9000, 9000), 255).save(tmp_path / "mask.png")
    assert (read_mask(tmp_path / "mask.png", 6, 255)[::1000] == 255).all()
    profile = {"driver": "GTiff", "width": 200_000, "height": 100_000, "count": 3, "dtype": "uint8", "tiled": True}
    with pytest.warns(rasterio.errors.NotGeoreferencedWarning):
        rasterio.open(tmp_path / "sparse.tif", "w", **profile, sparse_ok=True, compress="deflate").close()
    with open_scene(str(tmp_path / "sparse.tif"), (1, 2, 3), None) as scene:
        assert (scene.height, scene.width) == (100_000, 200_000)
        assert not scene.read(0, 1).any()


def test_a_mosaic_too_wide_for_the_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    write_tiff(tmp_path / "a.tif", np.zeros((3, 8, 8), np.uint8))
    source = '<SimpleSource><SourceFilename relativeToVRT="1">a.tif</SourceFilename><SourceBand>1</SourceBand></SimpleSource>'
    bands = "".join(f'<VRTRasterBand dataType="Byte" band="{band}">{source}</VRTRasterBand>' for band in (1, 2, 3))
    (tmp_path / "m.vrt").write_text(f'<VRTDataset rasterXSize="16000000" rasterYSize="2000">{bands}</VRTDataset>')
    card = Card(
        run="r", step=1, network="n", checkpoint_sha256="0" * 64, classes=["a", "b"], palette=[(0, 0, 0), (1, 1, 1)], ignore_index=255,
        bands=(1, 2, 3), stretch=None, mean=(0, 0, 0), std=(1, 1, 1), sizes="any", kdpipe="0",
    )  # fmt: skip
    monkeypatch.setattr(Scene, "read_with_data", lambda *arguments: pytest.fail("it was read"))
    summary = predict(Predictor("x", card, "cpu", "none", None), [str(tmp_path / "m.vrt")], tmp_path / "out")
    (said,) = summary.failed.values()
    # 1024 rows of 3 bands and of 2 classes, 4 bytes each
    assert re.search(r"m\.vrt is 16000000 px wide: one row of windows takes 180\.2 GB at least, and .* are free", said)


def npy(shape):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + b"\0" * 99


@pytest.mark.parametrize("name", ["t.npy", "t.npz"])
def test_scores_that_claim_terabytes_are_refused(name, tmp_path):
    content = npy((9, 10**6, 10**6))
    if name == "t.npz":
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("scores.npy", content)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(
        DataError, match=r"declares an array of float32 \(9, 1000000, 1000000\), far larger than the scores"
    ):
        read_scores(tmp_path / name, ["a"] * 9, 64, 64)


@pytest.mark.long
def test_scores_that_inflate_to_gigabytes_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "t.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("scores.npy", npy((9, 6000, 6000))[:128] + bytes(10**8))
    with pytest.raises(DataError, match="far larger than the scores of its tile"):
        read_scores(tmp_path / "t.npz", ["a"] * 9, 64, 64)


def test_a_small_honest_image_is_read_as_before(tmp_path):
    Image.new("RGB", (7, 5), (1, 2, 3)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").shape == (5, 7, 3)
