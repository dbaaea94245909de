"""Caches of MINOR 0, which say neither the order of temperature and class map nor the decoder: fresh where that changes nothing."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers.files import tree, write_image

from kdpipe.cache import SoftTargetCache, StaleCache
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.inspection.cache import inspect_cache
from kdpipe.pipeline.precompute import plan
from kdpipe.pipeline.precompute.expected_recipe import complete_recipe
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.training.targets import open_fresh_cache
from kdpipe.pipeline.verify.gate import verify

CPU = torch.device("cpu")
RENAMED = {
    "teacher__drop_channels": [4, 7],
    "class_map": {
        "Tree": {"Forest": 1}, "Rangeland": {"Grassland": 1}, "Cropland": {"Cropland": 1}, "Developed": {"Settlement": 1},
        "Bareland": {"SemiNatural": 1}, "Water": {"Background": 1},
    },
}  # fmt: skip


@pytest.fixture
def older(make, monkeypatch):
    """A function from overrides to a config whose cache an older kdpipe has written: its recipe lacks the newer fields."""

    def made(**overrides):
        config = make(**overrides)

        def without_newer_fields(*arguments):
            return complete_recipe(*arguments).model_copy(update={"decoder": None, "temperature_applied": None})

        with monkeypatch.context() as patch:
            patch.setattr(plan, "complete_recipe", without_newer_fields)
            precompute(config, CPU)
        return config

    return made


@pytest.mark.parametrize("overrides", [{"distill__temperature": 1.0}, RENAMED], ids=["T 1", "renamed"])
def test_an_older_cache_stays_fresh_where_the_order_changes_nothing(older, overrides):
    config = older(**overrides)
    folder = Path(config.cache.path)
    assert SoftTargetCache.open(str(folder)).manifest.format_version == "4.0"
    before = tree(folder)
    assert verify(config, "full", CPU).findings == []
    open_fresh_cache(config, list_tiles(config.data, "train"), None)
    (folder / "manifest.json").unlink()
    shutil.rmtree(next(folder.glob("tiles/Mine/*")))
    assert precompute(config, CPU).computed == 1
    assert tree(folder) == before


def test_an_older_cache_is_stale_where_the_order_changes_the_targets(older):
    config = older()
    assert config.distill.temperature == 2
    says = r"temperature_applied: an older kdpipe applied the temperature before the class map"
    with pytest.raises(StaleCache, match=says):
        precompute(config, CPU)
    with pytest.raises(StaleCache, match=says):
        open_fresh_cache(config, list_tiles(config.data, "train"), None)
    (finding,) = verify(config, "full", CPU).findings
    assert finding.code == "stale-recipe"
    (difference,) = inspect_cache(config.cache.path, config).differences
    assert "student classes that several teacher classes map to" in difference


@pytest.mark.parametrize(
    ("names", "stale"),
    [
        (["a.png", "b.tif"], False),
        (["a.jpg", "b.png"], True),
        (["a.tiff", "b.JPEG"], True),
    ],
)
def test_an_older_cache_is_stale_if_one_of_its_tiles_is_a_jpeg(older, tmp_path, names, stale):
    for name in names:
        write_image(tmp_path / "scenes/Any/images" / name, 40, 50)
    config = older(data__train=[str(tmp_path / "scenes/Any")], distill__temperature=1.0)
    tiles = list_tiles(config.data, "train")
    report = verify(config, "quick", CPU)
    if not stale:
        assert report.findings == []
        open_fresh_cache(config, tiles, None)
        assert precompute(config, CPU).computed == 0
        return
    assert [finding.code for finding in report.findings] == ["stale-recipe"]
    says = "another configuration: decoder: an older kdpipe computed the cache from JPEGs that GDAL had decoded"
    with pytest.raises(StaleCache, match=says):
        open_fresh_cache(config, tiles, None)
    with pytest.raises(StaleCache, match=says):
        precompute(config, CPU)


def test_a_finished_cache_says_the_order_and_the_decoder(finished):
    config = finished()
    manifest = SoftTargetCache.open(config.cache.path).manifest
    assert manifest.format_version == "4.2"
    assert (manifest.recipe.temperature_applied, manifest.recipe.decoder) == ("after class_map", "pillow")
