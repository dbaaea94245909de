"""`teacher.precision: auto`: bf16 where the device is fast at it and the soft targets hardly change."""

import pytest
import torch

from kdpipe.cache import SoftTargetCache
from kdpipe.pipeline.precompute.run import precompute
from kdpipe.pipeline.teacher import precision
from kdpipe.pipeline.verify.gate import verify

CPU = torch.device("cpu")


@pytest.fixture
def fast(monkeypatch):
    """The program takes this CPU for one that is fast at bf16."""
    monkeypatch.setattr(precision, "is_fast_at_bf16", lambda device: True)


def recorded(config):
    return [record.precision for record in SoftTargetCache.open(config.cache.path).manifest.recipe.teachers]


def test_a_device_that_only_emulates_bf16_computes_in_fp32_without_a_trial(make_config, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(precision, "open_teacher", None)
    config = make_config(teacher__precision="auto")
    precompute(config, CPU)
    assert recorded(config) == ["fp32"]


def test_a_processor_with_amx_is_fast_and_apples_gpu_is_not(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert precision.is_fast_at_bf16(CPU)
    assert not precision.is_fast_at_bf16(torch.device("mps"))
    for capability, fast in (((9, 0), True), ((8, 0), True), ((7, 5), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert precision.is_fast_at_bf16(torch.device("cuda")) == fast


@pytest.mark.long
def test_bf16_is_chosen_where_it_moves_soft_targets_less_than_rounding_does(make_config, fast, monkeypatch):
    config = make_config(teacher__precision="auto")
    precompute(config, CPU)
    assert recorded(config) == ["bf16"]
    findings = verify(config, "parity", CPU, sample=2).findings
    assert {finding.code for finding in findings} <= {"class-map"}, "a random teacher's classes fit no label"
    # A resumed run keeps the cache's precision, on any device.
    monkeypatch.setattr(precision, "is_fast_at_bf16", lambda device: False)
    assert precompute(config, CPU).kept == 6


@pytest.mark.long
def test_a_teacher_whose_soft_targets_bf16_changes_computes_in_fp32(make_config, fast, tmp_path):
    config = make_config(teacher__precision="auto")
    state = torch.load(config.teacher.checkpoint, weights_only=True)
    state["segmentation_head.0.weight"] *= 300  # so that rounding its features to 8 bits decides classes
    torch.save(state, tmp_path / "sharp.pth")
    config = make_config(teacher__precision="auto", teacher__checkpoint=str(tmp_path / "sharp.pth"))
    precompute(config, CPU)
    assert recorded(config) == ["fp32"]


@pytest.mark.long
def test_a_cache_of_16_bits_is_computed_in_fp32(make_config, fast):
    config = make_config(teacher__precision="auto", cache__bits=16)
    precompute(config, CPU)
    assert recorded(config) == ["fp32"]


def test_a_configured_precision_is_not_tried(make_config, fast, monkeypatch):
    monkeypatch.setattr(precision, "open_teacher", None)
    config = make_config(teacher__precision="fp32")
    precompute(config, CPU)
    assert recorded(config) == ["fp32"]
