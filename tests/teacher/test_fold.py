"""Folded batch norms and cast weights: the same logits, and only where the network's structure allows it."""

import pytest
import torch
from torch import nn

from kdpipe.pipeline.models.smp import create_smp_model
from kdpipe.pipeline.teacher.fold import folded, with_cast_weights


def trained(model):
    """The model in eval mode with batch statistics as training leaves them: fresh ones would let any mistake pass."""
    generator = torch.Generator().manual_seed(0)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.1, generator=generator)
            norm.running_var.uniform_(0.5, 2, generator=generator)
            norm.weight.data.uniform_(0.5, 2, generator=generator)
            norm.bias.data.normal_(0, 0.1, generator=generator)
    return model.eval()


def norms(model):
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.long
@pytest.mark.parametrize(
    ("architecture", "encoder", "left"),
    [
        ("unet", "efficientnet-b0", 1),  # the classifier's, which never runs
        ("unet", "resnet18", 0),
        ("fpn", "mobilenet_v2", 0),
        ("linknet", "tu-regnetx_002", 5),  # timm's norms, which hold their activation; those after transposed ones stay
        ("unetplusplus", "densenet121", 62),  # norms before convolutions stay
    ],
)
def test_a_folded_network_gives_the_same_logits(architecture, encoder, left):
    torch.manual_seed(0)
    model = trained(create_smp_model(architecture, encoder, 8, key="teacher"))
    images = torch.randn(2, 3, 70, 90)
    fold = folded(model, images)
    assert fold is not model
    assert norms(fold) == left < norms(model)
    other = torch.randn(1, 3, 128, 96)
    with torch.inference_mode():
        expected, found = model(other), fold(other)
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
    assert norms(model) > left, "the network itself is unchanged"


class Forked(nn.Module):
    """A convolution that feeds a batch norm and something else."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        found = self.conv(x)
        return self.norm(found) + found


class Twice(nn.Module):
    """One batch norm after two convolutions."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.norm = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.two(self.norm(self.one(x))))


class Reversed(nn.Module):
    """A batch norm that runs before the convolution declared ahead of it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.conv(self.norm(x))


@pytest.mark.parametrize("network", [Forked, Twice, Reversed])
def test_a_network_that_cannot_be_folded_stays_as_it_is(network):
    torch.manual_seed(0)
    model = trained(network())
    images = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        expected = model(images)
        assert torch.equal(folded(model, images)(images), expected)
    assert norms(model) == 1


@pytest.mark.parametrize("architecture", ["unet", "linknet", "segformer"])
def test_cast_weights_give_the_same_bits_under_autocast(architecture):
    torch.manual_seed(0)
    encoder = "mit_b0" if architecture == "segformer" else "resnet18"
    model = trained(create_smp_model(architecture, encoder, 8, key="teacher"))
    low = with_cast_weights(model, torch.randn(1, 3, 64, 64), torch.bfloat16)
    assert low is not model
    assert {m.weight.dtype for m in low.modules() if isinstance(m, nn.Conv2d)} == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in model.parameters())
    other = torch.randn(2, 3, 128, 96)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(low(other), model(other))


class Standardised(nn.Conv2d):
    """A layer that computes with its weights before use, as weight standardisation does."""

    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


class Refusing(nn.Linear):
    """A layer that takes float32 weights only."""

    def forward(self, x):
        if self.weight.dtype != torch.float32:
            raise RuntimeError("expected scalar type Float but found BFloat16")
        return x


@pytest.mark.parametrize("layer", [Standardised(3, 8, 3, padding=1), Refusing(3, 3)], ids=["standardised", "refusing"])
def test_a_network_whose_logits_cast_weights_would_change_stays_as_it_is(layer):
    torch.manual_seed(0)
    assert with_cast_weights(layer.eval(), torch.randn(1, 3, 64, 64), torch.bfloat16) is layer
