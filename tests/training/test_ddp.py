"""Stage two in two processes (DDP) against one process with twice the batch: gradients, losses, samples, scores, files."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.ddp_rank import MEANS, SUMS, fresh, gradients, with_unused
from helpers.doubles import Lines
from helpers.ports import free_port
from helpers.runs import Small, assert_same_weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kdpipe.configs import dump_config
from kdpipe.configs.errors import ConfigError
from kdpipe.pipeline.distributed import freeze_unused, is_further_process, open_fabric
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.training import run as training
from kdpipe.pipeline.training.loop import Loop

CPU = torch.device("cpu")
TRAIN = {
    "train__epochs": 3,
    "train__batch_size": 1,
    "train__crops_per_tile": 2,
    "train__accumulate": 2,
    "train__crop": 32,
    "train__average": "ema",
}
pytestmark = [pytest.mark.timeout(300), pytest.mark.long]

_RUN = {}


@pytest.fixture
def two_ranks(make_config, tmp_path, tmp_path_factory, monkeypatch):
    """Results of two processes that trained `with_unused` from the cache, stopped, resumed, and then computed gradients."""
    if not _RUN:
        config = make_config(**TRAIN)
        precompute(config, CPU)
        (tmp_path / "config.yaml").write_text(dump_config(config))
        port = free_port()
        processes = [
            subprocess.Popen(
                [sys.executable, str(Path(__file__).parents[1] / "helpers/ddp_rank.py"), str(rank), str(port), str(tmp_path)],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for rank in range(2)
        ]  # fmt: skip
        try:
            said = [process.communicate(timeout=120) for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert [process.returncode for process in processes] == [0, 0], said
        _RUN["ranks"] = [dict(np.load(tmp_path / f"rank{rank}.npz")) for rank in range(2)]
        _RUN["said"] = said
        _RUN["folder"] = shutil.copytree(
            tmp_path, tmp_path_factory.mktemp("ranks") / "run"
        )  # the test's own goes with it
    return _RUN


@pytest.mark.parametrize("name", SUMS)
def test_the_gradients_of_two_processes_are_those_of_one_with_twice_the_batch(two_ranks, name):
    expected, terms = gradients(fresh(), name, slice(0, 4))
    for rank in two_ranks["ranks"]:
        for i, gradient in enumerate(expected):
            np.testing.assert_allclose(rank[f"{name}/{i}"], gradient, rtol=2e-5, atol=1e-8)
        for term in ("total", "hard", "soft"):
            assert rank[f"{name}/{term}"] == pytest.approx(getattr(terms, term).item(), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", MEANS)
def test_a_loss_that_is_no_sum_is_the_mean_over_the_processes_that_have_a_pixel_for_it(two_ranks, name):
    parts = [gradients(fresh(), name, part) for part in (slice(0, 2), slice(2, 4))]
    labelled = [part for part in parts if part[1].hard > 0]
    taught = [part for part in parts if part[1].soft > 0]
    assert len(labelled) == (2 if name == "means" else 1)
    assert len(taught) == (1 if name.endswith("data") else 2)
    hard, soft = (
        np.mean([getattr(terms, term).item() for _, terms in having])
        for term, having in (("hard", labelled), ("soft", taught))
    )
    for rank in two_ranks["ranks"]:
        assert rank[f"{name}/hard"] == pytest.approx(hard, rel=1e-6)
        assert rank[f"{name}/soft"] == pytest.approx(soft, rel=1e-6)
        assert rank[f"{name}/total"] == pytest.approx(0.4 * hard + 0.6 * soft, rel=1e-6)
        if name == "means":
            for i, (one, two) in enumerate(zip(*(grads for grads, _ in parts), strict=True)):
                np.testing.assert_allclose(rank[f"{name}/{i}"], (one + two) / 2, rtol=2e-5, atol=1e-8)
        elif name.endswith("data"):  # all of both losses is the second process's
            for i, gradient in enumerate(parts[1][0]):
                np.testing.assert_allclose(rank[f"{name}/{i}"], gradient, rtol=2e-5, atol=1e-8)


def test_two_processes_stopped_and_resumed_train_as_one_with_twice_the_batch(
    two_ranks, make_config, monkeypatch, tmp_path
):
    ranks = two_ranks["ranks"]
    assert [int(rank["stopped_at"]) for rank in ranks] == [3, 3], "only rank 0 was asked to stop"
    monkeypatch.setattr(training, "starting_student", with_unused)
    seen = []
    original = Loop._train_batch

    def noted(self, batch):
        seen.append(batch["image"].double().sum(dim=(1, 2, 3)).tolist())
        return original(self, batch)

    monkeypatch.setattr(Loop, "_train_batch", noted)
    config = make_config(**{**TRAIN, "train__batch_size": 2}, cache__path=str(two_ranks["folder"] / "cache.zarr"))
    single = training.train(config, CPU)
    for rank in ranks:
        np.testing.assert_array_equal(rank["batches"], np.arange(len(seen)))  # none twice, none left out by the stop
        np.testing.assert_allclose(rank["losses"], single.losses[3:], rtol=1e-4)
        assert float(rank["miou"]) == pytest.approx(single.final["miou"], abs=2e-3)
    np.testing.assert_array_equal(np.concatenate([rank["samples"] for rank in ranks], axis=1), seen)
    name = "model_weights/tests/tiny/last.ckpt"
    found, expected = (torch.load(folder / name, weights_only=True) for folder in (two_ranks["folder"], tmp_path))
    assert found["averaging_state"] == expected["averaging_state"]
    for weights in ("state_dict", "current_model_state"):
        for key, value in expected[weights].items():
            torch.testing.assert_close(found[weights][key], value, rtol=1e-3, atol=1e-5)
    assert not torch.equal(*(next(iter(found[weights].values())) for weights in ("state_dict", "current_model_state")))


def test_a_trial_finds_the_parameters_without_gradient_and_changes_nothing_else():
    torch.manual_seed(0)
    student = Small()
    student.unused = torch.nn.Conv2d(8, 8, 1)
    student.head.bias.requires_grad_(False)  # the user's own choice stays
    before = {name: value.clone() for name, value in student.state_dict().items()}
    freeze_unused(student, torch.rand(2, 3, 16, 16))
    learning = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    assert learning == {"encoder.0.weight", "encoder.0.bias", "encoder.1.weight", "encoder.1.bias", "head.weight"}
    assert_same_weights(student.state_dict(), before)
    assert all(parameter.grad is None for parameter in student.parameters())


def test_only_the_first_process_writes_and_prints(two_ranks):
    folder = two_ranks["folder"]
    logs = sorted((folder / "lightning_logs/tests/tiny").glob("version_*"))
    assert [path.name for path in logs] == ["version_0", "version_1"], "the stopped run's and the resumed one's"
    steps = [line.split(",") for line in (logs[1] / "metrics.csv").read_text().splitlines()]
    column = steps[0].index("step")
    numbers = [int(row[column]) for row in steps[1:] if row[steps[0].index("train_loss")]]
    assert numbers == sorted(set(numbers)), "every step once"
    for version in logs:
        (events,) = version.glob("events.out.tfevents.*")
        board = EventAccumulator(str(events), size_guidance={"images": 0}).Reload()
        pictures = [tag for tag in board.Tags()["images"] if tag.endswith("/5 student")]
        assert len(pictures) == (0 if version.name == "version_0" else 5), (
            "the first was stopped before it was validated"
        )
        assert all(len({image.step for image in board.Images(tag)}) == len(board.Images(tag)) for tag in pictures)
    assert not [line for line in two_ranks["said"][1][0].splitlines() if line.strip()]


def test_settings_that_do_not_fit_several_devices_are_refused(make_config, monkeypatch):
    with pytest.raises(
        ConfigError,
        match="batch_size: auto measures one device, and devices is 2: set batch_size to the samples per device",
    ):
        make_config(train__batch_size="auto", train__devices=2)
    with pytest.raises(
        ConfigError, match=r"effective_batch_size is 4, but batch_size 2 x accumulate 1 x devices 3 is 6"
    ):
        make_config(train__effective_batch_size=4, train__devices=3)
    online = make_config(distill__mode="online", train__devices=2)
    with pytest.raises(ConfigError, match="online trains on one device, and train.devices is 2"):
        training.train(online, CPU)
    config = make_config(train__devices=2)
    with pytest.raises(ConfigError, match="train.devices 2 takes the first devices of a kind, found --device cuda:1"):
        open_fabric(config, torch.device("cuda:1"), 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="train.devices is 2, and there are 1 GPUs"):
        open_fabric(config, torch.device("cuda"), 2)
    assert not is_further_process(config)


def test_a_run_on_two_devices_is_not_resumed_on_one(two_ranks, make_config, monkeypatch):
    monkeypatch.chdir(two_ranks["folder"])
    config = make_config(**TRAIN, cache__path=str(two_ranks["folder"] / "cache.zarr"))
    monkeypatch.chdir(two_ranks["folder"])
    monkeypatch.setattr(training, "starting_student", with_unused)
    with pytest.raises(ConfigError, match="train.devices: was 2, is 1"):
        training.train(config, CPU, resume=True, progress=Lines())
