"""`EpochSampler`: other crops in every epoch, whatever loads them, and the same in every run."""

import numpy as np
import pytest
from torch.utils.data import DataLoader

from kdpipe.data.dataset import EpochSampler, TrainTiles
from kdpipe.data.tiles import list_tiles


def test_epochs_are_permutations_that_follow_each_other_and_can_be_chosen():
    sampler = EpochSampler(7, seed=3)
    first, second = list(sampler), list(sampler)
    assert sorted(first) == list(range(7))
    assert sorted(second) == list(range(7, 14))
    assert [k - 7 for k in second] != first
    sampler.set_epoch(1)
    assert list(sampler) == second
    assert list(EpochSampler(7, seed=3)) == first
    assert list(EpochSampler(7, seed=4)) != first
    assert len(sampler) == 7


def test_ranks_share_an_epoch_and_have_as_many_samples_each():
    parts = [list(EpochSampler(11, 3, rank, ranks=4)) for rank in range(4)]
    whole = list(EpochSampler(11, 3))
    assert [len(part) for part in parts] == [2] * 4
    assert len(EpochSampler(11, 3, 1, 4)) == 2
    assert np.array(parts).T.flatten().tolist() == whole[:8], "as one process with a batch of all"


def test_a_rank_or_an_epoch_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"expected a rank from 0 to 1 \(ranks - 1\), found 2"):
        EpochSampler(4, 0, rank=2, ranks=2)
    with pytest.raises(ValueError, match="epochs are counted from 0, found -1"):
        EpochSampler(4, 0).set_epoch(-1)


@pytest.mark.long
def test_workers_that_live_on_show_the_crops_of_the_epoch(make_config):
    config = make_config(train__crop=32)
    samples = TrainTiles(list_tiles(config.data, "train"), config)
    sampler = EpochSampler(len(samples), config.seed)
    options = {"num_workers": 2, "multiprocessing_context": "spawn", "persistent_workers": True}
    loader = DataLoader(samples, batch_size=3, sampler=sampler, **options)
    shown = []
    for epoch in (0, 1, 4):
        sampler.set_epoch(epoch)
        shown.append(np.concatenate([batch["image"].numpy() for batch in loader]))
        sampler.set_epoch(epoch)
        np.testing.assert_array_equal(shown[-1], [samples[k]["image"] for k in sampler])
    loader._iterator._shutdown_workers()
    crops = {crop.tobytes() for epoch in shown for crop in epoch}
    assert len(crops) == 3 * len(samples), "no crop twice"
