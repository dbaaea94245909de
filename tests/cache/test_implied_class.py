"""One class of a pixel is not stored: it is recovered exactly, and missing data are not mistaken for it."""

from contextlib import closing

import numpy as np
import pytest
import zarr
from helpers import golden_cache
from helpers.caches import RECIPE, distributions
from helpers.files import tree
from hypothesis import given, settings
from hypothesis import strategies as st

from kdpipe.cache import CorruptCache, SoftTargetCache, codec
from kdpipe.cache import writer as writer_module
from kdpipe.cache.encoding.implied_class import fill_in, leave_out
from kdpipe.cache.encoding.simplex import encode, levels_of
from kdpipe.cache.index.records import ImageDigest
from kdpipe.cache.recipe import Recipe
from kdpipe.cache.spill import Spill
from kdpipe.cache.storage.base import open_storage
from kdpipe.cache.tile import encode_bands, encode_tile
from kdpipe.cache.writer import open_writer, store_tile

IMAGE = ImageDigest(size_bytes=0, sha256="0" * 64)


def recipe(bits):
    return Recipe.model_validate({**RECIPE.model_dump(), "bits": bits, "levels": levels_of(bits, 3)})


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 9), st.integers(1, 40), st.integers(1, 40), st.sampled_from([4, 6, 8, 16]),
    st.sampled_from([1, 7, 256]), st.sampled_from([0.1, 3.0, 30.0]), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_the_class_left_out_is_recovered_and_the_choice_is_deterministic(
    num_classes, height, width, bits, chunk_px, sharpness, seed
):
    levels = levels_of(bits, num_classes)
    units = encode(distributions(num_classes, height, width, seed, sharpness), levels)
    stored, again = units.copy(), units.copy()
    leave_out(stored, chunk_px)
    leave_out(again, chunk_px)
    np.testing.assert_array_equal(stored, again)
    assert ((stored == np.iinfo(stored.dtype).max).sum(axis=0) == 1).all()
    top, left = (seed % side for side in (height, width))
    window = stored[:, top:, left:].copy()
    fill_in(stored, levels, chunk_px)
    np.testing.assert_array_equal(stored, units)
    fill_in(window, levels, chunk_px, (top, left))
    np.testing.assert_array_equal(window, units[:, top:, left:])


def test_each_chunk_leaves_out_the_class_that_changes_most_from_row_to_row():
    units = np.full((3, 8, 2), 10, dtype=np.uint8)
    units[1, :4] = [[9, 9], [10, 9], [9, 9], [10, 9]]
    units[2, :4, 0] = [1, 1, 1, 2]
    units[2, :4, 1] = 7
    units[2, 4:, 1] = [0, 1, 1, 1]
    leave_out(units, 4)
    marked = units == 255
    assert marked[:, 0, 0].tolist() == [False, True, False]
    assert marked[:, 7, 1].tolist() == [False, False, True]
    assert marked.sum() == 16
    even = np.zeros((3, 1, 1), dtype=np.uint8)
    leave_out(even, 4)
    assert even.ravel().tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    "pixel", [[0, 0, 0], [255, 255, 0], [255, 255, 255], [255, 200, 14], [255, 200, 100], [100, 100, 13], [100, 255, 13]],
    ids=["missing", "two left out", "all ones", "more than all", "more than a byte holds", "none left out", "another left out"],
)  # fmt: skip
def test_an_impossible_pixel_is_refused(pixel):
    stored = np.tile(np.array([255, 100, 13], dtype=np.uint8)[:, None, None], (1, 3, 4))
    fill_in(stored.copy(), 213, 256)
    stored[:, 1, 2] = pixel
    with pytest.raises(ValueError, match="its values do not sum to one"):
        fill_in(stored, 213, 256)


@pytest.mark.parametrize("bits", [4, 6, 8, 16])
def test_a_cache_keeps_the_bound_of_its_bits_and_is_deterministic(bits, tmp_path):
    probs = distributions(3, 270, 300, seed=bits)
    written = []
    for name in ("a", "b"):
        with open_writer(open_storage(str(tmp_path / name)), recipe(bits), device="cpu", libraries={}) as writer:
            manifest = writer.finish([writer.write("Train/a", probs, IMAGE)])
        written.append((tmp_path / name / "manifest.json").read_bytes())
    assert written[0] == written[1]
    cache = SoftTargetCache.open(str(tmp_path / "a"))
    found = cache.read("Train/a")
    assert np.abs(found.sum(axis=0) - 1).max() <= 1e-6
    assert np.abs(found - probs).max() <= manifest.error_bound <= 1 / (2**bits - 1) + 2e-6
    np.testing.assert_array_equal(cache.read("Train/a", (200, 100, 70, 199)), found[:, 200:270, 100:299])


def test_the_class_left_out_takes_almost_no_bytes():
    """Two smooth classes, and two noisy ones, one of which the others imply."""
    row, column = np.mgrid[:256, :256] / 256
    noise = np.random.default_rng(0).uniform(0, 0.3, (256, 256))
    first, second = 0.1 + 0.2 * row, 0.1 + 0.2 * column
    probs = np.stack([first, second, noise, 1 - first - second - noise]).astype(np.float32)
    made = RECIPE.model_dump() | {"classes": list("wxyz"), "class_map": [[1, 0, 0, 0]] * 2, "levels": levels_of(8, 4)}
    made = Recipe.model_validate(made)
    units, lost = codec.encode(probs, made)
    shard = encode_tile(units, "Train/a", IMAGE, made, lost)[0]
    whole = encode_tile(codec.units(units, made), "Train/a", IMAGE, made, lost)[0]
    assert len(shard) < 0.6 * len(whole)


def test_a_chunk_of_zeros_as_zarr_reads_a_missing_one_is_refused(tmp_path, monkeypatch):
    """All digests vouch for the shard."""
    zeros = np.zeros((3, 20, 30), dtype=np.uint8)
    monkeypatch.setattr(writer_module, "encode", lambda probs, recipe: (zeros, np.zeros((1, 1))))
    with open_writer(open_storage(str(tmp_path / "c")), RECIPE, device="cpu", libraries={}) as writer:
        writer.finish([writer.write("Train/a", distributions(3, 20, 30), IMAGE)])
    assert not zarr.open_group(tmp_path / "c", mode="r")["tiles/Train/a"][:].any()
    with pytest.raises(CorruptCache, match="a chunk is missing, or its values do not sum to one"):
        SoftTargetCache.open(str(tmp_path / "c")).read("Train/a")


@pytest.mark.parametrize("heights", [[300], [64, 200, 36], [1, 1, 298], [130, 170]])
@pytest.mark.parametrize("kind", ["soft", "logits"])
def test_a_tile_written_in_bands_has_the_bytes_of_one_written_whole(kind, heights, tmp_path):
    recipe = golden_cache.recipe(8) if kind == "soft" else golden_cache.logits_recipe(8)
    scores = np.random.default_rng(0).normal(0, 3, (len(recipe.channels), 300, 90)).astype(np.float32)
    tile = scores if kind == "logits" else np.exp(scores) / np.exp(scores).sum(axis=0)
    bands = np.split(tile, np.cumsum(heights)[:-1], axis=1)
    storages = [open_storage(str(tmp_path / name)) for name in ("bands", "whole")]
    for storage in storages:
        storage.folder.mkdir()
    with closing(Spill(storages[0])) as spill:
        in_bands = store_tile(storages[0], "T/a", encode_bands(iter(bands), recipe, 300, 90, spill), IMAGE, recipe)
    assert in_bands == store_tile(storages[1], "T/a", codec.encode(tile, recipe), IMAGE, recipe)
    assert tree(tmp_path / "bands") == tree(tmp_path / "whole")
