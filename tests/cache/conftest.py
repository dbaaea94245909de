import pytest
from helpers.caches import SIZES


@pytest.fixture
def images(tmp_path):
    """Stand-ins for source images: any file will do."""
    files = {}
    for tile in SIZES:
        files[tile] = tmp_path / "images" / f"{tile.replace('/', '-')}.png"
        files[tile].parent.mkdir(exist_ok=True)
        files[tile].write_bytes(tile.encode() * 10)
    return files
