"""Many classes at 8 bits: no pixel loses more than 2 % of its probability to other classes, from encoding to training."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from helpers import plain_reader
from helpers.caches import distributions
from helpers.configs import ENCODER
from helpers.rounding import largest_remainder
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs.zstd import Zstd

from kdpipe.cache import SoftTargetCache
from kdpipe.cache.encoding import many_classes, simplex, steady_rounding
from kdpipe.cache.encoding.many_classes import encode, levels_of
from kdpipe.cache.encoding.row_deltas import take_differences
from kdpipe.pipeline.evaluation.confusion import scores
from kdpipe.pipeline.models.smp import create_smp_model
from kdpipe.pipeline.precompute import plan
from kdpipe.pipeline.precompute.expected_recipe import complete_recipe
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.training.run import train
from kdpipe.pipeline.verify import class_map
from kdpipe.pipeline.verify.gate import verify

CPU = torch.device("cpu")
MOST, SLACK = 0.02, 1e-6


def moved(stored_CHW, probs_CHW):
    """The share of each pixel's probability that lies in other classes: its total variation, in float64."""
    return np.abs(stored_CHW.astype(float) - probs_CHW).sum(axis=0) / 2


def dirichlet(num_classes, height, width, concentration, seed=0):
    draws = np.random.default_rng(seed).dirichlet(np.full(num_classes, concentration), (height, width))
    return draws.transpose(2, 0, 1).astype(np.float32)


def kinds(num_classes):
    """Predictions that are certain, peaked, flat, and drawn from Dirichlet distributions from one-hot to even."""
    yield from (distributions(num_classes, 70, 40, seed=1, sharpness=sharpness) for sharpness in (30.0, 4.0, 1.0, 0.1))
    yield from (dirichlet(num_classes, 70, 40, concentration) for concentration in (0.01, 0.1, 1.0, 10.0))
    yield np.full((num_classes, 3, 20), 1 / num_classes, dtype=np.float32)


def stored_at_8_bits(probs_CHW):
    """What a reader of a cache at 8 bits gets, whatever the number of classes."""
    count, levels = len(probs_CHW), levels_of(8, len(probs_CHW))
    if levels > 255:
        return simplex.decode(encode(probs_CHW, levels), levels)
    return simplex.decode(steady_rounding.encode(probs_CHW, 8, simplex.levels_of(8, count)), levels)


@pytest.mark.long
@pytest.mark.parametrize("num_classes", [2, 6, 10, 11, 15, 19, 20, 21, 60, 150, 254, 400])
def test_8_bits_move_at_most_two_percent_of_any_pixel(num_classes):
    for probs in kinds(num_classes):
        stored = stored_at_8_bits(probs)
        assert moved(stored, probs).max() <= MOST + SLACK
        assert np.abs(stored - probs).max() <= max(1 / 255, (1 - 1 / num_classes) / 254) + SLACK
        np.testing.assert_allclose(stored.sum(axis=0), 1, atol=1e-5)


def test_whole_levels_alone_would_move_more():
    """What 8 bits moved before: the test above can fail."""
    flat = dirichlet(150, 70, 40, 1.0)
    plain = simplex.decode(simplex.encode(flat, 254), 254)
    steady = simplex.decode(steady_rounding.encode(flat, 6, simplex.levels_of(6, 150)), simplex.levels_of(6, 150))
    assert moved(plain, flat).mean() > 0.06
    assert moved(steady, flat).mean() > 0.2
    eleven = distributions(19, 200, 64, sharpness=0.05)
    room = steady_rounding.room(8, simplex.levels_of(8, 19), 19)
    blocks = np.empty(eleven[:, :192].shape, dtype=np.uint8)
    steady_rounding._encode_blocks(eleven[:, :192], simplex.levels_of(8, 19), room, out_CHW=blocks)
    assert moved(simplex.decode(blocks, simplex.levels_of(8, 19)), eleven[:, :192]).max() > MOST


@pytest.mark.parametrize(
    ("bits", "num_classes", "levels"),
    [(8, 19, 242), (8, 20, 256 * 243), (8, 150, 256 * 254), (8, 300, 256 * 254), (6, 150, 63), (4, 150, 15), (16, 150, 65099)],
)  # fmt: skip
def test_levels_have_parts_at_8_bits_of_more_than_19_classes(bits, num_classes, levels):
    assert levels_of(bits, num_classes) == levels < 2**16 - 1


@pytest.mark.parametrize("sharpness", [0.05, 1.0, 4.0])
def test_the_rounding_is_that_of_format_md_pixel_by_pixel(sharpness):
    probs = distributions(30, 5, 4, sharpness=sharpness)
    probs[:, 0, 0] = np.float32(1 / 30)
    levels = levels_of(8, 30)
    found = encode(probs, levels)
    for y, x in product(range(5), range(4)):
        for step in (256, 16, 1):
            expected = step * np.array(largest_remainder(probs[:, y, x], levels // step))
            if np.abs(expected / levels - probs[:, y, x]).sum() / 2 <= MOST:
                break
        assert found[:, y, x].tolist() == expected.tolist()


@settings(max_examples=40, deadline=None)
@given(st.integers(17, 70), st.sampled_from([3, 254, 4064, 54613]), st.integers(0, 2**32 - 1), st.booleans())
def test_sorted_remainders_serve_the_same_classes_as_paired_ones(num_classes, levels, seed, ties):
    probs = distributions(num_classes, 4, 5, seed, sharpness=1.0)
    if ties:
        probs = (np.round(probs * 64) + 1).astype(np.float32)
        probs /= probs.sum(axis=0)
    units = simplex.encode(probs, levels)
    for y, x in product(range(4), range(5)):
        assert units[:, y, x].tolist() == largest_remainder(probs[:, y, x], levels)


@pytest.mark.parametrize("total", [1 - 9e-5, 1 + 9e-5])
@pytest.mark.parametrize(("num_classes", "levels"), [(6, 54613), (2, 32768), (150, 65024), (30, 65099)])
def test_entries_that_sum_to_almost_one_become_integers_that_sum_to_the_levels(num_classes, levels, total):
    probs = distributions(num_classes, 30, 20, sharpness=2.0) * np.float32(total)
    probs[:, 0, 0] = [total] + [0] * (num_classes - 1)
    units = simplex.encode(probs, levels)
    assert (units.sum(axis=0, dtype=np.int64) == levels).all()
    assert np.abs(units / levels - probs).max() <= 1 / levels + 1e-4


def smooth(num_classes, side=128):
    """Predictions that vary as those of networks do: a few likely classes a pixel, and borders between them."""
    rng = np.random.default_rng(0)
    row, column = np.mgrid[:side, :side] / side
    waves, phases = rng.normal(0, 3, (2, num_classes)), rng.uniform(0, 6, num_classes)
    scores = 5 * np.sin(waves[0][:, None, None] * row + waves[1][:, None, None] * column + phases[:, None, None])
    scores += rng.normal(0, 0.02, scores.shape)
    return (np.exp(scores) / np.exp(scores).sum(axis=0)).astype(np.float32)


@pytest.mark.long
def test_150_classes_take_less_than_half_of_the_bytes_of_16_bits():
    probs = smooth(150)
    sizes = []
    for units in (encode(probs, levels_of(8, 150)), simplex.encode(probs, levels_of(16, 150))):
        take_differences(units)
        sizes.append(len(Zstd(7).encode(units)))
    assert sizes[0] < 0.45 * sizes[1]


@pytest.mark.long
def test_a_cache_of_150_classes_is_read_whole_by_window_by_zarr_and_from_the_page(tmp_path):
    classes = [f"class {number}" for number in range(150)]
    probs = np.concatenate([smooth(150)[:, :, :20], dirichlet(150, 140, 20, 1.0)], axis=1)  # two rows of chunks
    with SoftTargetCache.create(tmp_path / "own.zarr", classes) as own:
        own.write("folder/tile", probs)
    cache = SoftTargetCache.open(tmp_path / "own.zarr")
    assert cache.manifest.format_version == "5.2"
    whole = cache.read("folder/tile")
    assert moved(whole, probs).max() <= MOST + SLACK
    for window in ((0, 0, 268, 20), (250, 3, 18, 6), (63, 11, 3, 9)):
        top, left, height, width = window
        np.testing.assert_array_equal(
            cache.read("folder/tile", window), whole[:, top : top + height, left : left + width]
        )
    np.testing.assert_allclose(plain_reader.Cache(tmp_path / "own.zarr").probabilities("folder/tile"), whole, atol=1e-7)
    array = zarr.open_array(str(tmp_path / "own.zarr/tiles/folder/tile"), mode="r")
    assert (array.shape, array.dtype) == ((150, 268, 20), np.uint16)


def many_class_config(make_config, tmp_path, count):
    torch.manual_seed(0)
    teacher = create_smp_model("unet", ENCODER, count, key="teacher")
    torch.save(teacher.state_dict(), tmp_path / "many.pth")
    classes = [f"class {number}" for number in range(count)]
    return make_config(
        classes__names=classes, teacher__classes=classes, teacher__checkpoint=str(tmp_path / "many.pth"),
        class_map={name: {name: 1} for name in classes}, train__max_steps=2, train__epochs=1,
    )  # fmt: skip


@pytest.mark.long
def test_a_student_of_150_classes_trains_from_a_cache_that_passes_the_gate(make_config, tmp_path):
    config = many_class_config(make_config, tmp_path, 150)
    summary = precompute(config, CPU)
    assert summary.computed == 6 and not summary.failed
    report = verify(config, "parity", CPU, sample=1)
    assert {finding.code for finding in report.findings} <= {"class-map"}  # the teacher has random weights
    ((moved_mean, moved_most),) = [(row.moved_mean, row.moved_most) for row in report.parity]
    assert 0 < moved_mean <= moved_most <= MOST + 1e-4  # the live teacher repeats itself up to float32
    train(config, CPU)
    assert Path(tmp_path, "model_weights/tests/tiny/last.ckpt").is_file()


@pytest.mark.long
def test_a_cache_of_whole_levels_from_an_older_kdpipe_goes_on_as_it_is(make_config, tmp_path, monkeypatch):
    config = many_class_config(make_config, tmp_path, 30)

    def with_whole_levels(*arguments):
        return complete_recipe(*arguments).model_copy(update={"levels": simplex.levels_of(8, 30)})

    with monkeypatch.context() as patch:
        patch.setattr(plan, "complete_recipe", with_whole_levels)
        precompute(config, CPU)
    manifest = SoftTargetCache.open(config.cache.path).manifest
    assert (manifest.format_version, manifest.recipe.levels) == ("4.2", 247)
    assert verify(config, "full", CPU).findings == []
    assert precompute(config, CPU).computed == 0
    assert levels_of(8, 30) == many_classes.PARTS * 247


def test_the_gain_of_a_class_map_is_the_miou_of_its_confusion_matrix():
    """It is counted without the matrix, as 150 classes of both networks ask for it 22 500 times."""
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 1000, (20, 30)) * (rng.random((20, 30)) < 0.3)
    counts[1] = 0  # a class without labels
    assigned = rng.integers(0, 20, 30)
    confusion = np.stack([counts[:, assigned == s].sum(axis=1) for s in range(20)], axis=1)
    found = class_map._miou(counts, assigned)
    assert found == pytest.approx(scores(confusion, [f"{s}" for s in range(20)], []).miou, rel=1e-12)
