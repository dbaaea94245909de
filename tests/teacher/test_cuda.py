"""A CUDA device predicts without being waited for, copies arrive whole, and its cache passes the parity check on a CPU too."""

import shutil
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.files import write_image

from kdpipe.pipeline.dry_run import estimate
from kdpipe.pipeline.precompute.expected_recipe import complete_recipe
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.teacher.cuda import Transfers
from kdpipe.pipeline.teacher.frozen import open_teacher
from kdpipe.pipeline.training.run import train
from kdpipe.pipeline.verify.gate import verify

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_cuda_device_predicts_without_being_waited_for(make_config):
    config = make_config()
    recipe = complete_recipe(config, None, None)
    teacher = open_teacher(config, recipe, CUDA)
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, 256, (count, 70, 130, 3), dtype=np.uint8) for count in (2, 3) for _ in range(6)]
    rng.shuffle(batches)
    expected = [[encode() for encode in open_teacher(config, recipe, CUDA).encoded(images)] for images in batches]
    for images in batches[:6]:  # the first call with a shape waits while kernels are set up
        for encode in teacher.encoded(images):
            encode()
    assert teacher.seconds_taken() > 0
    sent = [teacher.send(images) for images in batches]
    try:
        torch.cuda.set_sync_debug_mode("error")
        predicted = [teacher.encoded(images) for images in sent]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for encodes, tiles in zip(predicted, expected, strict=True):
        for encode, (units, lost) in zip(encodes, tiles, strict=True):
            found_units, found_lost = encode()
            np.testing.assert_array_equal(found_units, units)
            np.testing.assert_array_equal(found_lost, lost)
    assert 0 < teacher.seconds_taken() < 60
    assert teacher.seconds_taken() == 0


def test_copies_in_both_directions_are_whole_while_the_device_computes():
    transfers = Transfers(CUDA)
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 100, (8, 700, 700, 3), dtype=np.uint8) for _ in range(12)]
    load = torch.ones(4096, 4096, device=CUDA)
    sent = deque(transfers.send(array) for array in arrays)
    fetched = []
    while sent:
        one = sent.popleft()
        tensor = transfers.receive(one)
        for _ in range(4):
            load = load @ load * 0
        fetched.append(transfers.fetch([tensor + 1 + load[0, 0].to(torch.uint8)]))
        del one, tensor  # frees memory that others may take
    for array, one in zip(arrays, fetched, strict=True):
        np.testing.assert_array_equal(one.arrays()[0], array + 1)


def shards(config):
    return {str(path): path.read_bytes() for path in Path(config.cache.path).rglob("0.0.0")}


@pytest.mark.parametrize(
    "overrides", [{}, {"teacher__tta": "d4"}, {"teacher__window": 64}, {"cache__kind": "logits"}], ids=str
)
def test_a_cuda_cache_passes_parity_and_resumes_to_the_same_bytes(make_config, tmp_path, overrides):
    for i in range(9):
        write_image(tmp_path / "Even" / "images" / f"t{i}.png", 70, 64, seed=i)
    config = make_config(
        **overrides, data__train=[str(tmp_path / "Even")], data__allow_missing_masks=True, teacher__batch_size=4
    )
    forecast = estimate(config, CUDA)
    assert 0 < forecast.seconds < 600
    summary = precompute(config, CUDA)
    assert summary.computed == 9
    assert 0 < summary.teacher_seconds < summary.seconds
    assert not verify(config, "parity", CUDA).findings
    assert not verify(config, "parity", CPU).findings
    # Deleted tiles are computed again in the same batches, to the same bytes.
    expected = shards(config)
    for tile in ("t1", "t6"):
        (folder,) = Path(config.cache.path).rglob(tile)
        shutil.rmtree(folder)
    again = precompute(config, CUDA)
    assert (again.kept, again.computed) == (7, 2)
    assert again.fingerprint == summary.fingerprint
    assert shards(config) == expected


def test_a_resumed_run_on_a_gpu_ends_with_the_losses_of_an_uninterrupted_one(cached):
    whole = train(cached.model_copy(update={"name": "whole"}), CUDA)
    short = cached.train.model_copy(update={"max_steps": 3})
    train(cached.model_copy(update={"train": short}), CUDA)
    resumed = train(cached, CUDA, resume=True)
    assert resumed.steps == whole.steps
    np.testing.assert_allclose(resumed.losses[-1], whole.losses[-1], rtol=0.05)
