"""Soft targets packed for their way to the device: what comes out is what went in, to a 16-bit step."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from kdpipe.pipeline.training.loaders import PACKED_LEVELS, collate_packed, packed, unpacked


def there_and_back(target_CHW, inside_HW):
    batch = torch.from_numpy(packed(target_CHW))[None]
    return unpacked(batch, torch.from_numpy(inside_HW)[None])[0].numpy()


@given(classes=st.integers(2, 12), sharpness=st.sampled_from([0.1, 1.0, 30.0]), seed=st.integers(0, 99))
def test_targets_come_out_within_the_stated_bound_and_sum_to_one(classes, sharpness, seed):
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


def test_a_pixel_without_numbers_stays_one_and_the_others_are_as_they_were():
    target = np.full((2, 1, 3), 0.5, dtype=np.float32)
    target[0, 0, 1] = np.nan
    found = there_and_back(target, np.ones((1, 3), dtype=bool))
    assert np.isnan(found[:, 0, 1]).all()
    np.testing.assert_allclose(found[:, 0, ::2], 0.5)


def test_a_batch_is_that_of_torch_but_for_its_targets():
    target = np.full((2, 4, 4), 0.5, dtype=np.float32)
    samples = [{"image": np.full((3, 4, 4), n, dtype=np.uint8), "target": target} for n in range(2)]
    batch = collate_packed(samples)
    assert batch["target"].dtype == torch.int16
    assert batch["image"].tolist() == [sample["image"].tolist() for sample in samples]
    assert "target" not in collate_packed([{"image": sample["image"]} for sample in samples])
    assert samples[0]["target"] is target, "the samples are as they were"
