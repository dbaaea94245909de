"""A trial on some of the tiles (`data.limit`, `--limit N`): its cache is a part of the whole, says so, and is completed without waste."""

import pytest
import torch
from helpers.doubles import Lines

from kdpipe.cache import IncompleteCache, SoftTargetCache
from kdpipe.data.stretch import resolve_stretch
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.training.run import train
from kdpipe.pipeline.verify.gate import verify

CPU = torch.device("cpu")
VIEWS = {"distill__teacher_view": "crop", "cache__views": 2, "train__mosaic": 1.0}


def manifest(config):
    return SoftTargetCache.open(config.cache.path, partial=True).manifest


@pytest.fixture
def trial(make_config):
    """Configurations with and without a limit, on the six labelled and two unlabelled tiles; others are the same."""

    def made(limit, **overrides):
        return make_config(data__unlabelled=[str(make_config.args[0] / "Unlabelled")], data__limit=limit, **overrides)

    return made


@pytest.mark.long
@pytest.mark.parametrize("overrides", [{}, VIEWS], ids=["tiles", "views of mosaics"])
def test_a_whole_run_goes_on_from_a_trial_and_ends_as_without_it(trial, tmp_path, overrides):
    per_tile = overrides.get("cache__views", 1)
    first = precompute(trial(3, **overrides), CPU)
    assert (first.computed, first.configured, first.is_partial) == (3 * per_tile, 8 * per_tile, True)
    assert verify(trial(3, **overrides), "full", CPU).passes
    for mode in ("cached", "none"):
        steps = trial(3, **overrides, name=mode, distill__mode=mode, train__max_steps=1)
        assert train(steps, CPU).steps == 1
    more = precompute(trial(5, **overrides), CPU)
    assert (more.kept, more.computed) == (3 * per_tile, 2 * per_tile)
    done = precompute(trial(None, **overrides), CPU)
    assert (done.kept, done.computed, done.is_partial) == (5 * per_tile, 3 * per_tile, False)

    elsewhere = trial(None, **overrides, cache__path=str(tmp_path / "undisturbed.zarr"))
    precompute(elsewhere, CPU)
    assert manifest(trial(None, **overrides)) == manifest(elsewhere)
    assert verify(trial(None, **overrides), "full", CPU).passes


def test_a_cache_of_a_trial_says_that_it_is_one(trial):
    config = trial(3)
    precompute(config, CPU)
    found = manifest(config)
    assert (len(found.tiles), found.partial_of, found.format_version) == (3, 8, "4.3")
    with pytest.raises(
        IncompleteCache, match=r"cache of a trial: it holds 3 of 8 tiles, as --limit asked.*partial=True"
    ):
        SoftTargetCache.open(config.cache.path)


def test_a_trial_on_a_whole_cache_changes_nothing(trial):
    precompute(trial(None), CPU)
    before = manifest(trial(None))
    said = Lines()
    summary = precompute(trial(2), CPU, said)
    assert summary.computed == 0
    assert not summary.is_partial
    assert "all 2 tiles of this trial are in" in "\n".join(said.said)
    assert manifest(trial(None)) == before


def test_a_smaller_trial_keeps_the_tiles_of_a_larger_one(trial):
    precompute(trial(5), CPU)
    assert precompute(trial(2), CPU).computed == 0
    assert len(manifest(trial(2)).tiles) == 5
    assert verify(trial(5), "full", CPU).passes


@pytest.mark.long
def test_percentiles_are_those_of_all_tiles(trial, make_config):
    stretch = {"percentiles": [2, 98]}
    some, every = trial(2, data__stretch=stretch), trial(None, data__stretch=stretch)
    assert resolve_stretch(some.data, list_tiles(some.data, "train")) == resolve_stretch(
        every.data, list_tiles(every.data, "train")
    )
    assert precompute(some, CPU).computed == 2
    assert precompute(every, CPU).kept == 2


def test_masks_that_training_will_refuse_are_said_before_stage_one(trial):
    said = Lines()
    precompute(trial(1, data__remap={77: "Forest"}), CPU, said)
    (line,) = [line for line in said.said if line.startswith("warning: ")]
    assert "stage one needs no masks, and training will refuse these: the mask" in line
    assert "values that data.remap does not list" in line
