"""A cache that a program of the user's own fills holds its values, goes on after an interruption, and is as well protected."""

import numpy as np
import pytest

from kdpipe.cache import CacheLocked, CorruptCache, IncompleteCache, Softening, SoftTargetCache, StaleCache

CLASSES = ["Forest", "Water", "Other"]


def probs(seed, height=30, width=41):
    return np.random.default_rng(seed).dirichlet(np.ones(3), (height, width)).transpose(2, 0, 1)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_it_holds_the_given_values(bits, tmp_path):
    path = tmp_path / "own.zarr"
    with SoftTargetCache.create(path, CLASSES, bits=bits) as own:
        for seed in range(3):
            own.write(f"mine/{seed}", probs(seed))
    cache = SoftTargetCache.open(path)
    assert cache.tile_ids == ["mine/0", "mine/1", "mine/2"]
    for seed in range(3):
        assert np.abs(cache.read(f"mine/{seed}") - probs(seed)).max() <= 1 / (2**bits - 1) + 1e-6
    assert cache.manifest.recipe.classes == CLASSES


def test_logits_are_softened_when_they_are_read(tmp_path):
    logits = np.random.default_rng(0).normal(size=(3, 20, 20)) * 4
    with SoftTargetCache.create(tmp_path / "own.zarr", CLASSES, kind="logits", bits=16) as own:
        own.write("a", logits)
    softening = Softening(2.0, np.eye(3, dtype=np.float32))
    expected = np.exp(logits / 2) / np.exp(logits / 2).sum(axis=0)
    found = SoftTargetCache.open(tmp_path / "own.zarr", softening).read("a")
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_an_interrupted_program_goes_on(tmp_path):
    path, image = tmp_path / "own.zarr", tmp_path / "a.png"
    image.write_bytes(b"one")
    with pytest.raises(KeyboardInterrupt), SoftTargetCache.create(path, CLASSES, made_by={"weights": "1"}) as own:
        own.write("a", probs(0), image)
        raise KeyboardInterrupt
    with pytest.raises(IncompleteCache):
        SoftTargetCache.open(path)
    with SoftTargetCache.create(path, CLASSES, made_by={"weights": "1"}) as own:
        assert own.is_written("a", image)
        assert not own.is_written("b")
        own.write("b", probs(1))
    assert SoftTargetCache.open(path).tile_ids == ["a", "b"]
    image.write_bytes(b"two")
    with SoftTargetCache.create(path, CLASSES, made_by={"weights": "1"}) as own:
        assert not own.is_written("a", image), "its image has changed"
        own.write("a", probs(2), image)
        assert own.is_written("b")
    np.testing.assert_allclose(SoftTargetCache.open(path).read("a"), probs(2), atol=1 / 255 + 1e-6)


def test_what_it_was_made_by_is_part_of_it(tmp_path):
    with SoftTargetCache.create(tmp_path / "own.zarr", CLASSES, made_by={"weights": "1"}) as own:
        own.write("a", probs(0))
    with (
        pytest.raises(StaleCache, match="made_by"),
        SoftTargetCache.create(tmp_path / "own.zarr", CLASSES, made_by={"weights": "2"}),
    ):
        pass
    assert SoftTargetCache.open(tmp_path / "own.zarr").tile_ids == ["a"]


def test_one_program_writes_at_a_time(tmp_path):
    with (
        SoftTargetCache.create(tmp_path / "own.zarr", CLASSES),
        pytest.raises(CacheLocked),
        SoftTargetCache.create(tmp_path / "own.zarr", CLASSES),
    ):
        pass


@pytest.mark.parametrize(
    "values",
    [probs(0)[:2], probs(0)[0], probs(0) * 1.5, np.full((3, 4, 4), np.nan), -probs(0)],
    ids=["two channels", "one", "sums", "NaN", "negative"],
)
def test_other_values_are_refused(values, tmp_path):
    with SoftTargetCache.create(tmp_path / "own.zarr", CLASSES) as own:
        with pytest.raises(ValueError):
            own.write("a", values)
        with pytest.raises(ValueError):
            own.write("../a", probs(0))
        own.write("b", probs(0))
    assert SoftTargetCache.open(tmp_path / "own.zarr").tile_ids == ["b"]


def test_damage_is_found_as_in_any_cache(tmp_path):
    path = tmp_path / "own.zarr"
    with SoftTargetCache.create(path, CLASSES) as own:
        own.write("a", probs(0))
    (shard,) = path.rglob("0.0.0")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CorruptCache):
        SoftTargetCache.open(path).read("a")
