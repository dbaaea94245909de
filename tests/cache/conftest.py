"""A small cache and the stand-ins for its source images."""

import pytest
from helpers.caches import SIZES, fill

from kdpipe.cache import SoftTargetCache


@pytest.fixture
def images(tmp_path):
    """Stand-ins for source images by tile: any file will do."""
    files = {}
    for tile in SIZES:
        files[tile] = tmp_path / "images" / f"{tile.replace('/', '-')}.png"
        files[tile].parent.mkdir(exist_ok=True)
        files[tile].write_bytes(tile.encode() * 10)
    return files


@pytest.fixture
def cache(tmp_path, images):
    """The finished cache of `images` at `tmp_path / "c.zarr"`."""
    fill(tmp_path / "c.zarr", images)
    return SoftTargetCache.open(str(tmp_path / "c.zarr"))
