"""Damage of every kind to every file of a cache: found, named, never read as numbers, and mended by computing just what is lost."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.caches import RECIPE, distributions, sign
from helpers.doubles import CostlessTeacher
from helpers.files import tree, write_image

from kdpipe.cache import CacheError, CorruptCache, IncompleteCache, SoftTargetCache, UnknownFormat
from kdpipe.cache import reader as reading
from kdpipe.cache import tile as layout
from kdpipe.cache.integrity import check_full
from kdpipe.cache.reader import read_manifest
from kdpipe.cache.records import ImageDigest
from kdpipe.cache.storage.base import open_storage
from kdpipe.cache.writer import open_writer
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.precompute import run as stage
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.training.targets import open_fresh_cache
from kdpipe.pipeline.verify.gate import verify

CPU = torch.device("cpu")
IMAGE = ImageDigest(size_bytes=1, sha256="0" * 64)
SIDES = {"Train/a": (64, 40), "Train/b": (64, 40)}
CHUNK_PX = 32  # so that a tile of a few hundred bytes has four chunks
WINDOWS = [(0, 0, 64, 40), (0, 0, 32, 32), (40, 35, 20, 5), (30, 30, 4, 4)]


def coarse(seed):
    """Targets of 3 classes that are the same over 8 x 8 px: their chunks take a hundred bytes each."""
    return distributions(3, 8, 5, seed=seed).repeat(8, axis=1).repeat(8, axis=2)


def small_cache(path):
    with open_writer(open_storage(str(path)), RECIPE, device="cpu", libraries={}) as writer:
        writer.begin()
        records = [writer.write(tile, coarse(seed), IMAGE) for seed, tile in enumerate(SIDES)]
        writer.finish(records)


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A finished cache of two tiles with four chunks each."""
    monkeypatch.setattr(layout, "CHUNK_PX", CHUNK_PX)
    small_cache(tmp_path / "c.zarr")
    return tmp_path / "c.zarr"


def values(cache):
    return {(tile, window): cache.read(tile, window) for tile in cache.tile_ids for window in WINDOWS}


def tile_of(file, root):
    """The tile whose file this is, None of a group's or the manifest."""
    parts = file.relative_to(root).parts
    return "/".join(parts[1:-1]) if len(parts) == 4 else None


def reads(cache, tile, window):
    """The numbers, or the error's message."""
    try:
        return cache.read(tile, window)
    except CorruptCache as err:
        return str(err)


def flip_bytes(small, every):
    """How many bytes were flipped, one at a time: each `every`-th of each file, found, named and never read as other numbers."""
    storage, whole = open_storage(str(small)), SoftTargetCache.open(str(small))
    right, images = values(whole), {}
    nothing = check_full(storage, whole.manifest, images)
    assert {finding.code for finding in nothing} == {"extra-tile"}  # there are no images
    tried = 0
    for file in sorted(path for path in small.rglob("*") if path.is_file()):
        before, tile, name = file.read_bytes(), tile_of(file, small), str(file.relative_to(small))
        for position in range(0, len(before), every):
            data = bytearray(before)
            data[position] ^= 1 << position % 8
            file.write_bytes(data)
            tried += 1
            if name == "manifest.json":
                with pytest.raises((CorruptCache, UnknownFormat), match=r"manifest\.json"):
                    SoftTargetCache.open(str(small))
                continue
            cache = SoftTargetCache.open(str(small))
            found = [
                (f.code, f.tile, f.message) for f in check_full(storage, cache.manifest, images) if f not in nothing
            ]
            if tile is None:
                assert found == [("damaged-group", None, f"{name} is missing or not what was written")], position
            else:
                what = "shard" if file.name == "0.0.0" else "metadata"
                assert found == [("damaged-tile", tile, f"its {what} ({file.name}) is not what was written")], position
            window = WINDOWS[position % len(WINDOWS)]
            for other in SIDES:
                answer = reads(cache, other, window)
                if other == tile:
                    assert f"tile {tile} of " in answer
                    assert f"its {what} ({file.name}) is not what was written" in answer
                else:
                    np.testing.assert_array_equal(answer, right[other, window])
        file.write_bytes(before)
    assert check_full(storage, whole.manifest, images) == nothing
    return tried


def test_every_seventh_byte_flipped_is_found_named_and_never_read_as_other_numbers(small):
    assert flip_bytes(small, 7) > 1_000


@pytest.mark.slow
def test_every_single_byte_flipped_is_found_named_and_never_read_as_other_numbers(small):
    assert flip_bytes(small, 1) == sum(len(data) for data in tree(small).values()) > 7_000


@pytest.mark.parametrize("remembered", [True, False], ids=["kept open", "opened again"])
def test_every_byte_of_a_tile_flipped_behind_an_open_reader_gives_the_right_numbers_or_an_error(
    small, monkeypatch, remembered
):
    """After the digests were compared, with the tile's index still in memory, and after it was dropped."""
    monkeypatch.setattr(reading, "MAX_OPEN_TILES", 2 if remembered else 1)
    cache = SoftTargetCache.open(str(small))
    right = values(cache)
    tried, unnoticed = 0, 0
    for file in sorted((small / "tiles/Train/a").iterdir()):
        before = file.read_bytes()
        for position in range(len(before)):
            data = bytearray(before)
            data[position] ^= 1 << position % 8
            file.write_bytes(data)
            cache.read("Train/b", WINDOWS[2])  # where only one index is kept, that of a is dropped
            noticed = False
            for window in (WINDOWS[0], WINDOWS[1 + position % 3]):
                answer = reads(cache, "Train/a", window)
                if isinstance(answer, str):
                    assert "tile Train/a of " in answer
                    noticed = True
                else:
                    np.testing.assert_array_equal(answer, right["Train/a", window])
            unnoticed += not noticed
            tried += 1
        file.write_bytes(before)
    sizes = {name: len((small / "tiles/Train/a" / name).read_bytes()) for name in ("0.0.0", "zarr.json")}
    assert tried == sum(sizes.values())
    index = 4 * 16 + 4
    # What was read before and is kept need not be read again: no change there is noticed, and none matters.
    assert unnoticed == (sizes["zarr.json"] + index if remembered else 0)


def test_a_tile_replaced_behind_an_open_reader_by_a_whole_one_of_another_cache_is_not_taken_for_it(tmp_path):
    """Of the same size, with one chunk at the same place: all the checksums within it are right."""
    caches = {}
    for seed in range(100):
        path = tmp_path / f"{seed}.zarr"
        recipe = RECIPE.model_copy(update={"temperature": 1.0 + seed})
        with open_writer(open_storage(str(path)), recipe, device="cpu", libraries={}) as writer:
            record = writer.write("Train/a", coarse(seed), IMAGE)
            writer.finish([record])
        other = caches.setdefault(record.shard_bytes, path)
        if other != path:
            break
    cache = SoftTargetCache.open(str(path))
    mine, theirs = cache.read("Train/a"), SoftTargetCache.open(str(other)).read("Train/a")
    assert not np.array_equal(mine, theirs)
    shutil.copy(other / "tiles/Train/a/0.0.0", path / "tiles/Train/a/0.0.0")
    with pytest.raises(CorruptCache, match=r"tile Train/a of .*\(chunk 0, 0 was replaced by another\)"):
        cache.read("Train/a")


class Teacher(CostlessTeacher):
    """Answers at once, from the image alone, and counts: float32 `(N, 6, H, W)`."""

    images = 0

    def cached_values(self, images_NHWC):
        self.images += len(images_NHWC)
        weights = np.stack([images_NHWC.sum(axis=-1) % (c + 3) + 1 for c in range(6)], axis=1).astype(np.float32)
        return weights / weights.sum(axis=1, keepdims=True)


@pytest.fixture
def cached(make_config, tmp_path, monkeypatch):
    """A function from overrides to a config, over three tiny images; the cache is finished. And the teacher that is asked."""
    monkeypatch.setattr("kdpipe.pipeline.precompute.expected_recipe.file_sha256", lambda path: "0" * 64)
    teacher = Teacher()
    monkeypatch.setattr(stage, "open_teacher", teacher.by)
    images_of("Mine", tmp_path / "data")

    def make(**overrides):
        return make_config(
            **{"data__train": [str(tmp_path / "data/Mine")], "data__allow_missing_masks": True, **overrides}
        )

    precompute(make(), CPU)
    teacher.images = 0
    return make, teacher


def images_of(name, folder, seed=0):
    """Three images that are not compressed, so that others take as many bytes."""
    from PIL import Image

    for i in range(3):
        path = folder / name / "images" / f"t{i}.png"
        write_image(path, 9, 12, seed=seed + i)
        Image.open(path).save(path.with_suffix(".tif"))
        path.unlink()


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


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
def test_a_damaged_file_is_named_refused_and_mended_by_its_tile_alone(cached, name, kind):
    make, teacher = cached
    config, tile = make(), FILES[name]
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
    assert tree(folder) == before
    assert verify(config, "full", CPU).passes


def other_cache(make, tmp_path, **overrides):
    """A finished cache of the same tiles, from other images of the same size."""
    images_of("Mine", tmp_path / "other", seed=7)
    config = make(data__train=[str(tmp_path / "other/Mine")], cache__path=str(tmp_path / "other.zarr"), **overrides)
    precompute(config, CPU)
    return tmp_path / "other.zarr"


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
def test_tiles_in_wrong_places_are_named_refused_and_mended_alone(cached, tmp_path, kind, recipe):
    make, teacher = cached
    config = make()
    folder = Path(config.cache.path)
    damage, tiles = FOLDER_KINDS[kind]
    overrides = {} if recipe == "the same recipe" else {"distill__temperature": 1.0}
    other = other_cache(make, tmp_path, **overrides)
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
def test_a_tile_of_another_cache_is_found_while_there_is_no_manifest(cached, tmp_path, recipe):
    """From an image of the same size, so that sizes say nothing; the manifest would have told, but a run was killed."""
    make, teacher = cached
    config = make()
    folder = Path(config.cache.path)
    overrides = {} if recipe == "the same recipe" else {"distill__temperature": 1.0}
    other = other_cache(make, tmp_path, **overrides)
    before = tree(folder)
    replace(folder / "tiles/Mine/t1", other / "tiles/Mine/t1")
    (folder / "manifest.json").unlink()
    teacher.images = 0
    if recipe == "the same recipe":
        precompute(config, CPU)  # goes by the image's size and time
        found = verify(config, "full", CPU).findings
        assert [(f.code, f.tile) for f in found] == [("stale-tile", "Mine/t1")]
        assert teacher.images == 0
        precompute(config, CPU, repair=True)
    else:
        precompute(config, CPU)
    assert teacher.images == 1
    assert tree(folder) == before


def test_files_that_do_not_belong_are_named_and_a_finished_tile_whose_image_went_is_none_of_them(cached, tmp_path):
    make, _ = cached
    folder = Path(make().cache.path)
    shutil.copytree(folder / "tiles/Mine/t1", folder / "tiles/Mine/copy")
    shutil.copytree(folder / "tiles/Mine/t1", folder / "tiles/Other/t1")
    (folder / "notes.txt").write_text("x")
    assert [(f.code, f.message) for f in verify(make(), "full", CPU).findings] == [
        ("stray-file", f"{name} does not belong to the cache")
        for name in ("notes.txt", "tiles/Other", "tiles/Mine/copy")
    ]
    for stray in ("tiles/Mine/copy", "tiles/Other"):
        shutil.rmtree(folder / stray)
    (folder / "notes.txt").unlink()
    (tmp_path / "data/Mine/images/t2.tif").unlink()
    precompute(make(), CPU)
    assert SoftTargetCache.open(str(folder)).tile_ids == ALL[:2]
    assert verify(make(), "full", CPU).passes
    assert (folder / "tiles/Mine/t2/0.0.0").exists()


def resigned(folder, change):
    """Edit the manifest and give it the checksum and fingerprint that its content has."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_bytes(sign(manifest))


def swap_digests(manifest):
    one, two = manifest["tiles"][:2]
    for name in ("shard_sha256", "metadata_sha256", "shard_bytes"):
        one[name], two[name] = two[name], one[name]


def give_other_digest(manifest):
    manifest["groups"]["tiles"] = "0" * 64


# What is edited, and the findings (code and tile) of levels quick and full.
EDITED = "damaged-manifest"
EVERY = [("foreign-tile", tile) for tile in ALL]
RESIGNED = {
    "error bound": (lambda m: m.update(error_bound=0.5), [(EDITED, None)], [(EDITED, None)]),
    "temperature": (lambda m: m["recipe"].update(temperature=3.0), [("stale-recipe", None), (EDITED, None)],
                    [("stale-recipe", None), (EDITED, None), *EVERY]),
    "class names": (lambda m: m["recipe"]["classes"].reverse(), [("stale-recipe", None), (EDITED, None)],
                    [("stale-recipe", None), (EDITED, None), *EVERY]),
    "precision, which the configuration leaves open": (
        lambda m: m["recipe"]["teachers"][0].update(precision="bf16"), [(EDITED, None)], [(EDITED, None), *EVERY]),
    "a tile removed": (lambda m: m["tiles"].pop(), [("missing-tile", "Mine/t2")], [("missing-tile", "Mine/t2")]),
    "a tile added": (lambda m: m["tiles"].append({**m["tiles"][0], "id": "Mine/t9"}),
                     [("extra-tile", "Mine/t9"), ("damaged-tile", "Mine/t9")],
                     [("extra-tile", "Mine/t9"), ("damaged-tile", "Mine/t9")]),
    "digests of two tiles swapped": (swap_digests, None, [("damaged-tile", tile) for tile in ALL[:2]]),
    "a tile's height": (lambda m: m["tiles"][0].update(height=12, width=9), [], [("foreign-tile", "Mine/t0")]),
    "an image's digest": (lambda m: m["tiles"][0]["image"].update(sha256="1" * 64), [],
                          [("foreign-tile", "Mine/t0"), ("stale-tile", "Mine/t0")]),
    "an image's size": (lambda m: m["tiles"][0]["image"].update(size_bytes=1), [("stale-tile", "Mine/t0")],
                        [("foreign-tile", "Mine/t0"), ("stale-tile", "Mine/t0")]),
    "a shard's size": (lambda m: m["tiles"][0].update(shard_bytes=7), [("damaged-tile", "Mine/t0")],
                       [("foreign-tile", "Mine/t0")]),
    "a group's digest": (give_other_digest, [], [("damaged-group", None)]),
    "a group removed": (lambda m: m["groups"].pop("tiles/Mine"), [(EDITED, None)], [(EDITED, None)]),
    "a group added": (lambda m: m["groups"].update({"tiles/Yours": "0" * 64}), [(EDITED, None), ("damaged-group", None)],
                      [(EDITED, None), ("damaged-group", None)]),
}  # fmt: skip


@pytest.mark.parametrize("what", RESIGNED)
def test_an_edited_manifest_that_was_signed_again_is_found_and_mended_without_the_teacher(cached, what):
    make, teacher = cached
    config = make()
    folder = Path(config.cache.path)
    before = tree(folder)
    change, quick, full = RESIGNED[what]
    resigned(folder, change)
    read_manifest(open_storage(str(folder)))  # whole in itself
    if quick is not None:  # else sizes may differ by chance
        assert [(f.code, f.tile) for f in verify(config, "quick", CPU).findings] == quick
    assert [(f.code, f.tile) for f in verify(config, "full", CPU).findings] == full
    summary = precompute(config, CPU, repair=True)
    assert (summary.computed, summary.damaged, teacher.images) == (0, {}, 0)
    assert tree(folder) == before


def test_an_edited_manifest_is_not_trained_from(cached):
    make, _ = cached
    folder = Path(make().cache.path)
    resigned(folder, lambda m: m.update(error_bound=0.5))
    with pytest.raises(
        CorruptCache,
        match=r"manifest.json was changed and signed again: error_bound is 0\.5, and .*; restore it, or delete it",
    ):
        open_fresh_cache(make(), list_tiles(make().data, "train"), None)


def test_a_manifest_of_another_cache_is_found_and_costs_no_tile(cached, tmp_path):
    make, teacher = cached
    config = make()
    folder = Path(config.cache.path)
    before = tree(folder)
    shutil.copy(other_cache(make, tmp_path) / "manifest.json", folder)
    teacher.images = 0
    found = verify(config, "full", CPU).findings
    assert {finding.tile for finding in found} == set(ALL)
    cache = SoftTargetCache.open(str(folder))
    for tile in ALL:
        with pytest.raises(CacheError, match=f"tile {tile} of .* is damaged"):
            cache.read(tile)
    assert precompute(config, CPU, repair=True).computed == 0
    assert (tree(folder), teacher.images) == (before, 0)


def test_nobody_can_tell_what_device_and_libraries_were_and_the_page_says_so(cached):
    make, _ = cached
    resigned(Path(make().cache.path), lambda m: m.update(device="abacus"))
    assert verify(make(), "full", CPU).passes
    page = (Path(__file__).parents[2] / "cache/FORMAT.md").read_text()
    assert "nobody can tell what `device` and `libraries` were" in page
