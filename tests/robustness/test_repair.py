"""`precompute-teacher --repair` computes what is damaged, and nothing else, back to the bytes of an undisturbed cache."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers.files import tree

from kdpipe.configs.errors import CorruptCache, StaleCache
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.verify.gate import verify

CPU = torch.device("cpu")


def flip(path, at=0.5):
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 1
    path.write_bytes(data)


def swap(one, other):
    first = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(first)


@pytest.fixture
def cached(make_config, tmp_path, landscape):
    """A finished cache over images of its own, so that they can be changed."""
    shutil.copytree(landscape, tmp_path / "data")
    config = make_config(data__train=[str(tmp_path / "data/Train")])
    precompute(config, CPU)
    return config


# What is done to the folder of tiles, and which tiles (by place in the sorted list) it damages.
DAMAGE = {
    "a flipped bit in a shard": (lambda a, b: flip(a / "0.0.0"), [0]),
    "a flipped bit in metadata": (lambda a, b: flip(a / "zarr.json"), [0]),
    "a truncated shard": (lambda a, b: (a / "0.0.0").write_bytes((a / "0.0.0").read_bytes()[:-9]), [0]),
    "an emptied shard": (lambda a, b: (a / "0.0.0").write_bytes(b""), [0]),
    "a missing shard": (lambda a, b: (a / "0.0.0").unlink(), [0]),
    "missing metadata": (lambda a, b: (a / "zarr.json").unlink(), [0]),
    "swapped shards": (lambda a, b: swap(a / "0.0.0", b / "0.0.0"), [0, 1]),
    "swapped tiles": (lambda a, b: [swap(a / n, b / n) for n in ("0.0.0", "zarr.json")], [0, 1]),
    "a flipped bit in a group": (lambda a, b: flip(a.parent / "zarr.json"), []),
    "a flipped bit in the topmost group": (lambda a, b: flip(a.parents[2] / "zarr.json"), []),
    "a missing topmost group": (lambda a, b: (a.parents[2] / "zarr.json").unlink(), []),
    "an edited manifest": (lambda a, b: flip(a.parents[2] / "manifest.json"), []),
    "a lost manifest and a flipped bit": (lambda a, b: ((a.parents[2] / "manifest.json").unlink(), flip(a / "0.0.0")), [0]),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_repair_computes_the_damaged_tiles_alone_to_the_same_bytes(cached, kind):
    folder = Path(cached.cache.path)
    before, harm = tree(folder), DAMAGE[kind]
    tiles = sorted((folder / "tiles/Train").glob("*/"))
    harm[0](tiles[0], tiles[1])
    assert tree(folder) != before
    assert not verify(cached, "full", CPU).passes
    summary = precompute(cached, CPU, repair=True)
    assert summary.computed == len(harm[1])
    assert summary.kept == 6 - len(harm[1])
    assert set(summary.damaged) <= {f"Train/{tiles[i].name}" for i in harm[1]}
    assert tree(folder) == before
    assert verify(cached, "full", CPU).passes


def test_repair_finds_an_image_that_changed_without_size_or_time(cached, tmp_path):
    import os

    image = sorted((tmp_path / "data/Train/images").iterdir())[0]
    times = image.stat()
    flip(image)
    os.utime(image, ns=(times.st_atime_ns, times.st_mtime_ns))
    before = precompute(cached, CPU)
    assert before.computed == 0
    summary = precompute(cached, CPU, repair=True)
    assert list(summary.damaged) == [f"Train/{image.stem}"]
    assert "is not the image that the tile was computed from" in summary.damaged[f"Train/{image.stem}"]


def test_repair_of_a_whole_cache_computes_nothing(cached):
    before = tree(Path(cached.cache.path))
    summary = precompute(cached, CPU, repair=True)
    assert (summary.computed, summary.damaged, summary.fingerprint is None) == (0, {}, False)
    assert tree(Path(cached.cache.path)) == before


def test_with_topmost_group_and_manifest_lost_the_receipts_say_how_tiles_were_made(cached, make_config):
    """Both files are small and lie at the top: all that was paid for would go with them."""
    folder = Path(cached.cache.path)
    before = tree(folder)
    flip(folder / "manifest.json")
    (folder / "zarr.json").write_text("{}")
    with pytest.raises(CorruptCache, match=r"zarr\.json is not that of a cache of soft targets .* --repair"):
        precompute(cached, CPU)
    with pytest.raises(
        CorruptCache, match=r"zarr\.json is not that of a cache of soft targets"
    ):  # no tile vouches for 1.0
        precompute(make_config(data__train=cached.data.train, distill__temperature=1.0), CPU, repair=True)
    assert precompute(cached, CPU, repair=True).computed == 0
    assert tree(folder) == before


def test_repair_does_not_take_a_cache_of_another_recipe_for_a_damaged_one(cached, make_config):
    """Not even where the manifest says so: the tiles vouch for the topmost group that is there."""
    folder = Path(cached.cache.path)
    other = make_config(
        data__train=cached.data.train, distill__temperature=1.0, cache__path=str(folder.parent / "o.zarr")
    )
    precompute(other, CPU)
    shutil.copy(folder.parent / "o.zarr/manifest.json", folder)
    before = tree(folder)
    with pytest.raises(StaleCache, match=r"temperature: the cache has 2\.0, the configuration says 1\.0"):
        precompute(other.model_copy(update={"cache": cached.cache}), CPU, repair=True)
    assert tree(folder) == before


def test_the_reader_of_a_damaged_tile_is_told_of_repair(cached):
    from kdpipe.cache import SoftTargetCache

    folder = Path(cached.cache.path)
    tile = sorted((folder / "tiles/Train").glob("*/"))[0]
    flip(tile / "0.0.0")
    with pytest.raises(CorruptCache, match=f"tile Train/{tile.name} .* precompute-teacher --repair"):
        SoftTargetCache.open(cached.cache.path).read(f"Train/{tile.name}")
