"""The sizes that a student cannot train on or predict are told before the first step, with the key to set."""

import copy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch

from kdpipe.configs.errors import ConfigError
from kdpipe.pipeline.dry_run import estimate
from kdpipe.pipeline.models.limits.sizes import fixed_side
from kdpipe.pipeline.models.limits.trial import refusal, smallest_side
from kdpipe.pipeline.models.student import build_student
from kdpipe.pipeline.models.views import padded_logits
from kdpipe.pipeline.training.batch_size import largest_batch
from kdpipe.pipeline.training.run import train

CPU = torch.device("cpu")
ENCODER = "resnet18"
ONE_SIZE = {
    "encoder": "tu-vit_tiny_patch16_224",
    "options": {"decoder_intermediate_channels": [8] * 4, "decoder_fusion_channels": 8},
}
NAMES = ("unet", "deeplabv3", "pan", "dpt")


@pytest.fixture(scope="module")
def networks():
    """Students by architecture."""
    return {name: build_student(name, 3, **(ONE_SIZE if name == "dpt" else {"encoder": ENCODER})) for name in NAMES}


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (2, 3, 64, 96)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_trial_without_values_fails_where_a_real_pass_does_and_changes_nothing(networks, name, shape, training):
    network = networks[name].train()
    before = copy.deepcopy(network.state_dict())
    text = refusal(network, shape, training=training)
    assert network.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    copied = copy.deepcopy(network).train(training)
    try:
        with torch.no_grad():
            copied(torch.rand(shape))
        takes = True
    except (ValueError, RuntimeError, AssertionError):
        takes = False
    assert (text is None) == takes


@pytest.mark.parametrize(
    ("name", "side", "smallest"), [("unet", None, 32), ("deeplabv3", None, 32), ("pan", None, 128), ("dpt", 224, 224)]
)
def test_the_one_size_and_the_smallest_size_of_a_network_are_known(networks, name, side, smallest):
    assert fixed_side(networks[name]) == side
    assert smallest_side(networks[name], 2, 3, training=True) == smallest


def test_a_fault_that_is_no_matter_of_size_stays_an_exception(networks):
    class Faulty(torch.nn.Conv2d):
        def forward(self, x):
            raise RuntimeError("no memory for a joke")

    with pytest.raises(RuntimeError, match="^no memory for a joke"):
        padded_logits(Faulty(3, 2, 1), torch.rand(1, 3, 64, 64))


def test_values_that_a_trial_cannot_have_are_computed(networks):
    class Looks(torch.nn.Conv2d):
        def forward(self, x):
            if x.sum().item() < 0:
                raise RuntimeError("too dark")
            return super().forward(x)

    assert refusal(Looks(3, 2, 1), (1, 3, 64, 64)) is None


@pytest.mark.parametrize(
    ("student", "keys", "message"),
    [
        (
            {"architecture": "deeplabv3plus", "encoder": ENCODER},
            {"batch_size": 1},
            r"student: deeplabv3plus with resnet18 normalises over a batch .* cannot train on one image of 64 x 64 px; set "
            r"train.batch_size to 2 or more \(now 1\)$",
        ),
        (
            {"architecture": "unet", "encoder": ENCODER},
            {"batch_size": 1, "crop": 32},
            r"set train.batch_size to 2 or more \(now 1\), or train.crop: 64 \(now 32\)$",
        ),
        (
            {"architecture": "pan", "encoder": ENCODER},
            {},
            r"student: pan with resnet18 halves its images until nothing is left, so that it needs larger ones, found 2 of 64 x 64 px; "
            r"set train.crop: 128 \(now 64\)$",
        ),
        (
            {"architecture": "pan", "encoder": ENCODER},
            {"batch_size": 1, "crop": 64},
            r"set train.crop: 128 \(now 64\)$",
        ),
        (
            {"architecture": "dpt", **ONE_SIZE},
            {},
            r"student: dpt with tu-vit_tiny_patch16_224 and options {.*} takes images of 224 x 224 px only, found 2 of 64 x 64 px; "
            r"set train.crop: 224 \(now 64\)$",
        ),
        (
            {"architecture": "pan", "encoder": ENCODER},
            {"crop": 128},
            r"halves its images .*; validation predicts whole tiles, and Val/\w+ has \d+ x \d+ px: leave such tiles out of data.val$",
        ),
    ],
)
def test_sizes_that_a_student_refuses_are_told_before_the_first_step(make_config, student, keys, message):
    config = make_config(
        student=student, distill__mode="none", **{f"train__{key}": value for key, value in keys.items()}
    )
    with pytest.raises(ConfigError, match=message):
        train(config, CPU)
    assert not any(Path(folder).exists() for folder in ("model_weights", "lightning_logs"))


def test_a_batch_size_that_is_searched_for_is_one_that_trains(make_config):
    student = {"architecture": "deeplabv3plus", "encoder": ENCODER}
    config = make_config(student=student, train__batch_size="auto", train__effective_batch_size=1, train__crop=32)
    with pytest.raises(ConfigError, match=r"set train.batch_size to 2 or more \(now 1\)$"):
        largest_batch(config, CPU)


def test_the_dry_run_says_that_a_student_does_not_train_on_its_crops(make_config):
    config = make_config(student={"architecture": "pan", "encoder": ENCODER})
    assert "cannot be timed here: student: pan with resnet18 halves" in str(estimate(config, CPU).worth)


def test_tiles_below_the_one_size_of_a_student_are_mirrored_to_it(networks):
    student = networks["dpt"].eval()
    x = torch.rand(1, 3, 100, 224)
    with torch.no_grad():
        found = padded_logits(student, x)
        # NumPy mirrors as often as needed, without the border pixel.
        mirrored = np.pad(x.numpy(), ((0, 0), (0, 0), (0, 124), (0, 0)), mode="reflect")
        expected = student(torch.from_numpy(mirrored))[..., :100, :]
    torch.testing.assert_close(found, expected)


def test_a_larger_tile_is_refused_in_the_networks_terms(networks):
    message = (
        r"the network takes images of 224 x 224 px only, found 1 of 256 x 224 px\. Windows of 224 px cut larger images"
    )
    with pytest.raises(ConfigError, match=message):
        padded_logits(networks["dpt"], torch.rand(1, 3, 230, 224))


def test_swin_and_vit_encoders_of_other_architectures_have_one_size_too():
    build = partial(smp.create_model, "unet", encoder_weights=None, classes=2)
    assert fixed_side(build("tu-swin_tiny_patch4_window7_224")) == 224
