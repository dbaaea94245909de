"""Every kind of damage to every file of a cache is found, named, never read as numbers, and repaired by computing only what is lost."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.files import flip, tree
from helpers.small_world import other_cache

from kdpipe.cache import CorruptCache, IncompleteCache, SoftTargetCache
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.verify.gate import verify

CPU = torch.device("cpu")


def to_folder(path):
    path.unlink()
    path.mkdir()
    (path / "x").write_bytes(b"x")


FILE_KINDS = {
    "flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
    "extended": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "replaced by a folder": to_folder,
}
FILES = {  # and the tile whose file it is
    "tiles/Mine/t1/0.0.0": "Mine/t1",
    "tiles/Mine/t1/zarr.json": "Mine/t1",
    "tiles/Mine/zarr.json": None,
    "tiles/zarr.json": None,
    "zarr.json": None,
    "manifest.json": None,
}
SEEN_BY_QUICK = {"missing", "replaced by a folder"}  # by name and size; of shards every other size, of the manifest all


@pytest.mark.parametrize("kind", FILE_KINDS)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_refused_and_mended_by_its_tile_alone(finished, teacher, name, kind):
    config, tile = finished(), FILES[name]
    folder = Path(config.cache.path)
    before, right = tree(folder), SoftTargetCache.open(str(folder)).read("Mine/t1")
    FILE_KINDS[kind](folder / name)
    found = verify(config, "full", CPU).findings
    quick = verify(config, "quick", CPU).findings
    assert len(found) == 1
    if tile:
        assert (found[0].code, found[0].tile) == ("damaged-tile", tile)
        assert Path(name).name in found[0].message
        with pytest.raises(CorruptCache, match=rf"tile {tile} of .* is damaged: .*{Path(name).name}"):
            SoftTargetCache.open(str(folder)).read(tile, (0, 0, 1, 1))
    elif name == "manifest.json":
        assert found[0].code == ("incomplete" if kind == "missing" else "damaged-manifest")
        with pytest.raises(IncompleteCache if kind == "missing" else CorruptCache, match="cache.zarr"):
            SoftTargetCache.open(str(folder))
    else:
        assert (found[0].code, found[0].message) == ("damaged-group", f"{name} is missing or not what was written")
        np.testing.assert_array_equal(SoftTargetCache.open(str(folder)).read("Mine/t1"), right)
    can = kind in SEEN_BY_QUICK or name == "manifest.json" or (name.endswith("0.0.0") and kind != "flipped")
    assert [f.tile for f in quick] == ([tile] if can else [])
    summary = precompute(config, CPU, repair=True)
    assert (summary.computed, teacher.images) == ((1, 1) if tile else (0, 0))
    assert set(summary.damaged) <= {tile}
    assert tree(folder) == before
    assert verify(config, "full", CPU).passes


def exchange(one, other):
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def replace(one, by):
    shutil.rmtree(one) if one.is_dir() else one.unlink()
    shutil.copytree(by, one) if by.is_dir() else shutil.copy(by, one)


def file_for(folder):
    shutil.rmtree(folder)
    folder.write_bytes(b"x")


ALL = ["Mine/t0", "Mine/t1", "Mine/t2"]
FOLDER_KINDS = {  # what is done to the tiles' folder, with another cache at hand, and the tiles that this damages
    "shards exchanged": (lambda t, o: exchange(t / "t0/0.0.0", t / "t1/0.0.0"), ALL[:2]),
    "metadata exchanged": (lambda t, o: exchange(t / "t0/zarr.json", t / "t1/zarr.json"), ALL[:2]),
    "tiles exchanged": (lambda t, o: exchange(t / "t0", t / "t1"), ALL[:2]),
    "a tile copied over another": (lambda t, o: replace(t / "t1", t / "t0"), ALL[1:2]),
    "a tile's folder missing": (lambda t, o: shutil.rmtree(t / "t1"), ALL[1:2]),
    "a tile's folder replaced by a file": (lambda t, o: file_for(t / "t1"), ALL[1:2]),
    "the folder of tiles replaced by a file": (lambda t, o: file_for(t), ALL),
    "all folders of tiles missing": (lambda t, o: shutil.rmtree(t.parent), ALL),
    "a shard of another cache": (lambda t, o: replace(t / "t1/0.0.0", o / "t1/0.0.0"), ALL[1:2]),
    "a tile of another cache": (lambda t, o: replace(t / "t1", o / "t1"), ALL[1:2]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [(kind, "the same recipe") for kind in FOLDER_KINDS]
    + [(kind, "another recipe") for kind in FOLDER_KINDS if "another cache" in kind],
)
def test_tiles_in_wrong_places_are_named_refused_and_mended_alone(finished, teacher, tmp_path, kind, recipe):
    config = finished()
    folder = Path(config.cache.path)
    damage, tiles = FOLDER_KINDS[kind]
    overrides = {} if recipe == "the same recipe" else {"distill__temperature": 1.0}
    other = other_cache(finished, tmp_path, **overrides)
    before = tree(folder)
    damage(folder / "tiles/Mine", other / "tiles/Mine")
    assert tree(folder) != before
    assert {finding.tile for finding in verify(config, "full", CPU).findings} - {None} == set(tiles)
    cache = SoftTargetCache.open(str(folder))
    for tile in tiles:
        with pytest.raises(CorruptCache, match=f"tile {tile} of .* is damaged"):
            cache.read(tile)
    teacher.images = 0
    summary = precompute(config, CPU, repair=True)
    assert (summary.computed, teacher.images) == (len(tiles), len(tiles))
    assert tree(folder) == before
    assert verify(config, "full", CPU).passes


@pytest.mark.parametrize("recipe", ["the same recipe", "another recipe"])
def test_a_tile_of_another_cache_is_found_while_there_is_no_manifest(finished, teacher, tmp_path, recipe):
    """The other image has the same size, so sizes do not tell; the manifest would, but a killed run left none."""
    config = finished()
    folder = Path(config.cache.path)
    overrides = {} if recipe == "the same recipe" else {"distill__temperature": 1.0}
    other = other_cache(finished, tmp_path, **overrides)
    before = tree(folder)
    replace(folder / "tiles/Mine/t1", other / "tiles/Mine/t1")
    (folder / "manifest.json").unlink()
    teacher.images = 0
    precompute(config, CPU)
    assert teacher.images == 1
    assert tree(folder) == before


def test_files_that_do_not_belong_are_named_and_a_finished_tile_whose_image_went_is_none_of_them(
    finished, teacher, tmp_path
):
    folder = Path(finished().cache.path)
    shutil.copytree(folder / "tiles/Mine/t1", folder / "tiles/Mine/copy")
    shutil.copytree(folder / "tiles/Mine/t1", folder / "tiles/Other/t1")
    (folder / "notes.txt").write_text("x")
    assert [(f.code, f.message) for f in verify(finished(), "full", CPU).findings] == [
        ("stray-file", f"{name} does not belong to the cache")
        for name in ("notes.txt", "tiles/Other", "tiles/Mine/copy")
    ]
    for stray in ("tiles/Mine/copy", "tiles/Other"):
        shutil.rmtree(folder / stray)
    (folder / "notes.txt").unlink()
    (tmp_path / "data/Mine/images/t2.tif").unlink()
    precompute(finished(), CPU)
    assert SoftTargetCache.open(str(folder)).tile_ids == ALL[:2]
    assert verify(finished(), "full", CPU).passes
    assert (folder / "tiles/Mine/t2/0.0.0").exists()
