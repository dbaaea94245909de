"""`distill.loss: package.module:name`: called with what the docs say, recorded with its file, and named when it does wrong."""

import sys

import numpy as np
import pytest
import torch
from helpers.doubles import Lines
from helpers.runs import assert_same_weights, checkpoint, weights

from kdpipe.configs.errors import ConfigError, OutOfMemory, TrainingDiverged
from kdpipe.configs.files import file_sha256
from kdpipe.pipeline.losses import distillation_loss, hard_loss
from kdpipe.pipeline.runs.checkpoint import load_trained
from kdpipe.pipeline.runs.record import read_run
from kdpipe.pipeline.training.batch_size import take_steps
from kdpipe.pipeline.training.run import train, with_mode

CPU = torch.device("cpu")
KL = """
import torch
from torch.nn import functional as F

def kl(logits, targets, counts):
    log_q = F.log_softmax(logits / 2, dim=1)
    return 4 * F.kl_div(log_q, targets, reduction="none").sum(dim=1)[counts].mean()

class Squared:
    def __call__(self, logits, targets, counts):
        return (logits.softmax(dim=1) - targets)[:, :, ::2].square().mean()

squared = Squared()

def nan(logits, targets, counts):
    return logits.mean() * float("nan")

def pixels(logits, targets, counts):
    return logits.mean(dim=1)

def number(logits, targets, counts):
    return logits.mean().item()

def detached(logits, targets, counts):
    return logits.detach().mean()

def raising(logits, targets, counts):
    raise ValueError("no such thing")

def exhausted(logits, targets, counts):
    raise torch.OutOfMemoryError("CUDA out of memory")

nothing = None
"""


@pytest.fixture
def own(make_config, tmp_path, monkeypatch):
    """`own(loss)` is a configuration whose `distill.loss` is that of the module `my_losses` in the current folder."""
    (tmp_path / "my_losses.py").write_text(KL)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_losses", raising=False)
    yield lambda loss, **more: make_config(distill__loss=f"my_losses:{loss}", **more)
    sys.modules.pop("my_losses", None)


def batch():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 3, 7, generator=g).requires_grad_()
    targets = torch.softmax(3 * torch.randn(2, 5, 3, 7, generator=g), dim=1)
    inside = torch.ones(2, 3, 7, dtype=torch.bool)
    inside[1, 2, 4:] = False
    return logits, torch.randint(0, 5, (2, 3, 7), generator=g), inside, targets * inside[:, None]


def test_a_loss_of_ones_own_gets_float32_and_the_pixels_that_count_outside_of_autocast():
    logits, mask, inside, targets = batch()
    seen = []

    def loss(*given):
        seen.extend(given)
        assert not torch.is_autocast_enabled("cpu")
        return (given[0].softmax(dim=1) - given[1]).square().sum(dim=1)[given[2]].mean()

    options = {"alpha": 0.7, "temperature": 3.0, "ignore_index": 255}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = distillation_loss(logits.bfloat16(), mask, inside, targets, own_loss=loss, **options)
    assert [given.dtype for given in seen] == [torch.float32, torch.float32, torch.bool]
    assert torch.equal(seen[1], targets)
    assert torch.equal(seen[2], inside)
    z, p = logits.detach().bfloat16().double().numpy(), targets.double().numpy()
    q = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    expected = ((q - p) ** 2).sum(axis=1)[inside.numpy()].mean()
    assert terms.soft.item() == pytest.approx(expected, rel=1e-5)
    hard = hard_loss(logits.bfloat16(), mask, 255).item()
    assert terms.total.item() == pytest.approx(0.3 * hard + 0.7 * expected, rel=1e-5), "without T²"
    assert terms.total.requires_grad


def test_a_loss_of_ones_own_is_not_asked_where_no_pixel_counts():
    logits, mask, inside, targets = batch()
    none = torch.zeros_like(inside)
    terms = distillation_loss(
        logits, mask, none, targets * 0, alpha=0.5, temperature=1.0, ignore_index=255, own_loss=lambda *given: 1 / 0
    )
    assert terms.soft == 0
    terms.total.backward()
    assert torch.isfinite(logits.grad).all()


def test_ones_own_kl_trains_as_the_usual_one(cached, own, small_student):
    usual, found = train(cached, CPU), train(own("kl", name="own"), CPU)
    # The usual one subtracts the entropy that rounding took, a constant, so that only the values differ by it.
    np.testing.assert_allclose(found.losses, usual.losses, rtol=0.02)
    for key, value in weights().items():
        torch.testing.assert_close(weights("own")[key], value, rtol=1e-3, atol=1e-5)


def test_a_run_records_the_file_of_its_loss_and_resumes_bit_for_bit(cached, own, small_student, tmp_path):
    train(own("squared", name="whole"), CPU)
    train(own("squared", train__max_steps=2), CPU)
    said = Lines()
    summary = train(own("squared"), CPU, resume=True, progress=said)
    assert_same_weights(weights(), weights("whole"))
    assert not [line for line in said.said if "distill.loss" in line]
    file = tmp_path / "my_losses.py"
    expected = {"name": "my_losses:squared", "path": str(file), "sha256": file_sha256(str(file)), "version": None}
    assert checkpoint()["kdpipe"]["own_loss"] == expected
    assert read_run(summary.weights).own_loss.model_dump() == expected
    assert "own_loss" not in (tmp_path / "model_weights/tests/whole/config.yaml").read_text()


def test_a_resumed_run_says_that_the_file_of_its_loss_has_changed(cached, own, small_student, tmp_path):
    train(own("squared", train__max_steps=2), CPU)
    (tmp_path / "my_losses.py").write_text(KL + "\n# a word\n")
    said = Lines()
    train(own("squared"), CPU, resume=True, progress=said)
    (line,) = [line for line in said.said if "distill.loss" in line]
    assert line.startswith(
        f"warning: since this run began, the file of distill.loss has changed: {tmp_path}/my_losses.py (sha256 was "
    )


def test_a_checkpoint_is_read_without_the_module_of_its_loss(cached, own, tmp_path):
    train(own("kl", train__max_steps=1, data__val=[]), CPU)
    (tmp_path / "my_losses.py").unlink()
    sys.modules.pop("my_losses")
    assert load_trained("model_weights/tests/tiny/last.ckpt").config.distill.loss == "my_losses:kl"
    assert "my_losses" not in sys.modules


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "pixels",
            r"distill\.loss: my_losses:pixels should return a scalar tensor .*, found shape \(2, 64, 64\): take its mean over",
        ),
        (
            "number",
            r"my_losses:number should return a scalar tensor that is computed from the student's logits, found float",
        ),
        ("detached", r"my_losses:detached should return .*, found one without a gradient: no detach\(\)"),
        ("raising", r"distill\.loss: my_losses:raising raised ValueError: no such thing; --debug shows where"),
        (
            "nothing",
            r"distill\.loss: my_losses:nothing should be a function or a class that returns a loss, found NoneType",
        ),
        ("absent", r"distill\.loss: my_losses \(.*my_losses\.py\) has no absent"),
    ],
)
def test_what_a_loss_does_wrong_is_named(cached, own, small_student, name, message):
    with pytest.raises(ConfigError, match=message):
        train(own(name), CPU)


def test_a_loss_that_is_not_finite_is_named(cached, own, small_student):
    with pytest.raises(
        TrainingDiverged,
        match=r"at step 1 .*: my_losses:nan \(distill\.loss\) returned nan, while the loss of the labels is finite",
    ):
        train(own("nan"), CPU)


def test_a_loss_that_runs_out_of_memory_is_not_blamed(cached, own, small_student):
    with pytest.raises(OutOfMemory, match="out of memory while training on 2 crops"):
        train(own("exhausted"), CPU)


def test_without_a_teacher_the_loss_is_not_imported(cached, make_config, small_student):
    config = make_config(distill__loss="no_such_module:loss")
    train(with_mode(config, "none"), CPU)
    assert "own_loss" not in checkpoint("tiny-none")["kdpipe"]
    with pytest.raises(ConfigError, match=r"distill\.loss: cannot import no_such_module: .* in "):
        train(config, CPU)


def test_trial_steps_take_the_loss_of_the_run(own, tmp_path):
    with pytest.raises(ConfigError, match="raised ValueError"):
        take_steps(own("raising"), CPU, 2, 1)


@pytest.mark.parametrize("given", ["mse", "my.losses", "my_losses:", "my-losses:mse", ""])
def test_what_names_no_loss_is_refused(make_config, given):
    with pytest.raises(
        ConfigError,
        match=r"distill\.loss: expected kl, dice, jaccard, weights of them .*, or a function of your own as package\.module:name, found",
    ):
        make_config(distill__loss=given)


def test_the_usual_loss_leaves_recorded_configurations_as_they_were(make_config):
    assert "loss" not in make_config().model_dump()["distill"]
    assert make_config(distill__loss="kl").model_dump() == make_config().model_dump()
