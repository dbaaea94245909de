"""Integers rounded on the teacher's device equal the codec's, bit for bit."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import golden_cache
from helpers.caches import distributions
from hypothesis import given, settings
from hypothesis import strategies as st

from kdpipe.cache import codec
from kdpipe.cache.encoding import many_classes, simplex
from kdpipe.configs.errors import KdpipeError
from kdpipe.pipeline import dry_run
from kdpipe.pipeline.dry_run import estimate
from kdpipe.pipeline.precompute.expected_recipe import complete_recipe
from kdpipe.pipeline.teacher.cuda import PendingCopy
from kdpipe.pipeline.teacher.frozen import open_teacher
from kdpipe.pipeline.teacher.rounding import rounded

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]


def recipe_of(bits, num_classes):
    """The fields of a recipe that rounding reads."""
    whole, levels = simplex.levels_of(bits, num_classes), many_classes.levels_of(bits, num_classes)
    dtype = np.dtype("uint8" if levels < 255 else "uint16")
    return SimpleNamespace(bits=bits, levels=levels, has_parts=levels != whole, dtype=dtype)


def assert_same(batch_NCHW, recipe, device):
    found = rounded(torch.from_numpy(batch_NCHW).to(device), recipe)
    assert found.valid
    for values_CHW, units_CHW, lost in zip(
        batch_NCHW, found.units_NCHW.cpu().numpy(), found.lost.cpu().numpy(), strict=True
    ):
        expected_CHW, expected_lost = codec.units_of(values_CHW, recipe)
        assert units_CHW.dtype == expected_CHW.dtype
        np.testing.assert_array_equal(units_CHW, expected_CHW)
        np.testing.assert_allclose(lost, expected_lost, rtol=0, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 9), st.integers(1, 150), st.integers(1, 80), st.sampled_from([4, 6, 8, 16]),
    st.sampled_from([0.1, 3.0, 30.0]), st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_soft_targets_become_the_same_integers(device, num_classes, height, width, bits, sharpness, seed):
    batch = np.stack([distributions(num_classes, height, width, seed + tile, sharpness) for tile in range(2)])
    assert_same(batch, recipe_of(bits, num_classes), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [6, 8, 16])
def test_smooth_values_repeat_the_row_above_in_the_same_places(device, bits):
    rng = np.random.default_rng(bits)
    scores = rng.normal(0, 0.05, (2, 6, 200, 70)).cumsum(axis=2).cumsum(axis=3)
    batch = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    assert_same(batch.astype(np.float32), recipe_of(bits, 6), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("total", [1 - 9e-5, 1 + 9e-5])
@pytest.mark.parametrize(("num_classes", "bits"), [(2, 8), (6, 8), (6, 16), (200, 8)])
def test_sums_a_little_off_one_become_the_same_integers(device, num_classes, bits, total):
    batch = distributions(num_classes, 70, 20, sharpness=0.1)[None] * np.float32(total)
    assert_same(batch, recipe_of(bits, num_classes), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_classes", [11, 17, 19, 20, 150])
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 4.0])
def test_many_classes_become_the_same_integers(device, num_classes, sharpness):
    batch = np.stack([distributions(num_classes, 70, 40, seed, sharpness) for seed in range(2)])
    batch[:, :, :5] = np.float32(1 / num_classes)  # whose remainders are equal
    assert_same(batch, recipe_of(8, num_classes), device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [8, 16])
def test_logits_become_the_same_integers(device, bits):
    recipe = golden_cache.logits_recipe(bits)
    batch = np.random.default_rng(0).normal(0, 8, (2, len(recipe.channels), 90, 50)).astype(np.float32)
    batch[:, :, :9] *= 20  # deeper than the stored range
    found = rounded(torch.from_numpy(batch).to(device), recipe)
    assert found.valid
    for logits, units in zip(batch, found.units_NCHW.cpu().numpy(), strict=True):
        np.testing.assert_array_equal(units, codec.units_of(logits, recipe)[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.5, 0.9])
def test_values_that_cannot_be_stored_are_flagged(device, bad):
    batch = np.stack([distributions(3, 70, 5, seed) for seed in range(2)])
    batch[1, 2, 66, 3] = bad
    assert not rounded(torch.from_numpy(batch).to(device), recipe_of(8, 3)).valid
    if not np.isfinite(bad):
        assert not rounded(torch.from_numpy(batch).to(device), golden_cache.logits_recipe(8)).valid


class AtOnce:
    """`Transfers` within main memory."""

    def send(self, array):
        return PendingCopy([torch.from_numpy(array)], self)

    def receive(self, sent):
        return sent.tensors[0]

    def beside(self, tensors):
        return nullcontext()

    def fetch(self, tensors):
        return PendingCopy(tensors, self)

    def synchronize(self):
        pass


@pytest.mark.parametrize("overrides", [{}, {"cache__bits": 16}, {"cache__kind": "logits"}], ids=str)
def test_a_teacher_that_rounds_on_its_device_returns_what_the_codec_returns(make_config, overrides):
    config = make_config(**overrides)
    recipe = complete_recipe(config, None, None)
    teacher = open_teacher(config, recipe, torch.device("cpu"))
    images = np.random.default_rng(0).integers(0, 256, (2, 70, 130, 3), dtype=np.uint8)
    expected = [encode() for encode in teacher.encoded(images)]
    teacher._transfers = AtOnce()
    for batch in (images, teacher.send(images)):
        found = [encode() for encode in teacher.encoded(batch)]
        for (units, lost), (expected_units, expected_lost) in zip(found, expected, strict=True):
            np.testing.assert_array_equal(units, expected_units)
            assert (lost is None) == (expected_lost is None) == ("cache__kind" in overrides)
            if lost is not None:
                np.testing.assert_allclose(lost, expected_lost, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("logit", "map_share", "error", "text"),
    [
        (torch.nan, 1, KdpipeError, "logits that are not finite, in precision fp32; no precision holds them"),
        (-torch.inf, 1, KdpipeError, "logits that are not finite, in precision fp32; no precision holds them"),
        (0.0, 0.5, ValueError, "the teacher's soft targets do not sum to one"),
    ],
)
def test_values_that_cannot_be_stored_are_refused_after_they_left_the_device(
    make_config, monkeypatch, logit, map_share, error, text
):
    config = make_config(distill__temperature=1.0)
    teacher = open_teacher(config, complete_recipe(config, None, None), torch.device("cpu"))
    teacher._transfers = AtOnce()
    teacher._softened._class_map_TS *= map_share
    logits = torch.zeros(1, 8, 64, 64)
    logits[0, 3, 5, 7] = logit
    monkeypatch.setattr(teacher, "_logits", lambda images, checked: logits)
    (encode,) = teacher.encoded(np.zeros((1, 64, 64, 3), dtype=np.uint8))
    with pytest.raises(error, match=text):
        encode()


@pytest.mark.long
def test_a_dry_run_where_the_device_rounds_times_whole_batches(make_config, monkeypatch):
    config = make_config(teacher__batch_size=4)
    plain = estimate(config, torch.device("cpu"))
    sizes = []

    def opened(config, recipe, device):
        teacher = open_teacher(config, recipe, device)
        teacher._transfers = AtOnce()
        values = teacher._values
        monkeypatch.setattr(teacher, "_values", lambda images: sizes.append(len(images)) or values(images))
        return teacher

    monkeypatch.setattr(dry_run, "open_teacher", opened)
    monkeypatch.setattr(dry_run, "stage_threads", lambda device: (1, 10**6))
    rounding = estimate(config, torch.device("cpu"))
    assert sizes == [4] * 3 * dry_run.TRIALS
    assert (rounding.bytes, rounding.pixels) == (plain.bytes, plain.pixels)
    assert 0 < rounding.seconds < 3600
