"""`precompute-teacher --repair` computes what is lost, and nothing else; test_damage.py repairs every kind of damage."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.files import flip, tree

from kdpipe.cache import SoftTargetCache
from kdpipe.configs.errors import CorruptCache, StaleCache
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.teacher import precision
from kdpipe.pipeline.verify.gate import verify

CPU = torch.device("cpu")


def test_repair_finds_an_image_that_changed_without_size_or_time(finished, teacher, tmp_path):
    image = tmp_path / "data/Mine/images/t1.tif"
    os.utime(image, (0, 1e9))
    assert precompute(finished(), CPU).computed == 0  # and its size and time are known from now on
    times = image.stat()
    flip(image)
    os.utime(image, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert precompute(finished(), CPU).computed == 0
    summary = precompute(finished(), CPU, repair=True)
    assert list(summary.damaged) == ["Mine/t1"]
    assert "is not the image that the tile was computed from" in summary.damaged["Mine/t1"]
    assert teacher.images == 1


def test_repair_of_a_complete_cache_computes_nothing(finished, teacher, tmp_path):
    before = tree(tmp_path / "cache.zarr")
    summary = precompute(finished(), CPU, repair=True)
    assert (summary.computed, summary.damaged, summary.fingerprint is None, teacher.images) == (0, {}, False, 0)
    assert tree(tmp_path / "cache.zarr") == before


def test_a_lost_manifest_and_a_flipped_bit_cost_one_tile(finished, teacher, tmp_path):
    folder = tmp_path / "cache.zarr"
    before = tree(folder)
    (folder / "manifest.json").unlink()
    flip(folder / "tiles/Mine/t0/0.0.0")
    assert not verify(finished(), "full", CPU).passes
    summary = precompute(finished(), CPU, repair=True)
    assert (summary.computed, summary.kept, teacher.images) == (1, 2, 1)
    assert set(summary.damaged) <= {"Mine/t0"}
    assert tree(folder) == before
    assert verify(finished(), "full", CPU).passes


@pytest.mark.parametrize("decided", ["fp32", "bf16"])
def test_with_topmost_group_and_manifest_lost_the_receipts_say_how_tiles_were_made(
    make, tmp_path, monkeypatch, decided
):
    """Both files are small and lie at the top, and without this everything paid for would be lost with them."""
    monkeypatch.setattr(precision, "is_fast_at_bf16", lambda device: decided == "bf16")
    monkeypatch.setattr(precision, "_targets_stay", lambda *of: True)
    folder = tmp_path / "cache.zarr"
    make = partial(make, teacher__precision="auto")
    precompute(make(), CPU)
    assert f'"precision": "{decided}"' in (folder / "zarr.json").read_text()
    before = tree(folder)
    flip(folder / "manifest.json")
    (folder / "zarr.json").write_text("{}")
    not_a_cache = r"zarr\.json is not the metadata of a cache"
    with pytest.raises(CorruptCache, match=not_a_cache + " .* --repair"):
        precompute(make(), CPU)
    with pytest.raises(CorruptCache, match=not_a_cache):  # no tile vouches for temperature 1
        precompute(make(distill__temperature=1.0), CPU, repair=True)
    assert precompute(make(), CPU, repair=True).computed == 0
    assert tree(folder) == before


def test_repair_does_not_take_a_cache_of_another_recipe_for_a_damaged_one(finished, tmp_path):
    """The tiles vouch for the topmost group, whatever the manifest says."""
    folder = tmp_path / "cache.zarr"
    other = finished(distill__temperature=1.0, cache__path=str(tmp_path / "other.zarr"))
    precompute(other, CPU)
    (folder / "manifest.json").write_bytes((tmp_path / "other.zarr/manifest.json").read_bytes())
    before = tree(folder)
    with pytest.raises(StaleCache, match=r"temperature: the cache has 2\.0, the configuration says 1\.0"):
        precompute(finished(distill__temperature=1.0), CPU, repair=True)
    assert tree(folder) == before


def test_the_reader_of_a_damaged_tile_is_told_of_repair(finished, tmp_path):
    flip(Path(finished().cache.path) / "tiles/Mine/t1/0.0.0")
    with pytest.raises(CorruptCache, match="tile Mine/t1 .* precompute-teacher --repair"):
        SoftTargetCache.open(str(tmp_path / "cache.zarr")).read("Mine/t1")
