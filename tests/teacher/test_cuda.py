"""
What only a CUDA device shows: it is asked without waiting for it, and what it makes is what a processor makes.

The other tests take the device that the commands take, so that on a machine with a GPU they are tests of it as well.
"""

import itertools
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
from kdpipe.pipeline.teacher import graphs
from kdpipe.pipeline.teacher.cuda import Transfers
from kdpipe.pipeline.teacher.frozen import open_teacher
from kdpipe.pipeline.training.run import train
from kdpipe.pipeline.verify.gate import verify

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_a_cuda_device_is_asked_without_waiting_for_it_and_replays_what_it_was_asked(make_config, monkeypatch):
    monkeypatch.setattr(graphs, "RECOVERS", "2.0")
    config = make_config()
    teacher = open_teacher(config, complete_recipe(config, None, None), CUDA)
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, 256, (count, 70, 130, 3), dtype=np.uint8) for count in (2, 3) for _ in range(6)]
    rng.shuffle(batches)
    expected = []
    for images in batches:
        plain = open_teacher(config, complete_recipe(config, None, None), CUDA)
        expected.append([encode() for encode in plain.encoded(images)])
    for images in batches[:6]:  # what is set up at the first two calls with a shape is waited for
        for encode in teacher.encoded(images):
            encode()
    assert teacher.seconds_taken() > 0
    sent = [teacher.send(images) for images in batches]
    assert [len(replay._graphs) for replay in (teacher._asking, teacher._rounding)] == [2, 2]
    try:
        torch.cuda.set_sync_debug_mode("error")
        asked = [teacher.encoded(images) for images in sent]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for encodes, tiles in zip(asked, expected, strict=True):
        for encode, (units, lost) in zip(encodes, tiles, strict=True):
            found_units, found_lost = encode()
            np.testing.assert_array_equal(found_units, units)
            np.testing.assert_array_equal(found_lost, lost)
    assert 0 < teacher.seconds_taken() < 60
    assert teacher.seconds_taken() == 0


def recording():
    return graphs.Replay(torch.cuda.Stream())


def test_a_replayed_function_gives_what_it_gives_and_keeps_few_graphs(monkeypatch):
    monkeypatch.setattr(graphs, "RECOVERS", "2.0")
    monkeypatch.setattr(graphs, "KEPT", 2)
    calls = []

    def function(x):
        calls.append(len(x))
        return x * 2, x.sum(dim=0)

    replay = recording()
    for turn in range(4):
        for length in (3, 4, 5):
            x = torch.full((length, 2), float(turn + length), device="cuda")
            doubled, total = replay(function, x)
            assert torch.equal(doubled, x * 2)
            assert torch.equal(total, x.sum(dim=0))
    assert len(replay._graphs) == 2
    assert [calls.count(length) for length in (3, 4, 5)] == [3, 3, 4]
    replay.drop()
    replay(function, torch.ones(3, 2, device="cuda"))
    assert calls.count(3) == 4
    assert not replay._graphs


def test_a_function_that_cannot_be_replayed_is_called_as_it_is():
    turns = itertools.count(1)
    for function, expected in (
        (lambda x: (x + x.sum().item(),), [5, 5, 5]),  # waits for the device
        (lambda x: (x * next(turns),), [1, 4, 5]),  # depends on more than its argument, which two more calls find out
    ):
        replay = recording()
        if replay._refused:
            pytest.skip(f"torch {torch.__version__} does not recover from captures that fail, and makes none")
        for value in expected:
            (found,) = replay(function, torch.ones(4, device="cuda"))
            assert found.tolist() == [value] * 4
        assert not replay._graphs


def test_what_a_cuda_device_is_sent_and_sends_back_is_whole_while_it_computes():
    device = torch.device("cuda")
    transfers = Transfers(device)
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 100, (8, 700, 700, 3), dtype=np.uint8) for _ in range(12)]
    load = torch.ones(4096, 4096, device=device)
    sent = deque(transfers.send(array) for array in arrays)
    fetched = []
    while sent:
        one = sent.popleft()
        tensor = transfers.take(one)
        for _ in range(4):
            load = load @ load * 0
        fetched.append(transfers.fetch([tensor + 1 + load[0, 0].to(torch.uint8)]))
        del one, tensor  # whose memory others may take
    for array, one in zip(arrays, fetched, strict=True):
        np.testing.assert_array_equal(one.arrays()[0], array + 1)


def shards(config):
    return {str(path): path.read_bytes() for path in Path(config.cache.path).rglob("0.0.0")}


@pytest.mark.parametrize(
    "overrides", [{}, {"teacher__tta": "d4"}, {"teacher__window": 64}, {"cache__kind": "logits"}], ids=str
)
def test_stage_one_and_its_proof(make_config, tmp_path, overrides):
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
    # Some tiles alone: among the same ones in a batch, to the same bytes.
    expected = shards(config)
    for tile in ("t1", "t6"):
        (folder,) = Path(config.cache.path).rglob(tile)
        shutil.rmtree(folder)
    again = precompute(config, CUDA)
    assert (again.kept, again.computed) == (7, 2)
    assert again.fingerprint == summary.fingerprint
    assert shards(config) == expected


def test_a_stopped_run_on_a_gpu_goes_on_to_weights_like_those_of_one_that_was_not(cached):
    whole = train(cached.model_copy(update={"name": "whole"}), CUDA)
    short = cached.train.model_copy(update={"max_steps": 3})
    train(cached.model_copy(update={"train": short}), CUDA)
    resumed = train(cached, CUDA, resume=True)
    assert resumed.steps == whole.steps
    np.testing.assert_allclose(resumed.losses[-1], whole.losses[-1], rtol=0.05)
