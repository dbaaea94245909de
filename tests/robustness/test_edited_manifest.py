"""A manifest that was edited, signed again or taken from another cache is found, and repaired without the teacher."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.caches import sign
from helpers.files import tree
from helpers.small_world import other_cache

from kdpipe.cache import CacheError, CorruptCache, SoftTargetCache
from kdpipe.cache.documents import read_manifest
from kdpipe.cache.storage.base import open_storage
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.training.targets import open_fresh_cache
from kdpipe.pipeline.verify.gate import verify

CPU = torch.device("cpu")
ALL = ["Mine/t0", "Mine/t1", "Mine/t2"]


def resigned(folder, change):
    """Edit the manifest, and sign it again: checksum and fingerprint match its content."""
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
    "an image's digest": (lambda m: m["tiles"][0]["image"].update(sha256="1" * 64), [("stale-tile", "Mine/t0")],
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
def test_an_edited_manifest_that_was_signed_again_is_found_and_mended_without_the_teacher(finished, teacher, what):
    config = finished(teacher__precision="auto")
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


def test_an_edited_manifest_is_not_trained_from(finished):
    folder = Path(finished().cache.path)
    resigned(folder, lambda m: m.update(error_bound=0.5))
    with pytest.raises(
        CorruptCache,
        match=r"manifest.json was changed and signed again: error_bound is 0\.5, and .*; restore it, or delete it",
    ):
        open_fresh_cache(finished(), list_tiles(finished().data, "train"), None)


def test_a_manifest_of_another_cache_is_found_and_costs_no_tile(finished, teacher, tmp_path):
    config = finished()
    folder = Path(config.cache.path)
    before = tree(folder)
    shutil.copy(other_cache(finished, tmp_path) / "manifest.json", folder)
    teacher.images = 0
    found = verify(config, "full", CPU).findings
    assert {finding.tile for finding in found} == set(ALL)
    cache = SoftTargetCache.open(str(folder))
    for tile in ALL:
        with pytest.raises(CacheError, match=f"tile {tile} of .* is damaged"):
            cache.read(tile)
    assert precompute(config, CPU, repair=True).computed == 0
    assert (tree(folder), teacher.images) == (before, 0)


def test_nobody_can_tell_what_device_and_libraries_were_and_the_page_says_so(finished):
    resigned(Path(finished().cache.path), lambda m: m.update(device="abacus"))
    assert verify(finished(), "full", CPU).passes
    page = (Path(__file__).parents[2] / "cache/FORMAT.md").read_text()
    assert "nobody can tell what `device` and `libraries` were" in page
