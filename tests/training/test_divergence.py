"""A loss that becomes NaN or infinite, or grows, is reported with the keys to change."""

import numpy as np
import pytest
import torch
from helpers.doubles import Lines, Plain

from kdpipe.cache.reader import SoftTargetCache
from kdpipe.configs.errors import TrainingDiverged
from kdpipe.pipeline.losses import distillation_loss
from kdpipe.pipeline.training import run as training
from kdpipe.pipeline.training.divergence import growth_hint, refuse_divergence
from kdpipe.pipeline.training.run import train

CPU = torch.device("cpu")


@pytest.fixture
def plain_student(monkeypatch):
    monkeypatch.setattr(training, "starting_student", lambda *args, **options: Plain())


def test_bf16_is_told_to_try_fp32(cached, make_config, plain_student):
    config = make_config(train__precision="bf16", train__lr=1e30, train__backbone_lr=0.0)
    message = (
        r"the loss became (nan|inf) at step \d \(hard .*, distillation .*\); try train\.lr: 1e\+29 \(now 1e\+30\), or "
        r"train\.clip_norm: 1\.0 \(now none\), or train\.precision: fp32 \(now bf16\)\. Start again with --overwrite: a resumed "
        r"run would repeat the same step\. Checkpoints up to the last one saved are in .*model_weights/tests/tiny$"
    )
    with pytest.raises(TrainingDiverged, match=message):
        train(config, CPU)


def test_an_overflow_of_fp16_is_told_to_try_fp32_and_fp32_is_not(make_config, tmp_path):
    """A half-precision network outputs infinity above 65504. Training in fp16 needs a GPU, the loss does not."""
    logits = torch.full((1, 6, 4, 4), 7e4).half()
    mask, inside = torch.zeros(1, 4, 4, dtype=torch.long), torch.ones(1, 4, 4, dtype=torch.bool)
    targets = torch.full((1, 6, 4, 4), 1 / 6)
    terms = distillation_loss(logits, mask, inside, targets, alpha=0.7, temperature=2.0, ignore_index=255)
    assert not torch.isfinite(terms.total)
    config = make_config(train__clip_norm=0.5, distill__temperature=8.0)
    with pytest.raises(TrainingDiverged) as caught:
        refuse_divergence(terms, targets, 3, config, "fp16", tmp_path)
    assert "train.precision: fp32 (now fp16)" in str(caught.value)
    assert "train.lr: 0.0001 (now 0.001) and train.backbone_lr: 1e-05 (now 0.0001)" in str(caught.value)
    assert "distill.temperature: 2 (now 8, squared in the loss)" in str(caught.value)
    assert "clip_norm" not in str(caught.value)  # it is lower already
    with pytest.raises(TrainingDiverged) as caught:
        refuse_divergence(terms, targets, 3, make_config(distill__mode="none"), "fp32", tmp_path)
    assert "precision" not in str(caught.value)


def test_soft_targets_of_nan_are_named_instead_of_a_key(cached, plain_student, monkeypatch):
    read = SoftTargetCache.read
    monkeypatch.setattr(SoftTargetCache, "read", lambda *args, **options: read(*args, **options) * np.float32("nan"))
    message = r"the loss became nan at step 1 .*: the soft targets of this batch are not finite, .* verify-cache --level full`$"
    with pytest.raises(TrainingDiverged, match=message) as caught:
        train(cached, CPU)
    assert "train.lr" not in str(caught.value)


@pytest.mark.long
def test_a_loss_that_grows_is_reported_at_the_end_of_the_run(cached, make_config, plain_student):
    runs = {}
    for name, lr in (("grows", 30.0), ("falls", 1e-3)):
        lines = Lines()
        config = make_config(
            name=name, train__epochs=20, train__batch_size=1, train__crop=32, train__lr=lr, train__backbone_lr=0.0,
            train__restart_epochs=99, data__val=[],
        )  # fmt: skip
        losses = train(config, CPU, progress=lines).losses
        assert len(losses) == 120
        assert np.isfinite(losses).all(), losses
        runs[name] = [line for line in lines.said if line.startswith("the loss grew")]
    assert runs["falls"] == []
    assert "over the last 12 steps" in runs["grows"][0]
    assert "train.lr: 3 (now 30), or" in runs["grows"][0]


def test_growth_must_be_clear_of_the_noise(make_config):
    """By hand: tenths of ten steps that alternate by ±1 have a standard error of √(2 · 10/9 / 10) = 0.47."""
    config = make_config()
    noise = [1.0, -1.0] * 50

    def losses(rise):
        return [1 + n + rise * i / 90 for i, n in zip([0] * 10 + [45] * 80 + [90] * 10, noise, strict=True)]

    assert growth_hint(losses(1.35), config, "fp32") is None
    assert growth_hint(losses(1.5), config, "fp32").startswith(
        "the loss grew: its mean over the last 10 steps is 2.5, over"
    )
    assert growth_hint(losses(9.0)[:99], config, "fp32") is None  # too few steps
    assert growth_hint(losses(-9.0), config, "fp32") is None


def test_a_loss_that_leapt_up_at_once_has_grown_too(make_config):
    exploded = [2.0, *[40.0, 80.0, 60.0] * 33]
    assert "at the first step 2; the run diverges" in growth_hint(exploded, make_config(), "fp32")
    assert growth_hint([30.0, *exploded[1:]], make_config(), "fp32") is None
