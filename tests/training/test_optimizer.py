"""The optimizer: weight decay, the encoder's learning rate, and a Lookahead that can be resumed."""

import io

import pytest
import torch
from torch import nn

from kdpipe.configs.schema import Train
from kdpipe.pipeline.models.student import build_student
from kdpipe.pipeline.training.optimizer import LookaheadAdamW, make_optimizer


@pytest.mark.parametrize(
    "student", [("unet", {"encoder": "mobilenet_v2"}), ("unetformer", {"encoder": "resnet18"})], ids=lambda s: s[0]
)
def test_the_encoder_learns_at_its_own_rate_and_biases_do_not_decay(student):
    architecture, options = student
    model = build_student(architecture, 6, **options)
    optimizer = make_optimizer(model, Train(lr=1e-3, backbone_lr=1e-4, weight_decay=0.1))
    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert len(found) == sum(len(group["params"]) for group in optimizer.param_groups)
    for name, parameter in model.named_parameters():
        in_encoder = name.startswith(("encoder.", "backbone."))
        assert found.pop(id(parameter)) == (1e-4 if in_encoder else 1e-3, 0.0 if name.endswith(".bias") else 0.1), name
    assert found == {}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def take_step(model, optimizer, number):
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(number))
    optimizer.zero_grad()
    (model(x) - x.sum(dim=1, keepdim=True)).square().mean().backward()
    optimizer.step()


def test_lookahead_is_the_papers_algorithm_around_adamw():
    model, reference = network(), network()
    optimizer = LookaheadAdamW(model.parameters(), lr=0.05)
    inner = torch.optim.AdamW(reference.parameters(), lr=0.05)
    slow = [p.detach().clone() for p in reference.parameters()]
    for number in range(1, 13):
        take_step(model, optimizer, number)
        take_step(reference, inner, number)
        if number % 5 == 0:
            with torch.no_grad():
                slow = [s + 0.5 * (p - s) for s, p in zip(slow, reference.parameters(), strict=True)]
                for p, s in zip(reference.parameters(), slow, strict=True):
                    p.copy_(s)
        for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("stop", [1, 5, 7])
def test_lookahead_resumes_exactly_from_a_saved_state(stop):
    whole, half = network(), network()
    optimizer = LookaheadAdamW(whole.parameters(), lr=0.05)
    for number in range(12):
        take_step(whole, optimizer, number)
    optimizer = LookaheadAdamW(half.parameters(), lr=0.05)
    for number in range(stop):
        take_step(half, optimizer, number)
    buffer = io.BytesIO()
    torch.save({"model": half.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    resumed = network()
    resumed.load_state_dict(saved["model"])
    optimizer = LookaheadAdamW(resumed.parameters(), lr=0.01)
    optimizer.load_state_dict(saved["optimizer"])
    for number in range(stop, 12):
        take_step(resumed, optimizer, number)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
