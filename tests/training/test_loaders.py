"""Batches: a stream that can start anywhere, and soft targets packed to 16-bit levels on their way to the device."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdpipe.pipeline.training.loaders import PACKED_LEVELS, BatchStream, collate_packed, packed, unpacked


def test_a_stream_resumed_anywhere_gives_the_same_batches():
    whole = list(BatchStream(11, 3, 4, seed=5, start=0))
    assert len(whole) == 12
    for start in range(13):
        assert list(BatchStream(11, 3, 4, seed=5, start=start)) == whole[start:]
    singles = list(BatchStream(11, 1, 4, seed=5, start=0, accumulate=3))
    assert [[k for batch in singles[i : i + 3] for k in batch] for i in range(0, len(singles), 3)] == whole
    epochs = [sorted(k % 11 for batch in whole[e * 3 : e * 3 + 3] for k in batch) for e in range(4)]
    assert all(len(set(epoch)) == 9 for epoch in epochs)


def there_and_back(target_CHW, inside_HW):
    batch = torch.from_numpy(packed(target_CHW))[None]
    return unpacked(batch, torch.from_numpy(inside_HW)[None])[0].numpy()


@given(classes=st.integers(2, 12), sharpness=st.sampled_from([0.1, 1.0, 30.0]), seed=st.integers(0, 99))
def test_targets_come_out_within_half_a_level_and_half_a_level_per_class_and_sum_to_one(classes, sharpness, seed):
    logits = np.random.default_rng(seed).normal(0, sharpness, (classes, 9, 7))
    exact = np.exp(logits - logits.max(axis=0))
    exact /= exact.sum(axis=0)
    found = there_and_back(exact.astype(np.float32), np.ones((9, 7), dtype=bool)).astype(np.float64)
    assert np.abs(found - exact).max() <= (1 + classes) / 2 / PACKED_LEVELS + 1e-6
    np.testing.assert_allclose(found.sum(axis=0), 1, atol=1e-6)


def test_certainty_and_padding_stay_what_they_are():
    target = np.zeros((3, 2, 2), dtype=np.float32)
    target[1, 0] = 1  # the lower row is padding
    assert packed(target).dtype == np.int16
    np.testing.assert_array_equal(there_and_back(target, target.any(axis=0)), target)


def test_a_pixel_of_nan_stays_nan_and_the_others_are_as_they_were():
    target = np.full((2, 1, 3), 0.5, dtype=np.float32)
    target[0, 0, 1] = np.nan
    found = there_and_back(target, np.ones((1, 3), dtype=bool))
    assert np.isnan(found[:, 0, 1]).all()
    np.testing.assert_allclose(found[:, 0, ::2], 0.5)


def test_a_batch_is_torchs_own_except_for_its_targets():
    target = np.full((2, 4, 4), 0.5, dtype=np.float32)
    samples = [{"image": np.full((3, 4, 4), n, dtype=np.uint8), "target": target} for n in range(2)]
    batch = collate_packed(samples)
    assert batch["target"].dtype == torch.int16
    assert batch["image"].tolist() == [sample["image"].tolist() for sample in samples]
    assert "target" not in collate_packed([{"image": sample["image"]} for sample in samples])
    assert samples[0]["target"] is target, "the samples are as they were"
