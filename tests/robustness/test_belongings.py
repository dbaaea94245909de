"""Nothing that belongs to the user is emptied, overwritten or deleted: files beside the cache, links in it, downloads in its folder."""

import pytest
import torch
from helpers.files import tree

from kdpipe.cache import CorruptCache
from kdpipe.configs.errors import ConfigError, StaleCache
from kdpipe.pipeline.precompute.run import precompute

CPU = torch.device("cpu")


@pytest.mark.parametrize("suffix", [".lock", ".workers"])
def test_a_run_is_refused_where_a_name_beside_the_cache_is_taken(make, tmp_path, suffix):
    path = tmp_path / f"cache.zarr{suffix}"
    path.write_text("[[package]]\nname = 'poetry'\n")
    with pytest.raises(ConfigError, match="is not kdpipe's"):
        precompute(make(), CPU)
    assert path.read_text() == "[[package]]\nname = 'poetry'\n"
    assert not (tmp_path / "cache.zarr").exists()


@pytest.mark.parametrize("is_link", [False, True])
def test_costs_are_not_recorded_where_their_name_is_taken(make, tmp_path, is_link):
    path, thesis = tmp_path / "cache.zarr.costs.json", tmp_path / "thesis"
    thesis.write_text("my own")
    if is_link:
        path.symlink_to(thesis)
    else:
        path.write_text("my own")
    assert precompute(make(), CPU).computed == 3
    assert path.read_text() == thesis.read_text() == "my own"


def test_downloads_in_the_folder_of_a_new_cache_are_refused_and_stay(make, tmp_path):
    folder = tmp_path / "cache.zarr"
    (folder / "photos.partial").mkdir(parents=True)
    (folder / "photos.partial/1.jpg").write_text("x")
    (folder / "thesis.pdf.partial").write_text("half")
    before = tree(folder)
    with pytest.raises(CorruptCache, match=r"holds files, but no zarr\.json"):
        precompute(make(), CPU)
    assert tree(folder) == before


def test_a_tile_that_became_a_link_costs_no_other_tile_its_receipt(finished, tmp_path):
    config, tiles = finished(), tmp_path / "cache.zarr/tiles/Mine"
    for file in sorted(tiles.glob("t1/*")):
        file.unlink()
    (tiles / "t1").rmdir()
    (tiles / "t1").symlink_to("t0")
    before = tree(tiles / "t0")
    with pytest.raises(
        CorruptCache, match="t1 is a link, and nothing is written or deleted through one; delete the link"
    ):
        precompute(config, CPU)
    assert tree(tiles / "t0") == before
    (tiles / "t1").unlink()
    assert precompute(config, CPU).computed == 1


def test_a_cache_without_a_tile_takes_another_teacher(make, tmp_path, monkeypatch):
    """A run that found out with its first tile that the checkpoint was the wrong one leaves such a cache."""

    def refused(*arguments):
        raise RuntimeError("by the test")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="by the test"):
        patch.setattr("kdpipe.cache.writer.store_tile", refused)
        precompute(make(), CPU)
    other = make(teacher__normalize="imagenet")
    assert precompute(other, CPU).computed == 3
    with pytest.raises(StaleCache, match="normalize"):
        precompute(make(), CPU)
