"""Pixels of each format against Pillow's own (JPEG, PNG) or rasterio's own (TIFF): whole, by rows, and as scenes."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import rasterio
from helpers.files import read_raster, write_tiff
from PIL import Image, ImageFile

from kdpipe.configs.errors import DataError
from kdpipe.data import decoders, scenes
from kdpipe.data.rasters import image_size, open_rows, read_bands, read_image, read_mask_values
from kdpipe.data.scenes import open_scene

DUBAI = Path(__file__).parents[3] / "shared/data/dubai/Train/images"
RNG = np.random.default_rng(0)
H, W = 75, 117  # odd: the last chroma sample of 4:2:0 stands for one pixel alone


def photo(height=H, width=W):
    """Colours that change from pixel to pixel, which is where decoders differ."""
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def saved(path, pixels, mode=None, **options):
    picture = Image.fromarray(pixels)
    (picture.convert(mode) if mode else picture).save(path, **options)
    return path


def pillow(path, mode=None):
    """Pillow's pixels `(H, W, B)`."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert(mode) if mode else picture)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def assert_reads(path, expected_HWB, bands, stretch=None):
    """The image is `expected` when read whole, by rows of 7, and as a scene."""
    np.testing.assert_array_equal(read_image(path, bands, stretch), expected_HWB)
    with open_rows(path, bands, stretch) as rows:
        parts = [rows.read(top, min(top + 7, rows.height)) for top in range(0, rows.height, 7)]
        np.testing.assert_array_equal(np.concatenate(parts), expected_HWB)
    with open_scene(str(path), bands, stretch) as scene:
        overlapping = [scene.read(top, min(top + 9, scene.height))[:7] for top in range(0, scene.height, 7)]
        np.testing.assert_array_equal(np.concatenate(overlapping), expected_HWB)


JPEGS = {
    "4:2:0": {"subsampling": "4:2:0"},
    "4:2:2": {"subsampling": "4:2:2"},
    "4:4:4": {"subsampling": "4:4:4"},
    "progressive": {"progressive": True},
    "optimised": {"optimize": True, "quality": 30},
    "restart markers": {"restart_marker_rows": 1},
    "stored as RGB": {"keep_rgb": True},
}


@pytest.mark.parametrize("kind", JPEGS)
def test_a_jpeg_has_pillow_s_pixels(tmp_path, kind):
    path = saved(tmp_path / "a.jpg", photo(), **JPEGS[kind])
    assert_reads(path, pillow(path), (1, 2, 3))
    assert_reads(path, pillow(path)[..., [2, 0, 0]], (3, 1, 1))
    assert image_size(path) == (H, W)


def test_half_resolved_chroma_is_where_gdal_s_pixels_differ(tmp_path):
    path = saved(tmp_path / "a.jpg", photo(), subsampling="4:2:0")
    assert np.abs(read_raster(path).transpose(1, 2, 0).astype(int) - pillow(path)).max() > 25


def test_a_grey_or_cmyk_jpeg_has_pillow_s_pixels(tmp_path):
    grey = saved(tmp_path / "grey.jpg", photo()[..., 0])
    assert_reads(grey, pillow(grey).repeat(3, 2), (1, 1, 1))
    cmyk = saved(tmp_path / "cmyk.jpg", photo(), "CMYK")
    assert_reads(cmyk, pillow(cmyk, "RGB"), (1, 2, 3))


def test_a_stretched_jpeg_has_pillow_s_pixels(tmp_path):
    path = saved(tmp_path / "a.jpg", photo())
    expected = np.rint((pillow(path).clip(50, 101).astype(np.float64) - 50) * 5)
    assert_reads(path, expected, (1, 2, 3), [(50, 101)] * 3)
    np.testing.assert_array_equal(read_bands(path, [3, 1])[0], pillow(path).transpose(2, 0, 1)[[2, 0]])


def test_orientation_and_profile_are_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    pixels = photo()
    plain, tagged = saved(tmp_path / "a.jpg", pixels), tmp_path / "b.jpg"
    Image.fromarray(pixels).save(tagged, exif=exif, icc_profile=b"not a profile that anybody could apply")
    np.testing.assert_array_equal(read_image(tagged), read_image(plain))


def test_a_jpeg_is_known_by_its_content(tmp_path):
    path = saved(tmp_path / "a.png", photo(), format="JPEG")
    assert_reads(path, pillow(path), (1, 2, 3))
    with pytest.raises(DataError, match=r"the mask .*a\.png is a JPEG"):
        read_mask_values(path)


def test_a_large_jpeg_is_copied_in_strips(tmp_path, monkeypatch):
    monkeypatch.setattr(decoders, "STRIP_PX", 11 * W + 5)
    path = saved(tmp_path / "a.jpg", photo())
    np.testing.assert_array_equal(read_image(path), pillow(path))


def test_a_jpeg_beyond_pillow_s_own_limit_is_read_without_a_warning(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.jpg", np.zeros((1100, 1000), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2**20)
    with pytest.warns(Image.DecompressionBombWarning), Image.open(path):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(path, (1, 1, 1)).shape == (1100, 1000, 3)


def jpeg_bytes(**options):
    buffer = io.BytesIO()
    picture = np.add.outer(np.arange(600), np.arange(700))[..., None] // [6, 7, 9] + RNG.integers(0, 60, (600, 700, 3))
    Image.fromarray(picture.astype(np.uint8)).save(buffer, "JPEG", **options)
    return bytearray(buffer.getvalue())


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 2}], ids=str)
@pytest.mark.parametrize("share", [0.05, 0.5, 0.999])
def test_a_truncated_jpeg_is_an_error_even_where_pillow_was_told_to_take_it(tmp_path, monkeypatch, options, share):
    monkeypatch.setattr(
        ImageFile, "LOAD_TRUNCATED_IMAGES", True
    )  # a switch of the whole process, which some libraries set
    content = jpeg_bytes(**options)
    (tmp_path / "a.jpg").write_bytes(content[: int(len(content) * share)])
    for read in (lambda path: read_image(path), lambda path: read_scene(path)):
        with pytest.raises(DataError, match=r"cannot read .*a\.jpg, which is damaged or not a"):
            read(tmp_path / "a.jpg")


def read_scene(path):
    with open_scene(str(path), (1, 2, 3), None) as scene:
        return scene.read(0, scene.height)


@pytest.mark.parametrize("options", [{"progressive": True}, {"restart_marker_rows": 2}], ids=str)
@pytest.mark.parametrize("share", [0.3, 0.95])
def test_a_jpeg_with_a_hole_is_an_error_which_pillow_does_not_see(tmp_path, options, share):
    content = jpeg_bytes(**options)
    start = int(len(content) * share)
    content[start : start + 3000] = bytes(3000)
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    assert pillow(path).shape == (600, 700, 3)
    Image.new("RGB", (350, 300)).save(tmp_path / "a.jpg.ovr", "TIFF")  # whole, and not to be looked at in its place
    for read in (lambda path: read_image(path), lambda path: read_scene(path)):
        with pytest.raises(DataError, match=r"cannot read .*a\.jpg, which is damaged"):
            read(path)


def test_a_jpeg_that_pillow_does_not_understand_is_an_error(tmp_path, monkeypatch):
    def refuse(self):
        raise SyntaxError("cannot handle 2-layer images")

    path = saved(tmp_path / "a.jpg", photo())
    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile._open", refuse)
    with pytest.raises(DataError, match=r"cannot read .*a\.jpg.*: cannot handle 2-layer images"):
        read_image(path)


def test_a_jpeg_of_which_gdal_and_pillow_declare_other_bands_is_an_error(tmp_path):
    path = saved(tmp_path / "a.jpg", photo(), "CMYK")
    message = (
        rf"cannot read .*a\.jpg.*declares \({H}, {W}, 4\) rows, columns and bands, and decoded it has \({H}, {W}, 3\)"
    )
    with rasterio.Env(GDAL_JPEG_TO_RGB="NO"), pytest.raises(DataError, match=message):
        read_image(path)


def test_a_jpeg_scene_must_be_a_local_file_of_a_size_to_decode_at_once(tmp_path, monkeypatch):
    path = saved(tmp_path / "a.jpg", photo())
    message = r"/vsimem/.* is a JPEG, which is read from a local file only: download it"
    with rasterio.MemoryFile(path.read_bytes(), ext=".jpg") as memory, pytest.raises(DataError, match=message):
        read_scene(memory.name)
    monkeypatch.setattr(scenes, "MAX_PIXELS", H * W - 1)
    with pytest.raises(DataError, match=rf"a JPEG of {H} x {W} px, more than the .*: convert it to GeoTIFF"):
        read_scene(path)


PNGS = {
    "RGB": photo(),
    "RGBA": np.dstack([photo(), photo()[..., :1]]),
    "grey": photo()[..., 0],
    "grey and alpha": photo()[..., :2],
    "16 bits": RNG.integers(0, 2**16, (H, W), dtype=np.uint16),
}


@pytest.mark.parametrize("kind", PNGS)
def test_a_png_has_pillow_s_pixels(tmp_path, kind):
    pixels = PNGS[kind]
    path = saved(tmp_path / "a.png", pixels)
    expected = pillow(path)
    values, _ = read_bands(path, range(1, expected.shape[2] + 1))
    assert values.dtype == pixels.dtype
    np.testing.assert_array_equal(values, expected.transpose(2, 0, 1))
    if values.dtype == np.uint8:
        bands = (1, 2, 3) if len(values) >= 3 else (1, 1, 1)
        assert_reads(path, expected[..., [band - 1 for band in bands]], bands)


def interlaced_png(pixels):
    """An Adam7 PNG of 8-bit RGB, which Pillow reads and does not write."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = pixels.shape[:2]
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    rows = (row for top, left, down, right in passes for row in pixels[top::down, left::right])
    content = b"".join(b"\0" + row.tobytes() for row in rows)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 1))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")


def test_an_interlaced_png_has_pillow_s_pixels(tmp_path):
    pixels, path = photo(), tmp_path / "a.png"
    path.write_bytes(interlaced_png(pixels))
    np.testing.assert_array_equal(pillow(path), pixels)
    assert_reads(path, pixels, (1, 2, 3))


def test_16_bits_of_colour_are_kept_of_which_pillow_keeps_8(tmp_path):
    pixels = RNG.integers(0, 2**16, (3, H, W), dtype=np.uint16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(tmp_path / "a.png", "w", driver="PNG", count=3, height=H, width=W, dtype="uint16") as raster:
            raster.write(pixels)
    np.testing.assert_array_equal(read_bands(tmp_path / "a.png", (1, 2, 3))[0], pixels)
    np.testing.assert_array_equal(pillow(tmp_path / "a.png").transpose(2, 0, 1), pixels >> 8)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_palette_s_indices_are_those_of_pillow_as_image_and_as_mask(tmp_path, bits):
    indices = RNG.integers(0, 2**bits, (H, W), dtype=np.uint8)
    picture = Image.new("P", (W, H))
    picture.putdata(indices.ravel().tolist())
    picture.putpalette(RNG.integers(0, 256, 3 * 2**bits, dtype=np.uint8).tobytes())
    picture.save(tmp_path / "a.png", bits=bits)
    with Image.open(tmp_path / "a.png") as found:
        assert found.mode == "P"
        np.testing.assert_array_equal(np.asarray(found), indices)
    np.testing.assert_array_equal(read_mask_values(tmp_path / "a.png"), indices)
    np.testing.assert_array_equal(read_bands(tmp_path / "a.png", [1])[0][0], indices)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compress": "deflate", "predictor": 2, "tiled": True, "blockxsize": 16, "blockysize": 32},
        {"compress": "jpeg", "photometric": "ycbcr", "interleave": "pixel", "jpeg_quality": 60},
        {"compress": "jpeg", "interleave": "pixel", "tiled": True, "blockxsize": 32, "blockysize": 32},
    ],
    ids=["plain", "deflate", "YCbCr JPEG", "RGB JPEG"],
)
def test_a_tiff_has_rasterio_s_pixels_with_jpeg_inside_too(tmp_path, options):
    path = write_tiff(tmp_path / "a.tif", photo().transpose(2, 0, 1), **options)
    assert_reads(path, read_raster(path).transpose(1, 2, 0), (1, 2, 3))


@pytest.mark.skipif(not DUBAI.is_dir(), reason=f"the real tiles are not at {DUBAI}")
def test_real_jpegs_have_pillow_s_pixels():
    for path in sorted(DUBAI.glob("*.jpg"))[:3]:
        assert_reads(path, pillow(path), (1, 2, 3))
