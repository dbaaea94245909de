"""`train.average`: the mean of the weights after each step, by NumPy, with batch norm statistics computed anew by hand."""

import numpy as np
import pytest
import torch
from helpers.commands import run_command
from helpers.doubles import Lines
from helpers.runs import Small, assert_same_weights, checkpoint, weights

from kdpipe.configs.errors import ConfigError
from kdpipe.data.dataset import TrainTiles
from kdpipe.data.survey import evenly
from kdpipe.data.tiles import list_tiles
from kdpipe.pipeline.models.normalize import student_inputs
from kdpipe.pipeline.models.unwrap import bare_state
from kdpipe.pipeline.runs.checkpoint import load_trained
from kdpipe.pipeline.runs.record import read_run
from kdpipe.pipeline.training import averaging
from kdpipe.pipeline.training.averaging import WeightAverage
from kdpipe.pipeline.training.loop import Loop
from kdpipe.pipeline.training.run import train

CPU = torch.device("cpu")
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.fixture
def after_steps(monkeypatch):
    """The weights of the student after each step of runs, float64."""
    seen = []
    original = Loop._log_step

    def log_step(self, terms, seconds):
        seen.append({name: value.double().numpy() for name, value in self.learner.student.state_dict().items()})
        original(self, terms, seconds)

    monkeypatch.setattr(Loop, "_log_step", log_step)
    return seen


def parameters(state):
    return {name: value for name, value in state.items() if not name.endswith(STATISTICS)}


@pytest.mark.parametrize("kind", ["mean", "ema"])
def test_the_saved_weights_are_the_average_of_the_steps(cached, make_config, small_student, after_steps, kind):
    train(make_config(train__average=kind, train__epochs=3), CPU)
    steps = len(after_steps)
    averaged = after_steps[steps - -(-steps // 4) :] if kind == "mean" else after_steps
    for name, value in parameters(weights()).items():
        found = averaged[0][name.removeprefix("student.")]
        for n, more in enumerate(averaged[1:], start=1):
            keep = n / (n + 1) if kind == "mean" else min(0.999, (1 + n) / (10 + n))
            found = keep * found + (1 - keep) * more[name.removeprefix("student.")]
        np.testing.assert_allclose(value.double().numpy(), found, rtol=1e-5, atol=1e-6)
        assert not np.array_equal(found, after_steps[-1][name.removeprefix("student.")])
    content = checkpoint()
    assert content["averaging_state"] == {"n_averaged": len(averaged), "first": steps - len(averaged) + 1}
    for name, value in content["current_model_state"].items():
        np.testing.assert_array_equal(value.double().numpy(), after_steps[-1][name.removeprefix("student.")])


def test_the_statistics_are_those_of_the_averaged_weights_on_training_crops(cached, make_config, small_student):
    config = make_config(train__average="mean")
    train(config, CPU)
    student = Small()
    student.load_state_dict({name.removeprefix("student."): value for name, value in weights().items()})
    samples = TrainTiles(list_tiles(config.data, "train"), config)
    size, means, variances = config.train.batch_size, [], []
    chosen = evenly(range(len(samples)), 16 * size)
    for start in range(0, len(chosen) - size + 1, size):
        images = torch.stack([torch.from_numpy(samples[k]["image"]) for k in chosen[start : start + size]])
        with torch.no_grad():
            out = student.encoder[0](student_inputs(images, config)).double().numpy()
        means.append(out.mean((0, 2, 3)))
        variances.append(out.var((0, 2, 3), ddof=1))
    saved = weights()
    np.testing.assert_allclose(saved["student.encoder.1.running_mean"].numpy(), np.mean(means, 0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(saved["student.encoder.1.running_var"].numpy(), np.mean(variances, 0), rtol=1e-4)
    raw = checkpoint()["current_model_state"]["student.encoder.1.running_mean"]
    assert not torch.allclose(raw, saved["student.encoder.1.running_mean"], rtol=1e-3)


@pytest.mark.parametrize("kind", ["mean", "ema"])
def test_training_itself_is_the_one_without_an_average_and_resumes_bit_for_bit(
    cached, make_config, small_student, kind
):
    train(make_config(name="plain", train__epochs=3), CPU)
    train(make_config(name="whole", train__average=kind, train__epochs=3), CPU)
    assert_same_weights(checkpoint("whole")["current_model_state"], weights("plain"))
    total = checkpoint("whole")["position"]["steps"]
    for stop in (total - 1, 2):  # within the steps of the average, and before them
        name = f"parts-{stop}"
        options = {"name": name, "train__average": kind, "train__epochs": 3}
        _stopped_after(stop, make_config(**options))
        train(make_config(**options), CPU, resume=True)
        assert_same_weights(weights(name), weights("whole"))
        assert_same_weights(checkpoint(name)["current_model_state"], checkpoint("whole")["current_model_state"])
        assert checkpoint(name)["averaging_state"] == checkpoint("whole")["averaging_state"]


def _stopped_after(step, config):
    import threading

    from helpers.doubles import StopAfter

    from kdpipe.configs.errors import Interrupted

    stop = threading.Event()
    with pytest.raises(Interrupted):
        train(config, CPU, progress=StopAfter(step, stop), stop=stop)
    assert checkpoint(config.name)["position"]["steps"] == step


def test_a_longer_run_begins_its_average_anew_and_says_so(cached, make_config, small_student):
    train(make_config(train__average="mean", train__epochs=2), CPU)
    said = Lines()
    train(make_config(train__average="mean", train__epochs=6), CPU, resume=True, progress=said)
    (note,) = [line for line in said.said if "average" in line and line.startswith("note")]
    assert "averages the weights from step 14 on, no longer from step 5" in note
    train(make_config(name="whole", train__average="mean", train__epochs=6), CPU)
    assert_same_weights(weights(), weights("whole"))


def test_scores_pictures_and_trained_students_are_of_the_average(cached, make_config, small_student):
    said = Lines()
    summary = train(make_config(train__average="mean", train__epochs=3), CPU, progress=said)
    run = read_run(summary.weights)
    assert [past.raw_miou is None for past in run.history] == [True, True, False]
    last = [line for line in said.said if "val mIoU" in line][-1]
    assert (
        f"{100 * run.history[-1].miou:.2f} with averaged weights, {100 * run.history[-1].raw_miou:.2f} without" in last
    )
    plain = train(make_config(name="plain", train__epochs=3), CPU)
    assert run.history[-1].raw_miou == pytest.approx(read_run(plain.weights).history[-1].miou)
    assert run.history[-1].miou != run.history[-1].raw_miou


def test_the_average_is_what_others_read_from_the_checkpoint(cached, make_config):
    config = make_config(train__average="ema", train__max_steps=2)
    summary = train(config, CPU)
    path = f"{summary.weights}/last.ckpt"
    averaged = {name.removeprefix("student."): value for name, value in weights().items()}
    assert_same_weights(load_trained(path).student.state_dict(), averaged)
    assert_same_weights(bare_state(torch.load(path, weights_only=True)), averaged)
    done = run_command("inspect", path)
    assert "after step 2, weights averaged over 2 steps" in " ".join(done.stdout.split())


def test_a_student_without_batch_norm_needs_no_statistics(make_config):
    student = torch.nn.Conv2d(3, 6, 1)
    config = make_config(train__average="ema")
    average = WeightAverage(student, config, None, 10, CPU, None)
    assert average.state() is None
    for step in range(1, 4):
        with torch.no_grad():
            student.weight.fill_(step)
        average.update(student, step)
    expected = 1.0
    for n in (1, 2):
        keep = (1 + n) / (10 + n)
        expected = keep * expected + (1 - keep) * (n + 1)
    assert average.state().state["weight"].flatten().tolist() == pytest.approx([expected] * 18)


def test_only_the_known_averages_are_accepted(make_config):
    with pytest.raises(ConfigError, match=r"train\.average"):
        make_config(train__average="swa")
    assert "average" not in make_config().model_dump()["train"]
    assert averaging.LAST_SHARE == 0.25, "the help of the key says a quarter"
