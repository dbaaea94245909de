"""Options of architectures: checked by name, tried once, and told apart by whether the weights show them."""

import contextlib
import functools
import itertools
import json

import pytest
import segmentation_models_pytorch as smp
import torch
from helpers.configs import ENCODER

from kdpipe.configs.errors import ConfigError
from kdpipe.pipeline.models.options import FORMERS, UNTRACED, options_of, untraced_options
from kdpipe.pipeline.models.smp import create_smp_model
from kdpipe.pipeline.models.student import build_student
from kdpipe.pipeline.models.unetformer import FTUNetFormer, UNetFormer

# For each option other values than the default; a mapping of several options where one alone is refused. An option that is new in smp
# fails here, until it has a value and its place in `UNTRACED`.
VALUES = {
    "encoder_depth": [4],
    "decoder_use_norm": ["identity", {"type": "batchnorm", "eps": 0.1}],
    "decoder_channels": [24],
    "decoder_attention_type": ["scse"],
    "decoder_interpolation": ["nearest", "bilinear"],
    "decoder_pab_channels": [32],
    "decoder_pyramid_channels": [128],
    "decoder_segmentation_channels": [64],
    "decoder_merge_policy": ["cat"],
    "decoder_dropout": [0.9],
    "upsampling": [1],
    "psp_out_channels": [128],
    "psp_dropout": [0.9],
    "encoder_output_stride": [8, 16, 32],
    "decoder_atrous_rates": [[1, 2, 3]],
    "decoder_aspp_separable": [True, False],
    "decoder_aspp_dropout": [0.9],
    "encoder_output_indices": [[0, 1, 2, 3]],
    "decoder_readout": ["ignore", "add"],
    "decoder_intermediate_channels": [[32, 32, 32, 32]],
    "decoder_fusion_channels": [64],
    "width": [48],
    "heads": [4],
    "embed_dim": [32],
    "depths": [[1, 1, 2, 1]],
    "encoder_heads": [[1, 2, 2, 4]],
    "drop_path": [0.0],
}
TRAINING_ONLY = {"decoder_dropout", "psp_dropout", "decoder_aspp_dropout", "drop_path"}
RESIZING = {"upsampling"}  # refused, unless the logits have the image's size
PYRAMIDS = ("unet", "unetplusplus", "manet")  # with channels for each level
# Small decoders, so that many can be built.
SMALL = {
    **{key: {"decoder_channels": [32, 16, 16, 16, 16]} for key in PYRAMIDS},
    **{key: {"decoder_channels": 8} for key in ("deeplabv3", "deeplabv3plus", "upernet")},
    "fpn": {"decoder_pyramid_channels": 32, "decoder_segmentation_channels": 32},
    "pspnet": {"psp_out_channels": 16},
    "segformer": {"decoder_segmentation_channels": 16},
    "dpt": {"decoder_intermediate_channels": [8, 8, 8, 8], "decoder_fusion_channels": 8},
    "ftunetformer": {"embed_dim": 16, "depths": (1, 1, 1, 1), "encoder_heads": (1, 1, 2, 4), "width": 32, "heads": 2},
}
SIDE = {"dpt": 224, "pan": 256}  # the one that its encoder takes, the least that its decoder takes; 128 for others
ALONE_REFUSED = {  # other options that the value of one needs
    ("unet", "encoder_depth"): {"decoder_channels": [16, 16, 8, 8]},
    ("unetplusplus", "encoder_depth"): {"decoder_channels": [16, 16, 8, 8]},
    ("manet", "encoder_depth"): {"decoder_channels": [16, 16, 8, 8]},
    ("dpt", "encoder_depth"): {"decoder_intermediate_channels": [8, 8, 8]},
}


def built(architecture, device, options):
    torch.manual_seed(0)
    options = SMALL.get(architecture, {}) | options
    with torch.device(device):
        if architecture == "ftunetformer":
            return FTUNetFormer(3, **options).eval()
        if architecture == "unetformer":
            return UNetFormer(3, encoder=ENCODER.removeprefix("tu-"), **options).eval()
        encoder = "tu-vit_tiny_patch16_224" if architecture == "dpt" else ENCODER
        return smp.create_model(architecture, encoder, encoder_weights=None, classes=3, **options).eval()


def settings(architecture, option):
    """Option mappings: the defaults, then one for each other value."""
    values = VALUES[option]
    if architecture in PYRAMIDS and option == "decoder_channels":
        values = [[32, 32, 16, 16, 8]]
    if architecture == "dpt" and option == "encoder_depth":
        values = [3]
    return [{}, *({option: value} | ALONE_REFUSED.get((architecture, option), {}) for value in values)]


def outputs_of(networks, images):
    """The logits of two networks that have the weights of the first."""
    networks[1].load_state_dict(networks[0].state_dict())
    with torch.inference_mode():
        return [network(images) for network in networks]


@pytest.mark.long
@pytest.mark.parametrize("architecture", UNTRACED)
def test_the_table_names_every_option_that_changes_logits_and_no_tensor(architecture):
    images = torch.randn(1, 3, *[SIDE.get(architecture, 128)] * 2, generator=torch.Generator().manual_seed(1))
    build = functools.lru_cache(lambda device, text: built(architecture, device, json.loads(text)))

    def shapes_of(options):
        return {name: value.shape for name, value in build("meta", json.dumps(options)).state_dict().items()}

    found = {"untraced": [], "without effect": [], "resizing": []}
    for option in options_of(architecture):
        networks = []
        for options in settings(architecture, option):
            with contextlib.suppress(ValueError):  # output strides of other architectures
                networks.append((options, shapes_of(options)))
        assert len(networks) >= 2
        for (one, shapes), (other, others) in itertools.combinations(networks, 2):
            if shapes != others:
                continue
            mine, its = outputs_of([build("cpu", json.dumps(options)) for options in (one, other)], images)
            if mine.shape == its.shape and torch.equal(mine, its):  # of the default's own value, or in training only
                found["without effect"].append(option)
                continue
            found["resizing" if mine.shape != its.shape else "untraced"].append(option)
            break
    assert found["untraced"] == untraced_options(architecture)
    assert set(found["resizing"]) == RESIZING & set(options_of(architecture))
    assert TRAINING_ONLY & set(options_of(architecture)) <= set(found["without effect"])


def test_the_table_has_a_row_for_every_architecture():
    assert set(UNTRACED) == {*smp.MODEL_ARCHITECTURES_MAPPING, *FORMERS}
    assert untraced_options("DeepLabV3Plus") == ["encoder_output_stride", "decoder_atrous_rates"]
    assert untraced_options(None) == []


def test_options_reach_the_constructor_as_smp_itself_takes_them():
    options = {"encoder_output_stride": 8, "decoder_channels": 16, "decoder_atrous_rates": [1, 2, 3]}
    images = torch.randn(1, 3, 64, 96)
    for build in (
        lambda: create_smp_model("deeplabv3plus", ENCODER, 5, key="teacher", options=options),
        lambda: build_student("deeplabv3plus", 5, encoder=ENCODER, options=options),
    ):
        torch.manual_seed(3)
        model = build()
        torch.manual_seed(3)
        own = smp.DeepLabV3Plus(ENCODER, encoder_weights=None, classes=5, **options)
        assert model.training
        with torch.inference_mode():
            assert torch.equal(model.eval()(images), own.eval()(images))
    model = build_student("ftunetformer", 5, options=SMALL["ftunetformer"])
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        name: value.shape for name, value in FTUNetFormer(5, **SMALL["ftunetformer"]).state_dict().items()
    }
    assert (
        build_student("unetformer", 5, encoder="resnet18", options={"width": 32}).decoder.pre_conv[0].out_channels == 32
    )


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        (
            "deeplabv3plus",
            {"encoder_output_strid": 8},
            r"student\.options: deeplabv3plus has no option encoder_output_strid; did you mean encoder_output_stride\?",
        ),
        (
            "linknet",
            {"colour": 8},
            r"student\.options: linknet has no option colour; it has encoder_depth, decoder_use_norm$",
        ),
        (
            "deeplabv3plus",
            {"encoder_output_stride": 7},
            r"student: segmentation-models-pytorch cannot build deeplabv3plus with .* and options \{encoder_output_stride: 7\}: ",
        ),
        ("unet", {"decoder_interpolation": "smooth"}, "student.options: unet with .* cannot predict an image: "),
        (
            "fpn",
            {"upsampling": 2},
            "student.options: fpn .* gives logits of 128 x 128 px for an image of 256 x 256 px, .* set upsampling to fit",
        ),
        ("ftunetformer", {"windth": 8}, r"student\.options: ftunetformer has no option windth; did you mean width\?"),
        ("unetformer", {"width": "wide"}, "student: cannot build unetformer with resnet18 and options {width: wide}: "),
    ],
)
def test_options_that_an_architecture_lacks_or_cannot_use_are_refused(architecture, options, message):
    encoder = {"ftunetformer": None, "unetformer": "resnet18"}.get(architecture, ENCODER)
    with pytest.raises(ConfigError, match=message):
        build_student(architecture, 3, encoder=encoder, options=options)
