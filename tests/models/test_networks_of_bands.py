"""Networks of other than three bands: encoder weights for three are adapted as timm and smp do, and it is said."""

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from segmentation_models_pytorch.encoders._utils import patch_first_conv

from kdpipe.configs.errors import CheckpointError
from kdpipe.configs.schema import MeanStd
from kdpipe.pipeline.models.normalize import IMAGENET_MEAN, IMAGENET_STD, adapted_to_bands, normalized
from kdpipe.pipeline.models.recognise import recognise
from kdpipe.pipeline.models.student import build_student
from kdpipe.pipeline.models.unetformer import FTUNetFormer


def by_hand(filters, bands):
    """The filters `(O, 3, h, w)` for another number of bands, in NumPy."""
    if bands == 1:
        return filters.sum(axis=1, keepdims=True)
    return np.stack([filters[:, i % 3] * 3 / bands for i in range(bands)], axis=1)


@pytest.mark.parametrize("bands", [1, 2, 4, 12])
def test_filters_are_repeated_in_turn_and_scaled_as_smp_does(bands):
    encoder = smp.encoders.get_encoder("resnet18", weights=None)
    state = {name: value.clone() for name, value in encoder.state_dict().items()}
    said = []
    wanted = smp.encoders.get_encoder("resnet18", in_channels=bands, weights=None)
    adapted = adapted_to_bands(wanted, state, "file", said.append)
    np.testing.assert_allclose(adapted["conv1.weight"], by_hand(state["conv1.weight"].numpy(), bands), rtol=1e-6)
    patch_first_conv(encoder, bands, pretrained=True)
    torch.testing.assert_close(adapted["conv1.weight"], encoder.state_dict()["conv1.weight"])
    assert {name for name in state if state[name] is not adapted[name]} == {"conv1.weight"}
    (line,) = said
    assert line.startswith("file: the filters of the first layer are for red, green and blue, and the student sees")
    assert "as timm does" in line


def test_three_bands_and_files_for_as_many_are_taken_as_they_are():
    encoder = smp.encoders.get_encoder("resnet18", in_channels=4, weights=None)
    state = encoder.state_dict()
    for own, of in ((encoder, state), (smp.encoders.get_encoder("resnet18", weights=None), None)):
        given = of or own.state_dict()
        adapted = adapted_to_bands(own, given, "file", pytest.fail)
        assert all(adapted[name] is value for name, value in given.items())


@pytest.mark.parametrize(
    ("architecture", "encoder", "name"),
    [("unet", "resnet18", "encoder.conv1.weight"), ("unetformer", "resnet18", "backbone.conv1.weight")],
)
def test_a_student_takes_an_encoder_file_for_three_bands_and_says_so_once(architecture, encoder, name, tmp_path):
    torch.manual_seed(1)
    state = timm.create_model("resnet18").state_dict()
    if architecture == "unet":
        state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    torch.save(state, tmp_path / "encoder.pth")
    said = []
    student = build_student(
        architecture, 3, in_channels=4, encoder=encoder, encoder_weights=str(tmp_path / "encoder.pth"), say=said.append
    )
    np.testing.assert_allclose(student.state_dict()[name], by_hand(state["conv1.weight"].numpy(), 4), rtol=1e-6)
    assert sum("repeated in turn (red, green, blue, red) and scaled by 3/4" in line for line in said) == 1
    assert student.eval()(torch.zeros(1, 4, 64, 64)).shape == (1, 3, 64, 64)


def test_ftunetformer_sees_any_number_of_bands():
    model = FTUNetFormer(
        3, in_channels=5, width=32, heads=4, embed_dim=16, depths=(1, 1, 2, 1), encoder_heads=(1, 1, 2, 2)
    )
    assert model.eval()(torch.zeros(1, 5, 64, 64)).shape == (1, 3, 64, 64)


def test_whole_weights_for_another_number_of_bands_are_refused_with_the_keys(tmp_path):
    torch.save(build_student("unet", 3, encoder="resnet18").state_dict(), tmp_path / "three.pth")
    with pytest.raises(CheckpointError, match="It is for images of 3 bands, and the network sees 4: set the bands of"):
        build_student("unet", 3, in_channels=4, encoder="resnet18", checkpoint=str(tmp_path / "three.pth"))


@pytest.mark.parametrize("bands", [1, 4])
def test_a_network_of_any_bands_is_recognised_from_its_tensors(bands):
    state = smp.create_model("linknet", "mobilenet_v2", encoder_weights=None, in_channels=bands, classes=5).state_dict()
    found = recognise(state, likely_encoder="mobilenet_v2")
    assert (found.architecture, found.encoder, found.in_channels, found.channels) == (
        "linknet",
        "mobilenet_v2",
        bands,
        5,
    )
    assert f", {bands} band{'s' if bands > 1 else ''}, 5 channels" in str(found)


def test_normalisation_takes_chosen_bands_in_their_order_and_repeats_imagenets_values():
    images = torch.arange(2 * 5 * 3 * 4).reshape(2, 5, 3, 4).to(torch.uint8)
    given = MeanStd(mean=(0.1, 0.2), std=(0.5, 0.25))
    expected = (images.numpy()[:, [4, 1]] / 255 - np.array([0.1, 0.2])[:, None, None]) / np.array([0.5, 0.25])[
        :, None, None
    ]
    np.testing.assert_allclose(normalized(images, given, (4, 1)), expected, rtol=1e-5, atol=1e-6)
    mean, std = (np.array([*v, *v[:2]])[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    np.testing.assert_allclose(
        normalized(images, "imagenet"), (images.numpy() / 255 - mean) / std, rtol=1e-5, atol=1e-5
    )
    grey = (images.numpy()[:, [2]] / 255 - np.mean(IMAGENET_MEAN)) / np.mean(IMAGENET_STD)
    np.testing.assert_allclose(normalized(images, "imagenet", (2,)), grey, rtol=1e-5, atol=1e-5)
